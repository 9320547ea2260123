"""Random signs: each bit of a threefry word (Salmon et al. 2011, section 4) is a +1 or a -1."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from esjax.core.seeds import fold

BITS = 32
"""Bits of a word."""


def signs(words: UInt32[Array, "*words"]) -> Float[Array, "*words 32"]:
    """Turn the bits of each word into ±1, the highest bit first; a set bit is a -1."""
    return of_highest_bit(words[..., None] << jnp.arange(BITS, dtype=jnp.uint32).reshape(*(1,) * words.ndim, BITS))


def of_highest_bit(words: UInt32[Array, "*words"]) -> Float[Array, "*words"]:
    """Turn the highest bit of each word into ±1: it becomes the sign bit of a 1.0, with no conversion."""
    highest = words & jnp.uint32(1 << (BITS - 1))
    return jax.lax.bitcast_convert_type(highest | jnp.uint32(0x3F800000), jnp.float32)


def draw_words(seeds: UInt32[Array, "*pairs 2"], bits: int) -> UInt32[Array, " words *pairs"]:
    """Draw words with at least `bits` random bits from each seed."""
    blocks = jnp.arange(-(-bits // (2 * BITS)), dtype=jnp.uint32)
    drawn = fold(seeds[None], blocks.reshape(-1, *(1,) * (seeds.ndim - 1)))
    return jnp.concatenate([drawn[..., 0], drawn[..., 1]])


def draw(
    kind: Literal["rademacher", "gaussian"], seeds: UInt32[Array, "*pairs 2"], count: int
) -> Float[Array, " count *pairs"]:
    """Draw `count` independent numbers of mean 0 and variance 1 from each seed.

    Args:
        kind: rademacher: ±1, the same bits on every platform. gaussian: standard normals, whose last bits differ
            between kinds of processors.
        seeds: uint32 [*pairs, 2].
        count: Numbers for each seed.

    Returns:
        float32 [count, *pairs]. Pairs come last, since unpacking and sums over pairs run along them.
    """
    if kind == "gaussian":
        normal = jnp.vectorize(_normal, excluded={1}, signature="(n)->(m)")
        return jnp.moveaxis(normal(seeds, count), -1, 0)
    words = draw_words(seeds, count)
    shifts = jnp.arange(BITS, dtype=jnp.uint32).reshape(1, -1, *(1,) * (seeds.ndim - 1))
    return of_highest_bit(words[:, None] << shifts).reshape(-1, *seeds.shape[:-1])[:count]


def _normal(seed: UInt32[Array, "2"], count: int) -> Float[Array, " count"]:
    with jax.threefry_partitionable(True):  # the bits depend on this flag
        return jax.random.normal(jax.random.wrap_key_data(seed, impl="threefry2x32"), (count,), jnp.float32)


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["start", "shape"])
@dataclass(frozen=True)
class PackedSigns:
    """An array of ±1 that is stored as bits and unpacked wherever it is used.

    An accelerator is limited by memory traffic: a bit takes a 32nd of a float, and unpacking it inside other work is
    free. On CPUs, unpacking inside other work turns that work into scalar code.

    Attributes:
        words: Bits of this array, and maybe of others.
        start: Position of this array's first bit.
        shape: Shape of the array.
    """

    words: UInt32[Array, " words"]
    start: int = field(default=0)
    shape: tuple[int, ...] = field(default=())

    def unpack(self) -> Float[Array, "..."]:
        """Return the array, float32 [*shape]."""
        bits = signs(self.words).reshape(-1)
        return bits[self.start : self.start + math.prod(self.shape)].reshape(self.shape)

    def row(self, number: Int[Array, ""]) -> Float[Array, "..."]:
        """Return one row of the first axis, of shape [1, ...]; reads the bits of that row alone."""
        size = math.prod(self.shape[1:])
        bits = self.start + size * number + jnp.arange(size, dtype=jnp.int32)
        found = of_highest_bit(self.words[bits // BITS] << (bits % BITS).astype(jnp.uint32))
        return found.reshape(1, *self.shape[1:])


def unpacked(array: Float[Array, "..."] | PackedSigns) -> Float[Array, "..."]:
    """Unpack an array if it is packed."""
    return array.unpack() if isinstance(array, PackedSigns) else array
