"""Models that read whole sequences, as transformers and parallel recurrences do.

They are scored by one call for a whole window. To write, they read the last tokens again for each new one, unless they
come with a cache: a `Model` may give `logits` beside stepwise functions of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.data.tokens import STOP
from esjax.models.model import Logits, Model, Params, Token


class LastTokens(NamedTuple):
    """What a sequence model remembers: the tokens of the document so far, as many as it can read.

    Attributes:
        tokens: The last of them, from the left, [context]; STOP, which begins a document, is one of them.
        known: How many there are, int32.
    """

    tokens: Int[Array, " context"]
    known: Int[Array, ""]


def sequence_model(
    init: Callable[[Key[Array, ""]], Params],
    logits: Callable[[Params, Int[Array, " length"]], Float[Array, "length vocabulary"]],
    context: int,
    unit: Params | None = None,
) -> Model:
    """Make a model of a function that predicts all tokens of a sequence at once.

    Args:
        init: `(key) -> params`, a pytree of float32 arrays.
        logits: `(params, tokens) -> logits`, int32 [length] to float [length, vocabulary]: row i predicts the token
            after tokens[i] and may look at tokens[:i + 1] alone. Lengths are 1 to `context`.
        context: Tokens that `logits` takes at most, at least 1. While writing, it is given so many each time.
        unit: See `Model.unit`.
    """

    def initial_state(params: Params) -> LastTokens:
        return LastTokens(jnp.full(context, STOP, jnp.int32), jnp.int32(1))

    def predict(params: Params, state: LastTokens) -> Logits:
        return logits(params, state.tokens)[state.known - 1]

    def consume(params: Params, state: LastTokens, token: Token) -> LastTokens:
        is_full = state.known == context
        tokens = jnp.where(is_full, jnp.roll(state.tokens, -1), state.tokens)
        place = jnp.minimum(state.known, context - 1)
        return LastTokens(tokens.at[place].set(token.astype(jnp.int32)), place + 1)

    return Model(init, initial_state, predict, consume, unit=unit, logits=logits, context=context)


def token_loss(logits: Float[Array, " vocabulary"], token: Token) -> Float[Array, ""]:
    """Score a prediction: -log softmax(logits)[token], in nats."""
    peak = jnp.max(logits)
    return jnp.log(jnp.sum(jnp.exp(logits - peak))) + peak - logits[token]


def sequence_nats(
    logits: Callable[[Int[Array, " length"]], Float[Array, "length vocabulary"]],
    context: int,
    tokens: Int[Array, " length"],
) -> Float[Array, " length"]:
    """Score each token of a text that begins with a document's beginning, in nats.

    A text longer than the context is read in pieces that overlap by half: each token is predicted from at least half a
    context, but for those at the beginning.

    Args:
        logits: Predictions of a sequence, see `sequence_model`.
        context: Tokens that it takes at most.
        tokens: Ids, at least one.
    """
    read = jnp.concatenate([jnp.full(1, STOP, jnp.int32), tokens[:-1].astype(jnp.int32)])
    score = jax.vmap(token_loss)
    length = len(tokens)
    if length <= context:
        return score(logits(read), tokens)
    half = max(context // 2, 1)
    more = -(-(length - context) // half)
    missing = context + more * half - length
    read, wanted = jnp.pad(read, (0, missing)), jnp.pad(tokens, (0, missing))

    def piece(start: Int[Array, ""]) -> Float[Array, " context"]:
        part = jax.lax.dynamic_slice_in_dim(read, start, context)
        return score(logits(part), jax.lax.dynamic_slice_in_dim(wanted, start, context))

    nats = jax.lax.map(piece, half * jnp.arange(more + 1))
    return jnp.concatenate([nats[0], nats[1:, context - half :].reshape(-1)])[:length]
