"""From documents to arrays without padding: a stream to draw windows from, and lanes to score whole documents."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, Integer, UInt32
from numpy import ndarray

from esjax.data.tokens import STOP
from esjax.errors import EsjaxError


def pack_stream(documents: Sequence[Int32[ndarray, "..."]]) -> Int32[ndarray, " length"]:
    """Join documents into one stream: STOP before the first and after each."""
    stop = np.array([STOP], np.int32)
    return np.concatenate([stop, *(part for document in documents for part in (document, stop))])


def check_stream(length: int, window_length: int) -> None:
    """Refuse a stream that no window fits into.

    Raises:
        EsjaxError: It is shorter than a window.
    """
    if length < window_length:
        raise EsjaxError(
            f"the training text holds {length} tokens, fewer than data.window + data.burn_in = {window_length}; "
            "shorten the window or add text"
        )


def draw_windows(
    stream: Integer[Array, " length"], seeds: UInt32[Array, "pairs 2"], sequences: int, window_length: int
) -> Int[Array, "pairs sequences window_length"]:
    """Draw each pair's windows of consecutive tokens, uniformly, from its seed.

    Args:
        stream: Packed documents, at least `window_length` tokens.
        seeds: One seed a pair, of the stream of keys `esjax.replica.streams.WINDOWS`.
        sequences: Windows of a pair.
        window_length: Tokens of a window, the burn-in included.
    """
    places = _places(seeds, sequences, stream.shape[0] - window_length + 1)
    positions = places[:, :, None] + jnp.arange(window_length)[None, None]
    return stream[positions].astype(jnp.int32)  # the stream may be of a smaller type, since every device holds it


def follow_windows(
    stream: Integer[Array, " length"],
    seeds: UInt32[Array, "pairs 2"],
    sequences: int,
    window_length: int,
    step: Int[Array, ""],
) -> Int[Array, "pairs sequences window_length"]:
    """Cut out the windows of a step where each begins at the end of the one before; the text begins anew at its end.

    Args:
        stream: Packed documents, at least `window_length` tokens.
        seeds: One seed a pair, the same in all steps: where the first window begins.
        sequences: Windows of a pair.
        window_length: Tokens of a window.
        step: From 0.
    """
    length = stream.shape[0]
    # step * window_length tokens further, modulo the length; in passes, since that product overflows. A pass of whole
    # windows ends `length % window_length` before the place that it began at.
    passes, further = jnp.divmod(step, length // window_length)
    read = further * window_length - passes % length * (length % window_length)
    places = (_places(seeds, sequences, length) + read % length) % length
    return stream[(places[:, :, None] + jnp.arange(window_length)[None, None]) % length].astype(jnp.int32)


def _places(seeds: UInt32[Array, "pairs 2"], sequences: int, count: int) -> Int[Array, "pairs sequences"]:
    def draw(seed: UInt32[Array, "2"]) -> Int[Array, " sequences"]:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.randint(key, (sequences,), 0, count)

    return jax.vmap(draw)(seeds)


class Lanes(NamedTuple):
    """Whole documents, one after another in each lane, every one ended by STOP.

    Attributes:
        tokens: Ids; STOP where a lane has run out.
        scored: Whether a token belongs to a document.
    """

    tokens: Int32[ndarray, "lanes length"]
    scored: Bool[ndarray, "lanes length"]


def pack_lanes(documents: Sequence[Int32[ndarray, "..."]]) -> Lanes:
    """Deal documents to as many lanes as the longest document leaves full, the longest first to the shortest lane."""
    lengths = [len(document) + 1 for document in documents]
    rows: list[list[ndarray]] = [[] for _ in range(max(1, sum(lengths) // max(lengths)))]
    queue = [(0, lane) for lane in range(len(rows))]
    for document in sorted(documents, key=len, reverse=True):
        length, lane = heapq.heappop(queue)
        rows[lane].append(document)
        heapq.heappush(queue, (length + len(document) + 1, lane))
    shape = (len(rows), max(length for length, _ in queue))
    tokens = np.full(shape, STOP, np.int32)
    scored = np.zeros(shape, bool)
    for lane, row in enumerate(rows):
        packed = pack_stream(row)[1:]
        tokens[lane, : len(packed)] = packed
        scored[lane, : len(packed)] = True
    return Lanes(tokens, scored)
