"""Llama (Touvron et al. 2023, section 2.2): a transformer, for pretrained weights or to train from scratch.

With the embedding x_t = E[token_t] of width D, and heads of width d, each layer computes:

    a = rms(x, g)      rms(x, g) = g * x / sqrt(mean(x²) + ε)                    (Zhang & Sennrich 2019, section 4)
    q = a Wq, k = a Wk, v = a Wv, cut into heads; several heads of q share one of k and v
                                                                                 (Ainslie et al. 2023, section 2.2)
    q and k turn with the position t: the pair (i, i + d/2) of a head by the angle t * theta^(-2i/d)
                                                                                 (Su et al. 2021, section 3.2)
    x <- x + heads(Σ_{s <= t} softmax_s(q_t · k_s / √d) v_s) Wo
    b = rms(x, g')     x <- x + (silu(b Wg) * (b Wu)) Wd                         (Shazeer 2020, section 2)

and logits = rms(x, g) Eᵀ, or rms(x, g) W if the embeddings are not tied (Press & Wolf 2017).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from esjax.core.rules import HIGHEST
from esjax.core.units import VECTOR_UNIT
from esjax.data.tokens import STOP
from esjax.models.layers import Norm
from esjax.models.model import Logits, Model, Token

FIRST_LOGITS = 0.1
"""Initial scale of the last norm: small, so that a run starts near the uniform distribution."""

Heads = Float[Array, "length heads head"]
Past = Float[Array, "past key_heads head"]


class LlamaLayers(NamedTuple):
    """The weights of all layers, stacked along the first axis, or their units. Matrices are [inputs, outputs].

    In one loop over the layers, the program that XLA compiles holds one layer, however many there are.
    """

    attention_norm: Norm
    query: Any
    """Wq, [layers, hidden, heads * head]."""
    key: Any
    """Wk, [layers, hidden, key heads * head]."""
    value: Any
    """Wv, [layers, hidden, key heads * head]."""
    output: Any
    """Wo, [layers, heads * head, hidden]."""
    mlp_norm: Norm
    gate: Any
    """Wg, [layers, hidden, mlp]."""
    up: Any
    """Wu, [layers, hidden, mlp]."""
    down: Any
    """Wd, [layers, mlp, hidden]."""


class LlamaParams(NamedTuple):
    """All weights."""

    embedding: Any
    """E, [vocabulary, hidden]."""
    layers: LlamaLayers
    norm: Norm
    output: Any = ()
    """W, [hidden, vocabulary]; () if the embeddings are tied."""


class LlamaState(NamedTuple):
    """The state after some tokens: keys and values of the last `context` of them, and the last token's output.

    Attributes:
        keys: Of each layer; the token at position t is in row t % context.
        values: The same.
        position: Number of tokens read, int32.
        hidden: Output of the last layer at the last token.
    """

    keys: Float[Array, "layers context heads head"]
    values: Float[Array, "layers context heads head"]
    position: Int[Array, ""]
    hidden: Float[Array, " hidden"]


def llama(
    vocab_size: int,
    hidden_size: int,
    mlp_size: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    context: int,
    rope_theta: float,
    norm_eps: float,
    tied: bool,
) -> Model:
    """Build the network.

    Stepwise and whole sequences give the same logits up to `context` tokens. From then on, each new token stepwise
    takes the place of the oldest one in the cache (Jiang et al. 2023, section 2).

    The model reads across the ends of documents, as it does in training; the first document begins with STOP.

    Args:
        vocab_size: V, number of token ids.
        hidden_size: D, width of the state.
        mlp_size: Width of the hidden layer after the attention.
        n_layers: Number of layers.
        n_heads: Number of attention heads; their width is hidden_size / n_heads.
        n_kv_heads: Number of heads of keys and values; divides `n_heads`.
        context: Most tokens that attention reaches back to, the current one included.
        rope_theta: theta, the base of the wavelengths of the rotary embedding.
        norm_eps: ε of the norms.
        tied: Whether the embedding is the output layer, too.
    """
    head_size = hidden_size // n_heads
    queries, keys = n_heads * head_size, n_kv_heads * head_size
    of_hidden, of_heads, of_mlp = hidden_size**-0.5, queries**-0.5, mlp_size**-0.5
    layer_units = LlamaLayers(
        attention_norm=Norm(VECTOR_UNIT),
        query=of_hidden,
        key=of_hidden,
        value=of_hidden,
        output=of_heads,
        mlp_norm=Norm(VECTOR_UNIT),
        gate=of_hidden,
        up=of_hidden,
        down=of_mlp,
    )
    unit = LlamaParams(of_hidden, layer_units, Norm(VECTOR_UNIT), () if tied else of_hidden)

    def init(key: Key[Array, ""]) -> LlamaParams:
        numbered = iter(jax.random.split(key, 9))

        def draw(*shape: int, size: float = 1.0) -> Array:
            return size * shape[-2] ** -0.5 * jax.random.normal(next(numbered), shape)

        ones, deep = Norm(jnp.ones((n_layers, hidden_size))), (2 * n_layers) ** -0.5
        layers = LlamaLayers(
            attention_norm=ones,
            query=draw(n_layers, hidden_size, queries),
            key=draw(n_layers, hidden_size, keys),
            value=draw(n_layers, hidden_size, keys),
            output=draw(n_layers, queries, hidden_size, size=deep),
            mlp_norm=ones,
            gate=draw(n_layers, hidden_size, mlp_size),
            up=draw(n_layers, hidden_size, mlp_size),
            down=draw(n_layers, mlp_size, hidden_size, size=deep),
        )
        embedding = draw(hidden_size, vocab_size).T
        output = () if tied else draw(hidden_size, vocab_size)
        return LlamaParams(embedding, layers, Norm(jnp.full(hidden_size, FIRST_LOGITS)), output)

    def run(
        params: LlamaParams, tokens: Int[Array, " length"], before: LlamaState | None = None
    ) -> tuple[Float[Array, "length hidden"], Float[Array, "layers length heads head"], Any]:
        """Read the first tokens of a document, or one token after a state.

        Returns:
            For each token the output of the last layer, and the keys and values of each layer.
        """
        x = params.embedding[tokens].astype(jnp.float32)
        places = (0 if before is None else before.position) + jnp.arange(len(tokens))
        turn = partial(_turned, angles=_angles(places, head_size, rope_theta))
        # Row s of a cache that was filled in order holds no token after place t if s <= t; full, all are before.
        rows = jnp.arange(len(tokens) if before is None else context)
        seen = rows[None] <= places[:, None]

        def all_of(cache: Float[Array, "layers context heads head"], number: Array, new: Heads) -> Past:
            """Put the new token of a layer into its cache."""
            old = jax.lax.dynamic_index_in_dim(cache, number, keepdims=False)
            return jnp.where((rows == places % context)[:, None, None], new, old)

        def read_layer(x: Array, of_layer: tuple[LlamaLayers, Array]) -> tuple[Array, tuple[Heads, Heads]]:
            layer, number = of_layer
            a = _rms(x, layer.attention_norm, norm_eps)
            query, key, value = (
                _product(a, matrix).reshape(len(tokens), heads, head_size)
                for matrix, heads in ((layer.query, n_heads), (layer.key, n_kv_heads), (layer.value, n_kv_heads))
            )
            new = turn(key), value
            past = (
                new if before is None else (all_of(before.keys, number, new[0]), all_of(before.values, number, new[1]))
            )
            x = x + _product(_attend(turn(query), *past, seen), layer.output)
            b = _rms(x, layer.mlp_norm, norm_eps)
            return x + _product(jax.nn.silu(_product(b, layer.gate)) * _product(b, layer.up), layer.down), new

        x, (new_keys, new_values) = jax.lax.scan(read_layer, x, (params.layers, jnp.arange(n_layers)))
        return x, new_keys, new_values

    def read_out(params: LlamaParams, x: Float[Array, "length hidden"]) -> Float[Array, "length vocabulary"]:
        return _product(_rms(x, params.norm, norm_eps), params.embedding.T if tied else params.output)

    def logits(params: LlamaParams, tokens: Int[Array, " length"]) -> Float[Array, "length vocabulary"]:
        return read_out(params, run(params, tokens)[0])

    def read(params: LlamaParams, tokens: Int[Array, " length"], count: Int[Array, ""] | int) -> LlamaState:
        # Rows of the caches after the first `count` tokens hold what follows them; new tokens take their places before
        # they are seen.
        x, keys, values = run(params, jnp.concatenate([jnp.full(1, STOP, tokens.dtype), tokens]))
        free = ((0, 0), (0, context - len(x)), (0, 0), (0, 0))
        return LlamaState(jnp.pad(keys, free), jnp.pad(values, free), jnp.int32(count) + 1, x[count])

    def initial_state(params: LlamaParams) -> LlamaState:
        empty = jnp.zeros((n_layers, context, n_kv_heads, head_size))
        return consume(params, LlamaState(empty, empty, jnp.int32(0), jnp.zeros(hidden_size)), jnp.int32(STOP))

    def predict(params: LlamaParams, state: LlamaState) -> Logits:
        return read_out(params, state.hidden[None])[0]

    def consume(params: LlamaParams, state: LlamaState, token: Token) -> LlamaState:
        x, keys, values = run(params, token[None], state)
        row = state.position % context
        return LlamaState(
            state.keys.at[:, row].set(keys[:, 0]), state.values.at[:, row].set(values[:, 0]), state.position + 1, x[0]
        )

    def shortened(tokens: int) -> Model:
        less = min(tokens, context)
        return llama(vocab_size, hidden_size, mlp_size, n_layers, n_heads, n_kv_heads, less, rope_theta, norm_eps, tied)

    return Model(
        init,
        initial_state,
        predict,
        consume,
        unit=unit,
        logits=logits,
        context=context,
        read=read,
        shortened=shortened,
        resets=False,
        stacked=("layers",),
        embeddings=() if tied else ("embedding",),
        output_layer="" if tied else "output",
    )


def _product(x: Float[Array, "length inputs"], matrix: Any) -> Float[Array, "length outputs"]:
    """Multiply in the type of the matrix, summing in float32."""
    return jnp.matmul(x.astype(matrix.dtype), matrix, precision=HIGHEST, preferred_element_type=jnp.float32)


def _rms(x: Float[Array, "length hidden"], norm: Norm, eps: float) -> Float[Array, "length hidden"]:
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return norm.scale.astype(jnp.float32)[None] * (x * jax.lax.rsqrt(mean + eps))


def _angles(places: Int[Array, " length"], head_size: int, theta: float) -> Float[Array, "length 1 half"]:
    rates = theta ** (-2 * jnp.arange(head_size // 2, dtype=jnp.float32) / head_size)
    return places[:, None, None].astype(jnp.float32) * rates[None, None]


def _turned(x: Heads, angles: Float[Array, "length 1 half"]) -> Heads:
    one, two = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)


def _attend(query: Heads, keys: Past, values: Past, seen: Bool[Array, "length past"]) -> Float[Array, "length width"]:
    """Mix the values of the tokens that are seen; heads of the query in groups, each with one head of the keys."""
    length, heads, head_size = query.shape
    grouped = query.reshape(length, keys.shape[1], -1, head_size)
    scores = jnp.einsum("tkgd,skd->kgts", grouped, keys, precision=HIGHEST) * head_size**-0.5
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("kgts,skd->tkgd", weights, values, precision=HIGHEST)
    return mixed.reshape(length, heads * head_size)
