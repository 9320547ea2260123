"""Small models as people write them, in flax, equinox and plain jax.numpy; none of them knows esjax."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

VOCAB, WIDTH, LENGTH = 11, 8, 6


class Case(NamedTuple):
    """A model's parameters, its loss on one sequence of tokens, and what its noise needs to be told."""

    params: Any
    loss: Callable[[Any, Array], Array]
    noise: Mapping[str, Any] = MappingProxyType({})


def nats(logits: Array, tokens: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[1:, None], axis=-1).mean()


class LinenGru(nn.Module):
    vocab: int = VOCAB

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        states = nn.RNN(nn.GRUCell(WIDTH))(nn.Embed(self.vocab, WIDTH)(tokens)[None])[0]
        return nn.Dense(self.vocab)(nn.relu(nn.Dense(2 * WIDTH)(states)))


class LinenTiedAttention(nn.Module):
    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embed = nn.Embed(VOCAB, WIDTH)
        x = embed(tokens)
        mask = nn.make_causal_mask(tokens[None])
        attended = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x)[None], mask=mask)[0]
        return embed.attend(x + attended)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return x + nn.Dense(WIDTH)(nn.relu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))), None


class LinenStacked(nn.Module):
    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        blocks = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(nn.Embed(VOCAB, WIDTH)(tokens), None)
        return nn.Dense(VOCAB)(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.before, self.middle = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.query, self.key, self.value, self.out = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.before(x)
        query, key, value = (layer(h).reshape(1, len(x), 2, -1) for layer in (self.query, self.key, self.value))
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.out(nnx.dot_product_attention(query, key, value, mask=mask)[0].reshape(len(x), -1))
        return x + self.down(nnx.gelu(self.up(self.middle(x))))


class NnxTransformer(nnx.Module):
    def __init__(self, vocab: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(vocab, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (4 * LENGTH, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.out = nnx.Linear(WIDTH, vocab, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        x = self.embed(tokens) + self.positions[...][: len(tokens)]
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class EquinoxGru(eqx.Module):
    embed: eqx.nn.Embedding
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, vocab: int, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(vocab, WIDTH, key=keys[0])
        self.cell = eqx.nn.GRUCell(WIDTH, WIDTH, key=keys[1])
        self.out = eqx.nn.Linear(WIDTH, vocab, key=keys[2])

    def __call__(self, tokens: Array) -> Array:
        def step(state: Array, token: Array) -> tuple[Array, Array]:
            state = self.cell(self.embed(token), state)
            return state, self.out(state)

        return jax.lax.scan(step, jnp.zeros(WIDTH), tokens)[1]


def _linen(module: Any, **noise: Any) -> Case:
    params = module.init(jax.random.key(1), jnp.zeros(LENGTH, jnp.int32))
    return Case(params, lambda params, tokens: nats(module.apply(params, tokens[:-1]), tokens), noise)


def _nnx() -> Case:
    graph, state = nnx.split(NnxTransformer(VOCAB, nnx.Rngs(0)))
    return Case(state, lambda state, tokens: nats(nnx.merge(graph, state)(tokens[:-1]), tokens))


def _equinox() -> Case:
    params, rest = eqx.partition(EquinoxGru(VOCAB, jax.random.key(1)), eqx.is_inexact_array)
    return Case(params, lambda params, tokens: nats(eqx.combine(params, rest)(tokens[:-1]), tokens))


def _plain() -> Case:
    keys = jax.random.split(jax.random.key(2), 2)
    params = {"first": jax.random.normal(keys[0], (VOCAB, WIDTH)), "last": jax.random.normal(keys[1], (WIDTH, VOCAB))}
    return Case(params, lambda params, tokens: nats(jnp.tanh(params["first"][tokens[:-1]]) @ params["last"], tokens))


CASES: dict[str, Callable[[], Case]] = {
    "linen GRU": lambda: _linen(LinenGru()),
    "linen attention of three axes, tied embedding": lambda: _linen(LinenTiedAttention()),
    "linen stacked by scan": lambda: _linen(LinenStacked(), stacked=lambda path, leaf: "/blocks/" in path),
    "nnx transformer": _nnx,
    "equinox GRU": _equinox,
    "plain dict": _plain,
}
