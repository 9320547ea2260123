"""Units: the size of a typical entry of each leaf, of which perturbations and updates are multiples.

So sigma and the learning rate mean the same for every leaf and for every width, whatever the equations of a model. Adam
moves every entry by about the learning rate, whatever the gradient's size, so its step needs units as much as sigma
does.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

VECTOR_UNIT = 0.3
"""Unit of vectors and numbers: with 1, the noise of biases drowns that of matrices of unit 1/√fan-in."""

STEPS_AN_OCTAVE = 8
"""Units from first weights are rounded to so many steps an octave."""


def default_unit(shape: Sequence[int]) -> float:
    """Choose the unit of a leaf by its shape: 1/√fan-in for two or more axes, fan-in being the rows, else 0.3."""
    return VECTOR_UNIT if len(shape) < 2 else max(math.prod(shape[: row_axes(shape)]), 1) ** -0.5


def row_axes(shape: Sequence[int]) -> int:
    """Choose how many axes of a leaf are the rows of a matrix: rows and columns come closest in size."""
    return min(range(1, len(shape)), key=lambda cut: math.prod(shape[:cut]) + math.prod(shape[cut:]))


def initial_units(params: PyTree) -> PyTree:
    """Make units from first weights: the root mean square of each leaf's values.

    A leaf of zeros gets `default_unit`. Values are rounded to eight steps an octave, so that first weights that differ
    in last bits between kinds of processors have the same units.

    Args:
        params: A pytree of arrays, not traced.

    Returns:
        A pytree of numbers like `params`.
    """

    def unit(leaf: Any) -> float:
        values = np.asarray(leaf, np.float64)
        size = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
        return (
            2.0 ** (round(STEPS_AN_OCTAVE * math.log2(size)) / STEPS_AN_OCTAVE) if size else default_unit(values.shape)
        )

    return jax.tree.map(unit, params)


def in_units(optimizer: optax.GradientTransformation, units: PyTree) -> optax.GradientTransformationExtraArgs:
    """Let an optimizer see parameters, gradients and updates in units of each leaf.

    Args:
        optimizer: Any optax transformation.
        units: A pytree of numbers like the parameters, those of the noise.

    Returns:
        A transformation of gradients and parameters in plain coordinates.
    """
    inner = optax.with_extra_args_support(optimizer)

    def divided(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, unit: leaf / unit, params, units)

    def multiplied(gradient: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf, unit: leaf * unit, gradient, units)

    def init(params: PyTree) -> Any:
        return inner.init(divided(params))

    def update(gradient: PyTree, state: Any, params: PyTree | None = None, **more: Any) -> tuple[PyTree, Any]:
        updates, state = inner.update(multiplied(gradient), state, None if params is None else divided(params), **more)
        return multiplied(updates), state

    return optax.GradientTransformationExtraArgs(init, update)
