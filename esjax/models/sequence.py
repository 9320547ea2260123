"""Models that read whole sequences, such as transformers and parallel recurrences.

One call scores a whole window. To generate, such a model reads the last tokens again for each new one. A model with a
cache can avoid that: a `Model` may have `logits` and custom stepwise functions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.data.tokens import STOP
from esjax.models.model import Logits, Model, Params, Token


class LastTokens(NamedTuple):
    """The state of a sequence model: the last tokens of the document, as many as it can read.

    Attributes:
        tokens: The tokens from the left, int32 [context]. A document begins with STOP.
        known: How many there are, int32, at least 1.
    """

    tokens: Int[Array, " context"]
    known: Int[Array, ""]


def sequence_model(
    init: Callable[[Key[Array, ""]], Params],
    logits: Callable[[Params, Int[Array, " length"]], Float[Array, "length vocabulary"]],
    context: int,
    unit: Params | None = None,
    *,
    embeddings: tuple[str, ...] = (),
    output_layer: str = "",
    stacked: tuple[str, ...] = (),
) -> Model:
    """Make a model from a function that predicts all tokens of a sequence at once.

    Args:
        init: `(key) -> params`, a pytree of float32 arrays.
        logits: `(params, tokens) -> logits`, int32 [length] to float [length, vocabulary]: row i predicts the token
            after tokens[i] and may depend on tokens[:i + 1] alone. Lengths are 1 to `context`.
        context: Most tokens that `logits` takes, at least 1. Generation always passes this number.
        unit: See `Model.unit`.
        embeddings: See `Model.embeddings`.
        output_layer: See `Model.output_layer`.
        stacked: See `Model.stacked`.
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

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        logits=logits,
        context=context,
        embeddings=embeddings,
        output_layer=output_layer,
        stacked=stacked,
    )


def token_loss(logits: Float[Array, " vocabulary"], token: Token) -> Float[Array, ""]:
    """Score a prediction: -log softmax(logits)[token], in nats."""
    peak = jnp.max(logits)
    return jnp.log(jnp.sum(jnp.exp(logits - peak))) + peak - logits[token]


def sequence_nats(
    logits: Callable[[Int[Array, " length"]], Float[Array, "length vocabulary"]],
    context: int,
    tokens: Int[Array, " length"],
) -> Float[Array, " length"]:
    """Score each token of a text that starts at the beginning of a document, in nats.

    A text longer than the context is read in pieces that overlap by half, so each token except the first ones is
    predicted from at least half a context.

    Args:
        logits: `(tokens) -> logits`, see `sequence_model`.
        context: Most tokens that it takes.
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
