"""Long short-term memory (Hochreiter & Schmidhuber 1997; Gers et al. 2000), with a hidden layer in the head.

With a forget gate, and with a = E[token] + h U + b of width 4D split into four parts:

    i = sigmoid(a_i)      f = sigmoid(a_f)      n = tanh(a_n)      o = sigmoid(a_o)
    c <- f * c + i * n
    h <- o * tanh(c)
    logits = relu(h_all W1 + b1) W2 + b2, with h_all the outputs h of all layers (Graves 2013, section 2)

A later layer has U and b of its own, and h' V in place of E[token], with h' the new output of the layer below.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from esjax.core.units import VECTOR_UNIT
from esjax.models.layers import Affine, affine, head_units, init_head, matmul, predict_by_head
from esjax.models.model import Logits, Model, Tap, Token, untouched

FIRST_FORGET = 1.0
"""Initial bias of the forget gate, so that a cell is remembered at first (Jozefowicz et al. 2015, section 2)."""


class LstmState(NamedTuple):
    """The state of a layer, or its units.

    Attributes:
        cell: c, [hidden].
        hidden: h, the output of the layer, [hidden].
    """

    cell: Any
    hidden: Any


class LstmParams(NamedTuple):
    """All weights."""

    start: tuple[LstmState, ...]
    """State of each layer at the start of a document."""
    embedding: Any
    """E, [vocabulary, 4 hidden]."""
    recurrent: tuple[Affine, ...]
    """U [hidden, 4 hidden] and b of each layer."""
    inputs: tuple[Any, ...]
    """V of each later layer, [hidden, 4 hidden]."""
    head_hidden: Affine
    """W1 [layers * hidden, head] and b1."""
    head_output: Affine
    """W2 [head, vocabulary] and b2."""


def lstm(vocab_size: int, hidden_size: int, head_size: int, n_layers: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the output of a layer.
        head_size: Width of the head's hidden layer.
        n_layers: Number of layers, at least 1.
    """
    size, width, later = hidden_size**-0.5, n_layers * hidden_size, n_layers - 1
    unit = LstmParams(
        (LstmState(1.0, 1.0),) * n_layers,
        1.0,
        (Affine(size, VECTOR_UNIT),) * n_layers,
        (size,) * later,
        *head_units(width, head_size),
    )

    def init(key: Key[Array, ""]) -> LstmParams:
        embedding_key, hidden_key, output_key, *keys = jax.random.split(key, 3 + n_layers + later)
        zeros = jnp.zeros(hidden_size)

        def recurrent(key: Key[Array, ""]) -> Affine:
            orthogonal = jax.nn.initializers.orthogonal()
            gates = [orthogonal(k, (hidden_size, hidden_size), jnp.float32) for k in jax.random.split(key, 4)]
            return Affine(jnp.concatenate(gates, axis=1), jnp.concatenate([zeros, zeros + FIRST_FORGET, zeros, zeros]))

        return LstmParams(
            (LstmState(zeros, zeros),) * n_layers,
            jax.random.normal(embedding_key, (vocab_size, 4 * hidden_size)),
            tuple(map(recurrent, keys[:n_layers])),
            tuple(size * jax.random.normal(k, (hidden_size, 4 * hidden_size)) for k in keys[n_layers:]),
            *init_head(hidden_key, output_key, width, head_size, vocab_size),
        )

    def initial_state(params: LstmParams) -> tuple[LstmState, ...]:
        return params.start

    def predict(params: LstmParams, state: tuple[LstmState, ...], tap: Tap = untouched) -> Logits:
        outputs = jnp.concatenate([layer.hidden for layer in state])
        return predict_by_head(outputs, params.head_hidden, params.head_output, tap)

    def consume(
        params: LstmParams, state: tuple[LstmState, ...], token: Token, tap: Tap = untouched
    ) -> tuple[LstmState, ...]:
        x, new = params.embedding[token], list[LstmState]()
        for i, (old, recurrent) in enumerate(zip(state, params.recurrent, strict=True)):
            if i > 0:
                x = matmul(new[-1].hidden, params.inputs[i - 1])
            new.append(_renew(old, x + affine(old.hidden, recurrent), i + 1, tap))
        return tuple(new)

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        state_taps=tuple(f"{part}_{i}" for i in range(1, n_layers + 1) for part in ("cell", "state")),
        embeddings=("embedding",),
        output_layer="head_output",
    )


def _renew(old: LstmState, a: Float[Array, " inputs"], number: int, tap: Tap) -> LstmState:
    a_input, a_forget, a_new, a_output = jnp.split(a, 4)
    take = tap(f"input_{number}", a_input, jax.nn.sigmoid)
    keep = tap(f"forget_{number}", a_forget, jax.nn.sigmoid)
    new = tap(f"new_{number}", a_new, jnp.tanh)
    show = tap(f"output_{number}", a_output, jax.nn.sigmoid)
    cell = tap(f"cell_{number}", keep * old.cell + take * new)
    return LstmState(cell, tap(f"state_{number}", show * jnp.tanh(cell)))
