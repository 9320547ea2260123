"""The loss of one set of parameters over whole documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esjax.member import consume, token_loss
from esjax.models.model import Model, Params, State

Score = Callable[[Params, Int[Array, "lanes length"], Bool[Array, "lanes length"]], Float[Array, ""]]


def make_score(model: Model) -> Score:
    """Make the function `(params, tokens, scored) -> loss`: mean nats per scored token; jit it.

    Every lane starts at the start of a document and carries the state along, anew after each STOP, see
    `esjax.data.packing.Lanes`.
    """

    def score(
        params: Params, tokens: Int[Array, "lanes length"], scored: Bool[Array, "lanes length"]
    ) -> Float[Array, ""]:
        def lane_total(tokens: Int[Array, " length"], scored: Bool[Array, " length"]) -> Float[Array, ""]:
            def step(state: State, token: Array) -> tuple[State, Array]:
                loss = token_loss(model.predict(params, state), token)
                return consume(model, params, state, token), loss

            _, losses = jax.lax.scan(step, model.initial_state(params), tokens)
            # Summed afterwards: added up one by one, millions of float32 losses would lose a part of the sum.
            return jnp.sum(jnp.where(scored, losses, 0))

        return jnp.sum(jax.vmap(lane_total)(tokens, scored)) / jnp.sum(scored, dtype=jnp.float32)

    return score
