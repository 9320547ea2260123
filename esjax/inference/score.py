"""The loss of one set of parameters over whole documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esjax.models.member import Member
from esjax.models.model import Model, Params

Score = Callable[[Params, Int[Array, "lanes length"], Bool[Array, "lanes length"]], Float[Array, ""]]


def make_score(model: Model) -> Score:
    """Make the function `(params, tokens, scored) -> loss`: mean nats per scored token; jit it.

    Every lane starts at the start of a document and carries the state along, anew after each STOP, see
    `esjax.data.packing.Lanes`.
    """

    def score(
        params: Params, tokens: Int[Array, "lanes length"], scored: Bool[Array, "lanes length"]
    ) -> Float[Array, ""]:
        # All losses are kept and then summed: added up one by one, millions of float32 would lose a part of the sum.
        nats = jax.vmap(Member(model, params).nats)(tokens)
        totals = jnp.sum(jnp.where(scored, nats, 0), axis=1)
        return jnp.sum(totals) / jnp.sum(scored, dtype=jnp.float32)

    return score
