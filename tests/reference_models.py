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
    layers = [jax.tree.map(lambda leaf, number=number: leaf[number], p.layers) for number in range(len(p.layers.key))]
    size = p.embedding.shape[1] // heads
    shared = heads // (p.layers.key.shape[2] // size)

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
        for number, layer in enumerate(layers):
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


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def head(p: Any, outputs: list[np.ndarray]) -> np.ndarray:
    hidden = np.concatenate(outputs) @ p.head_hidden.matrix + p.head_hidden.bias
    return np.maximum(hidden, 0) @ p.head_output.matrix + p.head_output.bias


def gru_layers(p: Any, tokens: list[int]) -> np.ndarray:
    """Logits of `esjax.models.gru` of several layers before each token."""
    state, rows, d = list(p.start), [], len(p.start[0])
    for token in tokens:
        rows.append(head(p, state))
        x, new = p.embedding[token], list[np.ndarray]()
        for i, h in enumerate(state):
            layer = p.recurrent[0] if i == 0 else p.recurrent[i].recurrent
            x = x if i == 0 else new[-1] @ p.recurrent[i].inputs
            y = h @ layer.matrix + layer.bias
            r, z = sigmoid(x[:d] + y[:d]), sigmoid(x[d : 2 * d] + y[d : 2 * d])
            new.append(z * h + (1 - z) * np.tanh(x[2 * d :] + r * y[2 * d :]))
        state = list(p.start) if token == STOP else new
    return np.array(rows)


def lstm_layers(p: Any, tokens: list[int]) -> np.ndarray:
    """Logits of `esjax.models.lstm` before each token."""
    state, rows, d = list(p.start), [], len(p.start[0].cell)
    for token in tokens:
        rows.append(head(p, [h for _, h in state]))
        new: list[tuple[np.ndarray, np.ndarray]] = []
        for i, (c, h) in enumerate(state):
            x = p.embedding[token] if i == 0 else new[-1][1] @ p.inputs[i - 1]
            a = x + h @ p.recurrent[i].matrix + p.recurrent[i].bias
            c = sigmoid(a[d : 2 * d]) * c + sigmoid(a[:d]) * np.tanh(a[2 * d : 3 * d])
            new.append((c, sigmoid(a[3 * d :]) * np.tanh(c)))
        state = list(p.start) if token == STOP else new
    return np.array(rows)


def gelu(x: np.ndarray) -> np.ndarray:
    """Return GELU by its usual approximation (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rms(x: np.ndarray, norm: Any, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * norm.scale


def lru_layers(p: Any, tokens: list[int]) -> np.ndarray:
    """Logits of `esjax.models.lru` before each token: each document is read anew from its beginning."""
    rows, d, document = [], len(p.norm.scale), [STOP]
    for token in tokens:
        hidden = [np.zeros(d) for _ in p.layers]
        for place in range(len(document)):
            seen = [document[place - age] if place >= age else STOP for age in range(len(p.embedding))]
            x = sum(table[one] for table, one in zip(p.embedding, seen, strict=True))
            for i, layer in enumerate(p.layers):
                r, take, v, o = np.split(rms(x, layer.norm, 1e-5) @ layer.inputs.matrix + layer.inputs.bias, 4)
                a = np.exp(-8 * np.log(1 + np.exp(layer.decay)) * sigmoid(r))
                hidden[i] = a * hidden[i] + np.sqrt(1 - a**2) * sigmoid(take) * v
                x = x + (gelu(o) * hidden[i]) @ layer.output
                one, two = np.split(rms(x, layer.mlp_norm, 1e-5) @ layer.mlp_inputs, 2)
                x = x + (gelu(one) * two) @ layer.mlp_output
        rows.append(rms(x, p.norm, 1e-5) @ p.head_output.matrix + p.head_output.bias)
        document = [STOP] if token == STOP else [*document, token]
    return np.array(rows)


def rwkv7_layers(p: Any, tokens: list[int], head_size: int) -> np.ndarray:
    """Logits of `esjax.models.rwkv7` before each token, one head at a time."""

    def layer_norm(x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
        return (x - x.mean()) / np.sqrt(x.var() + eps)

    def norm(x: np.ndarray, by: Any) -> np.ndarray:
        return layer_norm(x) * by.scale + by.bias

    def fresh() -> list[Any]:
        return [[np.zeros(d), [np.zeros((head_size, head_size)) for _ in parts], np.zeros(d)] for _ in p.layers]

    d = p.embedding.shape[1]
    parts = [slice(start, start + head_size) for start in range(0, d, head_size)]
    rows, states = [], fresh()

    def read(token: int) -> np.ndarray:
        x, first = norm(p.embedding[token], p.embedding_norm), None
        for layer, state in zip(p.layers, states, strict=True):
            z = norm(x, layer.norm)
            zr, zw, zk, zv, za, zg = ((1 - m) * z + m * state[0] for m in layer.mix)
            r, k, v = zr @ layer.receptance, zk @ layer.key, zv @ layer.value
            if first is None:
                first = v
            else:
                share = sigmoid(layer.first_value.bias + zv @ layer.first_value.down @ layer.first_value.up)
                v = (1 - share) * v + share * first
            w = np.exp(-sigmoid(layer.decay.bias + np.tanh(zw @ layer.decay.down) @ layer.decay.up) / np.sqrt(np.e))
            a = sigmoid(layer.rate.bias + za @ layer.rate.down @ layer.rate.up)
            removed, k = k * layer.key_scale, k * (1 - layer.key_rate + a * layer.key_rate)
            out = np.zeros(d)
            for number, part in enumerate(parts):
                q = removed[part] / np.linalg.norm(removed[part])
                change = np.diag(w[part]) - np.outer(q, a[part] * q)
                state[1][number] = state[1][number] @ change + np.outer(v[part], k[part])
                out[part] = layer_norm(state[1][number] @ r[part], head_size * 1e-5)
                out[part] = out[part] * layer.head_norm.scale[part] + layer.head_norm.bias[part]
                out[part] += (r[part] * k[part] * layer.bonus[part]).sum() * v[part]
            x = x + (out * (sigmoid(zg @ layer.gate_down) @ layer.gate_up)) @ layer.output
            y = norm(x, layer.mlp_norm)
            inner = np.maximum(((1 - layer.mlp_mix) * y + layer.mlp_mix * state[2]) @ layer.mlp_inputs, 0)
            x = x + inner**2 @ layer.mlp_output
            state[0], state[2] = z, y
        return norm(x, p.norm) @ p.output

    logits = read(STOP)
    for token in tokens:
        rows.append(logits)
        if token == STOP:
            states = fresh()
        logits = read(token)
    return np.array(rows)
