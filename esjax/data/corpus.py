"""The text of a run: cut into documents, split into training and held-out ones, and encoded."""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtyping import Int32, Integer
from numpy import ndarray

from esjax import __version__
from esjax.config.settings import Config, DataConfig, replace
from esjax.data.delivery import Blocks
from esjax.data.documents import Documents, TextStore, encode_documents
from esjax.data.kept_arrays import SWITCH, keep_arrays, kept_path, read_arrays
from esjax.data.ngram import fit_ngrams, ngram_losses
from esjax.data.sources import Text, locate, open_text, split_documents
from esjax.data.text_files import FileRecord
from esjax.data.tokens import UNK
from esjax.data.vocabulary import Vocabulary, fit_vocabulary, parse_vocabulary
from esjax.errors import EsjaxError
from esjax.paths import given_path

Split = Literal["train", "held_out", "all"]

Tokens = Int32[ndarray, "..."]

MOST_MEASURED = 2**20
"""Most held-out tokens that are measured during training, which takes about as long as scoring a population."""

MOST_COUNTED = 2**23
"""Most tokens that n-gram models count."""

LARGE = 50_000_000
"""Bytes of files from which on the tokens of a text are kept."""

KEPT_FORMAT = 1
"""Raise it when the same text becomes other tokens, or what is kept of them changes."""

SETTLED = 2.0
"""Seconds since the last change of a file, at least, for its tokens to be kept."""


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
        """Bits per byte of the measured documents if the loss is 1 nat per token; 0 if there is none.

        If some are measured and have UNK, whose bytes are not known, it is that of all held-out documents.
        """
        documents, tokens, size = self.measured, self.held_out.tokens, self.held_out_bytes
        if documents is not self.held_out and not any((document == UNK).any() for document in documents):
            tokens = size = sum(len(document) + 1 for document in documents)
            if self.vocabulary.kind != "byte":  # else a document may end within a character
                size = sum(len(self.vocabulary.decode(document).encode()) + 1 for document in documents)
        return tokens / size / math.log(2) if tokens else 0.0

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

    The tokens of a text of `LARGE` bytes or more are kept, see `esjax.data.kept_arrays`, and read from there next time
    if the files of the text are still the same.

    Raises:
        EsjaxError: The text cannot be read, see `esjax.data.sources`, or no document is left to train on; or the
            tokenizer cannot be read.
    """
    text, now = open_text(config.text, config.documents), time.time()
    key = _key(text.paths, config)
    # A run's vocabulary is mostly that of its settings, and else another one.
    keys = [] if key is None else [[key, None]] if vocabulary is None else [[key, None], [key, vocabulary.stored()]]
    for one in keys:
        if (found := _read_kept(one, vocabulary)) is not None:
            return found
    corpus = _read_corpus(text, config, vocabulary)
    # A file can change within the resolution of its time of change and show none.
    if keys and key == _key(text.paths, config) and _last_change(key) < now - SETTLED:
        _keep(keys[-1], corpus)
    return corpus


def _read_corpus(text: Text, config: DataConfig, vocabulary: Vocabulary | None) -> Corpus:
    digest = hashlib.blake2b(digest_size=16)
    train, held_out = TextStore(), TextStore()
    between = b""
    for batch in text.batches():
        encoded = "\0".join(batch).encode()
        digest.update(between + encoded)
        between = b"\0"
        for store, documents in zip(
            (train, held_out), split_documents(encoded.split(b"\0"), config.held_out), strict=True
        ):
            store.add(documents)
    if not train and not held_out:
        raise EsjaxError(f"the text {config.text!r} is empty; name one that holds at least one document")
    if vocabulary is None:
        if not train:
            count = sum(piece.count(0) for piece in held_out.pieces())
            raise EsjaxError(f"all {count} documents are held out; lower data.held_out or add text")
        if config.symbols is None:
            vocabulary = fit_vocabulary(config.vocabulary, train.pieces(), config.vocab_size)
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


def _key(paths: Sequence[Path], config: DataConfig) -> Any:
    """Return what the tokens of files depend on; None if the files are not large.

    Whatever changes a file sets its time of change, which no program can set to another one.
    """
    try:
        files = [(str(path), path.stat()) for path in paths]
        if sum(about.st_size for _, about in files) < LARGE:
            return None
        way, _, tokenizer = config.vocabulary.partition(":")
        if way == "tokenizer":
            files.append((tokenizer, os.stat(given_path(tokenizer))))
    except OSError:
        return None
    names = "text", "documents", "held_out", "vocabulary", "vocab_size", "symbols"
    states = [(name, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns) for name, about in files]
    return [__version__, KEPT_FORMAT, [getattr(config, name) for name in names], states]


def _last_change(key: Any) -> float:
    """Return when the last of the files was changed, in seconds since 1970."""
    newest: int = max(time for *_, modified, changed in key[-1] for time in (modified, changed))
    return newest / 1e9


def _keep(key: Any, corpus: Corpus) -> None:
    path = kept_path(key)
    if path is None:
        return
    arrays = {
        f"{name}_{part}": array
        for name, documents in (("train", corpus.train), ("held_out", corpus.held_out))
        for part, array in (("stream", documents.stream), ("ends", documents.ends))
    }
    rest = corpus._asdict() | {"vocabulary": corpus.vocabulary.stored(), "key": json.dumps(key)}
    keep_arrays(path, arrays, {name: value for name, value in rest.items() if name not in ("train", "held_out")})


def _read_kept(key: Any, vocabulary: Vocabulary | None) -> Corpus | None:
    """Read a corpus; None if it is not there, or has another vocabulary than the one given."""
    path = kept_path(key)
    kept = None if path is None else read_arrays(path)
    if kept is None or kept.about.pop("key") != json.dumps(key):
        return None
    about = kept.about | {
        "vocabulary": parse_vocabulary(kept.about["vocabulary"]),
        "files": tuple(FileRecord(*file) for file in kept.about["files"]),
    }
    if vocabulary not in (None, about["vocabulary"]):
        return None
    used = f"the text is not read again, its tokens are in {path}; {SWITCH}=off reads it"
    about["note"] = "; ".join(filter(None, (about["note"], used)))
    train, held_out = (
        Documents(kept.arrays[f"{name}_stream"], kept.arrays[f"{name}_ends"]) for name in ("train", "held_out")
    )
    return Corpus(train=train, held_out=held_out, **about)
