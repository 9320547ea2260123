"""Carried state: the windows of a step begin where those of the step before ended, with the state at that place.

States are exchanged as integer multiples of 1/`STEPS`. Each host sends the end states of its windows, and zeros for all
others, as part of its gradient sum (see `esjax.exchange.gradient_sums`). The sum over hosts has every window's state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Int, UInt32

from esjax.config.settings import Config
from esjax.models.model import Model, Params, State

STEPS = 2**14
"""Resolution: a state is rounded to 1/2^14, far less than any useful noise on activations."""

LARGEST_STATE = 2.0**16
"""Entries of a carried state are clipped to ± this value."""

Carried = Any
"""The states of all windows, float32 [pairs, sequences, entries]; () without carried state."""


def first_states(config: Config, model: Model, params: Params) -> Carried:
    """Make the states for the first step, or after a void step: the state at the start of a document."""
    if not config.data.carry:
        return ()
    start, _ = ravel_pytree(model.initial_state(params))
    return jnp.broadcast_to(start.astype(jnp.float32), (config.es.pairs, config.data.batch_size, start.size))


def states_of(model: Model, params: Params, carried: Carried, pairs: UInt32[Array, " pairs"]) -> State | None:
    """Return the states that the windows of some pairs begin with, in the structure of the model's state.

    Returns:
        A pytree with a leading axis of pairs times sequences; None without carried state.
    """
    if not isinstance(carried, Array):
        return None
    _, unravel = ravel_pytree(model.initial_state(params))
    return jax.vmap(unravel)(carried[pairs].reshape(-1, carried.shape[-1]))


def among_zeros(
    states: State, finite: Bool[Array, " windows"], carried: Carried, pairs: UInt32[Array, " pairs"]
) -> Int[Array, " vector_length"]:
    """Return the end states of the windows of some pairs as integers, with zeros for all other and for void windows."""
    if not isinstance(carried, Array):
        return jnp.zeros(0, jnp.int32)
    flat = jax.vmap(lambda state: ravel_pytree(state)[0])(states)
    flat = jnp.clip(jnp.where(finite[:, None], flat, 0.0), -LARGEST_STATE, LARGEST_STATE)
    whole = jnp.rint(flat * STEPS).astype(jnp.int32).reshape(len(pairs), *carried.shape[1:])
    return jnp.zeros(carried.shape, jnp.int32).at[pairs].add(whole).reshape(-1)


def take(total: Int[Array, " vector_length"], carried: Carried) -> Carried:
    """Read the states for the next step from the gradient sum of a step."""
    return jax.tree.map(lambda leaf: total.reshape(leaf.shape).astype(jnp.float32) / STEPS, carried)
