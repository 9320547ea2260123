"""The text of a run: cut into documents, split into training and held-out ones, and encoded."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxtyping import Int32, Integer
from numpy import ndarray

from esjax.config.settings import Config, DataConfig, replace
from esjax.data.delivery import Blocks
from esjax.data.documents import Documents, TextStore, encode_documents
from esjax.data.ngram import fit_ngrams, ngram_losses
from esjax.data.sources import locate, open_text, split_documents
from esjax.data.text_files import FileRecord
from esjax.data.vocabulary import Vocabulary, fit_vocabulary
from esjax.errors import EsjaxError
from esjax.paths import given_path

Split = Literal["train", "held_out", "all"]

Tokens = Int32[ndarray, "..."]

MOST_MEASURED = 2**20
"""Most held-out tokens that are measured during training, which takes about as long as scoring a population."""

MOST_COUNTED = 2**23
"""Most tokens that n-gram models count."""


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
        files: The files that the text was read from, with sizes and hashes.
    """

    vocabulary: Vocabulary
    train: Documents
    held_out: Documents
    train_bytes: int
    held_out_bytes: int
    digest: str
    note: str
    files: tuple[FileRecord, ...]

    @property
    def measured(self) -> Sequence[Tokens]:
        """The held-out documents that are measured during training: all, or some of them if there are very many."""
        return self.held_out.spread(MOST_MEASURED)

    def split(self, name: Split) -> tuple[Sequence[Tokens], int]:
        """Return the documents of a split and their size in bytes.

        Raises:
            EsjaxError: The split holds no document.
        """
        documents: Sequence[Tokens]
        if name == "all":
            documents, size = [*self.train, *self.held_out], self.train_bytes + self.held_out_bytes
        elif name == "train":
            documents, size = self.train, self.train_bytes
        else:
            documents, size = self.held_out, self.held_out_bytes
        if not documents:
            raise EsjaxError(f"the {name} split holds no document; raise data.held_out, add text or take another split")
        return documents, size

    @property
    def bits_of_a_nat(self) -> float:
        """Bits per byte of the held-out documents if the loss is 1 nat per token; 0 if there is none."""
        tokens = self.held_out.tokens
        return tokens / self.held_out_bytes / math.log(2) if tokens else 0.0

    def stream(self) -> Integer[ndarray, " length"]:
        """Return the training documents in one array, see `Documents.stream`."""
        return self.train.stream

    def blocks(self, seed: int, block_tokens: int | None) -> Blocks | None:
        """Return the source of the token blocks of a run; None if the run uses none."""
        return Blocks(self.stream(), self.vocabulary.size, seed, block_tokens) if block_tokens else None

    def baselines(self, documents: Sequence[Tokens]) -> dict[str, float]:
        """Score documents with n-gram models of the training split; returns nats per token by name of the model.

        Of a very long text, the models count `MOST_COUNTED` tokens.
        """
        return ngram_losses(fit_ngrams(self.train.spread(MOST_COUNTED), self.vocabulary.size), documents)


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
    text, digest = open_text(config.text, config.documents), hashlib.blake2b(digest_size=16)
    train, held_out = TextStore(), TextStore()
    between = ""
    for batch in text.batches():
        digest.update((between + "\0".join(batch)).encode())
        between = "\0"
        for store, documents in zip((train, held_out), split_documents(batch, config.held_out), strict=True):
            store.add(documents)
    if not train and not held_out:
        raise EsjaxError(f"the text {config.text!r} is empty; name one that holds at least one document")
    if vocabulary is None:
        if not train:
            raise EsjaxError(f"all {sum(1 for _ in held_out)} documents are held out; lower data.held_out or add text")
        if config.symbols is None:
            pieces = (piece.replace("\0", "") for piece in train.pieces())  # faster to count than documents
            texts = pieces if config.vocabulary == "char" else train
            vocabulary = fit_vocabulary(config.vocabulary, texts, config.vocab_size)
        else:
            vocabulary = Vocabulary("char", tuple(config.symbols))
    return Corpus(
        vocabulary,
        encode_documents(train, vocabulary),
        encode_documents(held_out, vocabulary),
        len(train),
        len(held_out),
        digest.hexdigest(),
        text.note,
        tuple(text.files),
    )
