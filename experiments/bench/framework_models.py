"""Language models in the usual style of flax and equinox, with no code for this library."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bench.ours import VOCAB

Logits = Float[Array, "length vocabulary"]
Tokens = Int[Array, " length"]


class Made(NamedTuple):
    """A model with its initial weights.

    Attributes:
        params: The weights.
        logits: `(params, tokens) -> logits`; row i predicts the token after token i.
        noise: Settings of `esjax.low_rank` that the model needs.
    """

    params: Any
    logits: Callable[[Any, Tokens], Logits]
    noise: Mapping[str, Any] = MappingProxyType({})


class LinenGru(nn.Module):
    """A GRU with a hidden layer in the head, in flax.linen."""

    @nn.compact
    def __call__(self, tokens: Tokens) -> Logits:
        """Return the logits."""
        states = nn.RNN(nn.GRUCell(32))(nn.Embed(VOCAB, 32)(tokens)[None])[0]
        return nn.Dense(VOCAB)(nn.relu(nn.Dense(64)(states)))


class LinenAttention(nn.Module):
    """One attention block, whose kernels have three axes, with an embedding that is also the head."""

    @nn.compact
    def __call__(self, tokens: Tokens) -> Logits:
        """Return the logits."""
        embed = nn.Embed(VOCAB, 32)
        x = embed(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=4)
        return embed.attend(x + attention(nn.LayerNorm()(x)[None], mask=nn.make_causal_mask(tokens[None]))[0])


class LinenBlock(nn.Module):
    """A residual block for `nn.scan`."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Apply the block to the residual stream."""
        return x + nn.Dense(32)(nn.relu(nn.Dense(64)(nn.LayerNorm()(x)))), None


class LinenStacked(nn.Module):
    """Four blocks; `nn.scan` stacks each of their weights in one array."""

    @nn.compact
    def __call__(self, tokens: Tokens) -> Logits:
        """Return the logits."""
        blocks = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = blocks(name="blocks")(nn.Embed(VOCAB, 32)(tokens), None)
        return nn.Dense(VOCAB)(x)


class NnxBlock(nnx.Module):
    """A block of a transformer, in flax.nnx."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        """Draw the weights."""
        self.before, self.between = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Apply the block to the residual stream."""
        normed, mask = self.before(x), jnp.tril(jnp.ones((len(x), len(x)), bool))
        query, key, value = (layer(normed).reshape(1, len(x), 4, -1) for layer in (self.query, self.key, self.value))
        x = x + self.out(nnx.dot_product_attention(query, key, value, mask=mask).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class NnxTransformer(nnx.Module):
    """A transformer of two blocks with learned positions, in flax.nnx."""

    def __init__(self, length: int, rngs: nnx.Rngs) -> None:
        """Draw the weights; the model reads at most `length` tokens."""
        self.embed = nnx.Embed(VOCAB, 64, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, 64)))
        self.blocks = nnx.List([NnxBlock(64, rngs) for _ in range(2)])
        self.out = nnx.Linear(64, VOCAB, rngs=rngs)

    def __call__(self, tokens: Tokens) -> Logits:
        """Return the logits."""
        x = self.embed(tokens) + self.positions[: len(tokens)]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def linen(module: nn.Module, length: int, **noise: Any) -> Made:
    """Make a model of flax.linen."""
    params = module.init(jax.random.key(0), jnp.zeros(length, jnp.int32))
    return Made(params, module.apply, noise)  # type: ignore[arg-type]


def nnx_transformer(length: int) -> Made:
    """Make a model of flax.nnx."""
    graph, params = nnx.split(NnxTransformer(length, nnx.Rngs(0)))
    return Made(params, lambda params, tokens: nnx.merge(graph, params)(tokens))


def equinox_gru() -> Made:
    """Make a GRU with a hidden layer in the head, in equinox."""
    import equinox as eqx

    class EquinoxGru(eqx.Module):
        embed: eqx.nn.Embedding
        cell: eqx.nn.GRUCell
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key: Array) -> None:
            keys = jax.random.split(key, 4)
            self.embed = eqx.nn.Embedding(VOCAB, 64, key=keys[0])
            self.cell = eqx.nn.GRUCell(64, 64, key=keys[1])
            self.hidden = eqx.nn.Linear(64, 128, key=keys[2])
            self.out = eqx.nn.Linear(128, VOCAB, key=keys[3])

        def __call__(self, tokens: Tokens) -> Logits:
            def step(state: Array, token: Array) -> tuple[Array, Array]:
                state = self.cell(self.embed(token), state)
                return state, self.out(jax.nn.relu(self.hidden(state)))

            return jax.lax.scan(step, jnp.zeros(64), tokens)[1]

    params, rest = eqx.partition(EquinoxGru(jax.random.key(0)), eqx.is_inexact_array)
    return Made(params, lambda params, tokens: eqx.combine(params, rest)(tokens))


MODELS: dict[str, Callable[[int], Made]] = {
    "linen GRU": lambda length: linen(LinenGru(), length),
    "equinox GRU": lambda length: equinox_gru(),
    "nnx transformer": nnx_transformer,
    "linen attention, tied embedding": lambda length: linen(LinenAttention(), length),
    "linen blocks, stacked": lambda length: linen(LinenStacked(), length, stacked=lambda path, leaf: "blocks" in path),
}
"""`(length) -> model` by name."""
