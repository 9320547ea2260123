"""Units: the size of a typical entry of each leaf. Perturbations and updates are multiples of it.

So sigma and the learning rate mean the same for every leaf, every width and every model. Adam moves each entry by about
the learning rate, whatever the size of the gradient, so its step needs units as much as sigma does.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

VECTOR_UNIT = 0.3
"""Unit of vectors and scalars. With 1, the noise of the biases would outweigh that of matrices of unit 1/√fan-in."""

STEPS_AN_OCTAVE = 8
"""Units of initial weights are rounded to 2^(n/8), eight steps per factor of 2."""


def default_unit(shape: Sequence[int]) -> float:
    """Return the unit of a leaf by its shape: 1/√fan-in for two or more axes, where rows are the fan-in; else 0.3."""
    return VECTOR_UNIT if len(shape) < 2 else max(math.prod(shape[: row_axes(shape)]), 1) ** -0.5


def row_axes(shape: Sequence[int]) -> int:
    """Return how many leading axes are the rows of a matrix, so that rows and columns are closest in size."""
    return min(range(1, len(shape)), key=lambda cut: math.prod(shape[:cut]) + math.prod(shape[cut:]))


def initial_units(params: PyTree) -> PyTree:
    """Make units from initial weights: the root mean square of each leaf.

    A leaf of zeros gets `default_unit`. Units are rounded to eight steps per factor of 2: initial weights may differ in
    their last bits between processors, and their units should not.

    Args:
        params: A pytree of arrays, not traced.

    Returns:
        A pytree of floats like `params`.
    """

    def unit(leaf: Any) -> float:
        values = np.asarray(leaf, np.float64)
        size = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
        return (
            2.0 ** (round(STEPS_AN_OCTAVE * math.log2(size)) / STEPS_AN_OCTAVE) if size else default_unit(values.shape)
        )

    return jax.tree.map(unit, params)


def in_units(optimizer: optax.GradientTransformation, units: PyTree) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it sees parameters, gradients and updates in units of each leaf.

    Args:
        optimizer: Any optax transformation.
        units: The units of the noise: a pytree of numbers like the parameters.

    Returns:
        A transformation that takes and returns plain gradients, parameters and updates.
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
