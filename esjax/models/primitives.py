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

HIGHEST = jax.lax.Precision.HIGHEST
"""Products ask for full float32: reduced precision would make losses depend on the kind of hardware."""


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
    """Multiply a row vector with a matrix."""
    if not isinstance(matrix, LowRank):
        return jnp.matmul(x, matrix, precision=HIGHEST)
    base = jnp.matmul(x, matrix.weight, precision=HIGHEST)
    return base + _combine(matrix, jnp.matmul(x, matrix.left.T, precision=HIGHEST))


def lookup(matrix: Float[Array, "rows columns"] | LowRank, token: Int[Array, ""]) -> Float[Array, " columns"]:
    """Read the row of an embedding table that belongs to a token."""
    if not isinstance(matrix, LowRank):
        return matrix[token]
    return matrix.weight[token] + _combine(matrix, matrix.left[:, token])


def _combine(matrix: LowRank, coefficients: Float[Array, " rank"]) -> Float[Array, " columns"]:
    scaled = matrix.scale * coefficients
    if matrix.left.shape[0] == 1:  # an outer product: XLA fuses it, where a product of inner size 1 is a call
        return scaled[0] * matrix.right[0]
    return jnp.matmul(scaled, matrix.right, precision=HIGHEST)
