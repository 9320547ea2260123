"""Gated recurrent units (Cho et al. 2014, section 2.3, in the variant of cuDNN) with a hidden layer in the head.

With x = E[token] of width 3D split into three parts, and y = h U + b split likewise:

    r = sigmoid(x_r + y_r)      z = sigmoid(x_z + y_z)      n = tanh(x_n + r * y_n)
    h <- z * h + (1 - z) * n
    logits = relu(h_all W1 + b1) W2 + b2, with h_all the states of all layers (Graves 2013, section 2)

A later layer has U and b of its own, and x = h' V, with h' the new state of the layer below.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from esjax.core.units import VECTOR_UNIT
from esjax.models.layers import Affine, affine, head_units, init_head, matmul, predict_by_head
from esjax.models.model import Logits, Model, Tap, Token, untouched

Hidden = Any
"""State of the layer, [hidden]; of several layers, a tuple of these."""


class GruLayer(NamedTuple):
    """The weights of a layer after the first."""

    inputs: Any
    """V, [hidden, 3 hidden]."""
    recurrent: Affine
    """U [hidden, 3 hidden] and b."""


class GruParams(NamedTuple):
    """All weights."""

    start: Hidden
    """State at the start of a document."""
    embedding: Any
    """E, [vocabulary, 3 hidden]."""
    recurrent: Any
    """U [hidden, 3 hidden] and b, an `Affine`; with more layers, a tuple of it and a `GruLayer` for each of them."""
    head_hidden: Affine
    """W1 [layers * hidden, head] and b1."""
    head_output: Affine
    """W2 [head, vocabulary] and b2."""


def gru(vocab_size: int, hidden_size: int, head_size: int, n_layers: int = 1) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the state of a layer.
        head_size: Width of the head's hidden layer.
        n_layers: Number of layers, at least 1.
    """
    later, width = n_layers - 1, n_layers * hidden_size
    recurrent_unit = Affine(hidden_size**-0.5, VECTOR_UNIT)
    unit = GruParams(
        _one_or_all([1.0] * n_layers),
        1.0,
        _one_or_all([recurrent_unit, *[GruLayer(hidden_size**-0.5, recurrent_unit)] * later]),
        *head_units(width, head_size),
    )

    def init(key: Key[Array, ""]) -> GruParams:
        embedding_key, recurrent_key, hidden_key, output_key, *keys = jax.random.split(key, 4 + 2 * later)

        def recurrent(key: Key[Array, ""]) -> Affine:
            orthogonal = jax.nn.initializers.orthogonal()
            gates = [orthogonal(k, (hidden_size, hidden_size), jnp.float32) for k in jax.random.split(key, 3)]
            return Affine(jnp.concatenate(gates, axis=1), jnp.zeros(3 * hidden_size))

        def layer(inputs_key: Key[Array, ""], recurrent_key: Key[Array, ""]) -> GruLayer:
            inputs = hidden_size**-0.5 * jax.random.normal(inputs_key, (hidden_size, 3 * hidden_size))
            return GruLayer(inputs, recurrent(recurrent_key))

        return GruParams(
            _one_or_all([jnp.zeros(hidden_size)] * n_layers),
            jax.random.normal(embedding_key, (vocab_size, 3 * hidden_size)),
            _one_or_all([recurrent(recurrent_key), *map(layer, keys[:later], keys[later:])]),
            *init_head(hidden_key, output_key, width, head_size, vocab_size),
        )

    def initial_state(params: GruParams) -> Hidden:
        return params.start

    def predict(params: GruParams, state: Hidden, tap: Tap = untouched) -> Logits:
        return predict_by_head(jnp.concatenate(jax.tree.leaves(state)), params.head_hidden, params.head_output, tap)

    def consume(params: GruParams, state: Hidden, token: Token, tap: Tap = untouched) -> Hidden:
        old = jax.tree.leaves(state)
        recurrent, *later = [params.recurrent] if len(old) == 1 else params.recurrent
        new = [_renew(old[0], params.embedding[token], recurrent, "", tap)]
        for i, layer in enumerate(later, start=1):
            new.append(_renew(old[i], matmul(new[-1], layer.inputs), layer.recurrent, f"_{i + 1}", tap))
        return _one_or_all(new)

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        state_taps=("state", *(f"state_{i}" for i in range(2, n_layers + 1))),
        embeddings=("embedding",),
        output_layer="head_output",
    )


def _one_or_all(layers: list[Any]) -> Any:
    return tuple(layers) if len(layers) > 1 else layers[0]


def _renew(
    old: Float[Array, " hidden"], x: Float[Array, " inputs"], recurrent: Affine, end: str, tap: Tap
) -> Float[Array, " hidden"]:
    """Return the new state of a layer; names of its taps have this end."""
    x_reset, x_update, x_new = jnp.split(x, 3)
    y_reset, y_update, y_new = jnp.split(affine(old, recurrent), 3)
    reset = tap(f"reset{end}", x_reset + y_reset, jax.nn.sigmoid)
    update = tap(f"update{end}", x_update + y_update, jax.nn.sigmoid)
    new = tap(f"new{end}", x_new + reset * y_new, jnp.tanh)
    return tap(f"state{end}", update * old + (1 - update) * new)
