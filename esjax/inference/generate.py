"""Sampling and beam search, token by token from a model state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from esjax.data.tokens import STOP, UNK
from esjax.models.member import consume
from esjax.models.model import Logits, Model, Params, State


class Sampling(NamedTuple):
    """How to choose the next token.

    Attributes:
        temperature: Divides the logits, at least 0; 0 takes the most probable token.
        top_k: Sample from this many most probable tokens; 0 is no limit.
        top_p: Sample from the most probable tokens whose probabilities add up to this, in (0, 1]: nucleus sampling
            (Holtzman et al. 2020, section 3.1).
    """

    temperature: Float[Array, ""] | float = 1.0
    top_k: Int[Array, ""] | int = 0
    top_p: Float[Array, ""] | float = 1.0


class Beams(NamedTuple):
    """The most probable continuations found, best first.

    Attributes:
        tokens: Token ids; STOP fills the rest after the end of a text.
        log_probability: Sum over the tokens, including the STOP at the end, in nats.
    """

    tokens: Int[Array, "beams max_tokens"]
    log_probability: Float[Array, " beams"]


def sample(
    model: Model, params: Params, state: State, keys: Key[Array, " texts"], max_tokens: int, sampling: Sampling
) -> Int[Array, "texts max_tokens"]:
    """Sample texts, each until STOP or until it has `max_tokens`. UNK is never sampled.

    All texts are extended together until the last one ends: a loop for each under `jax.vmap` would copy their states,
    the caches of a transformer for example, at every token.

    Args:
        model: The architecture.
        params: Its parameters.
        state: State after the prompt.
        keys: Random key of each text.
        max_tokens: Length of the result, static under jit.
        sampling: How to choose each token.

    Returns:
        Token ids, int32; STOP fills the rest after the first STOP.
    """

    def going(carry: tuple[Array, State, Array, Array]) -> Array:
        position, _, ended, _ = carry
        return (position < max_tokens) & ~jnp.all(ended)

    def extend(carry: tuple[Array, State, Array, Array]) -> tuple[Array, State, Array, Array]:
        position, states, ended, tokens = carry

        def choose(state: State, key: Key[Array, ""], ended: Bool[Array, ""]) -> tuple[State, Int[Array, ""]]:
            logits = model.predict(params, state).at[UNK].set(-jnp.inf)
            token = jnp.where(ended, STOP, _choose(logits, jax.random.fold_in(key, position), sampling))
            return consume(model, params, state, token), token

        states, column = jax.vmap(choose)(states, keys, ended)
        return position + 1, states, column == STOP, tokens.at[:, position].set(column)

    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(keys), *leaf.shape)), state)
    blank = jnp.full((len(keys), max_tokens), STOP, jnp.int32)
    return jax.lax.while_loop(going, extend, (jnp.int32(0), states, jnp.zeros(len(keys), bool), blank))[3]


def _choose(logits: Logits, key: Key[Array, ""], sampling: Sampling) -> Int[Array, ""]:
    greedy = jnp.argmax(logits)
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)

    def least() -> Float[Array, ""]:
        """Return the smallest logit that may be drawn."""
        descending = jnp.sort(scaled, descending=True)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, logits.size), logits.size)
        reached = jnp.cumsum(jax.nn.softmax(descending))
        # The token at which the sum crosses top_p belongs to the nucleus, so the nucleus is never empty.
        p = jnp.sum(reached < sampling.top_p) + 1
        return descending[jnp.minimum(jnp.minimum(k, p), logits.size) - 1]

    # To sort a large vocabulary can take as long as a forward pass.
    is_cut = (sampling.top_k > 0) | (sampling.top_p < 1)
    floor = jax.lax.cond(is_cut, least, lambda: jnp.full((), -jnp.inf, scaled.dtype))
    drawn = jax.random.categorical(key, jnp.where(scaled >= floor, scaled, -jnp.inf), mode="low")
    return jnp.where(sampling.temperature > 0, drawn, greedy).astype(jnp.int32)


def beam_search(model: Model, params: Params, state: State, width: int, max_tokens: int) -> Beams:
    """Keep the `width` most probable continuations at every length, finished ones included. UNK is never chosen.

    Args:
        model: The architecture.
        params: Its parameters.
        state: State after the prompt.
        width: Number of continuations, static under jit.
        max_tokens: Length of the result, static under jit.
    """

    def extend(carry: tuple[State, Beams], position: Array) -> tuple[tuple[State, Beams], None]:
        states, beams = carry
        ended = (position > 0) & (beams.tokens[:, position - 1] == STOP)
        log_p = jax.nn.log_softmax(jax.vmap(lambda state: model.predict(params, state))(states))
        log_p = log_p.at[:, UNK].set(-jnp.inf)
        vocab_size = log_p.shape[1]
        # A finished beam has one continuation: another STOP, with probability 1.
        stay = jnp.where(jnp.arange(vocab_size) == STOP, 0.0, -jnp.inf)
        candidates = beams.log_probability[:, None] + jnp.where(ended[:, None], stay, log_p)
        log_probability, index = jax.lax.top_k(candidates.reshape(-1), width)
        parent, token = index // vocab_size, (index % vocab_size).astype(jnp.int32)
        states = jax.tree.map(lambda leaf: leaf[parent], states)
        states = jax.vmap(lambda state, token: consume(model, params, state, token))(states, token)
        return (states, Beams(beams.tokens[parent].at[:, position].set(token), log_probability)), None

    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (width, *leaf.shape)), state)
    # Only the first beam starts: equal copies would all find the same texts.
    beams = Beams(jnp.full((width, max_tokens), STOP, jnp.int32), jnp.full(width, -jnp.inf).at[0].set(0.0))
    (_, beams), _ = jax.lax.scan(extend, (states, beams), jnp.arange(max_tokens))
    return beams
