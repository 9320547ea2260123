"""Layers of the models, in plain jax.numpy."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from esjax.core.rules import HIGHEST


class Affine(NamedTuple):
    """The weights of x ↦ x `matrix` + `bias`, or their units: two numbers."""

    matrix: Any
    bias: Any


def matmul(x: Float[Array, " rows"], matrix: Float[Array, "rows columns"]) -> Float[Array, " columns"]:
    """Multiply a row vector by a matrix, with all digits of float32."""
    return jnp.matmul(x, matrix, precision=HIGHEST)


def affine(x: Float[Array, " rows"], layer: Affine) -> Float[Array, " columns"]:
    """Multiply a row vector by a layer's matrix and add its bias."""
    return matmul(x, layer.matrix) + layer.bias
