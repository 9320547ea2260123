"""A multiplicative recurrent network (related to Sutskever et al. 2011, section 3), that of the original program.

L layers share one state s of width D:

    logits = relu(s W1) W2                      W1: D x 4D, W2: 4D x V
    s <- tanh(s + (s U_i) * E_i[token])         U_i: D x D, E_i: V x D, for i = 1..L in turn

The state at the start of a document, s0, is learned.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from esjax.models.layers import matmul
from esjax.models.model import Logits, Model, Tap, Token, untouched

HEAD_WIDTH = 4
"""Width of the head's hidden layer, as a multiple of the state's."""

CONSTANT_SHARE = 4
"""One in 4 entries of the state starts as a constant."""

FIRST_LOGITS = 0.1
"""Size of the initial logits: small, so that a run starts near the uniform distribution."""


class Layer(NamedTuple):
    """One update of the state."""

    recurrent: Any
    """U_i, [hidden, hidden]."""
    embedding: Any
    """E_i, [vocabulary, hidden]."""


class RnnParams(NamedTuple):
    """All weights, in the order of the original's weight file."""

    start: Any
    """s0, [hidden]."""
    layers: tuple[Layer, ...]
    head_hidden: Any
    """W1, [hidden, 4 hidden]."""
    head_output: Any
    """W2, [4 hidden, vocabulary]."""


def rnn(vocab_size: int, hidden_size: int, n_layers: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the state.
        n_layers: L, number of updates of the state for each token.
    """
    inner = HEAD_WIDTH * hidden_size
    unit = RnnParams(
        start=1.0,
        layers=(Layer(recurrent=hidden_size**-0.5, embedding=1.0),) * n_layers,
        head_hidden=hidden_size**-0.5,
        head_output=inner**-0.5,
    )

    def init(key: Key[Array, ""]) -> RnnParams:
        hidden_key, output_key, *layer_keys = jax.random.split(key, 2 + n_layers)
        is_constant = jnp.arange(hidden_size) < max(1, hidden_size // CONSTANT_SHARE)
        return RnnParams(
            start=jnp.where(is_constant, 1.0, 0.0),
            layers=tuple(_init_layer(layer_key, vocab_size, is_constant) for layer_key in layer_keys),
            head_hidden=unit.head_hidden * math.sqrt(2) * jax.random.normal(hidden_key, (hidden_size, inner)),
            head_output=unit.head_output * FIRST_LOGITS * jax.random.normal(output_key, (inner, vocab_size)),
        )

    def initial_state(params: RnnParams) -> Float[Array, " hidden"]:
        return params.start

    def predict(params: RnnParams, state: Float[Array, " hidden"], tap: Tap = untouched) -> Logits:
        hidden = tap("hidden", matmul(state, params.head_hidden), jax.nn.relu)
        return tap("logits", matmul(hidden, params.head_output))

    def consume(
        params: RnnParams, state: Float[Array, " hidden"], token: Token, tap: Tap = untouched
    ) -> Float[Array, " hidden"]:
        for i, layer in enumerate(params.layers):
            change = matmul(state, layer.recurrent) * layer.embedding[token]
            state = tap(f"state_{i}", state + change, jnp.tanh)
        return state

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        embeddings=tuple(f"layers/{i}/embedding" for i in range(n_layers)),
        output_layer="head_output",
    )


def _init_layer(key: Key[Array, ""], vocab_size: int, is_constant: Bool[Array, " hidden"]) -> Layer:
    """Draw the initial weights of a layer, which at first remembers the newest token best.

    The update multiplies by the state: a token cannot change a state of zeros, and old tokens do not fade. With
    orthogonal U and normal E the state drifts, and training stays at the unigram loss. So one part of the entries
    starts constant, s <- tanh(2s), and feeds the others through U. The other part forgets: s_j <- tanh(s_j (1 - E_j) +
    E_j input_j), with E around 1. Training may change all of this.
    """
    feed_key, embedding_key = jax.random.split(key)
    hidden_size = is_constant.size
    feed = jax.random.normal(feed_key, (hidden_size, hidden_size)) / jnp.sqrt(jnp.sum(is_constant))
    feeds = is_constant[:, None] & ~is_constant[None, :]
    embedding = 1 + jax.random.normal(embedding_key, (vocab_size, hidden_size))
    return Layer(
        recurrent=jnp.diag(jnp.where(is_constant, 1.0, -1.0)) + jnp.where(feeds, feed, 0.0),
        embedding=jnp.where(is_constant, 1.0, embedding),
    )
