"""From a seed to a perturbation of any pytree, and from many weighted seeds to their sum.

A perturbation ε has entries of mean 0 and variance 1 and is named by its seed alone: it comes out the same whatever the
chunking, the number of devices or the host. The two members of a pair are at θ + σ u ε and θ - σ u ε, where u is the
unit of each leaf.

- rademacher: ±1, the bits of threefry. Bit-exact on every platform, cheap, and as good as a normal for finite
  differences (Spall 1992, "Multivariate stochastic approximation using a simultaneous perturbation gradient
  approximation").
- gaussian: standard normals, whose last bits differ between kinds of processors.

Two shapes of ε:

- full: one entry for each parameter (Salimans et al. 2017).
- low rank: for a leaf of two or more axes, ε = Σ_r a_r b_rᵀ / √R (Sarkar et al. 2025, "Evolution Strategies at the
  Hyperscale", section 4); any other leaf gets a full ε.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from esjax.core.leaves import Leaf, OfLeaf, plan_leaves
from esjax.core.perturbed import PerturbedArray
from esjax.core.rules import HIGHEST
from esjax.core.shaping import LIMIT
from esjax.core.signs import PackedSigns, draw, draw_words, unpacked

Params = Any
"""A pytree of arrays."""

Precision = Literal["float32", "bfloat16"]
"""Type of what matrix products multiply."""

Totals = list[Array]
"""Σ weight * ε of each perturbed leaf, before the division by √rank; see `Layout.zeros`."""


@dataclass(frozen=True)
class Noise:
    """How the members of a population differ; made by `low_rank` or `full`.

    Attributes:
        sigma: Standard deviation of a perturbation, in units of each leaf.
        rank: Rank of the perturbation of a matrix; 0: one entry for each parameter.
        gaussian: Whether entries, or those of the factors, are normal; else they are ±1.
        split: Whether the members of a pair share every other column of ε, beginning with the first, and differ in the
            sign of the others; else they differ in the sign of all.
        units: Step size of each leaf, see `low_rank`.
        where: Which leaves are perturbed.
        stacked: Which leaves hold one array a layer, along their first axis.
        full_leaves: Which leaves get one entry for each parameter.
        packed: Whether signs stay packed until they are used, which suits accelerators. It changes no number.
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
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    @property
    def exact(self) -> bool:
        """Whether sums of weighted noise are of integers, so that they are the same in any order."""
        return not self.gaussian

    @property
    def exact_pairs(self) -> int:
        """Pairs whose noise float32 sums exactly, for weights up to `esjax.core.shaping.LIMIT`."""
        return 2**24 // (LIMIT * max(self.rank, 1))

    def lay_out(self, params: Params) -> "Layout":
        """Lay out the noise of one pair over the leaves of `params`: arrays, or anything with shapes and types.

        Raises:
            TypeError: A leaf is no array, or nothing in it can be perturbed.
            ValueError: Units are no tree like the parameters, or not above 0.
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
    """Perturb each matrix by a product of few vectors (Sarkar et al. 2025, section 4).

    A leaf of more than two axes is taken for a matrix whose rows are its first few axes and whose columns are the
    rest, cut where the two sides are closest in size: [width, heads, head width] becomes width by (heads, head width).
    Leaves of one axis, and numbers, get one entry of noise for each parameter, as do leaves of four axes or more:
    convolutions.

    Args:
        sigma: Standard deviation of a perturbation, above 0, in units of each leaf.
        rank: Number of products, at least 1.
        gaussian: Draw the vectors from a normal; else they are ±1, the same bits on every platform.
        split: Let the members of a pair share every other column of the noise, so that their summed loss counts as
            well.
        units: Step size of each leaf: a pytree of numbers like the parameters, or a function of path and leaf. None:
            1/√fan-in for leaves of two or more axes, fan-in being the rows, and 0.3 for the others. `initial_units`
            makes them from first weights.
        where: `(path, leaf) -> bool`: which leaves are perturbed and trained. None: all of floating type.
        stacked: `(path, leaf) -> bool`: which leaves hold one array a layer along their first axis, as `nnx.scan` and
            `flax.linen.scan` make them; each layer then has noise of its own. None: none.
        full_leaves: `(path, leaf) -> bool`: which leaves get one entry of noise for each parameter all the same.
        packed: Keep signs packed until they are used, which suits accelerators; it changes no number.

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
    """Perturb each parameter by itself (Salimans et al. 2017, "Evolution Strategies as a Scalable Alternative").

    Args:
        sigma: Standard deviation of a perturbation, above 0, in units of each leaf.
        gaussian: Draw from a normal; else entries are ±1, the same bits on every platform.
        split: See `low_rank`.
        units: See `low_rank`.
        where: See `low_rank`.

    Raises:
        ValueError: `sigma` is out of range.
    """
    return Noise(sigma, 0, gaussian, split, units, where)


class Layout:
    """The noise of one pair over the leaves of a pytree.

    Attributes:
        noise: How members differ.
        units: Step size of each leaf, a pytree of numbers like the parameters.
        numbers: Numbers of noise that a pair needs.
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
        """Lay out a pair's numbers, of which `take(start, shape)` returns some, over the parts of each leaf."""
        start, parts = 0, []
        for leaf in self._leaves:
            of_leaf = []
            for shape in self._shapes(leaf):
                of_leaf.append(take(start, shape))
                start += math.prod(shape)
            parts.append(of_leaf)
        return [self._row(leaf, of_leaf, parts) for leaf, of_leaf in zip(self._leaves, parts, strict=True)]

    def _row(self, leaf: Leaf, of_leaf: list[Any], parts: list[list[Any]]) -> list[Any]:
        """Make the noise of a bias, as if it were one more row of its matrix: Σ_r shift_r * factor_r."""
        if leaf.row_of is None:
            return of_leaf
        matrix, side = leaf.row_of
        shift, factor = unpacked(of_leaf[0]), unpacked(parts[matrix][side])
        pairs = factor.shape[len(self._leaves[matrix].shape) + 1 :]
        factor = factor.reshape(*leaf.shape, self.noise.rank, *pairs)
        shift = shift.reshape(*[1] * len(leaf.shape), self.noise.rank, *pairs)
        return [jnp.sum(factor * shift, axis=len(leaf.shape))]

    def sample(self, seeds: UInt32[Array, "*pairs 2"]) -> list[list[Array]]:
        """Grow the noise of pairs: for each perturbed leaf its ε, or the two factors; the axes of pairs come last."""
        kind: Any = "gaussian" if self.noise.gaussian else "rademacher"
        drawn, pairs = draw(kind, seeds, self.numbers), seeds.shape[:-1]
        return self._cut(lambda start, shape: drawn[start : start + math.prod(shape)].reshape(*shape, *pairs))

    def draw(self, seed: UInt32[Array, "2"]) -> list[list[Any]]:
        """Grow the noise of one pair as `member` takes it: as `sample`, or packed if the noise is."""
        if not self._is_packed:
            return self.sample(seed)
        words = draw_words(seed, self.numbers)
        return self._cut(lambda start, shape: PackedSigns(words, start, shape))

    @property
    def _is_packed(self) -> bool:
        return self.noise.packed and self.noise.rank > 0 and not self.noise.gaussian

    def draw_all(self, seeds: UInt32[Array, "pairs 2"]) -> list[list[Any]]:
        """Grow the noise of many pairs as `draw` does, the axis of pairs first.

        Numbers are written out by a loop: else XLA's CPU compiler unpacks each sign wherever it is used, in the middle
        of the network's elementwise loops, which takes up to as long as the network itself.
        """
        if self._is_packed or len(seeds) == 1:
            return jax.vmap(self.draw)(seeds)
        return jax.lax.map(self.draw, seeds, batch_size=-(-len(seeds) // 2))

    def member(
        self, params: Params, drawn: list[list[Any]], sign: Float[Array, ""], precision: Precision = "float32"
    ) -> Params:
        """Make the parameters of a member, `params + sign * sigma * unit * ε`, matrices of low rank not added up.

        Args:
            params: The parameters.
            drawn: Noise of the pair, see `draw`.
            sign: +1 or -1; in split pairs that of every other column alone.
            precision: Type to which matrices are rounded for products.
        """
        noise, leaves = self.noise, jax.tree.leaves(params)
        one = jnp.float32(1)
        for leaf, of_leaf in zip(self._leaves, drawn, strict=True):
            value, size = jnp.asarray(leaves[leaf.index]), noise.sigma * leaf.unit
            size = size / math.sqrt(noise.rank) if leaf.is_thin else size
            if not leaf.factors:
                direction = jnp.where(_is_common(leaf.shape), one, sign) if noise.split else sign
                with jax.numpy_dtype_promotion("standard"):  # the noise is float32, whatever the type of the leaf
                    moved = (value + direction * size * unpacked(of_leaf[0])).astype(value.dtype)
                leaves[leaf.index] = round_products(moved, precision, leaf.path)
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

    def weigh(self, seeds: UInt32[Array, "pairs 2"], weights: Float[Array, " pairs *halves"]) -> Totals:
        """Sum weight * ε over pairs: exact integers for ±1, integer weights and at most `Noise.exact_pairs` pairs.

        Args:
            seeds: Seeds of the pairs.
            weights: [pairs], or [pairs, 2] of split pairs: those of the columns that both members share come first.
        """
        split, totals = self.noise.split, []
        for leaf, parts in zip(self._leaves, self.sample(seeds), strict=True):
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
        """Return the totals of no pairs: int32 where sums are exact."""
        kind = jnp.int32 if self.noise.exact else jnp.float32
        return [jnp.zeros(leaf.shape, kind) for leaf in self._leaves]

    def gradient(self, totals: Totals, scale: Float[Array, ""], params: Params) -> Params:
        """Turn totals into the estimate `scale * Σ weight * ε / unit`, a pytree like the parameters; 0 where frozen."""
        leaves = [_no_gradient(leaf) for leaf in jax.tree.leaves(params)]
        for leaf, total in zip(self._leaves, totals, strict=True):
            # Products, not quotients: XLA may turn a division into a product, and then the last bit differs.
            by = scale * (1 / (leaf.unit * (math.sqrt(self.noise.rank) if leaf.is_thin else 1.0)))
            leaves[leaf.index] = (total.astype(jnp.float32) * by).astype(leaves[leaf.index].dtype)
        return jax.tree.unflatten(self._treedef, leaves)

    def epsilon(self, seed: UInt32[Array, "2"], params: Params) -> Params:
        """Write out ε of one pair, a pytree like the parameters; 0 where frozen."""
        leaves = [jnp.zeros(jnp.shape(leaf), jnp.float32) for leaf in jax.tree.leaves(params)]
        for leaf, parts in zip(self._leaves, self.sample(seed), strict=True):
            written = jnp.sum(parts[0] * parts[1], axis=-1) if leaf.factors else parts[0]
            leaves[leaf.index] = written / math.sqrt(self.noise.rank) if leaf.is_thin else written
        return jax.tree.unflatten(self._treedef, leaves)

    @property
    def adds_up(self) -> bool:
        """Whether each member has a copy of some matrix."""
        return any(not leaf.factors and len(leaf.shape) > 1 for leaf in self._leaves)


def round_products(leaf: Array, precision: Precision, path: str = "") -> Any:
    """Let products with a matrix be taken in another type; other leaves, and float32, stay as they are."""
    if precision == "float32" or jnp.ndim(leaf) != 2:
        return leaf
    return PerturbedArray(leaf.astype(precision), None, None, None, leaf.dtype, path)


def _no_gradient(leaf: Any) -> Any:
    """Return zeros like a leaf; for random keys, of which there are none, those of `jax.grad`."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _is_common(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Mark the entries, or columns, of a perturbation that the members of a split pair share: every other one."""
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)


def _summed(leaf: Leaf, left: Array, right: Array) -> Array:
    """Sum left * right over rank and pairs, the last two axes of both, as one product of matrices a layer."""
    inner = left.shape[-2] * left.shape[-1]
    one, two = left.reshape(leaf.layers, -1, inner), right.reshape(leaf.layers, -1, inner)
    return jnp.einsum("lmk,lnk->lmn", one, two, precision=HIGHEST).reshape(leaf.shape)
