"""Random signs: each bit of a word is a +1 or a -1."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

BITS = 32


def signs(words: UInt32[Array, "*words"]) -> Float[Array, "*words 32"]:
    """Make ±1 of the bits of each word, the highest first; a bit that is set is a -1."""
    return of_highest_bit(words[..., None] << jnp.arange(BITS, dtype=jnp.uint32).reshape(*(1,) * words.ndim, BITS))


def of_highest_bit(words: UInt32[Array, "*words"]) -> Float[Array, "*words"]:
    """Make ±1 of the highest bit of each word, which becomes the sign bit of a 1.0: two operations, no conversion."""
    highest = words & jnp.uint32(1 << (BITS - 1))
    return jax.lax.bitcast_convert_type(highest | jnp.uint32(0x3F800000), jnp.float32)


@struct.dataclass
class PackedSigns:
    """An array of ±1 that is kept as bits, and unpacked wherever it is used.

    An accelerator waits for memory, and a bit takes a 32nd of it; to unpack one in the middle of other work is free
    there. On CPUs it makes scalar code of that work.

    Attributes:
        words: Bits, of other arrays as well.
        start: Number of the first bit that is this array's.
        shape: Of the array.
    """

    words: UInt32[Array, " words"]
    start: int = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def unpack(self) -> Float[Array, "..."]:
        """Give the array."""
        bits = signs(self.words).reshape(-1)
        return bits[self.start : self.start + math.prod(self.shape)].reshape(self.shape)

    def column(self, number: Int[Array, ""]) -> Float[Array, " rows"]:
        """Give a column of a matrix, and read no other bit."""
        rows, columns = self.shape
        bits = self.start + columns * jnp.arange(rows, dtype=jnp.int32) + number
        return of_highest_bit(self.words[bits // BITS] << (bits % BITS).astype(jnp.uint32))


def unpacked(array: Float[Array, "..."] | PackedSigns) -> Float[Array, "..."]:
    """Give an array that may be packed."""
    return array.unpack() if isinstance(array, PackedSigns) else array
