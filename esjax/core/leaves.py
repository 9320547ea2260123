"""Which leaves of a pytree are perturbed, with noise of which shape, and in which unit."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from esjax.core.units import default_unit, row_axes

MOST_NAMED = 6
"""Number of leaves that an error message names."""

ANoise = Any
"""`esjax.core.noise.Noise`, which cannot be imported here: that module imports this one."""

OfLeaf = Callable[[str, Any], Any]
"""`(path, leaf) -> value`. A path is a string such as "params/Dense_0/kernel"."""


@dataclass(frozen=True)
class Leaf:
    """The noise planned for one perturbed leaf.

    Attributes:
        index: Position among the leaves of the pytree.
        path: Path in the pytree, see `OfLeaf`.
        shape: Shape of the leaf.
        unit: Unit of the leaf, above 0.
        axes: Number of axes, those of one layer if layers are stacked.
        factors: Shapes of the two factors of low-rank noise, without the rank; () for full noise.
        layers: Number of arrays stacked along the first axis, each with separate factors; 1: not stacked.
        row_of: For a bias: position of its matrix among the planned leaves, and 0 or 1 for the factor of that matrix
            that has the bias's shape. None: not a bias.
    """

    index: int
    path: str
    shape: tuple[int, ...]
    unit: float
    axes: int
    factors: tuple[tuple[int, ...], ...] = ()
    layers: int = 1
    row_of: tuple[int, int] | None = None

    @property
    def is_thin(self) -> bool:
        """Whether the noise is a sum over the rank, to be divided by √rank."""
        return bool(self.factors) or self.row_of is not None


def plan_leaves(noise: ANoise, params: Any) -> tuple[Any, list[Leaf]]:
    """Plan the noise of each perturbed leaf.

    Args:
        noise: How members differ.
        params: A pytree of arrays, or of anything with shapes and types.

    Returns:
        The unit of each leaf, a pytree of floats like the parameters; and the plan of each perturbed leaf.

    Raises:
        TypeError: A leaf is not an array, or no leaf can be perturbed.
        ValueError: The units do not match the parameters, or one is not above 0.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [leaf_names(path) for path, _ in named]
    paths = ["/".join(parts) for parts in names]
    units = _units(noise, paths, [leaf for _, leaf in named], treedef)
    plans = [
        _plan(noise, i, path, leaf, unit)
        for i, (path, (_, leaf), unit) in enumerate(zip(paths, named, units, strict=True))
        if _is_perturbed(noise, path, leaf)
    ]
    if not plans:
        some = ", ".join(paths[:MOST_NAMED]) + (" and more" if len(paths) > MOST_NAMED else "")
        raise TypeError(f"no leaf of the parameters can be perturbed; there are: {some or 'none'}")
    return jax.tree.unflatten(treedef, units), _with_rows(plans, names)


def leaf_names(path: Sequence[Any]) -> tuple[str, ...]:
    """Return the names along the path to a leaf. The last name `value` of a variable of nnx is left out."""
    names = tuple(jax.tree_util.keystr((part,), simple=True) for part in path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def leaf_path(path: Sequence[Any]) -> str:
    """Return the path to a leaf as settings name it, such as `layers/0/bias`."""
    return "/".join(leaf_names(path))


def is_below(path: str, prefix: str) -> bool:
    """Return whether a path is that of the named leaf, or of a leaf below it."""
    return path == prefix or path.startswith(prefix + "/")


def _units(noise: ANoise, paths: list[str], leaves: list[Any], treedef: Any) -> list[float]:
    units = noise.units
    if units is None:
        return [default_unit(_one_layer(noise, path, leaf)) for path, leaf in zip(paths, leaves, strict=True)]
    found, given = jax.tree.flatten(units)
    if given != treedef:  # units that match the parameters may be callable, too: an equinox module is a pytree
        if callable(units):
            found = [units(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
        else:
            raise ValueError(f"units must be a tree of numbers like the parameters, {treedef}, got {given}")
    for path, unit in zip(paths, found, strict=True):
        if not (math.isfinite(unit) and unit > 0):
            raise ValueError(f"the unit of {path} must be above 0 and finite, got {unit}")
    return [float(unit) for unit in found]


def _is_perturbed(noise: ANoise, path: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"leaf {path} of the parameters is a {type(leaf).__name__}; make it an array")
    is_chosen = noise.where is None or bool(noise.where(path, leaf))
    return is_chosen and leaf.size > 0 and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _plan(noise: ANoise, index: int, path: str, leaf: Any, unit: float) -> Leaf:
    shape = tuple(leaf.shape)
    core = _one_layer(noise, path, leaf)
    layers = shape[: len(shape) - len(core)]
    is_full = noise.full_leaves is not None and bool(noise.full_leaves(path, leaf))
    if noise.rank and 2 <= len(core) <= 3 and not is_full:
        cut = row_axes(core)
        rows, columns = core[:cut], core[cut:]
        if math.prod(rows) > 1 and math.prod(columns) > 1:
            factors = (*layers, *rows, *[1] * len(columns)), (*layers, *[1] * len(rows), *columns)
            return Leaf(index, path, shape, unit, len(core), factors, math.prod(layers))
    return Leaf(index, path, shape, unit, len(core))


def _one_layer(noise: ANoise, path: str, leaf: Any) -> tuple[int, ...]:
    """Return the shape of one layer of a stacked leaf; of any other leaf, its shape."""
    shape = tuple(jnp.shape(leaf))
    if noise.stacked is None or not noise.stacked(path, leaf):
        return shape
    if len(shape) < 2:
        raise ValueError(f"leaf {path} of shape {list(shape)} has no axis of layers; let `stacked` return False for it")
    return shape[1:]


def _with_rows(leaves: list[Leaf], names: list[tuple[str, ...]]) -> list[Leaf]:
    """Mark biases. A bias is the only other leaf beside a matrix and has the shape of its columns or of its rows."""
    beside: dict[tuple[str, ...], list[int]] = {}
    for number, leaf in enumerate(leaves):
        beside.setdefault(names[leaf.index][:-1], []).append(number)
    found = list(leaves)
    for numbers in beside.values():
        if len(numbers) != 2:
            continue
        bias, matrix = sorted(numbers, key=lambda number: len(leaves[number].shape))
        if not leaves[matrix].factors or leaves[matrix].layers > 1:
            continue
        rows, columns = _sides(leaves[matrix])
        if leaves[bias].shape in (columns, rows):
            side = 1 if leaves[bias].shape == columns else 0
            found[bias] = replace(leaves[bias], factors=(), row_of=(matrix, side))
    return found


def _sides(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of a matrix's row axes and of its column axes."""
    rows, _ = leaf.factors
    cut = next(axis for axis in range(len(leaf.shape)) if rows[axis:] == (1,) * len(rows[axis:]))
    return leaf.shape[:cut], leaf.shape[cut:]
