"""From a seed to a perturbation, and from many weighted seeds to their sum.

A perturbation ε has entries of mean 0 and variance 1 and is named by its seed alone: it comes out the same
whatever the chunking, the number of devices or the host. Two kinds of noise:

- rademacher: ±1, the bits of threefry. Bit-exact on every platform, cheap, and as good as a normal for finite
  differences (Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient").
- gaussian: standard normals. The same on one kind of hardware only.

Two spaces:

- full: one entry of ε per parameter.
- low_rank: for a matrix, ε = Σ_r a_r b_rᵀ / √R with noise vectors a_r, b_r (Sarkar et al. 2025, "Evolution
  Strategies at the Hyperscale", section 4); any other leaf gets a full ε.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Integer, UInt32

from esjax.fitness import LIMIT
from esjax.models.model import Model, Params
from esjax.models.primitives import HIGHEST, LowRank

PERTURBATIONS = 0
"""Stream of keys from which perturbations grow."""

WINDOWS = 1
"""Stream of keys from which the windows of text are drawn."""

INIT = 2
"""Stream of keys from which the first parameters are drawn."""

HELD_OUT = 3
"""Stream of keys from which the windows of held-out text are drawn, for a loss of one's own."""

BITS = 32


@struct.dataclass
class Factors:
    """The two sides of a low-rank ε, before the division by √rank: [rank, rows] and [rank, columns]."""

    left: Float[Array, "..."]
    right: Float[Array, "..."]


Noise = Any
"""A pytree like the parameters; each leaf is an array of the leaf's shape, or `Factors`. The axis of pairs, where there
is one, comes last."""

Total = Any
"""A pytree like the parameters: Σ weight * ε, before the division by √rank."""


class Space(NamedTuple):
    """How members differ from the parameters.

    Attributes:
        sample: `(seeds) -> noise` of one pair, or of a batch of pairs.
        perturb: `(params, noise, sign) -> params` of the member `params + sign * sigma * unit * ε`.
        weigh: `(noise of a batch of pairs, weights[pairs]) -> total`, exact integers for Rademacher noise.
        mean: `(total, scale) -> pytree` with `scale * Σ weight * ε`.
        numbers: Numbers of noise that a pair needs.
        exact: Whether totals are integers, so that they are the same in any order of summation.
        exact_pairs: Pairs that `weigh` sums exactly in float32, for weights up to `esjax.fitness.LIMIT`.
    """

    sample: Callable[[UInt32[Array, "*pairs 2"]], Noise]
    perturb: Callable[[Params, Noise, Float[Array, ""]], Params]
    weigh: Callable[[Noise, Float[Array, " pairs"]], Total]
    mean: Callable[[Total, Float[Array, ""]], Params]
    numbers: int
    exact: bool
    exact_pairs: int


@partial(jnp.vectorize, signature="(n),()->(n)")
def fold(seed: UInt32[Array, "2"], number: Integer[Array, ""] | int) -> UInt32[Array, "2"]:
    """Derive another seed from a seed and a number: one block of threefry. Batches broadcast."""
    return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), number))


def stream_seed(run_seed: int, stream: int) -> UInt32[Array, "2"]:
    """Derive the seed of one of the run's streams of keys."""
    return fold(jax.random.key_data(jax.random.key(run_seed, impl="threefry2x32")), stream)


def pair_seeds(
    stream: UInt32[Array, "2"], step: Int[Array, ""] | int, pairs: Integer[Array, " pairs"]
) -> UInt32[Array, "pairs 2"]:
    """Derive the seed of each pair from the stream, the step and the pair's index."""
    return fold(fold(stream, step)[None], pairs)


def draw(
    kind: Literal["rademacher", "gaussian"], seeds: UInt32[Array, "*pairs 2"], count: int
) -> Float[Array, " count *pairs"]:
    """Draw `count` independent numbers of mean 0 and variance 1 from each seed.

    The axis of pairs comes last: unpacking, and a sum over pairs, run along it.
    """
    if kind == "gaussian":
        normal = jnp.vectorize(_normal, excluded={1}, signature="(n)->(m)")
        return jnp.moveaxis(normal(seeds, count), -1, 0)
    axes = (1,) * (seeds.ndim - 1)
    blocks = jnp.arange(-(-count // (2 * BITS)), dtype=jnp.uint32)
    drawn = fold(seeds[None], blocks.reshape(-1, *axes))
    words = jnp.concatenate([drawn[..., 0], drawn[..., 1]])
    # Each bit becomes the sign bit of a 1.0: three integer operations and no conversion.
    signs = (words[:, None] << jnp.arange(BITS, dtype=jnp.uint32).reshape(1, -1, *axes)) & jnp.uint32(1 << 31)
    ones = jax.lax.bitcast_convert_type(signs | jnp.uint32(0x3F800000), jnp.float32)
    return ones.reshape(-1, *seeds.shape[:-1])[:count]


def unpack(words: UInt32[Array, "lanes words"]) -> Float[Array, "lanes bits"]:
    """Make ±1 of the bits of each lane's words; the axis of bits comes last."""

    def part(words: UInt32[Array, "lanes words"]) -> Float[Array, "lanes bits"]:
        signs = (words[:, :, None] << jnp.arange(BITS, dtype=jnp.uint32)[None, None]) & jnp.uint32(1 << 31)
        ones = jax.lax.bitcast_convert_type(signs | jnp.uint32(0x3F800000), jnp.float32)
        return ones.reshape(len(words), -1)

    # In two parts, and joined: XLA then makes the noise once, in a plain loop. Otherwise it unpacks each bit where it
    # is used, in the middle of the network's own loops, which turns them into scalar code: four times slower on CPUs.
    half = len(words) // 2
    return jnp.concatenate([part(words[:half]), part(words[half:])])


def _normal(seed: UInt32[Array, "2"], count: int) -> Float[Array, " count"]:
    return jax.random.normal(jax.random.wrap_key_data(seed, impl="threefry2x32"), (count,))


def make_space(
    model: Model,
    params: Params,
    *,
    space: Literal["full", "low_rank"],
    noise: Literal["rademacher", "gaussian"],
    sigma: float,
    rank: int,
) -> Space:
    """Lay out the noise of one pair over the leaves of `params` (arrays, or their shapes and dtypes).

    Args:
        model: Gives the unit of each leaf, and whether low-rank members may stay factored.
        params: The parameters, or a pytree of `jax.ShapeDtypeStruct` like them.
        space: Full or low-rank perturbations.
        noise: Distribution of the entries, or of the factors' entries.
        sigma: Standard deviation of a perturbation, in units of each leaf.
        rank: Number of factor pairs of a low-rank perturbation, at least 1.
    """
    units = model.units(params)
    factored = jax.tree.map(lambda leaf: space == "low_rank" and len(leaf.shape) == 2, params)
    leaves, treedef = jax.tree.flatten(params)
    layout = [(leaf.shape, is_factored) for leaf, is_factored in zip(leaves, jax.tree.leaves(factored), strict=True)]
    counts = [rank * sum(shape) if is_factored else math.prod(shape) for shape, is_factored in layout]

    def sample(seeds: UInt32[Array, "*pairs 2"]) -> Noise:
        flat = draw(noise, seeds, sum(counts))
        parts = jnp.split(flat, list(itertools.accumulate(counts))[:-1])

        def shaped(part: Float[Array, " count *pairs"], shape: tuple[int, ...], is_factored: bool) -> Array | Factors:
            pairs = part.shape[1:]
            if not is_factored:
                return part.reshape(*shape, *pairs)
            left, right = jnp.split(part, [rank * shape[0]])
            return Factors(left.reshape(rank, shape[0], *pairs), right.reshape(rank, shape[1], *pairs))

        noises = [shaped(part, *leaf_layout) for part, leaf_layout in zip(parts, layout, strict=True)]
        return jax.tree.unflatten(treedef, noises)

    def perturb(params: Params, noise: Noise, sign: Float[Array, ""]) -> Params:
        def member(leaf: Array, epsilon: Array | Factors, unit: float) -> Array | LowRank:
            scale = sign * (sigma * unit)
            if not isinstance(epsilon, Factors):
                return leaf + scale * epsilon
            scale = scale / math.sqrt(rank)
            if model.factored:
                return LowRank(leaf, epsilon.left, epsilon.right, scale)
            return leaf + scale * jnp.matmul(epsilon.left.T, epsilon.right, precision=HIGHEST)

        return jax.tree.map(member, params, noise, units)

    def weigh(noise: Noise, weights: Float[Array, " pairs"]) -> Total:
        def total(epsilon: Array | Factors) -> Array:
            if not isinstance(epsilon, Factors):
                return jnp.matmul(epsilon, weights, precision=HIGHEST)
            left = epsilon.left * weights[None, None, :]
            return jnp.einsum("rmk,rnk->rmn", left, epsilon.right, precision=HIGHEST).sum(axis=0)

        return jax.tree.map(total, noise, is_leaf=lambda leaf: isinstance(leaf, Factors))

    def mean(total: Total, scale: Float[Array, ""]) -> Params:
        def finish(leaf: Array, is_factored: bool) -> Array:
            return leaf.astype(jnp.float32) * (scale / math.sqrt(rank) if is_factored else scale)

        return jax.tree.map(finish, total, factored)

    return Space(
        sample,
        perturb,
        weigh,
        mean,
        numbers=sum(counts),
        exact=noise == "rademacher",
        exact_pairs=2**24 // (LIMIT * rank),
    )
