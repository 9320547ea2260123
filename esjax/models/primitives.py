"""The operations on matrices that models are written against.

A model calls these and does not know whether its matrix is plain or perturbed. For a perturbed one the whole
population shares one product with the base matrix, and a member adds only its own low-rank part (the idea of
"Evolution Strategies at the Hyperscale", Sarkar et al. 2025, section 4).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from esjax.config import Precision
from esjax.signs import PackedSigns, unpacked

HIGHEST = jax.lax.Precision.HIGHEST
"""Products ask for all digits of their factors: else the kind of hardware would decide how many count."""


@struct.dataclass
class LowRank:
    """The matrix `weight + (scale * leftᵀ right) * turned`, never added up.

    Attributes:
        weight: Base matrix, shared by all members.
        left: Factors along the first axis, [rank, rows].
        right: Factors along the second axis, [rank, columns].
        scale: Step along the perturbation, sign included unless `turned` has it.
        turned: What else multiplies each column of the perturbation, ±1. None: nothing.
    """

    weight: Float[Array, "rows columns"]
    left: Float[Array, "rank rows"] | PackedSigns
    right: Float[Array, "rank columns"] | PackedSigns
    scale: Float[Array, ""]
    turned: Float[Array, " columns"] | None = None


Matrix = Any
"""A leaf of a model's parameters: an array [rows, columns] or a `LowRank`; in `Model.unit`, a float."""

Vector = Any
"""A leaf of a model's parameters: an array [size]; in `Model.unit`, a float."""


class Affine(NamedTuple):
    """The weights of x ↦ x `matrix` + `bias`, which low-rank noise perturbs as one matrix with a row more."""

    matrix: Matrix
    bias: Vector


@struct.dataclass
class LowRankAffine:
    """A perturbed `Affine`, never added up: its bias is `base_bias + (shiftᵀ right) * turned`.

    It has no `matrix` and no `bias`: whoever asks for one of them alone would get what is not perturbed.

    Attributes:
        perturbed: Its matrix.
        base_bias: Base bias, shared by all members.
        shift: Steps of the bias along the matrix's right factors, sign included unless `turned` has it.
    """

    perturbed: LowRank
    base_bias: Float[Array, " columns"]
    shift: Float[Array, " rank"]


AffineLike = Any
"""An `Affine` among a model's parameters, or a `LowRankAffine`; in `Model.unit`, an `Affine` of floats."""


def matmul(x: Float[Array, " rows"], matrix: Float[Array, "rows columns"] | LowRank) -> Float[Array, " columns"]:
    """Multiply a row vector with a matrix: numbers of the matrix's type, added up in float32."""
    if not isinstance(matrix, LowRank):
        return _product(x, matrix)
    return _product(x, matrix.weight) + _combine(matrix, matrix.scale * _coefficients(x, matrix))


def affine(x: Float[Array, " rows"], layer: Affine | LowRankAffine) -> Float[Array, " columns"]:
    """Multiply a row vector with a layer's matrix, see `matmul`, and add its bias."""
    if not isinstance(layer, LowRankAffine):
        return _product(x, layer.matrix) + layer.bias
    matrix = layer.perturbed
    coefficients = matrix.scale * _coefficients(x, matrix) + layer.shift
    return _product(x, matrix.weight) + layer.base_bias + _combine(matrix, coefficients)


def lookup(matrix: Float[Array, "rows columns"] | LowRank, token: Int[Array, ""]) -> Float[Array, " columns"]:
    """Read the row of an embedding table that belongs to a token."""
    if not isinstance(matrix, LowRank):
        return matrix[token].astype(jnp.float32)
    left = matrix.left.column(token) if isinstance(matrix.left, PackedSigns) else matrix.left[:, token]
    return matrix.weight[token].astype(jnp.float32) + _combine(matrix, matrix.scale * left)


def add_up(perturbed: LowRank | LowRankAffine) -> Any:
    """Write a perturbed matrix or layer out, for a model that does not use the functions above."""
    if isinstance(perturbed, LowRank):
        rows = jax.vmap(lambda left: _combine(perturbed, perturbed.scale * left), in_axes=1)(unpacked(perturbed.left))
        return perturbed.weight + rows
    matrix = perturbed.perturbed
    return Affine(add_up(matrix), perturbed.base_bias + _combine(matrix, perturbed.shift))


def round_matrices(params: Any, precision: Precision) -> Any:
    """Round the matrices among the parameters of a member; a perturbation that is kept in factors stays as it is.

    Args:
        params: A pytree of matrices, vectors and other arrays, as `matmul` and `lookup` take them.
        precision: Type of what is multiplied; float32 changes nothing.
    """

    def rounded(leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            return dataclasses.replace(leaf, weight=leaf.weight.astype(precision))
        return leaf.astype(precision) if leaf.ndim == 2 else leaf

    return jax.tree.map(rounded, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))


def _product(x: Float[Array, " rows"], weight: Float[Array, "rows columns"]) -> Float[Array, " columns"]:
    return jnp.matmul(x.astype(weight.dtype), weight, precision=HIGHEST, preferred_element_type=jnp.float32)


def _coefficients(x: Float[Array, " rows"], matrix: LowRank) -> Float[Array, " rank"]:
    return jnp.matmul(x, unpacked(matrix.left).T, precision=HIGHEST)


def _combine(matrix: LowRank, coefficients: Float[Array, " rank"]) -> Float[Array, " columns"]:
    right = unpacked(matrix.right)
    # With one factor an outer product: XLA fuses it, where a product of inner size 1 is a call.
    step = coefficients[0] * right[0] if len(right) == 1 else jnp.matmul(coefficients, right, precision=HIGHEST)
    return step if matrix.turned is None else step * matrix.turned
