"""An update as bytes: hosts receive the same bytes that the ledger holds."""

import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple, get_args

import msgspec
import numpy as np
from jaxtyping import Int, Int32, UInt32

from esjax.exchange.gradient_sums import TAIL

SPAN_LIMIT = 2**12
"""Most spans of pairs in one update or message."""

Whole = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
Pair = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Positive = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
Span = tuple[Pair, Positive]
"""First pair and number of pairs; the end is below 2^32."""

Spans = Annotated[list[Span], msgspec.Meta(max_length=SPAN_LIMIT)]

Integers = Literal["|i1", "<i2", "<i4"]
"""Types of a gradient sum's integers as bytes; `pack_sums` takes the smallest that holds all of them."""


class UpdateError(ValueError):
    """Bytes that are not an update."""


class UpdateHeader(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Header of an update.

    Attributes:
        step: Step whose losses the update is made from.
        spans: Pairs that were scored, in the order of their weights.
        scale: Factor of the weighted sum, see `esjax.core.Shaped`.
        applied: False for a void step, which is counted and leaves the parameters as they are.
        loss: Mean of the finite losses, in nats per token if the loss is not custom; None: none is finite.
        void_pairs: Number of pairs of weight 0: with a loss that is not finite, or in a sum that is left out.
        vector_length: Length of the gradient sum; 0: the body holds a weight for each pair.
        dtype: Type of the weights, or of the gradient in the sum.
        halves: Weights of each pair: 2 for split pairs, else 1.
        slope: Shaped value for each unit of difference, see `esjax.core.Shaped`; 0 with a gradient sum.
    """

    step: Whole
    spans: Spans
    scale: float
    applied: bool
    loss: float | None
    void_pairs: Whole
    vector_length: Whole = 0
    dtype: Integers = "|i1"
    halves: Literal[1, 2] = 1
    slope: float = 0.0


class Update(NamedTuple):
    """An update: a header, and the weights of all pairs or the gradient sum; empty if it is not applied."""

    header: UpdateHeader
    weights: Int[np.ndarray, " vector_length *halves"]

    def pairs(self) -> UInt32[np.ndarray, " pairs"]:
        """Return the indices of the pairs, in the order of the weights."""
        return pairs_of(self.header.spans)


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(UpdateHeader)
_LENGTH = struct.Struct("<I")


def pack_update(update: Update) -> bytes:
    """Turn an update into bytes: the header's length (4 bytes), the header, the weights or the packed sum."""
    header, body = update.header, update.weights.tobytes()
    if header.vector_length and header.applied:
        dtype, body = pack_sums(update.weights[None])
        header = msgspec.structs.replace(header, dtype=dtype)
    packed = _ENCODER.encode(header)
    return _LENGTH.pack(len(packed)) + packed + body


def unpack_update(data: bytes) -> Update:
    """Turn bytes into an update.

    Raises:
        UpdateError: They are not an update.
    """
    if len(data) < _LENGTH.size:
        raise UpdateError("an update is cut off")
    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    if end > len(data):
        raise UpdateError("an update is cut off")
    try:
        header = _DECODER.decode(memoryview(data)[_LENGTH.size : end])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise UpdateError(str(error)[:200]) from error
    if header.vector_length and header.applied:
        sums = sums_of(data[end:], 1, header.vector_length, header.dtype)
        if sums is None:
            raise UpdateError(
                f"an update has {len(data) - end} bytes for {header.vector_length} numbers of type {header.dtype}"
            )
        return Update(header, sums[0])
    pairs = pair_count(header.spans) if header.applied else 0
    if len(data) - end != pairs * header.halves:
        raise UpdateError(f"an update has {len(data) - end} weights for {pairs} pairs, {header.halves} each")
    weights = np.frombuffer(data, np.int8, offset=end)
    return Update(header, weights if header.halves == 1 else weights.reshape(-1, 2))


def is_update(data: bytes, step: int) -> bool:
    """Return whether bytes are the update of a step."""
    try:
        return unpack_update(data).header.step == step
    except UpdateError:
        return False


def pair_count(spans: Iterable[Span]) -> int:
    """Return the number of pairs of all spans."""
    return sum(count for _, count in spans)


def pairs_of(spans: Sequence[Span]) -> UInt32[np.ndarray, " pairs"]:
    """Return the indices of the pairs of all spans, one span after another."""
    return np.concatenate(
        [np.zeros(0, np.uint32), *(np.arange(first, first + count, dtype=np.uint32) for first, count in spans)]
    )


def without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
    """Return the spans without the pairs in `taken`."""
    left = list(spans)
    for first, count in taken:
        end = first + count
        left = [
            piece
            for one, size in left
            for piece in ((one, min(one + size, first) - one), (max(one, end), one + size - max(one, end)))
            if piece[1] > 0
        ]
    return left


def pack_sums(sums: Int[np.ndarray, "spans vector_length"]) -> tuple[Integers, bytes]:
    """Turn gradient sums into bytes: all gradients in the smallest type that holds them, then all tails as int32.

    Returns:
        The type of the gradients, and the bytes.
    """
    gradients, tails = sums[:, :-TAIL], sums[:, -TAIL:]
    size = int(np.abs(gradients).max(initial=0))
    dtype: Integers = "|i1" if size < 2**7 else "<i2" if size < 2**15 else "<i4"
    return dtype, gradients.astype(dtype).tobytes() + tails.astype("<i4").tobytes()


def sums_of(body: bytes, spans: int, vector_length: int, dtype: str) -> Int32[np.ndarray, "spans vector_length"] | None:
    """Read what `pack_sums` wrote for `spans` sums; None if type, length and number of bytes do not match."""
    if dtype not in get_args(Integers) or vector_length < TAIL:
        return None
    end = np.dtype(dtype).itemsize * spans * (vector_length - TAIL)
    if len(body) != end + 4 * spans * TAIL:
        return None
    gradients = np.frombuffer(body[:end], dtype).reshape(spans, vector_length - TAIL)
    tails = np.frombuffer(body[end:], "<i4").reshape(spans, TAIL)
    return np.concatenate([gradients, tails], axis=1, dtype=np.int32)
