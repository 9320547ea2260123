"""One update: from an estimate of the gradient to the next training state."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from esjax.core.leaves import leaf_path
from esjax.core.noise import Totals
from esjax.core.units import in_units
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, TAIL
from esjax.models.model import Params
from esjax.replica.estimators.carried_state import Carried, take
from esjax.replica.estimators.feedback import Feedback, first_feedback, learn

NORMAL_DEVIATION = (math.pi / 2) ** 0.5
"""Standard deviation of a normal variable whose mean size is 1."""


@struct.dataclass
class TrainState:
    """Everything that a later step depends on.

    Attributes:
        step: Number of steps done, void ones included, int32.
        params: The parameters that members perturb.
        opt_state: State of the optax transformation.
        average: A running average of `params`, for evaluation and generation.
        spread: Standard deviation of the pairs' differences in the last step, in nats, if hosts exchange gradient sums
            of noise on weights; else 0.
        carried: States that the windows of the next step begin with, see `carried_state`; () without carried state.
        feedback: Learned feedback, see `esjax.replica.estimators.feedback`.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    average: PyTree
    spread: PyTree
    carried: PyTree
    feedback: Feedback


class UpdateInfo(NamedTuple):
    """Sizes of one update.

    Attributes:
        gradient_norm: Euclidean norm of the estimate, in units of each leaf.
        update_norm: Euclidean norm of the change of the parameters, in units of each leaf.
    """

    gradient_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


Apply = Callable[[TrainState, Params, Float[Array, ""]], tuple[TrainState, UpdateInfo]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    carried: Carried = (),
    feedback: Sequence[tuple[int, int]] = (),
) -> TrainState:
    """Make the state of step 0 from initial parameters and, with carried state, from `first_states`."""
    opt_state, spread = optimizer.init(params), jnp.float32(0)
    return TrainState(
        jnp.int32(0),
        params,
        opt_state,
        average=params,
        spread=spread,
        carried=carried,
        feedback=first_feedback(feedback),
    )


def make_apply(
    optimizer: optax.GradientTransformation,
    units: PyTree,
    average_fraction: float,
    is_trained: Callable[[str], bool] = lambda path: True,
) -> Apply:
    """Make the function that turns an estimate of the gradient into the next state.

    Args:
        optimizer: Any optax transformation; it sees the gradient and the parameters in units of each leaf.
        units: Unit of each leaf, see `Model.units`.
        average_fraction: Fraction of the run so far, from 0 to 1, over which `TrainState.average` averages, by
            polynomial-decay averaging (Shamir & Zhang 2013, section 4). 0: no average.
        is_trained: Whether the parameter at a path changes; decay would change frozen ones, too.

    Returns:
        `(state, gradient, loss) -> (state, info)`; jit it. The loss goes to optimizers that take a `value`.
    """
    scaled = in_units(optimizer, units)

    def apply(state: TrainState, gradient: Params, loss: Float[Array, ""]) -> tuple[TrainState, UpdateInfo]:
        updates, opt_state = scaled.update(gradient, state.opt_state, state.params, value=loss)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, update: update if is_trained(leaf_path(path)) else jnp.zeros_like(update), updates
        )
        params = jax.tree.map(jnp.add, state.params, updates)
        step = state.step + 1
        if average_fraction == 0:
            average = params
        else:
            share = 1 / (average_fraction * state.step.astype(jnp.float32) + 1)
            average = jax.tree.map(lambda old, new: old + share * (new - old), state.average, params)
        slope = jax.tree.map(lambda leaf, unit: leaf * unit, gradient, units)
        change = jax.tree.map(lambda leaf, unit: leaf / unit, updates, units)
        info = UpdateInfo(optax.tree.norm(slope), optax.tree.norm(change))
        return TrainState(step, params, opt_state, average, state.spread, state.carried, state.feedback), info

    return apply


def make_apply_sum(
    apply: Apply, gradient: Callable[[Totals, Float[Array, ""], Params], Params], zeros: Totals
) -> Callable[
    [TrainState, Int[Array, " vector_length"], Float[Array, ""], Float[Array, ""]], tuple[TrainState, UpdateInfo]
]:
    """Make the function that turns a gradient sum, see `esjax.exchange.gradient_sums`, into the next state.

    Args:
        apply: See `make_apply`.
        gradient: `(totals, scale, params) -> gradient`.
        zeros: Totals of 0, for their shapes.

    Returns:
        `(state, total, scale, loss) -> (state, info)`. Jit it.
    """
    flat, unravel = ravel_pytree(zeros)

    def apply_sum(
        state: TrainState, total: Int[Array, " vector_length"], scale: Float[Array, ""], loss: Float[Array, ""]
    ) -> tuple[TrainState, UpdateInfo]:
        state, info = apply(state, gradient(unravel(total[: flat.size]), scale, state.params), loss)
        counted, _, differences = total[-TAIL:].astype(jnp.float32)
        spread = NORMAL_DEVIATION * differences / DIFFERENCE_STEPS / jnp.maximum(counted, 1)
        end = flat.size + sum(matrix.size for matrix in state.feedback.matrices)
        feedback = learn(state.feedback, total[flat.size : end])
        carried = take(total[end:-TAIL], state.carried)
        return dataclasses.replace(state, spread=spread, carried=carried, feedback=feedback), info

    return apply_sum
