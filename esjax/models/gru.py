"""A gated recurrent unit (Cho et al. 2014, section 2.3, in the variant of cuDNN) with a hidden layer in the head.

With x = E[token] of width 3D split into three parts, and y = h U + b split likewise:

    r = sigmoid(x_r + y_r)      z = sigmoid(x_z + y_z)      n = tanh(x_n + r * y_n)
    h <- z * h + (1 - z) * n
    logits = relu(h W1 + b1) W2 + b2
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from esjax.models.layers import Affine, affine
from esjax.models.model import Logits, Model, Tap, Token, untouched

BIAS_UNIT = 0.3
"""Unit of the biases. With 1, their perturbations would outweigh those of the matrices."""

FIRST_LOGITS = 0.1
"""Size of the initial logits: small, so that a run starts near the uniform distribution."""


class GruParams(NamedTuple):
    """All weights."""

    start: Any
    """State at the start of a document, [hidden]."""
    embedding: Any
    """E, [vocabulary, 3 hidden]."""
    recurrent: Affine
    """U [hidden, 3 hidden] and b."""
    head_hidden: Affine
    """W1 [hidden, head] and b1."""
    head_output: Affine
    """W2 [head, vocabulary] and b2."""


def gru(vocab_size: int, hidden_size: int, head_size: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the state.
        head_size: Width of the head's hidden layer.
    """
    unit = GruParams(
        start=1.0,
        embedding=1.0,
        recurrent=Affine(hidden_size**-0.5, BIAS_UNIT),
        head_hidden=Affine(hidden_size**-0.5, BIAS_UNIT),
        head_output=Affine(head_size**-0.5, BIAS_UNIT),
    )

    def init(key: Key[Array, ""]) -> GruParams:
        embedding_key, recurrent_key, hidden_key, output_key = jax.random.split(key, 4)
        orthogonal = jax.nn.initializers.orthogonal()
        gates = [orthogonal(k, (hidden_size, hidden_size), jnp.float32) for k in jax.random.split(recurrent_key, 3)]
        hidden = math.sqrt(2 / hidden_size) * jax.random.normal(hidden_key, (hidden_size, head_size))
        output = FIRST_LOGITS * head_size**-0.5 * jax.random.normal(output_key, (head_size, vocab_size))
        return GruParams(
            start=jnp.zeros(hidden_size),
            embedding=jax.random.normal(embedding_key, (vocab_size, 3 * hidden_size)),
            recurrent=Affine(jnp.concatenate(gates, axis=1), jnp.zeros(3 * hidden_size)),
            head_hidden=Affine(hidden, jnp.zeros(head_size)),
            head_output=Affine(output, jnp.zeros(vocab_size)),
        )

    def initial_state(params: GruParams) -> Float[Array, " hidden"]:
        return params.start

    def predict(params: GruParams, state: Float[Array, " hidden"], tap: Tap = untouched) -> Logits:
        hidden = tap("hidden", affine(state, params.head_hidden), jax.nn.relu)
        return tap("logits", affine(hidden, params.head_output))

    def consume(
        params: GruParams, state: Float[Array, " hidden"], token: Token, tap: Tap = untouched
    ) -> Float[Array, " hidden"]:
        x_reset, x_update, x_new = jnp.split(params.embedding[token], 3)
        y_reset, y_update, y_new = jnp.split(affine(state, params.recurrent), 3)
        reset = tap("reset", x_reset + y_reset, jax.nn.sigmoid)
        update = tap("update", x_update + y_update, jax.nn.sigmoid)
        new = tap("new", x_new + reset * y_new, jnp.tanh)
        return tap("state", update * state + (1 - update) * new)

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        state_taps=("state",),
        embeddings=("embedding",),
        output_layer="head_output",
    )
