"""The evolution-strategies update: from seeds and shaped weights to the next parameters.

The estimate of the gradient is the mean over pairs of (shaped weight * ε), in units of each leaf (Salimans et al.
2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", algorithm 2, with antithetic pairs).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8, PyTree, UInt32

from esjax.evaluate import make_deal
from esjax.models.model import Params
from esjax.noise import Space, Total, pair_seeds


@struct.dataclass
class TrainState:
    """Everything that a later step depends on.

    Attributes:
        step: Number of updates applied or found void, int32.
        params: The parameters around which members are perturbed.
        opt_state: State of the optax transformation.
        average: The parameters to evaluate and generate with: a running average of `params`.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    average: PyTree


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
        Int8[Array, "chunks chunk_pairs"],
        Int[Array, ""],
    ],
    Total,
]
ApplyTotal = Callable[[TrainState, Total, Float[Array, ""]], tuple[TrainState, UpdateInfo]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Start a run from its first parameters."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), average=params)


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
        weights: Int8[Array, "chunks chunk_pairs"],
        count: Int[Array, ""],
    ) -> Total:
        assert pairs.shape[1] <= space.exact_pairs  # float32 holds every integer up to 2^24
        addend = deal(count, jax.tree.map(jnp.zeros_like, total), stream, step, pairs, weights)
        return jax.tree.map(jnp.add, total, addend)

    return weigh_pairs


def make_apply_total(
    space: Space, optimizer: optax.GradientTransformation, units: PyTree, average_fraction: float
) -> ApplyTotal:
    """Make the function that turns a total into the next state.

    Args:
        space: How members differ from the parameters.
        optimizer: Any optax transformation; it sees the estimate, and the parameters, in units of each leaf.
        units: Size of a typical entry of each leaf, see `Model.units`.
        average_fraction: Part of the run, in (0, 1], over which `TrainState.average` looks back, by
            polynomial-decay averaging (Shamir & Zhang 2013, section 4); 0: no averaging.

    Returns:
        `(state, total, scale) -> (state, info)`; `scale * total` is the estimate. Jit it.
    """

    def apply_total(state: TrainState, total: Total, scale: Float[Array, ""]) -> tuple[TrainState, UpdateInfo]:
        estimate = space.mean(total, scale)
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
        return TrainState(step, params, opt_state, average), info

    return apply_total
