"""How a run's text reaches its hosts: in one compressed message, or as blocks of tokens.

It is compressed by bz2. Measured on builtin:shakespeare, 4.9 million tokens of one byte each: bz2 1.48 MB, packed in
0.3 s and unpacked in 0.16 s by each host; lzma 1.55 MB, 3.3 s and 0.08 s; zlib 1.95 MB, 0.3 s and 0.02 s. The text is
sent to every host that joins, so its size matters most.
"""

import bz2
import hashlib
import json
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Integer
from numpy import ndarray

from esjax.data.packing import pack_stream
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary, parse_vocabulary
from esjax.errors import EsjaxError

MAX_BYTES = 2**32
"""Largest text that is sent or accepted, in bytes before compression."""

_HEADER = struct.Struct("<QQQ")
"""Bytes per token, tokens of the stream, bytes of the vocabulary; then come the tokens, and the vocabulary as JSON."""


class PackedText(NamedTuple):
    """A compressed text; `unpack_text(*packed, vocab_size)` reads it.

    Attributes:
        data: Compressed bytes.
        size: Number of bytes before compression.
        digest: BLAKE2b-128 of those bytes, in hexadecimal.
    """

    data: bytes
    size: int
    digest: str


class TextPayload(NamedTuple):
    """The text that a host trains and evaluates on.

    Attributes:
        stream: Packed training documents, in the smallest type that holds the text's ids.
        held_out: Documents to evaluate on.
        vocabulary: The vocabulary, if it was packed.
    """

    stream: Integer[ndarray, " length"]
    held_out: list[Int32[ndarray, "..."]]
    vocabulary: Vocabulary | None = None


def pack_text(
    stream: Integer[ndarray, " length"],
    held_out: Sequence[Int32[ndarray, "..."]],
    vocabulary: Vocabulary | None = None,
) -> PackedText:
    """Compress a text.

    Args:
        stream: Packed training documents, see `esjax.data.packing.pack_stream`, or a block of them.
        held_out: Documents to evaluate on.
        vocabulary: The vocabulary, for hosts that decode what members write.

    Raises:
        EsjaxError: The text is larger than `MAX_BYTES`.
    """
    stored = b"" if vocabulary is None else json.dumps(vocabulary.stored(), ensure_ascii=False).encode()
    parts = stream, pack_stream(held_out)
    smallest = np.min_scalar_type(max(part.max(initial=0) for part in parts)).newbyteorder("<")
    size = _HEADER.size + sum(map(len, parts)) * smallest.itemsize + len(stored)
    if size > MAX_BYTES:
        raise EsjaxError(
            f"the text takes {size:,} bytes, and {MAX_BYTES:,} at most are sent to hosts; set data.block_tokens"
        )
    tokens = [part.astype(smallest, copy=False).tobytes() for part in parts]
    content = b"".join((_HEADER.pack(smallest.itemsize, len(stream), len(stored)), *tokens, stored))
    return PackedText(bz2.compress(content), size, hash_bytes(content))


def unpack_text(data: bytes, size: int, digest: str, vocab_size: int) -> TextPayload:
    """Check and read a text.

    Args:
        data: Any bytes.
        size: Expected number of bytes, see `PackedText`; no more are unpacked.
        digest: Expected hash.
        vocab_size: Number of token ids.

    Raises:
        EsjaxError: The bytes are not a text, or size, hash or token ids are not as expected; or a tokenizer needs a
            library that is missing.
    """
    if not _HEADER.size <= size <= MAX_BYTES:
        raise EsjaxError(f"a text of {size:,} bytes is not taken; {MAX_BYTES:,} are the most")
    decompressor = bz2.BZ2Decompressor()
    try:
        content = decompressor.decompress(data, size + 1)
    except OSError as error:
        raise EsjaxError(f"the text cannot be unpacked: {error}; fetch it again") from error
    if len(content) != size or not decompressor.eof or decompressor.unused_data:
        raise EsjaxError(f"the text does not unpack to the {size:,} bytes that it should have; fetch it again")
    found = hash_bytes(content)
    if found != digest:
        raise EsjaxError(f"the text has the hash {found}, and that of the run has {digest}; fetch it again")
    itemsize, length, stored = _HEADER.unpack_from(content)
    rest_size = size - _HEADER.size - stored
    if itemsize not in (1, 2, 4) or rest_size < 0 or rest_size % itemsize:
        raise EsjaxError("the text is packed in no way that this version of esjax knows; use the run's version")
    tokens = np.frombuffer(content, f"<u{itemsize}", rest_size // itemsize, _HEADER.size)
    stream, rest = tokens[:length], tokens[length:]
    stops = np.flatnonzero(rest == STOP)
    if not stops.size or rest[0] != STOP or rest[-1] != STOP:
        raise EsjaxError("the text has no held-out documents where they belong; use the run's version of esjax")
    if tokens.max() >= vocab_size:
        raise EsjaxError(
            f"the text holds the token {tokens.max()}, and the ids end before {vocab_size}; fetch it again"
        )
    held_out = [rest[before + 1 : end].astype(np.int32) for before, end in pairwise(stops)]
    return TextPayload(stream, held_out, _read_vocabulary(content[size - stored :]) if stored else None)


def _read_vocabulary(stored: bytes) -> Vocabulary:
    try:
        return parse_vocabulary(json.loads(stored))
    except (ValueError, RecursionError) as error:
        raise EsjaxError("the text has a vocabulary that cannot be read; use the run's version of esjax") from error


def token_block(
    stream: Integer[ndarray, " length"], seed: int, block: int, block_tokens: int
) -> Integer[ndarray, " block_tokens"]:
    """Draw a block of consecutive tokens, uniformly; the same on every machine and with every version of numpy.

    Args:
        stream: Packed documents; returned whole if it is shorter than a block.
        seed: Seed of the run.
        block: Number of the block, from 0.
        block_tokens: Tokens of a block.
    """
    name = struct.pack("<QQ", seed, block)
    number = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    start = number % max(1, len(stream) - block_tokens + 1)  # of a 128-bit number, so practically uniform
    return stream[start : start + block_tokens]


def hash_bytes(content: bytes) -> str:
    """Return the hash by which a text, a state or another large body is checked: BLAKE2b-128, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Blocks:
    """The blocks of a run as bytes. It keeps the newest few, since all hosts ask for the same ones."""

    def __init__(self, stream: Integer[ndarray, " length"], vocab_size: int, seed: int, block_tokens: int) -> None:
        """Prepare to draw blocks.

        Args:
            stream: Packed training documents.
            vocab_size: Number of token ids.
            seed: Seed of the run.
            block_tokens: Tokens of a block.
        """
        self._stream = stream.astype(token_type(vocab_size), copy=False)
        self._seed, self._block_tokens = seed, block_tokens
        self._made: dict[int, bytes] = {}

    def __call__(self, block: int) -> bytes:
        """Return a block as bytes, see `token_block`; `unpack_block` reads it."""
        if block not in self._made:
            near = {number: data for number, data in self._made.items() if abs(number - block) <= 1}
            tokens = token_block(self._stream, self._seed, block, self._block_tokens)
            self._made = {**near, block: tokens.tobytes()}
        return self._made[block]

    def tokens(self, block: int) -> Integer[ndarray, " block_tokens"]:
        """Return the tokens of a block."""
        return np.frombuffer(self(block), self._stream.dtype)


def token_type(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every token id of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1).newbyteorder("<")


def unpack_block(data: bytes, vocab_size: int) -> Integer[ndarray, " block_tokens"]:
    """Read a block.

    Raises:
        EsjaxError: The bytes are not tokens of this vocabulary.
    """
    kind = token_type(vocab_size)
    if not data or len(data) % kind.itemsize:
        raise EsjaxError(f"{len(data)} bytes are no block of tokens of {kind.itemsize} bytes; fetch it again")
    tokens = np.frombuffer(data, kind)
    if tokens.max() >= vocab_size:
        raise EsjaxError(f"a block holds the token {tokens.max()}, and the ids end before {vocab_size}; fetch it again")
    return tokens
