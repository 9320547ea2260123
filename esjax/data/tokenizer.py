"""Subword tokenizers: any tokenizer.json of the library tokenizers, or byte-pair encoding fitted to the text of a run.

Byte-pair encoding joins the most frequent pair of neighbouring tokens, again and again (Sennrich et al. 2016, section
3.2), here from the 256 bytes on, so that no text has unknown tokens.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Int32, Int64, Integer
from numpy import ndarray

from esjax.data.text_files import read_text
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import FIRST, UNKNOWN_MARK, Vocabulary, documents_of
from esjax.errors import EsjaxError
from esjax.extras import needing


@dataclass(frozen=True)
class TokenizerVocabulary(Vocabulary):
    """The tokens of a tokenizer. UNK and STOP come first, and then all other ids in the tokenizer's order.

    Attributes:
        json: The tokenizer, as in tokenizer.json.
        unknown_id: The tokenizer's id that is UNK here. None: UNK is a new id.
        stop_id: The tokenizer's id that is STOP here. None: STOP is a new id.
    """

    kind: Literal["char", "byte", "tokenizer"] = "tokenizer"
    json: str = ""
    unknown_id: int | None = None
    stop_id: int | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def order(self) -> Int[ndarray, " ids"]:
        """The tokenizer's id of each id, or -1 for a new one."""
        return _order(self.json, self.unknown_id, self.stop_id)

    def encode(self, text: str) -> Int32[ndarray, " length"]:
        """Turn text into ids, int32 [length]. Names of special tokens, such as <|im_start|>, become these tokens."""
        ids = _tokenizer(self.json).encode(text).ids
        return self._ids(ids[: len(ids) - _closing(self.json)])

    def encode_inner(self, text: str) -> Int32[ndarray, " length"]:
        """Turn text that stands within another into ids, without the tokens that begin or close a text."""
        return self._ids(_tokenizer(self.json).encode(text, add_special_tokens=False).ids)

    def encode_piece(self, piece: bytes) -> tuple[Integer[ndarray, " length"], Int64[ndarray, " documents"]]:
        """Turn documents, each with NUL behind it, into ids, see `Vocabulary.encode_piece`."""
        closing = _closing(self.json)
        every = [one.ids for one in _tokenizer(self.json).encode_batch(documents_of(piece))]
        found = [self._ids(ids[: len(ids) - closing]) for ids in every]
        stop = np.array([STOP], np.int32)
        return np.concatenate([part for ids in found for part in (ids, stop)]), np.array(
            [len(ids) + 1 for ids in found]
        )

    def _ids(self, found: Sequence[int]) -> Int32[ndarray, " length"]:
        return _places(self.json, self.unknown_id, self.stop_id)[np.asarray(found, np.int64)]

    def decode(self, ids: Sequence[int] | ndarray) -> str:
        """Turn ids into text without STOP; UNK and invalid UTF-8 become a replacement character."""
        runs: list[list[int]] = [[]]
        for i in map(int, ids):
            if i == UNK:
                runs.append([])
            elif i != STOP:
                runs[-1].append(int(self.order[i]))
        decode = _tokenizer(self.json).decode
        return UNKNOWN_MARK.join(decode(run, skip_special_tokens=False) for run in runs)

    def decode_after(self, prompt: str, ids: Sequence[int] | ndarray) -> str:
        """Turn ids into the text that they continue a prompt with: some tokenizers drop the first space of a text."""
        before = self.encode(prompt)
        known, whole = self.decode(before), self.decode(np.concatenate([before, np.asarray(ids, before.dtype)]))
        return whole[len(known) :] if whole.startswith(known) else self.decode(ids)

    def stored(self) -> dict[str, Any]:
        """Return the vocabulary as a JSON value, for `parse_vocabulary`."""
        named = {"unknown_id": self.unknown_id, "stop_id": self.stop_id}
        return {"kind": self.kind, **named, "tokenizer": json.loads(self.json)}

    def unknown(self, text: str) -> list[str]:
        """List the parts of a text that become UNK, each once, in order."""
        found = _tokenizer(self.json).encode(text)
        parts = zip(self._ids(found.ids), found.offsets, strict=True)
        return list(dict.fromkeys(text[start:end] for i, (start, end) in parts if i == UNK))


def make_vocabulary(
    tokenizer: str, source: str, *, unknown_id: int | None = None, stop_id: int | None = None
) -> TokenizerVocabulary:
    """Make a vocabulary of a tokenizer.

    Args:
        tokenizer: Content of a tokenizer.json.
        source: Where it comes from, for messages.
        unknown_id: See `TokenizerVocabulary`.
        stop_id: See `TokenizerVocabulary`.

    Raises:
        EsjaxError: It is no tokenizer, it lacks one of the ids, or the library is missing.
    """
    try:
        text = json.dumps(json.loads(tokenizer), ensure_ascii=False)
        known = _size(text)
    except EsjaxError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise EsjaxError(f"cannot read {source} as a tokenizer.json: {error}") from error
    for i in (unknown_id, stop_id):
        if i is not None and not 0 <= i < known:
            raise EsjaxError(f"the tokenizer of {source} has ids from 0 to {known - 1}, and none is {i}")
    return TokenizerVocabulary(json=text, unknown_id=unknown_id, stop_id=stop_id)


def parse_tokenizer(stored: dict[str, Any]) -> TokenizerVocabulary:
    """Make a vocabulary from what `TokenizerVocabulary.stored` returned.

    Raises:
        ValueError: It is something else.
        EsjaxError: The library is missing.
    """
    named: Any = {name: stored.get(name) for name in ("unknown_id", "stop_id")}
    if not all(i is None or type(i) is int for i in named.values()) or not isinstance(stored.get("tokenizer"), dict):
        raise ValueError("no tokenizer")
    library()
    try:
        return make_vocabulary(json.dumps(stored["tokenizer"], ensure_ascii=False), "the vocabulary", **named)
    except EsjaxError as error:
        raise ValueError(str(error)) from error


def read_tokenizer(path: Path) -> TokenizerVocabulary:
    """Read a tokenizer.json for a model that is trained from scratch: UNK and STOP are new ids.

    Raises:
        EsjaxError: The file cannot be read, or the library is missing.
    """
    return make_vocabulary(read_text(path), repr(str(path)))


def fit_bpe(documents: Iterable[str], size: int) -> TokenizerVocabulary:
    """Fit byte-pair encoding to the text to train on.

    Args:
        documents: The text.
        size: Most ids, UNK and STOP included, at least 258. There are fewer if the text has no more pairs to join.

    Raises:
        EsjaxError: The library is missing.
    """
    tokenizers = library()
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - FIRST,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return make_vocabulary(bpe.to_str(), "the text")


def library() -> ModuleType:
    """Return the library tokenizers.

    Raises:
        EsjaxError: It is missing.
    """
    with needing("a tokenizer", "tokenizers"):
        import tokenizers
    return tokenizers


@lru_cache(maxsize=4)
def _closing(tokenizer: str) -> int:
    """Return how many tokens the tokenizer puts behind every text. They are left out: here STOP ends a document."""
    is_added = _tokenizer(tokenizer).encode("a").special_tokens_mask
    return len(list(takewhile(bool, reversed(is_added))))


@lru_cache(maxsize=4)
def _tokenizer(text: str) -> Any:
    tokenizer = library().Tokenizer.from_str(text)
    tokenizer.no_truncation()  # a file may store both, for batches of one length
    tokenizer.no_padding()
    return tokenizer


@lru_cache(maxsize=4)
def _size(text: str) -> int:
    return 1 + max(_tokenizer(text).get_vocab(with_added_tokens=True).values(), default=-1)


@lru_cache(maxsize=4)
def _order(text: str, unknown_id: int | None, stop_id: int | None) -> ndarray:
    others = np.setdiff1d(np.arange(_size(text)), [i for i in (unknown_id, stop_id) if i is not None])
    first = [-1 if i is None else i for i in (unknown_id, stop_id)]
    return np.concatenate([np.array(first), others])


@lru_cache(maxsize=4)
def _places(text: str, unknown_id: int | None, stop_id: int | None) -> ndarray:
    """Return the id of each id of the tokenizer."""
    order, places = _order(text, unknown_id, stop_id), np.zeros(_size(text), np.int32)
    places[order[order >= 0]] = np.flatnonzero(order >= 0)
    return places
