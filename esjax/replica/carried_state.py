"""States that the windows of a step leave to those of the next, which begin where they end.

A state is kept as whole numbers of 1/`STEPS`: hosts hand in those of their windows as part of a vector of integers
(see `esjax.exchange.gradient_sums`), zeros for all others, and what the vectors add up to is every window's state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int, UInt32

from esjax.config.settings import Config
from esjax.models.model import Model, Params, State

STEPS = 2**14
"""Resolution of a state: steps a unit, far finer than any noise on activations that is of use."""

LARGEST_STATE = 2.0**16
"""Largest number of a state that is carried; what is beyond is cut off."""

Carried = Any
"""The states of all windows, [pairs, sequences, entries], in units of the model; () if none are carried."""


def first_states(config: Config, model: Model, params: Params) -> Carried:
    """Make the states that a run begins with, or goes on with after a void step: those of a document's beginning."""
    if not config.data.carry:
        return ()
    start, _ = ravel_pytree(model.initial_state(params))
    return jnp.broadcast_to(start.astype(jnp.float32), (config.es.pairs, config.data.batch_size, start.size))


def states_of(model: Model, params: Params, carried: Carried, pairs: UInt32[Array, " pairs"]) -> State | None:
    """Give the states that some pairs' windows begin with the shape that the model knows, sequences one after another.

    Returns:
        None if none are carried.
    """
    if not isinstance(carried, Array):
        return None
    _, unravel = ravel_pytree(model.initial_state(params))
    return jax.vmap(unravel)(carried[pairs].reshape(-1, carried.shape[-1]))


def among_zeros(
    states: State, finite: Bool[Array, " windows"], carried: Carried, pairs: UInt32[Array, " pairs"]
) -> Int[Array, " vector_length"]:
    """Put the states that some pairs' windows end with among zeros for all others, as integers.

    A window that does not count leaves zeros, too.
    """
    if not isinstance(carried, Array):
        return jnp.zeros(0, jnp.int32)
    flat = jax.vmap(lambda state: ravel_pytree(state)[0])(states)
    flat = jnp.clip(jnp.where(finite[:, None], flat, 0.0), -LARGEST_STATE, LARGEST_STATE)
    whole = jnp.rint(flat * STEPS).astype(jnp.int32).reshape(len(pairs), *carried.shape[1:])
    return jnp.zeros(carried.shape, jnp.int32).at[pairs].add(whole).reshape(-1)


def take(total: Int[Array, " vector_length"], carried: Carried) -> Carried:
    """Read the states of the next step's windows from a step's sum."""
    return jax.tree.map(lambda leaf: total.reshape(leaf.shape).astype(jnp.float32) / STEPS, carried)
