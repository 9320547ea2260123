"""The text of a run: cut into documents, split into training and held-out ones, and encoded."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Int32, Integer
from numpy import ndarray

from esjax.config.settings import Config, DataConfig, replace
from esjax.data.delivery import Blocks, token_type
from esjax.data.ngram import fit_ngrams, ngram_losses
from esjax.data.packing import pack_stream
from esjax.data.sources import load_documents, locate, split_documents
from esjax.data.vocabulary import Vocabulary, fit_vocabulary
from esjax.errors import EsjaxError
from esjax.paths import given_path

Split = Literal["train", "held_out", "all"]

Tokens = Int32[ndarray, "..."]


class Corpus(NamedTuple):
    """Encoded documents.

    Attributes:
        vocabulary: Maps characters, bytes or subwords to ids.
        train: Documents to train on.
        held_out: Documents to evaluate on.
        train_bytes: UTF-8 bytes of the training documents, plus one for the end of each.
        held_out_bytes: The same for the held-out documents.
        digest: Hash of all documents, in order.
        note: A notice about the source for the user, or "".
    """

    vocabulary: Vocabulary
    train: list[Tokens]
    held_out: list[Tokens]
    train_bytes: int
    held_out_bytes: int
    digest: str
    note: str

    def split(self, name: Split) -> tuple[list[Tokens], int]:
        """Return the documents of a split and their size in bytes.

        Raises:
            EsjaxError: The split holds no document.
        """
        documents, size = {
            "train": (self.train, self.train_bytes),
            "held_out": (self.held_out, self.held_out_bytes),
            "all": (self.train + self.held_out, self.train_bytes + self.held_out_bytes),
        }[name]
        if not documents:
            raise EsjaxError(f"the {name} split holds no document; raise data.held_out, add text or take another split")
        return documents, size

    @property
    def bits_of_a_nat(self) -> float:
        """Bits per byte of the held-out documents if the loss is 1 nat per token; 0 if there is none."""
        tokens = sum(len(document) + 1 for document in self.held_out)
        return tokens / self.held_out_bytes / math.log(2) if tokens else 0.0

    def stream(self) -> Integer[ndarray, " length"]:
        """Pack the training documents, in the smallest type that holds their ids: every device has a copy."""
        return pack_stream(self.train).astype(token_type(self.vocabulary.size))

    def blocks(self, seed: int, block_tokens: int | None) -> Blocks | None:
        """Return the source of the token blocks of a run; None if the run uses none."""
        return Blocks(self.stream(), self.vocabulary.size, seed, block_tokens) if block_tokens else None

    def baselines(self, documents: Sequence[Tokens]) -> dict[str, float]:
        """Score documents with n-gram models of the training split; returns nats per token by name of the model."""
        return ngram_losses(fit_ngrams(self.train, self.vocabulary.size), documents)


def locate_text(config: Config) -> Config:
    """Make the paths of text, tokenizer and prompts in the settings absolute, see `esjax.data.sources.locate`."""
    way, _, file = config.data.vocabulary.partition(":")
    vocabulary = f"{way}:{given_path(file)}" if way == "tokenizer" else config.data.vocabulary
    config = replace(config, data=replace(config.data, text=locate(config.data.text), vocabulary=vocabulary))
    if config.reward.prompts is None:
        return config
    return replace(config, reward=replace(config.reward, prompts=str(given_path(config.reward.prompts))))


def load_corpus(config: DataConfig, vocabulary: Vocabulary | None = None) -> Corpus:
    """Read, split and encode the text that the settings name.

    Args:
        config: Settings of the data.
        vocabulary: Vocabulary of an existing run. None: that of the settings, or made from the training split.

    Raises:
        EsjaxError: The text cannot be read, see `esjax.data.sources`, or no document is left to train on; or the
            tokenizer cannot be read.
    """
    text = load_documents(config.text, config.documents)
    train, held_out = split_documents(text.documents, config.held_out)
    if vocabulary is None:
        if not train:
            raise EsjaxError(f"all {len(held_out)} documents are held out; lower data.held_out or add text")
        vocabulary = fit_vocabulary(config.vocabulary, train, config.vocab_size)
        if config.symbols is not None:
            vocabulary = Vocabulary("char", tuple(config.symbols))
    return Corpus(
        vocabulary,
        [vocabulary.encode(document) for document in train],
        [vocabulary.encode(document) for document in held_out],
        _bytes(train),
        _bytes(held_out),
        hashlib.blake2b("\0".join(text.documents).encode(), digest_size=16).hexdigest(),
        text.note,
    )


def _bytes(documents: Sequence[str]) -> int:
    return sum(len(document.encode()) + 1 for document in documents)
