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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from esjax.core.perturbed import PerturbedArray
from esjax.core.rules import HIGHEST
from esjax.core.shaping import LIMIT
from esjax.core.signs import PackedSigns, draw, draw_words, unpacked
from esjax.core.units import default_unit, row_axes

Params = Any
"""A pytree of arrays."""

Precision = Literal["float32", "bfloat16"]
"""Type of what matrix products multiply."""

MOST_NAMED = 6
"""Leaves that an error names."""

OfLeaf = Callable[[str, Any], Any]
"""`(path, leaf) -> value`; a path is like "params/Dense_0/kernel"."""

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


@dataclass(frozen=True)
class _Leaf:
    """Plan of one perturbed leaf.

    Attributes:
        index: Place among the leaves of the pytree.
        path: Where it is.
        shape: Its shape.
        unit: Its step size.
        factors: Shapes of the two factors, without the rank; () where each parameter has an entry of its own.
        layers: Arrays along its first axis that have factors of their own; 1 where it is one array.
        row_of: For a bias: which perturbed leaf is its matrix, and along which factor its noise runs. None: no bias.
    """

    index: int
    path: str
    shape: tuple[int, ...]
    unit: float
    factors: tuple[tuple[int, ...], ...] = ()
    layers: int = 1
    row_of: tuple[int, int] | None = None

    @property
    def is_thin(self) -> bool:
        """Whether its noise is a sum over the rank."""
        return bool(self.factors) or self.row_of is not None


class Layout:
    """The noise of one pair over the leaves of a pytree.

    Attributes:
        noise: How members differ.
        units: Step size of each leaf, a pytree of numbers like the parameters.
        numbers: Numbers of noise that a pair needs.
    """

    def __init__(self, noise: Noise, params: Params) -> None:
        """See `Noise.lay_out`."""
        named, self._treedef = jax.tree_util.tree_flatten_with_path(params)
        names = [leaf_names(path) for path, _ in named]
        paths = ["/".join(parts) for parts in names]
        units = _units(noise, paths, [leaf for _, leaf in named], self._treedef)
        self.noise = noise
        self.units = jax.tree.unflatten(self._treedef, units)
        self._leaves = [
            _plan(noise, i, path, leaf, unit)
            for i, (path, (_, leaf), unit) in enumerate(zip(paths, named, units, strict=True))
            if _is_perturbed(noise, path, leaf)
        ]
        if not self._leaves:
            some = ", ".join(paths[:MOST_NAMED]) + (" and more" if len(paths) > MOST_NAMED else "")
            raise TypeError(f"no leaf of the parameters can be perturbed; there are: {some or 'none'}")
        self._leaves = _with_rows(self._leaves, names)
        self.numbers = sum(math.prod(shape) for leaf in self._leaves for shape in self._shapes(leaf))

    def _shapes(self, leaf: _Leaf) -> list[tuple[int, ...]]:
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

    def _row(self, leaf: _Leaf, of_leaf: list[Any], parts: list[list[Any]]) -> list[Any]:
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


def _units(noise: Noise, paths: list[str], leaves: list[Any], treedef: Any) -> list[float]:
    units = noise.units
    if units is None:
        return [default_unit(_one_layer(noise, path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]
    found, given = jax.tree.flatten(units)
    if given != treedef:  # a module of equinox is a tree that can be called
        if callable(units):
            found = [units(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        else:
            raise ValueError(f"units must be a tree of numbers like the parameters, {treedef}, got {given}")
    for path, unit in zip(paths, found, strict=True):
        if not (math.isfinite(unit) and unit > 0):
            raise ValueError(f"the unit of {path} must be above 0 and finite, got {unit}")
    return [float(unit) for unit in found]


def _is_perturbed(noise: Noise, path: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"leaf {path} of the parameters is a {type(leaf).__name__}; make it an array")
    is_chosen = noise.where is None or bool(noise.where(path, leaf))
    return is_chosen and leaf.size > 0 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _plan(noise: Noise, index: int, path: str, leaf: Any, unit: float) -> _Leaf:
    shape = tuple(leaf.shape)
    core = _one_layer(noise, path, leaf)
    layers = shape[: len(shape) - len(core)]
    is_full = noise.full_leaves is not None and bool(noise.full_leaves(path, leaf))
    if noise.rank and 2 <= len(core) <= 3 and not is_full:
        cut = row_axes(core)
        rows, columns = core[:cut], core[cut:]
        if math.prod(rows) > 1 and math.prod(columns) > 1:
            factors = (*layers, *rows, *[1] * len(columns)), (*layers, *[1] * len(rows), *columns)
            return _Leaf(index, path, shape, unit, factors, math.prod(layers))
    return _Leaf(index, path, shape, unit)


def _one_layer(noise: Noise, path: str, leaf: Any) -> tuple[int, ...]:
    """Return the shape of a leaf without its axis of layers."""
    shape = tuple(jnp.shape(leaf))
    if noise.stacked is None or not noise.stacked(path, leaf):
        return shape
    if len(shape) < 2:
        raise ValueError(f"leaf {path} of shape {list(shape)} has no axis of layers; let `stacked` pass over it")
    return shape[1:]


def leaf_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Name the way to a leaf of a pytree; the variables of nnx, which keep their array as `value`, count as leaves."""
    names = tuple(jax.tree_util.keystr((part,), simple=True) for part in path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _with_rows(leaves: list[_Leaf], names: list[tuple[str, ...]]) -> list[_Leaf]:
    """Find biases: the one other leaf beside a matrix, of the shape of its columns, or of its rows."""
    beside: dict[tuple[str, ...], list[int]] = {}
    for number, leaf in enumerate(leaves):
        beside.setdefault(names[leaf.index][:-1], []).append(number)
    found = list(leaves)
    for numbers in beside.values():
        if len(numbers) != 2:
            continue
        bias, matrix = sorted(numbers, key=lambda number: len(leaves[number].shape))
        rows, columns = _sides(leaves[matrix])
        if leaves[matrix].layers == 1 and leaves[bias].shape in (columns, rows):
            side = 1 if leaves[bias].shape == columns else 0
            found[bias] = replace(leaves[bias], factors=(), row_of=(matrix, side))
    return found


def _sides(leaf: _Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a matrix's row axes and of its column axes; of another leaf, none."""
    if not leaf.factors:
        return (), ()
    rows, _ = leaf.factors
    cut = next(axis for axis in range(len(leaf.shape)) if rows[axis:] == (1,) * len(rows[axis:]))
    return leaf.shape[:cut], leaf.shape[cut:]


def _is_common(shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Mark the entries, or columns, of a perturbation that the members of a split pair share: every other one."""
    return (jnp.arange(math.prod(shape)) % 2 == 0).reshape(shape)


def _summed(leaf: _Leaf, left: Array, right: Array) -> Array:
    """Sum left * right over rank and pairs, the last two axes of both, as one product of matrices a layer."""
    inner = left.shape[-2] * left.shape[-1]
    one, two = left.reshape(leaf.layers, -1, inner), right.reshape(leaf.layers, -1, inner)
    return jnp.einsum("lmk,lnk->lmn", one, two, precision=HIGHEST).reshape(leaf.shape)
