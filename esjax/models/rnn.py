"""The multiplicative recurrent network of the original program.

One state s of width D is shared by L layers:

    logits = relu(s W1) W2                      W1: D x 4D, W2: 4D x V
    s <- tanh(s + (s U_i) * E_i[token])         U_i: D x D, E_i: V x D, for i = 1..L in turn

and s0, the state at the start of a document, is learned.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from esjax.models.model import Logits, Model, Token
from esjax.models.primitives import Matrix, lookup, matmul

HEAD_WIDTH = 4
"""Width of the head's hidden layer, in widths of the state."""


class Layer(NamedTuple):
    """One update of the state."""

    recurrent: Matrix
    """U_i, [hidden, hidden]."""
    embedding: Matrix
    """E_i, [vocabulary, hidden]."""


class RnnParams(NamedTuple):
    """All weights, in the order of the original's weight file."""

    start: Float[Array, " hidden"]
    """s0."""
    layers: tuple[Layer, ...]
    head_hidden: Matrix
    """W1, [hidden, 4 hidden]."""
    head_output: Matrix
    """W2, [4 hidden, vocabulary]."""


def rnn(vocab_size: int, hidden_size: int, n_layers: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the state.
        n_layers: L, number of updates of the state a token.
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
        orthogonal = jax.nn.initializers.orthogonal()

        def layer(layer_key: Key[Array, ""]) -> Layer:
            recurrent_key, embedding_key = jax.random.split(layer_key)
            return Layer(
                recurrent=orthogonal(recurrent_key, (hidden_size, hidden_size), jnp.float32),
                embedding=jax.random.normal(embedding_key, (vocab_size, hidden_size)),
            )

        return RnnParams(
            start=jnp.zeros(hidden_size),
            layers=tuple(layer(layer_key) for layer_key in layer_keys),
            head_hidden=unit.head_hidden * math.sqrt(2) * jax.random.normal(hidden_key, (hidden_size, inner)),
            head_output=unit.head_output * jax.random.normal(output_key, (inner, vocab_size)),
        )

    def initial_state(params: RnnParams) -> Float[Array, " hidden"]:
        return params.start

    def predict(params: RnnParams, state: Float[Array, " hidden"]) -> Logits:
        return matmul(jax.nn.relu(matmul(state, params.head_hidden)), params.head_output)

    def consume(params: RnnParams, state: Float[Array, " hidden"], token: Token) -> Float[Array, " hidden"]:
        for layer in params.layers:
            state = jnp.tanh(state + matmul(state, layer.recurrent) * lookup(layer.embedding, token))
        return state

    return Model(init, initial_state, predict, consume, unit=unit, factored=True)
