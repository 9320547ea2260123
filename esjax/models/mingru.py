"""Gated elementwise layers (related to minGRU: Feng et al. 2024, section 3.1), with a hidden layer in the head.

The gates of the first layer see the last K tokens, those of a later layer the new state of the layer below. No gate
reads the state of its own layer, so an entry of a state depends on the same entry of the old one alone:

    a = E_0[token_t] + ... + E_{K-1}[token_{t-K+1}] + b        in the first layer
    a = h' U + b, with h' the new state of the layer below     in later layers
    z = sigmoid(a_z + 1)      n = tanh(a_n)      h <- z * h + (1 - z) * n
    logits = relu(h_all W1 + b1) W2 + b2, with h_all the states of all layers

All h of a sequence are computed by an associative scan over its tokens (Blelloch 1990), or one after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.core.units import VECTOR_UNIT
from esjax.data.tokens import STOP
from esjax.models.layers import (
    Affine,
    affine,
    embed_tokens,
    head_units,
    init_head,
    last_tokens,
    linear_recurrence,
    predict_by_head,
)
from esjax.models.model import Logits, Model, Tap, Token, untouched

KEEP = 1.0
"""Added to the gate before the sigmoid, so that a state is remembered at first."""


class MinGruParams(NamedTuple):
    """All weights."""

    start: Any
    """State of each layer at the start of a document, a tuple of [hidden]."""
    embedding: Any
    """E_0 to E_{K-1}, a tuple of [vocabulary, 2 hidden]."""
    bias: Any
    """b of the first layer, [2 hidden]."""
    layers: Any
    """U [hidden, 2 hidden] and b of each later layer, a tuple of `Affine`."""
    head_hidden: Affine
    """W1 [layers * hidden, head] and b1."""
    head_output: Affine
    """W2 [head, vocabulary] and b2."""


class MinGruState(NamedTuple):
    """The state after some tokens.

    Attributes:
        hidden: State of each layer.
        tokens: The last K - 1 tokens, the newest first; STOP where there are none.
    """

    hidden: tuple[Float[Array, " hidden"], ...]
    tokens: Int[Array, " last"]


def mingru(vocab_size: int, hidden_size: int, head_size: int, n_layers: int, gate_tokens: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: Width of the state of a layer.
        head_size: Width of the head's hidden layer.
        n_layers: Number of gated layers, at least 1.
        gate_tokens: K, number of tokens that the gates of the first layer see, at least 1.
    """
    later = n_layers - 1
    width = n_layers * hidden_size
    unit = MinGruParams(
        (1.0,) * n_layers,
        (1.0,) * gate_tokens,
        VECTOR_UNIT,
        (Affine(hidden_size**-0.5, VECTOR_UNIT),) * later,
        *head_units(width, head_size),
    )

    def init(key: Key[Array, ""]) -> MinGruParams:
        hidden_key, output_key, *keys = jax.random.split(key, 2 + gate_tokens + later)
        tables = [jax.random.normal(k, (vocab_size, 2 * hidden_size)) for k in keys[:gate_tokens]]
        matrices = [jax.random.normal(k, (hidden_size, 2 * hidden_size)) for k in keys[gate_tokens:]]
        return MinGruParams(
            (jnp.zeros(hidden_size),) * n_layers,
            tuple(gate_tokens**-0.5 * table for table in tables),
            jnp.zeros(2 * hidden_size),
            tuple(Affine(hidden_size**-0.5 * matrix, jnp.zeros(2 * hidden_size)) for matrix in matrices),
            *init_head(hidden_key, output_key, width, head_size, vocab_size),
        )

    def initial_state(params: MinGruParams) -> MinGruState:
        return MinGruState(params.start, jnp.full(gate_tokens - 1, STOP, jnp.int32))

    def predict(params: MinGruParams, state: MinGruState, tap: Tap = untouched) -> Logits:
        return predict_by_head(jnp.concatenate(state.hidden), params.head_hidden, params.head_output, tap)

    def consume(params: MinGruParams, state: MinGruState, token: Token, tap: Tap = untouched) -> MinGruState:
        tokens = jnp.concatenate([token[None].astype(jnp.int32), state.tokens])
        given, new = _embed(params, tokens), list[Array]()
        for i, old in enumerate(state.hidden, start=1):
            gate, candidate = jnp.split(given, 2)
            keep = tap(f"gate_{i}", gate + KEEP, jax.nn.sigmoid)
            new.append(tap(f"state_{i}", keep * old + (1 - keep) * tap(f"new_{i}", candidate, jnp.tanh)))
            if i < n_layers:
                given = affine(new[-1], params.layers[i - 1])
        return MinGruState(tuple(new), tokens[:-1])

    def states(params: MinGruParams, state: MinGruState, tokens: Int[Array, " length"]) -> MinGruState:
        is_stop = (tokens == STOP)[:, None]
        seen = last_tokens(tokens, state.tokens)
        given, new = jax.vmap(lambda row: _embed(params, row))(seen), list[Array]()
        for i, (start, old) in enumerate(zip(params.start, state.hidden, strict=True)):
            if i > 0:
                given = jax.vmap(lambda x, layer=params.layers[i - 1]: affine(x, layer))(new[-1])
            gate, candidate = jnp.split(given, 2, axis=1)
            keep = jax.nn.sigmoid(gate + KEEP)
            added = jnp.where(is_stop, start[None], (1 - keep) * jnp.tanh(candidate))
            new.append(linear_recurrence(jnp.where(is_stop, 0.0, keep), added, old))
        return MinGruState(tuple(new), seen[:, :-1])

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        state_taps=tuple(f"state_{i}" for i in range(1, n_layers + 1)),
        states=states,
        embeddings=("embedding",),
        output_layer="head_output",
    )


def _embed(params: MinGruParams, tokens: Int[Array, " last"]) -> Float[Array, " gates"]:
    """Return a of the first layer, from the last tokens."""
    return embed_tokens(params.embedding, tokens) + params.bias
