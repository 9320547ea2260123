"""The evolution-strategies update: from seeds and shaped weights to the next parameters.

The estimate of the gradient is the mean over pairs of (shaped weight * ε), in units of each leaf (Salimans et al.
2017, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", algorithm 2, with antithetic pairs).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int8, PyTree, UInt32

from esjax.evaluate import PAIRS_AXIS, into_chunks
from esjax.models.model import Params
from esjax.noise import Space, Total


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


WeighSeeds = Callable[[UInt32[Array, "pairs 2"], Int8[Array, " pairs"]], Total]
ApplyTotal = Callable[[TrainState, Total, Float[Array, ""]], tuple[TrainState, UpdateInfo]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Start a run from its first parameters."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), average=params)


def make_weigh_seeds(space: Space, mesh: Mesh, chunk_pairs: int) -> WeighSeeds:
    """Make the function that grows every pair's noise again and sums it.

    Args:
        space: How members differ from the parameters.
        mesh: Devices that share the work; one axis, `PAIRS_AXIS`.
        chunk_pairs: Pairs whose noise one device holds at a time.

    Returns:
        `(seeds, weights) -> total`, Σ weight * ε over any number of pairs. With Rademacher noise the total is int32
        and exact, whatever the chunking and the devices; totals of several calls may be added. Exact while a step
        holds at most 2^31 / 127 / rank pairs, 16 million at rank 1. Jit it.
    """
    chunk_pairs = min(chunk_pairs, space.exact_pairs)  # float32 holds every integer up to 2^24

    def weigh_chunk(seeds: Array, weights: Array) -> Total:
        noise = jax.vmap(space.sample)(seeds)
        total = space.weigh(noise, weights.astype(jnp.float32))
        return jax.tree.map(lambda leaf: leaf.astype(jnp.int32), total) if space.exact else total

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(PAIRS_AXIS), PartitionSpec(PAIRS_AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def weigh_shard(seeds: Array, weights: Array) -> Total:
        def add_chunk(total: Total, chunk: tuple[Array, Array]) -> tuple[Total, None]:
            return jax.tree.map(jnp.add, total, weigh_chunk(*chunk)), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(weigh_chunk, seeds[0], weights[0])
        )
        total, _ = jax.lax.scan(add_chunk, zeros, (seeds, weights))
        return jax.lax.psum(total, PAIRS_AXIS)

    def weigh_seeds(seeds: UInt32[Array, "pairs 2"], weights: Int8[Array, " pairs"]) -> Total:
        return weigh_shard(into_chunks(seeds, mesh.size, chunk_pairs), into_chunks(weights, mesh.size, chunk_pairs))

    return weigh_seeds


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
