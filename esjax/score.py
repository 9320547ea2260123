"""The loss of one set of parameters over whole documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esjax.evaluate import consume, token_loss
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
            def step(carry: tuple[State, Array], at: tuple[Array, Array]) -> tuple[tuple[State, Array], None]:
                state, total = carry
                token, counts = at
                loss = token_loss(model.predict(params, state), token)
                return (consume(model, params, state, token), total + jnp.where(counts, loss, 0)), None

            start = (model.initial_state(params), jnp.float32(0))
            (_, total), _ = jax.lax.scan(step, start, (tokens, scored))
            return total

        return jnp.sum(jax.vmap(lane_total)(tokens, scored)) / jnp.sum(scored, dtype=jnp.float32)

    return score
