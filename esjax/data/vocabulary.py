"""From characters, bytes or subwords to token ids and back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
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
        return self._map(text.encode(errors=_ANY))[0].astype(np.int32)

    def encode_inner(self, text: str) -> Int32[ndarray, " length"]:
        """Turn text that stands within another into ids."""
        return self.encode(text)

    def encode_piece(self, piece: bytes) -> tuple[Integer[ndarray, " length"], Int64[ndarray, " documents"]]:
        """Turn documents into ids.

        Args:
            piece: Documents in UTF-8, each with NUL behind it.

        Returns:
            The ids, with STOP behind each document, and the number of them for each document, its STOP included.
        """
        ids, ends = self._map(piece)
        ids[ends] = STOP
        return ids, np.diff(ends, prepend=-1)

    def _map(self, text: bytes) -> tuple[Integer[ndarray, " length"], Int64[ndarray, " nuls"]]:
        """Return the id of each byte, or of each character of UTF-8, and the places of NUL."""
        if self.kind == "byte":
            found = np.frombuffer(text, np.uint8)
            ids = found.astype(np.uint16) + np.uint16(FIRST)
        else:
            found, table = _first_bytes(text), _table(self.symbols)
            ids = table[found]
            if not text.isascii():
                ids[found > _LAST_ASCII] = table[_other_code_points(text)]
        return ids, np.flatnonzero(found == 0)

    def decode(self, ids: Sequence[int] | ndarray) -> str:
        """Turn ids into text without STOP; UNK and invalid UTF-8 become a replacement character."""
        if self.kind == "byte":
            return b"".join(
                UNKNOWN_MARK.encode() if i == UNK else bytes([i - FIRST]) for i in map(int, ids) if i != STOP
            ).decode(errors="replace")
        return "".join(UNKNOWN_MARK if i == UNK else self.symbols[i - FIRST] for i in map(int, ids) if i != STOP)

    def decode_after(self, prompt: str, ids: Sequence[int] | ndarray) -> str:
        """Turn ids into the text that they continue a prompt with."""
        return self.decode(ids)

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
def _table(symbols: tuple[str, ...]) -> Integer[ndarray, " codes"]:
    """Return the id of each code point."""
    table = np.zeros(CODE_POINTS, np.min_scalar_type(len(symbols) + FIRST))  # UNK
    table[[ord(symbol) for symbol in symbols]] = np.arange(FIRST, FIRST + len(symbols))
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


def fit_vocabulary(kind: str, pieces: Iterable[bytes], vocab_size: int | None) -> Vocabulary:
    """Make the vocabulary of a text: for characters, those of the text by falling frequency, then by code point.

    Args:
        kind: The setting data.vocabulary.
        pieces: The text to train on: documents in UTF-8, with NUL between them.
        vocab_size: For characters: most ids, UNK and STOP included. None: all characters.

    Raises:
        EsjaxError: A tokenizer cannot be read, or the library tokenizers is missing.
    """
    if kind == "byte":
        return Vocabulary("byte")
    if kind != "char":
        from esjax.data.tokenizer import fit_bpe, read_tokenizer

        way, _, value = kind.partition(":")
        return (
            fit_bpe(chain.from_iterable(map(documents_of, pieces)), int(value))
            if way == "bpe"
            else read_tokenizer(given_path(value))
        )
    counts = np.zeros(CODE_POINTS, np.int64)
    for piece in pieces:
        counts[: _LAST_ASCII + 1] += np.bincount(_first_bytes(piece), minlength=256)[: _LAST_ASCII + 1]
        if not piece.isascii():
            others = np.bincount(_other_code_points(piece))
            counts[: len(others)] += others
    counts[0] = 0
    present = np.flatnonzero(counts)
    ranked = present[np.argsort(-counts[present], kind="stable")].tolist()
    return Vocabulary("char", tuple(map(chr, ranked if vocab_size is None else ranked[: vocab_size - FIRST])))


def documents_of(piece: bytes) -> list[str]:
    """Return the documents of a piece, see `esjax.data.documents.TextStore.pieces`."""
    return piece.removesuffix(b"\0").decode().split("\0")


_LAST_ASCII = 0x7F

_ASCII = bytes(range(_LAST_ASCII + 1))

_FURTHER = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that begin no character."""

_ANY: Any = "surrogatepass"
"""How errors in UTF-8 are handled: half a surrogate pair counts as a character, one that texts do not hold."""


def _first_bytes(text: bytes) -> Integer[ndarray, " length"]:
    """Return the first byte of each character of UTF-8: of an ASCII character, its code point."""
    return np.frombuffer(text if text.isascii() else text.translate(None, _FURTHER), np.uint8)


def _other_code_points(text: bytes) -> Integer[ndarray, " others"]:
    """Return the code points of the characters of UTF-8 that are not ASCII, in order."""
    others = text.translate(None, _ASCII).decode(errors=_ANY)
    return np.frombuffer(others.encode("utf-32-le", _ANY), np.uint32)
