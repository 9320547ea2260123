"""Evolution strategies for a character-level GRU, on one page: text, model, training loop, sample.

    python experiments/minimal.py [TEXT_FILE] [SECONDS]

Each step scores 2,048 pairs of perturbed copies of the weights, each pair on one window of text. The losses become one
small integer per pair. The noise is drawn again from the seeds and summed with these integers as weights; the sum goes
to Adam (Salimans et al. 2017; the perturbations are of low rank: Sarkar et al. 2025). Nothing is differentiated.
"""

import os
import pydoc_data.topics
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"  # one thread per device, one device per core

import jax
import jax.numpy as jnp
import optax

import esjax

HIDDEN, HEAD = 32, 64
WINDOW = 32  # tokens that a pair is scored on, after a first one that is only read
PAIRS = 2048
SIGMA = 0.2  # standard deviation of the noise, in units of each leaf
LEARNING_RATE = 0.1  # in units of each leaf, too; falls as 1 / sqrt(1 + step / 100)


def first_params(key: jax.Array, vocab: int) -> dict:
    """Draw the weights: an embedding, a GRU cell, and a head with one hidden layer."""
    keys = jax.random.split(key, 4)
    gates = jax.random.split(keys[1], 3)
    orthogonal = jax.nn.initializers.orthogonal()
    return {
        "embedding": jax.random.normal(keys[0], (vocab, 3 * HIDDEN)),
        "recurrent": {
            "kernel": jnp.concatenate([orthogonal(gate, (HIDDEN, HIDDEN)) for gate in gates], axis=1),
            "bias": jnp.zeros(3 * HIDDEN),
        },
        "hidden": {
            "kernel": jax.random.normal(keys[2], (HIDDEN, HEAD)) * (2 / HIDDEN) ** 0.5,
            "bias": jnp.zeros(HEAD),
        },
        "output": {
            "kernel": 0.1 * jax.random.normal(keys[3], (HEAD, vocab)) * HEAD**-0.5,
            "bias": jnp.zeros(vocab),
        },
    }


def unit(path: str, leaf: jax.Array) -> float:
    """Return the unit of a leaf, the size of a typical entry: noise and updates are multiples of it."""
    if path == "embedding":
        return 1.0
    return 0.3 if leaf.ndim == 1 else leaf.shape[0] ** -0.5


def dense(layer: dict, x: jax.Array) -> jax.Array:
    """Apply a layer."""
    return x @ layer["kernel"] + layer["bias"]


def consume(params: dict, state: jax.Array, token: jax.Array) -> jax.Array:
    """Take the GRU one token further (Cho et al. 2014, in the form of cuDNN)."""
    x_reset, x_update, x_new = jnp.split(params["embedding"][token], 3)
    y_reset, y_update, y_new = jnp.split(dense(params["recurrent"], state), 3)
    reset, update = jax.nn.sigmoid(x_reset + y_reset), jax.nn.sigmoid(x_update + y_update)
    return update * state + (1 - update) * jnp.tanh(x_new + reset * y_new)


def predict(params: dict, state: jax.Array) -> jax.Array:
    """Return the logits of the next token."""
    return dense(params["output"], jax.nn.relu(dense(params["hidden"], state)))


def loss(params: dict, window: jax.Array) -> jax.Array:
    """Average the cross entropy of a window's tokens, in nats; the first is only read."""

    def read(state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats = -jax.nn.log_softmax(predict(params, state))[token]
        return consume(params, state, token), nats

    return jax.lax.scan(read, jnp.zeros(HIDDEN), window)[1][1:].mean()


def write(params: dict, prompt: jax.Array, key: jax.Array, length: int = 200) -> jax.Array:
    """Read a prompt, then draw one token after another."""

    def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = jax.random.categorical(key, predict(params, state) / 0.7)
        return consume(params, state, token), token

    state = jax.lax.scan(lambda state, token: (consume(params, state, token), None), jnp.zeros(HIDDEN), prompt)[0]
    return jax.lax.scan(step, state, jax.random.split(key, length))[1]


def main(text: str, seconds: float) -> float:
    """Train on all but the last twentieth of a text; return the loss on that."""
    jax.config.update("jax_num_cpu_devices", os.cpu_count())
    symbols = sorted(set(text))
    tokens = jnp.asarray([symbols.index(symbol) for symbol in text])
    training, held_out = jnp.split(tokens, [len(tokens) * 19 // 20])
    params = first_params(jax.random.key(0), len(symbols))

    units = jax.tree_util.tree_map_with_path(
        lambda path, leaf: unit(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), params
    )
    noise = esjax.low_rank(SIGMA, units=units)
    mesh = jax.make_mesh((jax.device_count(),), ("pairs",), (jax.sharding.AxisType.Auto,))
    value_and_grad = esjax.value_and_grad(loss, noise, PAIRS, mesh=mesh)
    optimizer = esjax.in_units(optax.adam(lambda step: LEARNING_RATE * (1 + step / 100) ** -0.5), units)

    @jax.jit
    def step(params: dict, state: optax.OptState, number: int) -> tuple[dict, optax.OptState, jax.Array]:
        places = jax.random.randint(jax.random.key(number), (PAIRS, 1), 0, len(training) - WINDOW)
        value, gradient = value_and_grad(params, number, training[places + jnp.arange(WINDOW + 1)])
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    windows = held_out[: len(held_out) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
    measure = jax.jit(lambda params: jax.vmap(loss, (None, 0))(params, windows).mean())
    state, number, shown, started = optimizer.init(params), 0, 0.0, time.perf_counter()
    while (now := time.perf_counter() - started) < seconds or number < 10:
        # CPU devices can block each other forever if one runs ahead: finish each step before the next.
        params, state, value = jax.block_until_ready(step(params, state, number))
        number += 1
        if now >= shown:
            print(f"step {number:5}  {now:4.0f} s  loss {value:.3f}  held-out {measure(params):.3f}", flush=True)
            shown = now + 10
    result = float(measure(params))
    prompt = tokens[:20]
    print(f"held-out {result:.3f} nats a character after {number} steps; a sample:")
    print("".join(symbols[int(token)] for token in jax.jit(write)(params, prompt, jax.random.key(1))))
    return result


if __name__ == "__main__":
    given = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else "\n".join(pydoc_data.topics.topics.values())
    main(given, float(sys.argv[2]) if len(sys.argv) > 2 else 60)
