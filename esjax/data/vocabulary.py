"""From characters, bytes or subwords to token ids and back."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from esjax.data.tokens import STOP, UNK
from esjax.paths import given_path

FIRST = max(UNK, STOP) + 1
"""Id of the first symbol."""

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


def fit_vocabulary(kind: str, documents: Sequence[str], vocab_size: int | None) -> Vocabulary:
    """Make the vocabulary of a text: for characters, those of the text by falling frequency, then by code point.

    Args:
        kind: The setting data.vocabulary.
        documents: The text to train on.
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
        counts.update(document)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    return Vocabulary("char", tuple(ranked if vocab_size is None else ranked[: vocab_size - FIRST]))
