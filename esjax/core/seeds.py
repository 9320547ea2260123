"""Seeds: threefry counters that name noise, windows of text and random keys.

A seed is two uint32 words. Every seed is derived with threefry2x32 by name, one block at a time, so that the same run
gives the same numbers whatever JAX's default generator is and whatever its flags say.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Key, UInt32

PERTURBATIONS = 0
"""Stream of a run's seeds from which perturbations grow."""

Seed = int | Integer[Array, ""] | UInt32[Array, "2"] | Key[Array, ""]
"""A run's seed, at least 0 and below 2^32; the seed of a stream, see `stream_seed`; or a key of JAX."""

LOSS_KEY = 2**32 - 1
"""What is folded into a pair's seed for the key of its loss; the pair's noise counts its blocks up from 0."""


@partial(jnp.vectorize, signature="(n),()->(n)")
def fold(seed: UInt32[Array, "2"], number: Integer[Array, ""] | int) -> UInt32[Array, "2"]:
    """Derive another seed from a seed and a number: one block of threefry. Batches broadcast."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number))


def stream_seed(seed: int | Integer[Array, ""], stream: int) -> UInt32[Array, "2"]:
    """Derive the seed of one of a run's streams of random numbers.

    Args:
        seed: The run's seed, at least 0 and below 2^32.
        stream: Number of the stream, for example `PERTURBATIONS`.

    Raises:
        TypeError: The seed is no whole number.
        ValueError: The seed is out of range.
    """
    return fold(_words(seed), stream)


def key_of(seed: int | Integer[Array, ""]) -> Key[Array, ""]:
    """Make the threefry key of a number, at least 0 and below 2^32: `jax.random.key(seed)` as it is by default."""
    return jax.random.wrap_key_data(_words(seed), impl="threefry2x32")


def _words(seed: int | Integer[Array, ""]) -> UInt32[Array, "2"]:
    # Not by `jax.random.key`, to which JAX_RANDOM_SEED_OFFSET adds a number.
    if not jnp.issubdtype(jax.dtypes.result_type(seed), jnp.integer) or jnp.ndim(seed):
        raise TypeError(f"seed must be one whole number, got {seed!r}")
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
    return jnp.stack([jnp.uint32(0), jnp.uint32(seed)])


def pair_seeds(
    seed: Seed,
    step: int | Integer[Array, ""],
    pairs: int | Integer[Array, " pairs"],
) -> UInt32[Array, "pairs 2"]:
    """Derive the seed of each pair of a step; a pair's noise grows from its seed alone.

    Args:
        seed: Seed of the run, of a stream, or a key of JAX, see `Seed`.
        step: Number of the step, at least 0; it may be traced.
        pairs: How many pairs, or their numbers, from 0 to 2^32 - 1.

    Returns:
        uint32 [pairs, 2].

    Raises:
        ValueError: `pairs` is below 1, or the seed is out of range.
    """
    if jnp.ndim(pairs) == 0:
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {pairs}")
        pairs = jnp.arange(pairs, dtype=jnp.uint32)
    return fold(fold(_stream_of(seed), step)[None], pairs)


def _stream_of(seed: Any) -> UInt32[Array, "2"]:
    if hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(seed)[:2]  # a key of rbg is made of two of threefry
    return seed if jnp.ndim(seed) == 1 else stream_seed(seed, PERTURBATIONS)


def loss_key(seed: UInt32[Array, "2"]) -> Key[Array, ""]:
    """Derive the random key that the loss of both members of a pair is given."""
    return jax.random.wrap_key_data(fold(seed, jnp.uint32(LOSS_KEY)), impl="threefry2x32")
