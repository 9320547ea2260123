"""From documents to arrays: a stream to draw windows from, and lanes to score whole documents in parallel."""

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


MOST_TOKENS = 2**31 - 1
"""Most tokens of a stream on a device, where places are int32."""


def check_stream(length: int, window_length: int) -> None:
    """Check that a window fits into a stream, and the stream on a device; both lengths are in tokens.

    Raises:
        EsjaxError: The stream is shorter than a window, or longer than `MOST_TOKENS`.
    """
    if length > MOST_TOKENS:
        raise EsjaxError(
            f"the training text holds {length:,} tokens, and devices take {MOST_TOKENS:,} at a time; set "
            "data.block_tokens"
        )
    if length < window_length:
        raise EsjaxError(
            f"the training text holds {length} tokens, fewer than a window of {window_length} (data.window, and "
            "data.burn_in before it); shorten the window or add text"
        )


def draw_windows(
    stream: Integer[Array, " length"], seeds: UInt32[Array, "pairs 2"], sequences: int, window_length: int
) -> Int[Array, "pairs sequences window_length"]:
    """Draw each pair's windows of consecutive tokens, uniformly, from its seed.

    Args:
        stream: Packed documents, at least `window_length` tokens.
        seeds: One seed per pair, from the stream `esjax.replica.streams.WINDOWS`.
        sequences: Windows of a pair.
        window_length: Tokens of a window, the burn-in included.
    """
    places = draw_places(seeds, sequences, stream.shape[0] - window_length + 1)
    positions = places[:, :, None] + jnp.arange(window_length, dtype=jnp.int32)[None, None]
    return stream[positions].astype(jnp.int32)  # streams may have a smaller type


def follow_windows(
    stream: Integer[Array, " length"],
    seeds: UInt32[Array, "pairs 2"],
    sequences: int,
    window_length: int,
    step: Int[Array, ""],
) -> Int[Array, "pairs sequences window_length"]:
    """Return the windows of a step if each begins where that of the step before ended; the text repeats at its end.

    Args:
        stream: Packed documents, at least `window_length` tokens.
        seeds: One seed per pair, the same in all steps; it determines where the first window begins.
        sequences: Windows of a pair.
        window_length: Tokens of a window.
        step: Number of the step, from 0.
    """
    length = stream.shape[0]
    # The offset is step * window_length modulo the length. That product overflows, so count passes over the text: a
    # pass of whole windows ends `length % window_length` tokens before its start.
    passes, further = jnp.divmod(step, length // window_length)
    read = further * window_length - passes % length * (length % window_length)
    places = (draw_places(seeds, sequences, length) + read % length) % length
    return stream[(places[:, :, None] + jnp.arange(window_length, dtype=jnp.int32)[None, None]) % length].astype(
        jnp.int32
    )


def draw_places(seeds: UInt32[Array, "pairs 2"], sequences: int, count: int) -> Int[Array, "pairs sequences"]:
    """Draw each pair's places, from 0 to `count` - 1, uniformly, from its seed: of windows, or of prompts."""

    def draw(seed: UInt32[Array, "2"]) -> Int[Array, " sequences"]:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        with jax.threefry_partitionable(True):  # the bits depend on this flag, and on the type
            return jax.random.randint(key, (sequences,), 0, count, jnp.int32)

    return jax.vmap(draw)(seeds)


class Lanes(NamedTuple):
    """Whole documents, one after another in each lane, each followed by STOP.

    Attributes:
        tokens: Ids; STOP after the end of a lane.
        scored: Whether a token belongs to a document.
    """

    tokens: Int32[ndarray, "lanes length"]
    scored: Bool[ndarray, "lanes length"]


def pack_lanes(documents: Sequence[Int32[ndarray, "..."]]) -> Lanes:
    """Deal documents to lanes: the next longest to the shortest lane.

    The number of lanes is the total length over the longest document, so lanes end at about the same length.
    """
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
