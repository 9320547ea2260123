"""The evolution-strategies update: from seeds and shaped weights to the next parameters.

The estimate of the gradient is the mean over pairs of (shaped weight * ε), in units of each leaf (Salimans et al.
2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", algorithm 2, with antithetic pairs).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8, PyTree, UInt32

from esjax.carrying import Carried, take
from esjax.evaluate import make_deal
from esjax.models.model import Params
from esjax.noise import Space, Total, pair_seeds
from esjax.sums import DIFFERENCE_STEPS, TAIL

NORMAL_DEVIATION = (math.pi / 2) ** 0.5
"""Standard deviation of a normal variable whose mean size is 1."""


@struct.dataclass
class TrainState:
    """Everything that a later step depends on.

    Attributes:
        step: Number of updates applied or found void, int32.
        params: The parameters around which members are perturbed.
        opt_state: State of the optax transformation.
        average: The parameters to evaluate and generate with: a running average of `params`.
        spread: Standard deviation of the pairs' differences in the last step, in nats, where hosts hand in sums of
            weighted perturbations; else 0.
        carried: States that the next step's windows begin with, see `esjax.carrying`; () if they are not carried.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    average: PyTree
    spread: PyTree
    carried: PyTree


class UpdateInfo(NamedTuple):
    """What one update did.

    Attributes:
        gradient_norm: Euclidean norm of the estimate, in units of each leaf.
        update_norm: Euclidean norm of the change of the parameters, in units of each leaf.
    """

    gradient_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


WeighPairs = Callable[
    [
        Total,
        UInt32[Array, "2"],
        Int[Array, ""],
        UInt32[Array, "chunks chunk_pairs"],
        Int8[Array, "chunks chunk_pairs *halves"],
        Int[Array, ""],
    ],
    Total,
]
ApplyTotal = Callable[[TrainState, Total, Float[Array, ""]], tuple[TrainState, UpdateInfo]]


def init_state(params: Params, optimizer: optax.GradientTransformation, carried: Carried = ()) -> TrainState:
    """Start a run from its first parameters, and from `first_states` if it carries them."""
    opt_state, spread = optimizer.init(params), jnp.float32(0)
    return TrainState(jnp.int32(0), params, opt_state, average=params, spread=spread, carried=carried)


def zero_total(space: Space, params: Params) -> Total:
    """Make the total of no pairs."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32 if space.exact else jnp.float32), params)


def make_weigh_pairs(space: Space, mesh: Mesh) -> WeighPairs:
    """Make the function that grows every pair's noise again and sums it.

    Args:
        space: How members differ from the parameters.
        mesh: Devices that share the work; one axis, `PAIRS_AXIS`.

    Returns:
        `(total, stream, step, pairs, weights, count) -> total` adds Σ weight * ε over the first `count` chunks of
        pairs, named by the stream and the step. A chunk is what one device sums at a time, at most `space.exact_pairs`.
        With Rademacher noise the total is int32 and exact, whatever the chunks, their order and the devices, while a
        step holds at most 2^31 / 127 / rank pairs, 16 million at rank 1. Jit it.
    """

    def weigh(chunk: Array, total: Total, stream: Array, step: Array, pairs: Array, weights: Array) -> Total:
        noise = space.sample(pair_seeds(stream, step, pairs[chunk]))
        addend = space.weigh(noise, weights[chunk].astype(jnp.float32))
        return jax.tree.map(lambda leaf, more: leaf + more.astype(leaf.dtype), total, addend)

    deal = make_deal(mesh, weigh)

    def weigh_pairs(
        total: Total,
        stream: UInt32[Array, "2"],
        step: Int[Array, ""],
        pairs: UInt32[Array, "chunks chunk_pairs"],
        weights: Int8[Array, "chunks chunk_pairs *halves"],
        count: Int[Array, ""],
    ) -> Total:
        assert pairs.shape[1] <= space.exact_pairs  # float32 holds every integer up to 2^24
        addend = deal(count, jax.tree.map(jnp.zeros_like, total), stream, step, pairs, weights)
        return jax.tree.map(jnp.add, total, addend)

    return weigh_pairs


def make_apply_total(
    mean: Callable[[Total, Float[Array, ""]], Params],
    optimizer: optax.GradientTransformation,
    units: PyTree,
    average_fraction: float,
) -> ApplyTotal:
    """Make the function that turns a total into the next state.

    Args:
        mean: `(total, scale) -> estimate`, see `Space.mean`.
        optimizer: Any optax transformation; it sees the estimate, and the parameters, in units of each leaf.
        units: Size of a typical entry of each leaf, see `Model.units`.
        average_fraction: Part of the run, in (0, 1], over which `TrainState.average` looks back, by
            polynomial-decay averaging (Shamir & Zhang 2013, section 4); 0: no averaging.

    Returns:
        `(state, total, scale) -> (state, info)`. Jit it.
    """

    def apply_total(state: TrainState, total: Total, scale: Float[Array, ""]) -> tuple[TrainState, UpdateInfo]:
        estimate = mean(total, scale)
        in_units = jax.tree.map(lambda leaf, unit: leaf / unit, state.params, units)
        updates, opt_state = optimizer.update(estimate, state.opt_state, in_units)
        params = jax.tree.map(lambda leaf, update, unit: leaf + unit * update, state.params, updates, units)
        step = state.step + 1
        if average_fraction == 0:
            average = params
        else:
            share = 1 / (average_fraction * state.step.astype(jnp.float32) + 1)
            average = jax.tree.map(lambda old, new: old + share * (new - old), state.average, params)
        info = UpdateInfo(optax.tree.norm(estimate), optax.tree.norm(updates))
        return TrainState(step, params, opt_state, average, state.spread, state.carried), info

    return apply_total


def make_apply_sum(
    apply_total: ApplyTotal, params: Params
) -> Callable[[TrainState, Int[Array, " numbers"], Float[Array, ""]], tuple[TrainState, UpdateInfo]]:
    """Make the function that turns a sum of vectors, see `esjax.sums`, into the next state.

    Args:
        apply_total: See `make_apply_total`.
        params: The parameters, for their shapes.

    Returns:
        `(state, total, scale) -> (state, info)`. Jit it.
    """
    zeros, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), params))

    def apply_sum(
        state: TrainState, total: Int[Array, " numbers"], scale: Float[Array, ""]
    ) -> tuple[TrainState, UpdateInfo]:
        state, info = apply_total(state, unravel(total[: zeros.size]), scale)
        counted, _, differences = total[-TAIL:].astype(jnp.float32)
        spread = NORMAL_DEVIATION * differences / DIFFERENCE_STEPS / jnp.maximum(counted, 1)
        carried = take(total[zeros.size : -TAIL], state.carried)
        return dataclasses.replace(state, spread=spread, carried=carried), info

    return apply_sum
