"""From a seed to a perturbation of any pytree, and from many weighted seeds to the sum of their perturbations.

A perturbation ε has entries of mean 0 and variance 1. It depends on its seed alone: not on the chunks, the number of
devices or the host. The members of an *antithetic* pair are θ + σ u ε and θ - σ u ε, where u is the unit of each leaf.
The members of a *split* pair share the even columns of ε and differ in the sign of the odd ones.

Two distributions:

- rademacher: ±1 from the bits of threefry. The same bits on every platform, cheap, and as good as a normal for finite
  differences (Spall 1992, section II).
- gaussian: standard normals, whose last bits differ between kinds of processors.

Two shapes of ε:

- full: one number for each parameter (Salimans et al. 2017, section 2).
- low rank: for a matrix, ε = Σ_r a_r b_rᵀ / √R with R products of vectors (Sarkar et al. 2025, section 4). Leaves that
  are no matrices get full noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from esjax.core.leaves import Leaf, OfLeaf, is_below, plan_leaves
from esjax.core.perturbed import PerturbedArray
from esjax.core.rules import HIGHEST
from esjax.core.shaping import LIMIT
from esjax.core.signs import PackedSigns, draw, draw_words, unpacked

Params = Any
"""A pytree of arrays."""

Precision = Literal["float32", "bfloat16"]
"""Type to which the operands of matrix products are rounded; sums are float32."""

Rows = dict[str, Int[Array, "pairs reads"]]
"""By the path of a leaf, or of all leaves below it: which rows of its first axis each pair's example reads."""

Totals = list[Array]
"""Σ weight * ε over pairs: an array for each perturbed leaf, of its shape, before the division by √rank."""


@dataclass(frozen=True)
class Noise:
    """How the members of a population differ; made by `low_rank` or `full`.

    Attributes:
        sigma: Standard deviation of a perturbation, above 0, in units of each leaf.
        rank: Rank of the perturbation of a matrix; 0: full noise.
        gaussian: Whether the numbers that are drawn are normal; else they are ±1.
        split: Whether pairs are split; else they are antithetic and differ in the sign of all of ε.
        units: Unit of each leaf, see `low_rank`.
        where: Which leaves are perturbed, see `low_rank`.
        stacked: Which leaves hold one array per layer along their first axis.
        full_leaves: Which leaves get full noise.
        packed: Whether ±1 stay packed as bits until they are used, which suits accelerators. It changes no number.
    """

    sigma: float
    rank: int = 1
    gaussian: bool = False
    split: bool = False
    units: Any = None
    where: OfLeaf | None = None
    stacked: OfLeaf | None = None
    full_leaves: OfLeaf | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma must be above 0 and finite, got {self.sigma}")
        if self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank}")

    @property
    def exact(self) -> bool:
        """Whether sums of weighted noise are sums of integers, which are the same in any order."""
        return not self.gaussian

    @property
    def exact_pairs(self) -> int:
        """Most pairs whose weighted noise a float32 sums exactly, for weights up to `esjax.core.shaping.LIMIT`."""
        return 2**24 // (LIMIT * max(self.rank, 1))

    def lay_out(self, params: Params) -> "Layout":
        """Plan the noise over the leaves of `params`, a pytree of arrays or of anything with shapes and types.

        Raises:
            TypeError: A leaf is not an array, or no leaf can be perturbed.
            ValueError: The units do not match the parameters, or one is not above 0.
        """
        return Layout(self, params)


def low_rank(
    sigma: float,
    rank: int = 1,
    *,
    gaussian: bool = False,
    split: bool = False,
    units: Any = None,
    where: OfLeaf | None = None,
    stacked: OfLeaf | None = None,
    full_leaves: OfLeaf | None = None,
    packed: bool = False,
) -> Noise:
    """Perturb each matrix by a sum of `rank` products of two vectors (Sarkar et al. 2025, section 4).

    A leaf of three axes counts as a matrix: [width, heads, head width] becomes width by (heads, head width), since it
    is cut where rows and columns are closest in size. Scalars, vectors and leaves of four or more axes, such as
    convolutions, get full noise.

    Args:
        sigma: Standard deviation of a perturbation, above 0, in units of each leaf.
        rank: Number of products, at least 1.
        gaussian: Draw the vectors from a normal distribution; else they are ±1, the same bits on every platform.
        split: Let the members of a pair share the even columns of ε and differ in the sign of the odd ones. `shape`
            then credits the shared half by the pair's summed loss.
        units: Unit of each leaf: a pytree of numbers like the parameters, or a function of path and leaf. None:
            1/√fan-in for leaves of two or more axes, where the rows are the fan-in, and 0.3 for the others.
            `initial_units` makes units from initial weights.
        where: `(path, leaf) -> bool`: which leaves are perturbed and trained. None: all leaves of floating type.
        stacked: `(path, leaf) -> bool`: which leaves hold one array per layer along their first axis, as `nnx.scan` and
            `flax.linen.scan` make them. Each layer gets separate noise. None: no leaf.
        full_leaves: `(path, leaf) -> bool`: which matrices get full noise. None: no matrix.
        packed: Keep ±1 packed as bits until they are used, which suits accelerators. It changes no number.

    Raises:
        ValueError: `sigma` or `rank` is out of range.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return Noise(sigma, rank, gaussian, split, units, where, stacked, full_leaves, packed)


def full(
    sigma: float,
    *,
    gaussian: bool = False,
    split: bool = False,
    units: Any = None,
    where: OfLeaf | None = None,
) -> Noise:
    """Perturb each parameter independently (Salimans et al. 2017, section 2).

    Args:
        sigma: Standard deviation of a perturbation, above 0, in units of each leaf.
        gaussian: Draw from a normal distribution; else entries are ±1, the same bits on every platform.
        split: See `low_rank`.
        units: See `low_rank`.
        where: See `low_rank`.

    Raises:
        ValueError: `sigma` is out of range.
    """
    return Noise(sigma, 0, gaussian, split, units, where)


class Layout:
    """Noise over the leaves of one pytree: draws it, perturbs with it, and sums it.

    Attributes:
        noise: How members differ.
        units: Unit of each leaf, a pytree of floats like the parameters.
        numbers: How many random numbers a pair needs.
    """

    def __init__(self, noise: Noise, params: Params) -> None:
        """See `Noise.lay_out`."""
        self.noise = noise
        self.units, self._leaves = plan_leaves(noise, params)
        self._treedef = jax.tree.structure(params)
        self.numbers = sum(math.prod(shape) for leaf in self._leaves for shape in self._shapes(leaf))

    def _shapes(self, leaf: Leaf) -> list[tuple[int, ...]]:
        if leaf.row_of is not None:
            return [(self.noise.rank,)]
        return [(*shape, self.noise.rank) for shape in leaf.factors] or [leaf.shape]

    def _cut(self, take: Callable[[int, tuple[int, ...]], Any]) -> list[list[Any]]:
        """Cut a pair's random numbers into the parts of each leaf; `take(start, shape)` returns the next part."""
        start, parts = 0, []
        for leaf in self._leaves:
            of_leaf = []
            for shape in self._shapes(leaf):
                of_leaf.append(take(start, shape))
                start += math.prod(shape)
            parts.append(of_leaf)
        return [self._row(leaf, of_leaf, parts) for leaf, of_leaf in zip(self._leaves, parts, strict=True)]

    def _row(self, leaf: Leaf, of_leaf: list[Any], parts: list[list[Any]]) -> list[Any]:
        """Make the noise of a bias as one more row (or column) of its matrix: Σ_r shift_r * factor_r."""
        if leaf.row_of is None:
            return of_leaf
        matrix, side = leaf.row_of
        shift, factor = unpacked(of_leaf[0]), unpacked(parts[matrix][side])
        pairs = factor.shape[len(self._leaves[matrix].shape) + 1 :]
        factor = factor.reshape(*leaf.shape, self.noise.rank, *pairs)
        shift = shift.reshape(*[1] * len(leaf.shape), self.noise.rank, *pairs)
        return [jnp.sum(factor * shift, axis=len(leaf.shape))]

    def sample(self, seeds: UInt32[Array, "*pairs 2"]) -> list[list[Array]]:
        """Draw the noise of pairs.

        Returns:
            For each perturbed leaf [ε] or [left factor, right factor]. The axes of pairs come last.
        """
        kind: Any = "gaussian" if self.noise.gaussian else "rademacher"
        drawn, pairs = draw(kind, seeds, self.numbers), seeds.shape[:-1]
        return self._cut(lambda start, shape: drawn[start : start + math.prod(shape)].reshape(*shape, *pairs))

    def draw(self, seed: UInt32[Array, "2"]) -> list[list[Any]]:
        """Draw the noise of one pair for `member`: as `sample` does, or packed."""
        if not self._is_packed:
            return self.sample(seed)
        words = draw_words(seed, self.numbers)
        return self._cut(lambda start, shape: PackedSigns(words, start, shape))

    @property
    def _is_packed(self) -> bool:
        return self.noise.packed and self.noise.rank > 0 and not self.noise.gaussian

    def draw_all(self, seeds: UInt32[Array, "pairs 2"]) -> list[list[Any]]:
        """Draw the noise of many pairs as `draw` does, the axis of pairs first.

        A loop forces XLA to store the numbers. Otherwise its CPU compiler unpacks the signs wherever they are used,
        inside the network's elementwise loops, which can take as long as the network itself.
        """
        if self._is_packed or len(seeds) == 1:
            return jax.vmap(self.draw)(seeds)
        return jax.lax.map(self.draw, seeds, batch_size=-(-len(seeds) // 2))

    def member(
        self, params: Params, drawn: list[list[Any]], sign: Float[Array, ""], precision: Precision = "float32"
    ) -> Params:
        """Make the parameters of a member, `params + sign * sigma * unit * ε`.

        Args:
            params: The parameters.
            drawn: Noise of the pair, see `draw`.
            sign: +1 or -1. In split pairs only the odd columns take it.
            precision: Type to which matrices are rounded for products.

        Returns:
            A pytree like `params`, in which a matrix with low-rank noise is a `PerturbedArray`.
        """
        noise, leaves = self.noise, jax.tree.leaves(params)
        one = jnp.float32(1)
        for leaf, of_leaf in zip(self._leaves, drawn, strict=True):
            value, size = jnp.asarray(leaves[leaf.index]), noise.sigma * leaf.unit
            size = size / math.sqrt(noise.rank) if leaf.is_thin else size
            if not leaf.factors:
                direction = jnp.where(_is_common(leaf.shape), one, sign) if noise.split else sign
                with jax.numpy_dtype_promotion("standard"):  # noise is float32; the leaf may not be
                    moved = (value + direction * size * unpacked(of_leaf[0])).astype(value.dtype)
                leaves[leaf.index] = round_products(moved, precision, leaf.path, leaf.axes)
                continue
            left, right = of_leaf
            step: Any = size * sign
            if noise.split:
                step = size * jnp.where(_is_common((*leaf.factors[1], 1)), one, sign)
            if noise.split and not self._is_packed:
                right, step = right * step, None
            base = value.astype(precision) if precision != "float32" else value
            leaves[leaf.index] = PerturbedArray(base, left, right, step, value.dtype, leaf.path)
        return jax.tree.unflatten(self._treedef, leaves)

    def weigh(
        self, seeds: UInt32[Array, "pairs 2"], weights: Float[Array, " pairs *halves"], rows: Rows | None = None
    ) -> Totals:
        """Sum weight * ε over pairs.

        The sums are exact for ±1, integer weights and at most `Noise.exact_pairs` pairs.

        Args:
            seeds: Seeds of the pairs.
            weights: [pairs]; for split pairs [pairs, 2]: of the shared columns, and of the others.
            rows: Rows that each pair's example reads; the noise of others is left out. None: all rows.
        """
        split, totals = self.noise.split, []
        for leaf, parts in zip(self._leaves, self.sample(seeds), strict=True):
            read = [read for path, read in (rows or {}).items() if is_below(leaf.path, path)]
            if read:
                parts = [parts[0] * _are_read(read[0], leaf.shape[0], parts[0].ndim), *parts[1:]]
            if not leaf.factors:
                sums = jnp.matmul(parts[0], weights, precision=HIGHEST)
                totals.append(jnp.where(_is_common(leaf.shape), sums[..., 0], sums[..., 1]) if split else sums)
                continue
            left, right = parts
            pairs = (*[1] * (right.ndim - 1), -1)
            if split:
                is_common = _is_common((*leaf.factors[1], 1))[..., None]
                right = right * jnp.where(is_common, weights[:, 0].reshape(pairs), weights[:, 1].reshape(pairs))
            else:
                left = left * weights.reshape(pairs)
            totals.append(_summed(leaf, left, right))
        return totals

    def zeros(self) -> Totals:
        """Return totals of 0 to add to: int32 where sums are exact, else float32."""
        kind = jnp.int32 if self.noise.exact else jnp.float32
        return [jnp.zeros(leaf.shape, kind) for leaf in self._leaves]

    def gradient(self, totals: Totals, scale: Float[Array, ""], params: Params) -> Params:
        """Turn totals into the estimate `scale * Σ weight * ε / unit`, a pytree like `params`; frozen leaves get 0."""
        leaves = [_no_gradient(leaf) for leaf in jax.tree.leaves(params)]
        for leaf, total in zip(self._leaves, totals, strict=True):
            # Products, not quotients: XLA may turn a division into a product, and then the last bit differs.
            by = scale * (1 / (leaf.unit * (math.sqrt(self.noise.rank) if leaf.is_thin else 1.0)))
            leaves[leaf.index] = (total.astype(jnp.float32) * by).astype(leaves[leaf.index].dtype)
        return jax.tree.unflatten(self._treedef, leaves)

    def epsilon(self, seed: UInt32[Array, "2"], params: Params) -> Params:
        """Return ε of one pair as plain float32 arrays, a pytree like `params`; frozen leaves get 0."""
        leaves = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in jax.tree.leaves(params)]
        for leaf, parts in zip(self._leaves, self.sample(seed), strict=True):
            written = jnp.sum(parts[0] * parts[1], axis=-1) if leaf.factors else parts[0]
            leaves[leaf.index] = written / math.sqrt(self.noise.rank) if leaf.is_thin else written
        return jax.tree.unflatten(self._treedef, leaves)

    @property
    def adds_up(self) -> bool:
        """Whether some matrix has full noise, so that each member needs a copy of it."""
        return any(not leaf.factors and leaf.axes > 1 for leaf in self._leaves)


def round_products(leaf: Array, precision: Precision, path: str = "", axes: int | None = None) -> Any:
    """Wrap a matrix so that its products round to `precision`; any other leaf, and float32, is returned unchanged.

    `axes` are those of one layer, for a leaf that holds layers stacked along its first axis; None: all axes.
    """
    if precision == "float32" or (jnp.ndim(leaf) if axes is None else axes) != 2:
        return leaf
    return PerturbedArray(leaf.astype(precision), None, None, None, leaf.dtype, path)


def _no_gradient(leaf: Any) -> Any:
    """Return zeros like a leaf; for random keys, float0 as `jax.grad` does."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _are_read(read: Int[Array, "pairs reads"], rows: int, axes: int) -> Float[Array, "rows ... pairs"]:
    """Return 1 for each row that a pair's example reads and 0 for the others, with axes of size 1 between."""
    marks = jnp.zeros((rows, len(read)), jnp.float32)
    marks = marks.at[read, jnp.arange(len(read), dtype=jnp.int32)[:, None]].set(1.0)
    return marks.reshape(rows, *[1] * (axes - 2), len(read))


def _is_common(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Mark what the members of a split pair share: even columns of low-rank noise, even entries of full noise."""
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)


def _summed(leaf: Leaf, left: Array, right: Array) -> Array:
    """Sum left * right over rank and pairs, the last two axes of both, by one matrix product per layer."""
    inner = left.shape[-2] * left.shape[-1]
    one, two = left.reshape(leaf.layers, -1, inner), right.reshape(leaf.layers, -1, inner)
    return jnp.einsum("lmk,lnk->lmn", one, two, precision=HIGHEST).reshape(leaf.shape)
