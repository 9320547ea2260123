"""RWKV-7 (Peng et al. 2025, section 4): a recurrent network whose state is a matrix for each head, by the delta rule.

With x = ln(E[token]) of width D, and ln a layer norm, each layer computes, for z = ln(x), z' that of the token before,
and z_m = z + (z' - z) * m, where each of r, w, k, v, a, g has another m:

    r = z_r Wr      k = z_k Wk      v = z_v Wv      g = sigmoid(z_g G) G'
    w = exp(-e^(-1/2) sigmoid(w0 + tanh(z_w A) A'))                  how much of each column of S is kept
    a = sigmoid(a0 + z_a B B')                                       how much of what k finds is replaced
    v <- v + (v_1 - v) * sigmoid(v0 + z_v C C')                      in later layers; v_1 is v of the first layer
    q = k * s, of length 1 in each head      k <- k * (1 + (a - 1) * t)
    S <- S diag(w) - (S q) (a * q)ᵀ + v kᵀ                           for each head; S: values x keys
    x <- x + (g * (norm(S r) + (Σ r * k * u) v)) Wo                  the norm and the sum for each head

and then, with z = ln(x) again, x <- x + relu((z + (z' - z) * m) U)² U'. Logits are ln(x) W.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from esjax.core.rules import HIGHEST
from esjax.core.units import VECTOR_UNIT
from esjax.data.tokens import STOP
from esjax.models.layers import FIRST_LOGITS, matmul
from esjax.models.model import Activation, Logits, Model, Token, identity

NORM_EPS = 1e-5
"""Added to the variance in layer norms; in the norm of a head, times its width."""

MOST_DECAY = math.exp(-0.5)
"""The logarithm of w is between minus this and 0."""

SHORTEST = 1e-12
"""Least length by which q is divided."""


class LayerNorm(NamedTuple):
    """The weights of a layer norm, or their units."""

    scale: Any
    bias: Any


class Mix(NamedTuple):
    """m of each product, [hidden]: 0 reads the token itself, 1 the one before; or their units."""

    r: Any
    w: Any
    k: Any
    v: Any
    a: Any
    g: Any


class Gate(NamedTuple):
    """The weights of x ↦ `bias` + x `down` `up`, or their units."""

    bias: Any
    """w0, a0 or v0, [hidden]."""
    down: Any
    """A, B or C, [hidden, gate]."""
    up: Any
    """A', B' or C', [gate, hidden]."""


class Rwkv7Layer(NamedTuple):
    """The weights of a layer, or their units. Matrices are [inputs, outputs]."""

    norm: LayerNorm
    mix: Mix
    receptance: Any
    """Wr, [hidden, hidden]."""
    key: Any
    """Wk, [hidden, hidden]."""
    value: Any
    """Wv, [hidden, hidden]."""
    output: Any
    """Wo, [hidden, hidden]."""
    decay: Gate
    rate: Gate
    first_value: Any
    """A `Gate`; () in the first layer."""
    gate_down: Any
    """G, [hidden, gate]."""
    gate_up: Any
    """G', [gate, hidden]."""
    key_scale: Any
    """s, [hidden]."""
    key_rate: Any
    """t, [hidden]."""
    bonus: Any
    """u, [hidden]."""
    head_norm: LayerNorm
    mlp_norm: LayerNorm
    mlp_mix: Any
    """m of the second half, [hidden]."""
    mlp_inputs: Any
    """U, [hidden, mlp]."""
    mlp_output: Any
    """U', [mlp, hidden]."""


class Rwkv7Params(NamedTuple):
    """All weights."""

    embedding: Any
    """E, [vocabulary, hidden]."""
    embedding_norm: LayerNorm
    layers: tuple[Rwkv7Layer, ...]
    norm: LayerNorm
    output: Any
    """W, [hidden, vocabulary]."""


class LayerState(NamedTuple):
    """The state of a layer.

    Attributes:
        before: ln(x) of the last token, in the first half of the layer.
        memory: S of each head.
        mlp_before: ln(x) of the last token, in the second half.
    """

    before: Float[Array, " hidden"]
    memory: Float[Array, "heads values keys"]
    mlp_before: Float[Array, " hidden"]


class Rwkv7State(NamedTuple):
    """The state after some tokens: that of each layer, and x after the last layer."""

    layers: tuple[LayerState, ...]
    output: Float[Array, " hidden"]


def rwkv7(vocab_size: int, hidden_size: int, head_size: int, mlp_size: int, n_layers: int, gate_size: int) -> Model:
    """Build the network.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the residual stream.
        head_size: Width of a head; divides `hidden_size`.
        mlp_size: Width of the hidden layer in the second half of a layer.
        n_layers: Number of layers, at least 1.
        gate_size: Width of the products that make w, a, g and the share of v_1.
    """
    heads, size = hidden_size // head_size, hidden_size**-0.5
    norm_unit = LayerNorm(VECTOR_UNIT, VECTOR_UNIT)
    gate_unit = Gate(VECTOR_UNIT, size, gate_size**-0.5)

    def layer_unit(number: int) -> Rwkv7Layer:
        return Rwkv7Layer(
            norm=norm_unit,
            mix=Mix(*[VECTOR_UNIT] * 6),
            receptance=size,
            key=size,
            value=size,
            output=size,
            decay=gate_unit,
            rate=gate_unit,
            first_value=gate_unit if number else (),
            gate_down=size,
            gate_up=gate_size**-0.5,
            key_scale=VECTOR_UNIT,
            key_rate=VECTOR_UNIT,
            bonus=VECTOR_UNIT,
            head_norm=norm_unit,
            mlp_norm=norm_unit,
            mlp_mix=VECTOR_UNIT,
            mlp_inputs=size,
            mlp_output=mlp_size**-0.5,
        )

    unit = Rwkv7Params(1.0, norm_unit, tuple(map(layer_unit, range(n_layers))), norm_unit, size)

    def init(key: Key[Array, ""]) -> Rwkv7Params:
        keys = iter(jax.random.split(key, 14 * n_layers + 2))
        zeros, half, deep = jnp.zeros(hidden_size), jnp.full(hidden_size, 0.5), (2 * n_layers) ** -0.5
        norm = LayerNorm(jnp.ones(hidden_size), zeros)

        def matrix(rows: int, columns: int, size: float = 1.0) -> Array:
            return size * rows**-0.5 * jax.random.normal(next(keys), (rows, columns))

        def gate(bias: Array) -> Gate:
            return Gate(bias, matrix(hidden_size, gate_size), matrix(gate_size, hidden_size, 0.1))

        def layer(number: int) -> Rwkv7Layer:
            return Rwkv7Layer(
                norm=norm,
                mix=Mix(*[half] * 6),
                receptance=matrix(hidden_size, hidden_size),
                key=matrix(hidden_size, hidden_size),
                value=matrix(hidden_size, hidden_size),
                output=matrix(hidden_size, hidden_size, deep),
                decay=gate(jnp.linspace(-6.0, 0.0, hidden_size)),  # memories of 3.3 to 670 tokens
                rate=gate(zeros),
                first_value=gate(zeros) if number else (),
                gate_down=matrix(hidden_size, gate_size),
                gate_up=matrix(gate_size, hidden_size),
                key_scale=half + 0.5,
                key_rate=half + 0.5,
                bonus=zeros,
                head_norm=norm,
                mlp_norm=norm,
                mlp_mix=half,
                mlp_inputs=matrix(hidden_size, mlp_size),
                mlp_output=matrix(mlp_size, hidden_size, deep),
            )

        embedding = jax.random.normal(next(keys), (vocab_size, hidden_size))
        output = matrix(hidden_size, vocab_size, FIRST_LOGITS)
        return Rwkv7Params(embedding, norm, tuple(map(layer, range(n_layers))), norm, output)

    def initial_state(params: Rwkv7Params) -> Rwkv7State:
        zeros = jnp.zeros(hidden_size)
        blank = LayerState(zeros, jnp.zeros((heads, head_size, head_size)), zeros)
        return consume(params, Rwkv7State((blank,) * n_layers, zeros), jnp.int32(STOP))

    def predict(params: Rwkv7Params, state: Rwkv7State) -> Logits:
        return matmul(_norm(state.output, params.norm), params.output)

    def consume(params: Rwkv7Params, state: Rwkv7State, token: Token) -> Rwkv7State:
        x, first, new = _norm(params.embedding[token], params.embedding_norm), None, []
        for layer, old in zip(params.layers, state.layers, strict=True):
            z = _norm(x, layer.norm)
            mixed, memory, first = _recall(layer, z, old, first)
            x = x + mixed
            y = _norm(x, layer.mlp_norm)
            inner = jax.nn.relu(matmul(_between(y, old.mlp_before, layer.mlp_mix), layer.mlp_inputs))
            x = x + matmul(inner * inner, layer.mlp_output)
            new.append(LayerState(z, memory, y))
        return Rwkv7State(tuple(new), x)

    return Model(init, initial_state, predict, consume, unit=unit, embeddings=("embedding",), output_layer="output")


def _norm(x: Float[Array, " hidden"], norm: LayerNorm) -> Float[Array, " hidden"]:
    return norm.scale * _standard(x, NORM_EPS) + norm.bias


def _standard(x: Float[Array, "*heads width"], eps: float) -> Float[Array, "*heads width"]:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


def _between(z: Float[Array, " hidden"], before: Float[Array, " hidden"], m: Any) -> Float[Array, " hidden"]:
    return z + (before - z) * m


def _opened(z: Float[Array, " hidden"], gate: Gate, activation: Activation = identity) -> Float[Array, " hidden"]:
    return jax.nn.sigmoid(gate.bias + matmul(activation(matmul(z, gate.down)), gate.up))


def _recall(
    layer: Rwkv7Layer, z: Float[Array, " hidden"], old: LayerState, first: Array | None
) -> tuple[Float[Array, " hidden"], Float[Array, "heads values keys"], Float[Array, " hidden"]]:
    """Return what is added to the residual stream, the new memory, and the value of the first layer."""
    heads, head_size, _ = old.memory.shape
    mixed = Mix(*(_between(z, old.before, m) for m in layer.mix))

    def by_head(x: Float[Array, " hidden"]) -> Float[Array, "heads head"]:
        return x.reshape(heads, head_size)

    r, k, value = matmul(mixed.r, layer.receptance), matmul(mixed.k, layer.key), matmul(mixed.v, layer.value)
    if first is None:
        first = value
    else:
        value = value + (first - value) * _opened(mixed.v, layer.first_value)
    kept = by_head(jnp.exp(-MOST_DECAY * _opened(mixed.w, layer.decay, jnp.tanh)))
    rate = _opened(mixed.a, layer.rate)
    q = by_head(k * layer.key_scale)
    q = q / jnp.maximum(jnp.sqrt(jnp.sum(q * q, axis=-1, keepdims=True)), SHORTEST)
    k = by_head(k * (1 + (rate - 1) * layer.key_rate))
    r, value, rate = by_head(r), by_head(value), by_head(rate)
    found = jnp.einsum("hvk,hk->hv", old.memory, q, precision=HIGHEST)
    memory = old.memory * kept[:, None] - found[:, :, None] * (rate * q)[:, None] + value[:, :, None] * k[:, None]
    read = jnp.einsum("hvk,hk->hv", memory, r, precision=HIGHEST)
    read = layer.head_norm.scale * _standard(read, head_size * NORM_EPS).reshape(-1) + layer.head_norm.bias
    bonus = (jnp.sum(r * k * by_head(layer.bonus), axis=-1, keepdims=True) * value).reshape(-1)
    gate = matmul(jax.nn.sigmoid(matmul(mixed.g, layer.gate_down)), layer.gate_up)
    return matmul(gate * (read + bonus), layer.output), memory, first
