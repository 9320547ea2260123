"""Gated linear recurrent units in residual blocks (related to Hawk: De et al. 2024, section 2; Orvieto et al. 2023).

The gates read what comes from the layers below, never the old state, so the recurrence is linear and elementwise. With
x = E_0[token_t] + ... + E_{K-1}[token_{t-K+1}] of width D, each layer computes:

    u = rms(x, g)      rms(x, g) = g * x / sqrt(mean(x²) + ε)            (Zhang & Sennrich 2019, section 4)
    r, i, v, o = four parts of u W + b
    a = exp(-8 softplus(λ) sigmoid(r))
    h <- a * h + sqrt(1 - a²) * sigmoid(i) * v
    x <- x + (gelu(o) * h) W'
    p, q = two parts of rms(x, g') U      x <- x + (gelu(p) * q) U'      (Shazeer 2020, section 2)

and logits = rms(x, g) W1 + b1. K tokens stand for the short convolution of Hawk. All h of a sequence are computed by an
associative scan over its tokens (Blelloch 1990), or one after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.core.units import VECTOR_UNIT
from esjax.data.tokens import STOP
from esjax.models.layers import (
    FIRST_LOGITS,
    Affine,
    Norm,
    affine,
    embed_tokens,
    last_tokens,
    linear_recurrence,
    matmul,
    rms_norm,
)
from esjax.models.model import Logits, Model, Tap, Token, untouched

NORM_EPS = 1e-5
"""ε of the norms."""

SHARPNESS = 8.0
"""Factor of λ: it lets a gate change how much is kept by orders of magnitude."""

LEAST_KEPT, MOST_KEPT = 0.5, 0.99
"""Range of a in the initial model, with the gates half open."""


class LruLayer(NamedTuple):
    """The weights of a layer, or their units."""

    norm: Norm
    inputs: Affine
    """W [hidden, 4 hidden] and b."""
    decay: Any
    """λ, [hidden]."""
    output: Any
    """W', [hidden, hidden]."""
    mlp_norm: Norm
    mlp_inputs: Any
    """U, [hidden, 2 mlp]."""
    mlp_output: Any
    """U', [mlp, hidden]."""


class LruParams(NamedTuple):
    """All weights."""

    embedding: Any
    """E_0 to E_{K-1}, a tuple of [vocabulary, hidden]."""
    layers: tuple[LruLayer, ...]
    norm: Norm
    head_output: Affine
    """W1 [hidden, vocabulary] and b1."""


class LruState(NamedTuple):
    """The state after some tokens.

    Attributes:
        hidden: h of each layer.
        output: x after the last layer.
        tokens: The last K - 1 tokens, the newest first; STOP where there are none.
    """

    hidden: tuple[Float[Array, " hidden"], ...]
    output: Float[Array, " hidden"]
    tokens: Int[Array, " last"]


def lru(vocab_size: int, hidden_size: int, mlp_size: int, n_layers: int, gate_tokens: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the residual stream and of the state of a layer.
        mlp_size: Width of the hidden layer of the gated MLPs.
        n_layers: Number of layers, at least 1.
        gate_tokens: K, number of tokens that the first layer sees at a time, at least 1.
    """
    size, norm_unit = hidden_size**-0.5, Norm(VECTOR_UNIT)
    unit = LruParams(
        embedding=(1.0,) * gate_tokens,
        layers=(LruLayer(norm_unit, Affine(size, VECTOR_UNIT), VECTOR_UNIT, size, norm_unit, size, mlp_size**-0.5),)
        * n_layers,
        norm=norm_unit,
        head_output=Affine(size, VECTOR_UNIT),
    )

    def init(key: Key[Array, ""]) -> LruParams:
        keys = iter(jax.random.split(key, gate_tokens + 4 * n_layers + 1))
        kept = jnp.linspace(LEAST_KEPT, MOST_KEPT, hidden_size)
        ones, deep = Norm(jnp.ones(hidden_size)), (2 * n_layers) ** -0.5

        def matrix(rows: int, columns: int, size: float = 1.0) -> Array:
            return size * rows**-0.5 * jax.random.normal(next(keys), (rows, columns))

        tables = [jax.random.normal(next(keys), (vocab_size, hidden_size)) for _ in range(gate_tokens)]
        layers = tuple(
            LruLayer(
                norm=ones,
                inputs=Affine(matrix(hidden_size, 4 * hidden_size), jnp.zeros(4 * hidden_size)),
                decay=jnp.log(jnp.expm1(-2 / SHARPNESS * jnp.log(kept))),  # sigmoid(0) is a half
                output=matrix(hidden_size, hidden_size, deep),
                mlp_norm=ones,
                mlp_inputs=matrix(hidden_size, 2 * mlp_size),
                mlp_output=matrix(mlp_size, hidden_size, deep),
            )
            for _ in range(n_layers)
        )
        output = Affine(matrix(hidden_size, vocab_size, FIRST_LOGITS), jnp.zeros(vocab_size))
        return LruParams(tuple(gate_tokens**-0.5 * table for table in tables), layers, ones, output)

    def initial_state(params: LruParams) -> LruState:
        zeros = jnp.zeros(hidden_size)
        blank = LruState((zeros,) * n_layers, zeros, jnp.full(gate_tokens - 1, STOP, jnp.int32))
        return consume(params, blank, jnp.int32(STOP))

    def predict(params: LruParams, state: LruState, tap: Tap = untouched) -> Logits:
        return tap("logits", affine(rms_norm(state.output, params.norm, NORM_EPS), params.head_output))

    def consume(params: LruParams, state: LruState, token: Token, tap: Tap = untouched) -> LruState:
        tokens = jnp.concatenate([token[None].astype(jnp.int32), state.tokens])
        x, new = embed_tokens(params.embedding, tokens), list[Array]()
        for i, (layer, old) in enumerate(zip(params.layers, state.hidden, strict=True), start=1):
            keep, added, gate = _open(layer, x)
            new.append(tap(f"state_{i}", keep * old + added))
            x = _pass_on(layer, x, gate, new[-1])
        return LruState(tuple(new), tap("output", x), tokens[:-1])

    def states(params: LruParams, state: LruState, tokens: Int[Array, " length"]) -> LruState:
        is_stop = tokens == STOP
        seen = last_tokens(tokens, state.tokens)
        x, new = jax.vmap(lambda row: embed_tokens(params.embedding, row))(seen), list[Array]()
        for layer, old in zip(params.layers, state.hidden, strict=True):
            keep, added, gate = jax.vmap(lambda x, layer=layer: _open(layer, x))(x)
            new.append(linear_recurrence(jnp.where(is_stop[:, None], 0.0, keep), added, old))
            x = jax.vmap(lambda *given, layer=layer: _pass_on(layer, *given))(x, gate, new[-1])
        return LruState(tuple(new), x, seen[:, :-1])

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        tapped=True,
        state_taps=(*(f"state_{i}" for i in range(1, n_layers + 1)), "output"),
        states=states,
        embeddings=("embedding",),
        output_layer="head_output",
    )


def _open(
    layer: LruLayer, x: Float[Array, " hidden"]
) -> tuple[Float[Array, " hidden"], Float[Array, " hidden"], Float[Array, " hidden"]]:
    """Return how much of the state is kept, what is added to it, and the gate of the output."""
    u = rms_norm(x, layer.norm, NORM_EPS)
    rate, take, value, gate = jnp.split(affine(u, layer.inputs), 4)
    log_kept = -SHARPNESS * jax.nn.softplus(layer.decay) * jax.nn.sigmoid(rate)
    return jnp.exp(log_kept), jnp.sqrt(-jnp.expm1(2 * log_kept)) * jax.nn.sigmoid(take) * value, gate


def _pass_on(
    layer: LruLayer, x: Float[Array, " hidden"], gate: Float[Array, " hidden"], state: Float[Array, " hidden"]
) -> Float[Array, " hidden"]:
    """Add what the layer and its MLP make of the state to the residual stream."""
    x = x + matmul(jax.nn.gelu(gate) * state, layer.output)
    one, two = jnp.split(matmul(rms_norm(x, layer.mlp_norm, NORM_EPS), layer.mlp_inputs), 2)
    return x + matmul(jax.nn.gelu(one) * two, layer.mlp_output)
