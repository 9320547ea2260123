"""Rules: how each operation of JAX works on a `PerturbedArray` without adding it up (Sarkar et al. 2025, section 4).

A rule takes the inputs of an operation, of which at least one is perturbed, and its parameters. It returns the output:
an array or another perturbed array. If it returns `NotImplemented`, the interpreter adds the inputs up.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from esjax.core.perturbed import PerturbedArray, is_perturbed
from esjax.core.signs import PackedSigns

HIGHEST = lax.Precision.HIGHEST
"""Products with factors keep all digits of float32. By default, the hardware would decide how many it keeps."""

Axes = tuple[int, ...]


def dot_general(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """Multiply: add the product with the base, which all members share, and the products with the thin factors."""
    if is_perturbed(lhs) and is_perturbed(rhs):
        return NotImplemented
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    if is_perturbed(lhs):
        value, x, of_value, of_x = lhs, rhs, (lhs_contracted, lhs_batch), (rhs_contracted, rhs_batch)
    else:
        value, x, of_value, of_x = rhs, lhs, (rhs_contracted, rhs_batch), (lhs_contracted, lhs_batch)
    operand = x
    if value.base.dtype != value.dtype:  # multiply in the narrower type, sum in the wider one
        operand = x.astype(value.base.dtype)
        params = {**params, "precision": None, "preferred_element_type": value.dtype}
    # The operand that differs between members comes first. Then their axis leads in the product, as it does in the thin
    # product that is added to it.
    numbers = ((of_x[0], of_value[0]), (of_x[1], of_value[1]))
    step = None if value.left is None else _thin_product(x, value, of_x, of_value)
    if step is None and value.left is not None:
        return NotImplemented
    product = lax.dot_general_p.bind(operand, value.base, dimension_numbers=numbers, **params)
    product = product if step is None else (product + step).astype(product.dtype)
    if value is lhs:
        batch, free = len(of_x[1]), x.ndim - len(of_x[0]) - len(of_x[1])
        order = [*range(batch), *range(batch + free, product.ndim), *range(batch, batch + free)]
        product = lax.transpose(product, order)
    return product


def _thin_product(
    x: Array, value: PerturbedArray, of_x: tuple[Axes, Axes], of_value: tuple[Axes, Axes]
) -> Array | None:
    """Multiply x by Σ_r left_r * right_r: contract each factor over the axes along which it varies.

    Axes have names: ("value", i) for axis i of the perturbed array, ("x", i) for a free axis of x, and "rank".

    Returns:
        The product, first the batch axes, then the free axes of x, then those of the value. None if both factors vary
        along a contracted axis.
    """
    contracted, batch = of_value
    shared = dict(zip([*of_x[0], *of_x[1]], [("value", axis) for axis in (*contracted, *batch)], strict=True))
    names: list[Any] = [shared.get(axis, ("x", axis)) for axis in range(x.ndim)]
    free = [("value", axis) for axis in range(len(value.shape)) if axis not in (*contracted, *batch)]
    wanted = [*(("value", axis) for axis in batch), *(name for name in names if name[0] == "x"), *free]

    # A scalar step is cheapest after the contraction, where the array is smallest.
    step = None if value.step is None or jnp.ndim(value.step) else value.step
    pair = value.factors() if step is None else value.plain_factors()
    factors = [_named(factor) for factor in pair]
    summed = {("value", axis) for axis in contracted}
    if summed & set(factors[0][1]) & set(factors[1][1]):
        return None
    partial, waiting = x.astype(jnp.promote_types(x.dtype, jnp.float32)), []
    for factor, axes in factors:
        if summed & set(axes):
            partial, names = _contract(partial, names, factor, axes, summed)
        else:
            waiting.append((factor, axes))
    # Along the axes that are still to be contracted, the perturbed array is constant: sum x over them.
    gone = [i for i, name in enumerate(names) if name in summed]
    partial, names = jnp.sum(partial, axis=gone) if gone else partial, [name for name in names if name not in summed]
    rank = pair[0].shape[-1]
    partial = partial if step is None else partial * step
    if rank > 1 and "rank" in names and len(waiting) == 1:
        factor, axes = waiting[0]
        if not (set(names) & set(axes)) - {"rank", *wanted[: len(batch)]}:
            partial, names = _contract(partial, names, factor, axes, {"rank"})
            return _arranged(partial, names, wanted)
    # With rank 1, multiply elementwise: XLA fuses that, while a matrix product of inner size 1 is a separate call.
    every = wanted if rank == 1 else [*wanted, "rank"]
    for factor, axes in waiting:
        partial, names = _arranged(partial, names, every) * _arranged(factor, axes, every), every
    partial = _arranged(partial, names, every)
    return partial if rank == 1 else jnp.sum(partial, axis=-1)


def _named(factor: Array) -> tuple[Array, list[Any]]:
    """Drop the axes along which a factor does not vary and name the others."""
    constant = [axis for axis in range(factor.ndim - 1) if factor.shape[axis] == 1]
    names = [("value", axis) for axis in range(factor.ndim - 1) if factor.shape[axis] != 1]
    if factor.shape[-1] == 1:
        return lax.squeeze(factor, [*constant, factor.ndim - 1]), names
    return lax.squeeze(factor, constant), [*names, "rank"]


def _contract(
    one: Array, one_names: Sequence[Any], two: Array, two_names: Sequence[Any], summed: set[Any]
) -> tuple[Array, list[Any]]:
    """Multiply two arrays and sum over those axes in `summed` that both have."""
    shared = [name for name in one_names if name in two_names]
    over, batch = [name for name in shared if name in summed], [name for name in shared if name not in summed]

    def places(some: list[Any]) -> tuple[list[int], list[int]]:
        return [one_names.index(name) for name in some], [two_names.index(name) for name in some]

    product = lax.dot_general(
        one,
        two.astype(one.dtype),
        dimension_numbers=(places(over), places(batch)),
        precision=HIGHEST,
        preferred_element_type=one.dtype,
    )
    rest = [name for names in (one_names, two_names) for name in names if name not in shared]
    return product, [*batch, *rest]


def _arranged(array: Array, names: Sequence[Any], wanted: Sequence[Any]) -> Array:
    """Put axes into the wanted order; a missing one gets size 1."""
    if list(names) == list(wanted):
        return array
    present = [name for name in wanted if name in names]
    array = lax.transpose(array, [names.index(name) for name in present])
    return lax.expand_dims(array, [i for i, name in enumerate(wanted) if name not in names])


def _each_part(value: PerturbedArray, change: Callable[[Array, bool], Array]) -> PerturbedArray:
    """Apply `change(part, is_factor)` to the base and both factors."""
    if value.left is None:
        return PerturbedArray(change(value.base, False), None, None, None, value.dtype, value.leaf)
    left, right = value.factors()
    return value.with_parts(change(value.base, False), change(left, True), change(right, True))


def transpose(value: PerturbedArray, *, permutation: Sequence[int], **_: Any) -> PerturbedArray:
    """Transpose each part."""
    return _each_part(value, lambda part, is_factor: lax.transpose(part, [*permutation, len(permutation)][: part.ndim]))


def squeeze(value: PerturbedArray, *, dimensions: Sequence[int], **_: Any) -> Any:
    """Drop axes of size 1."""
    return _if_worth_it(_each_part(value, lambda part, is_factor: lax.squeeze(part, dimensions)))


def broadcast_in_dim(
    value: Any, *rest: Any, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any
) -> Any:
    """Add axes; factors do not vary along them."""
    if rest:
        return NotImplemented

    def change(part: Array, is_factor: bool) -> Array:
        sizes = [1] * len(shape) if is_factor else list(shape)
        for axis, size in zip(broadcast_dimensions, part.shape, strict=False):
            sizes[axis] = size if is_factor else shape[axis]
        rank = part.shape[len(broadcast_dimensions) :]
        return lax.broadcast_in_dim(part, (*sizes, *rank), [*broadcast_dimensions, len(shape)][: part.ndim])

    return _each_part(value, change)


def reshape(value: Any, *rest: Any, new_sizes: Sequence[int], dimensions: Any, **_: Any) -> Any:
    """Split axes, or join neighbouring axes along which the same factor varies."""
    if rest or dimensions is not None:
        return NotImplemented
    groups = _reshape_groups(value.shape, tuple(new_sizes))
    if groups is None:
        return NotImplemented
    if value.left is None:
        return _each_part(value, lambda part, is_factor: part.reshape(new_sizes))
    factors = value.factors()
    shapes: list[list[int]] = [[], []]
    for old, new in groups:
        size = math.prod(value.shape[axis] for axis in old)
        for factor, shape in zip(factors, shapes, strict=True):
            here = math.prod(factor.shape[axis] for axis in old)
            if here not in (1, size):
                return NotImplemented
            shape.extend(new if here == size else [1] * len(new))
    left, right = (factor.reshape(*shape, factor.shape[-1]) for factor, shape in zip(factors, shapes, strict=True))
    return _if_worth_it(value.with_parts(value.base.reshape(new_sizes), left, right))


def _reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Group old axes with the new sizes that they become, in the smallest groups; None if the array is empty."""
    if math.prod(old) == 0:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        axes: list[int] = []
        sizes: list[int] = []
        a = b = 1
        while (not axes and not sizes) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                axes.append(i)
                a *= old[i]
                i += 1
            else:
                sizes.append(new[j])
                b *= new[j]
                j += 1
        groups.append((axes, sizes))
    return groups


def convert_element_type(value: PerturbedArray, *, new_dtype: Any, **_: Any) -> Any:
    """Cast the base; the factors stay float32."""
    if not jnp.issubdtype(new_dtype, jnp.floating):
        return NotImplemented
    base = value.base if value.base.dtype != value.dtype else value.base.astype(new_dtype)
    return PerturbedArray(base, value.left, value.right, value.step, jnp.dtype(new_dtype), value.leaf)


def copy(value: PerturbedArray, **_: Any) -> PerturbedArray:
    """Return the array unchanged."""
    return value


def add(one: Any, two: Any, **_: Any) -> Any:
    """Add up: a sum needs the whole array anyway, and XLA fuses the two sums. So it does not count as "no rule"."""
    return jnp.add(*(value.added_up() if is_perturbed(value) else value for value in (one, two)))


def mul(one: Any, two: Any, **_: Any) -> Any:
    """Multiply by a scalar."""
    value, number = (one, two) if is_perturbed(one) else (two, one)
    return _scaled(value, number, jnp.multiply)


def div(value: Any, number: Any, **_: Any) -> Any:
    """Divide by a scalar."""
    return _scaled(value, number, jnp.divide) if is_perturbed(value) else NotImplemented


def neg(value: PerturbedArray, **_: Any) -> Any:
    """Negate."""
    return _scaled(value, -1.0, jnp.multiply)


def _scaled(value: PerturbedArray, number: Any, change: Callable[[Any, Any], Array]) -> Any:
    if is_perturbed(number) or jnp.ndim(number) or value.base.dtype != value.dtype or value.left is None:
        return NotImplemented
    left, right = value.factors()
    return value.with_parts(change(value.base, number).astype(value.dtype), left, change(right, number))


def slice_(value: PerturbedArray, *, start_indices: Axes, limit_indices: Axes, strides: Axes | None, **_: Any) -> Any:
    """Slice at fixed positions."""

    def change(part: Array, is_factor: bool) -> Array:
        index = [
            slice(None) if is_factor and part.shape[axis] == 1 else slice(start, limit, step)
            for axis, (start, limit, step) in enumerate(
                zip(start_indices, limit_indices, strides or (1,) * len(start_indices), strict=True)
            )
        ]
        return part[tuple(index)]

    return _if_worth_it(_each_part(value, change))


def split(value: PerturbedArray, *, sizes: Sequence[Any], axis: int, **_: Any) -> Any:
    """Split along an axis."""
    parts, start = [], 0
    for size in map(int, sizes):
        starts, limits = [0] * len(value.shape), list(value.shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(slice_(value, start_indices=tuple(starts), limit_indices=tuple(limits), strides=None))
        start += size
    return parts


def dynamic_slice(value: Any, *starts: Any, slice_sizes: Sequence[int], **_: Any) -> Any:
    """Slice at computed positions: the row of a token, or the matrix of a layer."""
    if not is_perturbed(value) or len(starts) != len(slice_sizes):
        return NotImplemented
    is_row = tuple(slice_sizes) == (1, *value.shape[1:]) and value.right is not None and value.right.shape[0] == 1
    if is_row and isinstance(value.left, PackedSigns) and value.left.shape[0] != 1:
        _, right = value.factors()
        row = jnp.clip(starts[0], 0, value.shape[0] - 1).astype(jnp.int32)
        base = lax.dynamic_slice(value.base, starts, slice_sizes).astype(value.dtype)
        return base + jnp.sum(value.left.row(row) * right, axis=-1).astype(value.dtype)

    zero = jnp.zeros_like(starts[0])  # all start indices have one type

    def change(part: Array, is_factor: bool) -> Array:
        if not is_factor:
            return lax.dynamic_slice(part, starts, slice_sizes)
        varies = [size != 1 for size in part.shape[:-1]]
        where = [start if here else zero for start, here in zip(starts, varies, strict=True)]
        sizes = [size if here else 1 for size, here in zip(slice_sizes, varies, strict=True)]
        if (*sizes, part.shape[-1]) == part.shape:
            return part
        return lax.dynamic_slice(part, (*where, zero), (*sizes, part.shape[-1]))

    return _if_worth_it(_each_part(value, change))


def gather(value: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Sequence[int], **params: Any) -> Any:
    """Look up slices, such as rows of an embedding."""
    if not is_perturbed(value):
        return NotImplemented
    numbers, params = dimension_numbers, {**params, "unique_indices": params.get("unique_indices", False)}
    if getattr(numbers, "operand_batching_dims", ()):
        return NotImplemented
    base = lax.gather_p.bind(value.base, indices, dimension_numbers=numbers, slice_sizes=tuple(slice_sizes), **params)
    if value.left is None:
        return base.astype(value.dtype)
    batch = [axis for axis in range(base.ndim) if axis not in numbers.offset_dims]

    def change(factor: Array) -> Array:
        looked_up = [axis for axis in numbers.start_index_map if factor.shape[axis] != 1]
        sizes = [min(size, here) for size, here in zip(slice_sizes, factor.shape[:-1], strict=True)]
        if not looked_up:  # constant along the looked-up axes: one slice serves all
            part = lax.slice(factor, [0] * factor.ndim, [*sizes, factor.shape[-1]])
            part = lax.squeeze(part, numbers.collapsed_slice_dims)
            return lax.expand_dims(part, batch)
        columns = [i for i, axis in enumerate(numbers.start_index_map) if axis in looked_up]
        found = lax.GatherDimensionNumbers(
            offset_dims=(*numbers.offset_dims, base.ndim),
            collapsed_slice_dims=numbers.collapsed_slice_dims,
            start_index_map=tuple(looked_up),
        )
        return lax.gather_p.bind(
            factor,
            indices[..., jnp.array(columns)] if len(columns) < indices.shape[-1] else indices,
            dimension_numbers=found,
            slice_sizes=(*sizes, factor.shape[-1]),
            **{**params, "fill_value": 0},
        )

    left, right = value.factors()
    result = PerturbedArray(base, change(left), change(right), None, value.dtype, value.leaf)
    return _if_worth_it(result) if not batch else result.added_up()


def _if_worth_it(value: PerturbedArray) -> Any:
    """Add up a part that factors no longer make smaller: a row of a perturbed matrix is only a vector."""
    if value.left is None:
        return value
    left, right = value.factors()
    is_matrix = left.shape != right.shape and max(left.size, right.size) < value.base.size
    return value if is_matrix else value.added_up()


RULES: dict[str, Callable[..., Any]] = {
    "add": add,
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "copy": copy,
    "copy_p": copy,
    "div": div,
    "dot_general": dot_general,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
    "mul": mul,
    "neg": neg,
    "reshape": reshape,
    "sharding_constraint": copy,
    "slice": slice_,
    "split": split,
    "squeeze": squeeze,
    "transpose": transpose,
}
"""Rules by the name of the operation."""
