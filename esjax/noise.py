"""From a seed to a perturbation, and from many weighted seeds to their sum.

A perturbation ε has entries of mean 0 and variance 1 and is named by its seed alone: it comes out the same
whatever the chunking, the number of devices or the host. Two kinds of noise:

- rademacher: ±1, the bits of threefry. Bit-exact on every platform, cheap, and as good as a normal for finite
  differences (Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient").
- gaussian: standard normals. The same on one kind of hardware only.

Two spaces:

- full: one entry of ε per parameter.
- low_rank: for a matrix, ε = Σ_r a_r b_rᵀ / √R with noise vectors a_r, b_r (Sarkar et al. 2025, "Evolution
  Strategies at the Hyperscale", section 4); a layer's bias is one more row of its matrix; any other leaf gets a full ε.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Integer, UInt32

from esjax.fitness import LIMIT
from esjax.models.model import Model, Params
from esjax.models.primitives import HIGHEST, Affine, LowRank, LowRankAffine, add_up
from esjax.signs import BITS, PackedSigns, of_highest_bit, unpacked

PERTURBATIONS = 0
"""Stream of keys from which perturbations grow."""

WINDOWS = 1
"""Stream of keys from which the windows of text are drawn."""

INIT = 2
"""Stream of keys from which the first parameters are drawn."""

HELD_OUT = 3
"""Stream of keys from which the windows of held-out text are drawn, for a loss of one's own."""


@struct.dataclass
class Factors:
    """The two sides of a low-rank ε, before the division by √rank.

    Attributes:
        left: [rank, rows].
        right: [rank, columns].
        shift: Where the matrix has a bias, that one's entries of the left side, [rank].
    """

    left: Float[Array, "..."] | PackedSigns
    right: Float[Array, "..."] | PackedSigns
    shift: Float[Array, "..."] | PackedSigns | None = None


Noise = Any
"""A pytree like the parameters; in place of each leaf, or `Affine`, an array of the leaf's shape, or `Factors`. The
axis of pairs, where there is one, comes last."""

Total = Any
"""A pytree like the parameters: Σ weight * ε, before the division by √rank."""


class Space(NamedTuple):
    """How members differ from the parameters.

    Attributes:
        sample: `(seeds) -> noise` of one pair, or of a batch of pairs.
        sample_pair: `(seed) -> noise` of one pair, the same, but packed if the space is.
        perturb: `(params, noise, sign) -> params` of the member `params + sign * sigma * unit * ε`; of split pairs the
            sign is that of every other column alone.
        weigh: `(noise of a batch of pairs, weights) -> total`, exact integers for Rademacher noise; weights [pairs], or
            [pairs, 2] of split pairs, those of the columns that both members have in common first.
        mean: `(total, scale) -> pytree` with `scale * Σ weight * ε`.
        numbers: Numbers of noise that a pair needs.
        exact: Whether totals are integers, so that they are the same in any order of summation.
        exact_pairs: Pairs that `weigh` sums exactly in float32, for weights up to `esjax.fitness.LIMIT`.
    """

    sample: Callable[[UInt32[Array, "*pairs 2"]], Noise]
    sample_pair: Callable[[UInt32[Array, "2"]], Noise]
    perturb: Callable[[Params, Noise, Float[Array, ""]], Params]
    weigh: Callable[[Noise, Float[Array, " pairs *halves"]], Total]
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
    words = _words(seeds, count)
    shifts = jnp.arange(BITS, dtype=jnp.uint32).reshape(1, -1, *(1,) * (seeds.ndim - 1))
    return of_highest_bit(words[:, None] << shifts).reshape(-1, *seeds.shape[:-1])[:count]


def _words(seeds: UInt32[Array, "*pairs 2"], bits: int) -> UInt32[Array, "*shape"]:
    blocks = jnp.arange(-(-bits // (2 * BITS)), dtype=jnp.uint32)
    drawn = fold(seeds[None], blocks.reshape(-1, *(1,) * (seeds.ndim - 1)))
    return jnp.concatenate([drawn[..., 0], drawn[..., 1]])


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
    packed: bool = False,
    split: bool = False,
) -> Space:
    """Lay out the noise of one pair over the leaves of `params` (arrays, or their shapes and dtypes).

    Args:
        model: Gives the unit of each leaf, and whether low-rank members may stay factored.
        params: The parameters, or a pytree of `jax.ShapeDtypeStruct` like them.
        space: Full or low-rank perturbations.
        noise: Distribution of the entries, or of the factors' entries.
        sigma: Standard deviation of a perturbation, in units of each leaf.
        rank: Number of factor pairs of a low-rank perturbation, at least 1.
        packed: Whether the signs of factored members stay packed until they are used, which suits accelerators; see
            `esjax.signs`. It changes no number.
        split: Whether the members of a pair have every other column of ε in common, beginning with the first, and
            differ in the sign of the others; else they differ in that of all.
    """
    units = model.units(params)
    low_rank = space == "low_rank"

    def is_layer(node: Any) -> bool:
        return low_rank and isinstance(node, Affine) and len(node.matrix.shape) == 2

    nodes, treedef = jax.tree.flatten(params, is_leaf=is_layer)
    layout = [_shapes(node, rank if low_rank else 0) for node in nodes]
    factored = [jax.tree.map(lambda _, of=parts: len(of) > 1, node) for node, parts in zip(nodes, layout, strict=True)]
    count = sum(math.prod(shape) for shapes in layout for shape in shapes)

    def arrange(cut: Callable[[int, tuple[int, ...]], Array | PackedSigns]) -> Noise:
        """Lay out the numbers of a pair, of which `(start, shape)` cuts off some."""
        start, noises = 0, []
        for shapes in layout:
            parts = []
            for shape in shapes:
                parts.append(cut(start, shape))
                start += math.prod(shape)
            noises.append(Factors(*parts) if len(parts) > 1 else parts[0])
        return jax.tree.unflatten(treedef, noises)

    def sample(seeds: UInt32[Array, "*pairs 2"]) -> Noise:
        drawn, pairs = draw(noise, seeds, count), seeds.shape[:-1]
        return arrange(lambda start, shape: drawn[start : start + math.prod(shape)].reshape(*shape, *pairs))

    def sample_packed(seed: UInt32[Array, "2"]) -> Noise:
        words = _words(seed, count)
        return arrange(lambda start, shape: PackedSigns(words, start, shape))

    one = jnp.float32(1)

    def perturb(params: Params, noise: Noise, sign: Float[Array, ""]) -> Params:
        def member(node: Array | Affine, epsilon: Array | PackedSigns | Factors, unit: Any) -> Any:
            if not isinstance(epsilon, Factors):
                numbers = unpacked(epsilon)
                direction = jnp.where(_is_common(numbers.shape), one, sign) if split else sign
                return node + direction * (sigma * unit) * numbers
            steps = jax.tree.map(lambda unit: (one if split else sign) * (sigma * unit) / math.sqrt(rank), unit)
            turned = jnp.where(_is_common(epsilon.right.shape[1:]), one, sign) if split else None
            if isinstance(node, Affine):
                matrix = LowRank(node.matrix, epsilon.left, epsilon.right, steps.matrix, turned)
                assert epsilon.shift is not None
                perturbed: Any = LowRankAffine(matrix, node.bias, steps.bias * unpacked(epsilon.shift))
            else:
                perturbed = LowRank(node, epsilon.left, epsilon.right, steps, turned)
            return perturbed if model.factored else add_up(perturbed)

        return jax.tree.map(member, params, noise, units, is_leaf=is_layer)

    def weigh(noise: Noise, weights: Float[Array, " pairs *halves"]) -> Total:
        def total(epsilon: Array | Factors) -> Array | Affine:
            if not isinstance(epsilon, Factors):
                sums = jnp.matmul(epsilon, weights, precision=HIGHEST)
                return jnp.where(_is_common(sums.shape[:-1]), sums[..., 0], sums[..., 1]) if split else sums
            # What `sample` gives is not packed.
            sides: tuple[Array, Array, Array | None] = (epsilon.left, epsilon.right, epsilon.shift)  # type: ignore[assignment]
            left, right, shift = sides
            if shift is not None:
                left = jnp.concatenate([left, shift[:, None]], axis=1)
            if split:
                is_common = _is_common((1, right.shape[1], 1))
                right = right * jnp.where(is_common, weights[None, None, :, 0], weights[None, None, :, 1])
            else:
                left = left * weights[None, None, :]
            summed = jnp.einsum("rmk,rnk->rmn", left, right, precision=HIGHEST).sum(axis=0)
            return summed if shift is None else Affine(summed[:-1], summed[-1])

        return jax.tree.map(total, noise, is_leaf=lambda leaf: isinstance(leaf, Factors))

    def mean(total: Total, scale: Float[Array, ""]) -> Params:
        def finish(leaf: Array, is_factored: bool) -> Array:
            return leaf.astype(jnp.float32) * (scale / math.sqrt(rank) if is_factored else scale)

        return jax.tree.map(finish, total, jax.tree.unflatten(treedef, factored))

    return Space(
        sample,
        sample_packed if packed and low_rank and model.factored and noise == "rademacher" else sample,
        perturb,
        weigh,
        mean,
        numbers=count,
        exact=noise == "rademacher",
        exact_pairs=2**24 // (LIMIT * rank),
    )


def _shapes(node: Any, rank: int) -> list[tuple[int, ...]]:
    """List the shapes of what the noise of a leaf or layer is made of; those of its `Factors` if `rank` is not 0."""
    matrix = node.matrix if isinstance(node, Affine) else node
    if not rank or len(matrix.shape) != 2:
        return [node.shape]
    rows, columns = matrix.shape
    return [(rank, rows), (rank, columns), *([(rank,)] if isinstance(node, Affine) else [])]


def _is_common(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Tell which entries, or columns, of a perturbation the members of a split pair have in common: every other one."""
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)
