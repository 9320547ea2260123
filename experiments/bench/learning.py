"""Held-out loss over seconds and over tokens: noise on weights, noise on activations, and backpropagation.

The same model, text, windows and first weights, and the optimizer of each: esjax's defaults for the first two, and Adam
with a learning rate of its own for backpropagation. One after another, each for so many seconds of training:

    python experiments/bench_learning.py [--seconds 60] [--hidden 64] [--only activation ...]
"""

import argparse
import json
import time
from collections.abc import Iterator

import esjax

esjax.prepare_devices()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jaxtyping import Array  # noqa: E402

from esjax.config import Config, EsConfig, GruConfig, replace  # noqa: E402
from esjax.data.corpus import Corpus, load_corpus  # noqa: E402
from esjax.data.delivery import token_type  # noqa: E402
from esjax.data.packing import draw_windows, pack_stream  # noqa: E402
from esjax.devices import local_mesh  # noqa: E402
from esjax.evaluate import cross_entropy  # noqa: E402
from esjax.models import build_model  # noqa: E402
from esjax.noise import INIT, WINDOWS, pair_seeds, stream_seed  # noqa: E402
from esjax.trained import Trained  # noqa: E402
from esjax.training import train  # noqa: E402

BATCH, RATE = 256, 0.005
"""Of backpropagation: windows a step, and Adam's learning rate at first; it falls to 0 as a cosine over the run."""


def main() -> None:
    """Print a line of JSON for each evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between evaluations")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--head", type=int, default=64)
    parser.add_argument("--only", nargs="+", default=["low_rank", "activation", "exact logits", "backpropagation"])
    arguments = parser.parse_args()
    model = GruConfig(hidden_size=arguments.hidden, head_size=arguments.head)
    config = Config(seconds=arguments.seconds, evaluate_time=arguments.every, model=model)
    es = {
        "low_rank": EsConfig(),
        "activation": EsConfig(space="activation"),
        "exact logits": EsConfig(space="activation", exact_logits=True),
    }
    for name in arguments.only:
        lines = evolve(replace(config, es=es[name])) if name in es else backpropagate(config)
        for seconds, tokens, held_out in lines:
            line = {"method": name, "seconds": round(seconds, 1), "tokens": tokens, "held_out": round(held_out, 4)}
            print(json.dumps(line), flush=True)


def evolve(config: Config) -> Iterator[tuple[float, int, float]]:
    """Train with evolution strategies; yield seconds, member-tokens and held-out loss."""
    for info in train(config):
        if info.held_out is not None:
            yield info.seconds, info.member_tokens, info.held_out


def backpropagate(config: Config) -> Iterator[tuple[float, int, float]]:
    """Train with backpropagation on the same windows; yield seconds, tokens and held-out loss."""
    corpus: Corpus = load_corpus(config.data)
    size, data = corpus.vocabulary.size, config.data
    model = build_model(config.model, size)
    trained = Trained(model, corpus.vocabulary, local_mesh())
    lanes = trained.lanes(corpus.held_out)
    stream = jax.numpy.asarray(pack_stream(corpus.train).astype(token_type(size)))
    params = model.init(jax.random.wrap_key_data(stream_seed(config.seed, INIT), impl="threefry2x32"))
    loss, seeds = cross_entropy(data.burn_in), stream_seed(config.seed, WINDOWS)
    rule = optax.inject_hyperparams(optax.adam)(RATE)

    def step(params: object, state: object, number: Array, rate: Array) -> tuple[object, object]:
        of_windows = pair_seeds(seeds, number, jax.numpy.arange(BATCH, dtype=np.uint32))
        windows = draw_windows(stream, of_windows, 1, data.burn_in + data.window)[:, 0]
        gradient = jax.grad(lambda p: jax.vmap(lambda window: loss(model, p, window))(windows).mean())(params)
        state.hyperparams["learning_rate"] = rate  # type: ignore[attr-defined]
        updates, state = rule.update(gradient, state)
        return optax.apply_updates(params, updates), state

    jitted, state = jax.jit(step), rule.init(params)
    jax.block_until_ready(jitted(params, state, np.int32(0), np.float32(RATE)))
    spent, number, next_at = 0.0, 0, 0.0
    while spent < config.seconds:  # type: ignore[operator]
        started = time.perf_counter()
        for _ in range(10):
            rate = np.float32(RATE * (1 + np.cos(np.pi * min(1.0, spent / config.seconds))) / 2)  # type: ignore[operator]
            params, state = jitted(params, state, np.int32(number), rate)
            number += 1
        jax.block_until_ready(params)
        spent += time.perf_counter() - started
        if spent >= next_at or spent >= config.seconds:  # type: ignore[operator]
            next_at += config.evaluate_time
            yield spent, number * BATCH * data.window, trained.loss(params, lanes)


if __name__ == "__main__":
    main()
