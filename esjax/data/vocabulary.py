"""From characters, bytes or subwords to token ids and back."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, Integer
from numpy import ndarray

from esjax.data.tokens import STOP, UNK
from esjax.paths import given_path

FIRST = max(UNK, STOP) + 1
"""Id of the first symbol."""

CODE_POINTS = 0x110000
"""Number of code points of Unicode."""

UNKNOWN_MARK = "\N{REPLACEMENT CHARACTER}"
"""Text for UNK."""


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text. The id of `symbols[i]` is `i + FIRST`; `len` is the number of ids.

    Attributes:
        kind: char: symbols are characters. byte: symbols are the 256 bytes, and no text has unknown ones. tokenizer:
            see `esjax.data.tokenizer.TokenizerVocabulary`.
        symbols: Distinct characters, the most frequent first; empty for bytes.
    """

    kind: Literal["char", "byte", "tokenizer"]
    symbols: tuple[str, ...] = ()

    def __len__(self) -> int:
        return FIRST + (256 if self.kind == "byte" else len(self.symbols))

    @property
    def size(self) -> int:
        """Number of ids, UNK and STOP included."""
        return len(self)

    def encode(self, text: str) -> Int32[ndarray, " length"]:
        """Turn text into ids, int32 [length]; characters outside the vocabulary become UNK."""
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + FIRST
        ids = _ids(self.symbols)
        return np.fromiter((ids.get(character, UNK) for character in text), np.int32, len(text))

    def encode_piece(self, text: str) -> tuple[Integer[ndarray, " length"], Int64[ndarray, " documents"]]:
        """Turn documents into ids.

        Args:
            text: Documents, each with NUL behind it.

        Returns:
            The ids, with STOP behind each document, and the number of them for each document, its STOP included.
        """
        if self.kind == "byte":
            codes, table = np.frombuffer(text.encode(), np.uint8), _byte_table()
        else:
            codes, table = code_points(text), _table(self.symbols)
        return table[codes], np.diff(np.flatnonzero(codes == 0), prepend=-1)

    def decode(self, ids: Sequence[int] | ndarray) -> str:
        """Turn ids into text without STOP; UNK and invalid UTF-8 become a replacement character."""
        if self.kind == "byte":
            return b"".join(
                UNKNOWN_MARK.encode() if i == UNK else bytes([i - FIRST]) for i in map(int, ids) if i != STOP
            ).decode(errors="replace")
        return "".join(UNKNOWN_MARK if i == UNK else self.symbols[i - FIRST] for i in map(int, ids) if i != STOP)

    def stored(self) -> dict[str, Any]:
        """Return the vocabulary as a JSON value, for `parse_vocabulary`."""
        return {"kind": self.kind, "symbols": list(self.symbols)}

    def unknown(self, text: str) -> list[str]:
        """List the characters of a text that are not in the vocabulary, each once, in order."""
        if self.kind == "byte":
            return []
        known = set(self.symbols)
        return [character for character in dict.fromkeys(text) if character not in known]


@lru_cache(maxsize=4)
def _ids(symbols: tuple[str, ...]) -> dict[str, int]:
    return {symbol: i + FIRST for i, symbol in enumerate(symbols)}


@lru_cache(maxsize=4)
def _table(symbols: tuple[str, ...]) -> Integer[ndarray, " codes"]:
    """Return the id of each code point, and STOP for NUL."""
    table = np.zeros(CODE_POINTS, np.min_scalar_type(len(symbols) + FIRST))  # UNK
    table[[ord(symbol) for symbol in symbols]] = np.arange(FIRST, FIRST + len(symbols))
    table[0] = STOP
    return table


@lru_cache(maxsize=1)
def _byte_table() -> Integer[ndarray, " bytes"]:
    """Return the id of each byte, and STOP for NUL."""
    table = np.arange(FIRST, FIRST + 256, dtype=np.uint16)
    table[0] = STOP
    return table


def is_symbol(value: object) -> bool:
    """Return whether a value can be a symbol: one character that UTF-8 can encode."""
    return isinstance(value, str) and len(value) == 1 and not 0xD800 <= ord(value) < 0xE000


def parse_vocabulary(stored: Any) -> Vocabulary:
    """Make a vocabulary from a JSON value.

    Raises:
        ValueError: The value is not a vocabulary.
        EsjaxError: It is that of a tokenizer, and the library tokenizers is missing.
    """
    if isinstance(stored, dict) and stored.get("kind") == "tokenizer":
        from esjax.data.tokenizer import parse_tokenizer

        return parse_tokenizer(stored)
    kind, symbols = (stored.get("kind"), stored.get("symbols", ())) if isinstance(stored, dict) else (None, ())
    distinct = isinstance(symbols, list) and all(map(is_symbol, symbols)) and len(set(symbols)) == len(symbols)
    if kind not in ("char", "byte") or not distinct:
        raise ValueError("no vocabulary")
    return Vocabulary(kind, tuple(symbols))


def fit_vocabulary(kind: str, documents: Iterable[str], vocab_size: int | None) -> Vocabulary:
    """Make the vocabulary of a text: for characters, those of the text by falling frequency, then by code point.

    Args:
        kind: The setting data.vocabulary.
        documents: The text to train on; for characters, pieces of it will do.
        vocab_size: For characters: most ids, UNK and STOP included. None: all characters.

    Raises:
        EsjaxError: A tokenizer cannot be read, or the library tokenizers is missing.
    """
    if kind == "byte":
        return Vocabulary("byte")
    if kind != "char":
        from esjax.data.tokenizer import fit_bpe, read_tokenizer

        way, _, value = kind.partition(":")
        return fit_bpe(documents, int(value)) if way == "bpe" else read_tokenizer(given_path(value))
    counts: Counter[str] = Counter()
    for document in documents:
        for code, count in zip(*_tally(code_points(document)), strict=True):
            counts[chr(code)] += count
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return Vocabulary("char", tuple(ranked if vocab_size is None else ranked[: vocab_size - FIRST]))


def _tally(codes: Integer[ndarray, " length"]) -> tuple[list[int], list[int]]:
    """Return the distinct codes and their counts."""
    if len(codes) < 2**16:
        present, counts = np.unique(codes, return_counts=True)
    else:
        counts = np.bincount(codes)
        present = np.flatnonzero(counts)
        counts = counts[present]
    return present.tolist(), counts.tolist()


def code_points(text: str) -> Integer[ndarray, " length"]:
    """Return the code point of each character, in the smaller type if the text is ASCII."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
