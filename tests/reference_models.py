"""The equations of the models in float64 numpy, and weights at which all of them matter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esjax.data.tokens import STOP


def wide(params: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def rnn_step(p: Any, s: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.maximum(s @ p.head_hidden, 0) @ p.head_output
    for layer in p.layers:
        s = np.tanh(s + (s @ layer.recurrent) * layer.embedding[token])
    return s, logits


def gru_step(p: Any, h: np.ndarray, token: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.maximum(h @ p.head_hidden.matrix + p.head_hidden.bias, 0) @ p.head_output.matrix + p.head_output.bias
    d = len(h)
    x, y = p.embedding[token], h @ p.recurrent.matrix + p.recurrent.bias
    r = 1 / (1 + np.exp(-(x[:d] + y[:d])))
    z = 1 / (1 + np.exp(-(x[d : 2 * d] + y[d : 2 * d])))
    n = np.tanh(x[2 * d :] + r * y[2 * d :])
    return z * h + (1 - z) * n, logits


STEPS = {"rnn": rnn_step, "gru": gru_step}


def reference_losses(name: str, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Nats of each token; the state starts anew after STOP."""
    p = wide(params)
    state, losses = p.start, []
    for token in tokens:
        after, logits = STEPS[name](p, state, int(token))
        losses.append(np.log(np.exp(logits).sum()) - logits[token])
        state = p.start if token == STOP else after
    return np.array(losses)


def busy(params: Any) -> Any:
    """Give every weight a size at which it matters, start state and biases too."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.7, leaf.shape), jnp.float32), params)


def mingru_step(
    p: Any, state: tuple[list[np.ndarray], list[int]], token: int
) -> tuple[tuple[list[np.ndarray], list[int]], np.ndarray]:
    """Take a step of `esjax.models.mingru`; the state is that of each layer, and the last tokens, the newest first."""
    layers, before = state
    hidden = np.concatenate(layers) @ p.head_hidden.matrix + p.head_hidden.bias
    logits = np.maximum(hidden, 0) @ p.head_output.matrix + p.head_output.bias
    seen, new = [token, *before], []
    a = sum(p.embedding[i][seen[i]] for i in range(len(p.embedding))) + p.bias
    for i, h in enumerate(layers):
        d = len(h)
        z = 1 / (1 + np.exp(-(a[:d] + 1)))
        new.append(z * h + (1 - z) * np.tanh(a[d:]))
        if i < len(p.layers):
            a = new[-1] @ p.layers[i].matrix + p.layers[i].bias
    return (new, seen[:-1]), logits


def llama_logits(p: Any, tokens: list[int], heads: int, theta: float, eps: float) -> np.ndarray:
    """Logits of `esjax.models.llama` after each token: one head and one pair of dimensions at a time."""
    hidden, layers = p.embedding.shape[1], range(len(p.layers))
    size = hidden // heads
    shared = heads // (p.layers[0].key.shape[1] // size)

    def rms(x: np.ndarray, norm: Any) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + eps) * norm.scale

    def turned(x: np.ndarray, place: int) -> np.ndarray:
        """Turn the pair (i, i + size/2) of a head as a complex number."""
        half = size // 2
        pairs = x[:half] + 1j * x[half:]
        pairs = pairs * np.exp(1j * place * np.array([theta ** (-2 * i / size) for i in range(half)]))
        return np.concatenate([pairs.real, pairs.imag])

    keys: list[list[np.ndarray]] = [[] for _ in layers]
    values: list[list[np.ndarray]] = [[] for _ in layers]
    rows = []
    for place, token in enumerate(tokens):
        x = p.embedding[token]
        for number, layer in enumerate(p.layers):
            a = rms(x, layer.attention_norm)
            keys[number].append(a @ layer.key)
            values[number].append(a @ layer.value)
            mixed = []
            for head in range(heads):
                part, of_head = slice(head // shared * size, (head // shared + 1) * size), slice(head * size, None)
                query = turned((a @ layer.query)[of_head][:size], place)
                scores = np.array([query @ turned(key[part], s) for s, key in enumerate(keys[number])]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights = weights / weights.sum()
                mixed.append(sum(w * value[part] for w, value in zip(weights, values[number], strict=True)))
            x = x + np.concatenate(mixed) @ layer.output
            b = rms(x, layer.mlp_norm)
            gate = b @ layer.gate
            x = x + (gate / (1 + np.exp(-gate)) * (b @ layer.up)) @ layer.down
        x = rms(x, p.norm)
        rows.append(x @ p.embedding.T if isinstance(p.output, tuple) else x @ p.output)
    return np.array(rows)
