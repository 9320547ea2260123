"""The mean loss of a model over whole documents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from esjax.models.member import Member
from esjax.models.model import Model, Params

Score = Callable[[Params, Int[Array, "lanes length"], Bool[Array, "lanes length"]], Float[Array, ""]]


MOST_LOGITS = 2**28
"""Most logits in memory at a time, for models that read whole sequences; 1 GiB."""


def make_score(model: Model) -> Score:
    """Make the function `(params, tokens, scored) -> loss`, the mean nats per scored token; it can be jitted.

    `tokens` and `scored` are those of `esjax.data.packing.Lanes`. A lane starts with a document; the state is reset
    after each STOP.
    """

    def score(
        params: Params, tokens: Int[Array, "lanes length"], scored: Bool[Array, "lanes length"]
    ) -> Float[Array, ""]:
        # Keep all losses and sum them at the end: adding millions of float32 one by one loses precision.
        nats = jax.lax.map(Member(model, params).nats, tokens, batch_size=_lanes_at_a_time(model, params, tokens))
        totals = jnp.sum(jnp.where(scored, nats, 0), axis=1)
        return jnp.sum(totals) / jnp.sum(scored, dtype=jnp.float32)

    return score


def _lanes_at_a_time(model: Model, params: Params, tokens: Int[Array, "lanes length"]) -> int:
    """Return how many lanes are scored in parallel: all, unless their logits would be too many."""
    if model.logits is None:
        return len(tokens)
    logits = jax.eval_shape(model.logits, params, tokens[0, : model.context])
    return max(1, min(len(tokens), MOST_LOGITS // logits.size))
