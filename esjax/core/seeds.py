"""Seeds: from the number of a run to the seed of each pair.

A seed is two uint32 words. One block of threefry2x32 (Salmon et al. 2011, section 4) derives a seed from another seed
and a number. So a run gives the same numbers under any default generator and any flags of JAX.
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
"""Number that derives the key of a pair's loss from the pair's seed. The pair's noise uses the numbers from 0 up."""


@partial(jnp.vectorize, signature="(n),()->(n)")
def fold(seed: UInt32[Array, "2"], number: Integer[Array, ""] | int) -> UInt32[Array, "2"]:
    """Derive a seed from a seed and a number by one block of threefry; seeds [..., 2] and numbers [...] broadcast."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number))


def stream_seed(seed: int | Integer[Array, ""], stream: int) -> UInt32[Array, "2"]:
    """Derive the seed of one of a run's streams of random numbers.

    Args:
        seed: The run's seed, at least 0 and below 2^32.
        stream: Number of the stream, for example `PERTURBATIONS`.

    Raises:
        TypeError: The seed is not one whole number.
        ValueError: The seed is out of range.
    """
    return fold(_words(seed), stream)


def key_of(seed: int | Integer[Array, ""]) -> Key[Array, ""]:
    """Make the threefry key of a number, at least 0 and below 2^32: `jax.random.key(seed)` under JAX's defaults."""
    return jax.random.wrap_key_data(_words(seed), impl="threefry2x32")


def _words(seed: int | Integer[Array, ""]) -> UInt32[Array, "2"]:
    # `jax.random.key` would add JAX_RANDOM_SEED_OFFSET.
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
    """Derive the seed of each pair of a step. A pair's noise depends on its seed alone.

    Args:
        seed: Seed of the run, of a stream, or a key of JAX, see `Seed`.
        step: Number of the step, at least 0; it may be traced.
        pairs: Number of pairs, or the numbers of the pairs wanted, each from 0 to 2^32 - 1.

    Returns:
        uint32 [pairs, 2].

    Raises:
        TypeError: The seed is not one whole number.
        ValueError: `pairs` is below 1, or the seed is out of range.
    """
    if jnp.ndim(pairs) == 0:
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {pairs}")
        pairs = jnp.arange(pairs, dtype=jnp.uint32)
    return fold(fold(_stream_of(seed), step)[None], pairs)


def _stream_of(seed: Any) -> UInt32[Array, "2"]:
    if hasattr(seed, "dtype") and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(seed)[:2]  # a key of rbg consists of two threefry keys
    return seed if jnp.ndim(seed) == 1 else stream_seed(seed, PERTURBATIONS)


def loss_key(seed: UInt32[Array, "2"]) -> Key[Array, ""]:
    """Derive the random key that both members of a pair pass to the loss."""
    return jax.random.wrap_key_data(fold(seed, jnp.uint32(LOSS_KEY)), impl="threefry2x32")
