"""The operations on matrices that models are written against.

A model calls these and does not know whether its matrix is plain or perturbed. For a perturbed one the whole
population shares one product with the base matrix, and a member adds only its own low-rank part (the idea of
"Evolution Strategies at the Hyperscale", Sarkar et al. 2025, section 4).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from esjax.config import Precision

HIGHEST = jax.lax.Precision.HIGHEST
"""Products ask for all digits of their factors: else the kind of hardware would decide how many count."""


@struct.dataclass
class LowRank:
    """The matrix `weight + scale * leftᵀ right`, never added up.

    Attributes:
        weight: Base matrix, shared by all members.
        left: Factors along the first axis.
        right: Factors along the second axis.
        scale: Step along the perturbation, sign included.
    """

    weight: Float[Array, "rows columns"]
    left: Float[Array, "rank rows"]
    right: Float[Array, "rank columns"]
    scale: Float[Array, ""]


Matrix = Any
"""A leaf of a model's parameters: an array [rows, columns] or a `LowRank`; in `Model.unit`, a float."""

Vector = Any
"""A leaf of a model's parameters: an array [size]; in `Model.unit`, a float."""


def matmul(x: Float[Array, " rows"], matrix: Float[Array, "rows columns"] | LowRank) -> Float[Array, " columns"]:
    """Multiply a row vector with a matrix: numbers of the matrix's type, added up in float32."""
    if not isinstance(matrix, LowRank):
        return _product(x, matrix)
    return _product(x, matrix.weight) + _combine(matrix, jnp.matmul(x, matrix.left.T, precision=HIGHEST))


def lookup(matrix: Float[Array, "rows columns"] | LowRank, token: Int[Array, ""]) -> Float[Array, " columns"]:
    """Read the row of an embedding table that belongs to a token."""
    if not isinstance(matrix, LowRank):
        return matrix[token].astype(jnp.float32)
    return matrix.weight[token].astype(jnp.float32) + _combine(matrix, matrix.left[:, token])


def round_matrices(params: Any, precision: Precision) -> Any:
    """Round the matrices among the parameters of a member; a perturbation that is kept in factors stays as it is.

    Args:
        params: A pytree of matrices, vectors and other arrays, as `matmul` and `lookup` take them.
        precision: Type of what is multiplied; float32 changes nothing.
    """

    def rounded(leaf: Any) -> Any:
        if isinstance(leaf, LowRank):
            return LowRank(leaf.weight.astype(precision), leaf.left, leaf.right, leaf.scale)
        return leaf.astype(precision) if leaf.ndim == 2 else leaf

    return jax.tree.map(rounded, params, is_leaf=lambda leaf: isinstance(leaf, LowRank))


def _product(x: Float[Array, " rows"], weight: Float[Array, "rows columns"]) -> Float[Array, " columns"]:
    return jnp.matmul(x.astype(weight.dtype), weight, precision=HIGHEST, preferred_element_type=jnp.float32)


def _combine(matrix: LowRank, coefficients: Float[Array, " rank"]) -> Float[Array, " columns"]:
    scaled = matrix.scale * coefficients
    if matrix.left.shape[0] == 1:  # an outer product: XLA fuses it, where a product of inner size 1 is a call
        return scaled[0] * matrix.right[0]
    return jnp.matmul(scaled, matrix.right, precision=HIGHEST)
