"""Member-tokens a second of a step with noise on activations, against a plain forward pass of as many tokens.

Both alternately, medians; the forward pass is of the best batch size of some that are tried:

    python experiments/bench_activation.py [--hidden 32 64 128] [--population 4096] [--rounds 9]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import esjax

esjax.prepare_devices()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jaxtyping import Array  # noqa: E402

from esjax.config import Config, EsConfig, GruConfig, replace  # noqa: E402
from esjax.devices import local_mesh  # noqa: E402
from esjax.evaluate import make_deal  # noqa: E402
from esjax.member import Member  # noqa: E402
from esjax.models import build_model  # noqa: E402
from esjax.replica import Replica  # noqa: E402

VOCAB = 83
BATCHES = (64, 128, 256, 512)
"""Sequences at a time of the forward pass that are tried."""


def main() -> None:
    """Print a line of JSON for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--population", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    stream = rng.integers(2, VOCAB, 2**16).astype(np.uint8)
    for hidden in arguments.hidden:
        model_config = GruConfig(hidden_size=hidden, head_size=max(64, hidden))
        es = EsConfig(space="activation", population_size=arguments.population)
        config = Config(es=es, model=model_config)
        model = build_model(model_config, VOCAB)
        runs: dict[str, Callable[[], object]] = {}
        for name, chosen in {"step": es, "step, exact logits": replace(es, exact_logits=True)}.items():
            replica = Replica(replace(config, es=chosen), model, stream, local_mesh())
            runs[name] = step_of(replica, np.arange(es.pairs, dtype=np.uint32))
        length = config.data.window + config.data.burn_in
        tokens = rng.integers(2, VOCAB, (arguments.population, length)).astype(np.int32)
        for batch in BATCHES:
            runs[f"forward {batch}"] = forward_of(config, batch, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                jax.block_until_ready(run())
                seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        best = min(value for name, value in medians.items() if name.startswith("forward"))
        line: dict[str, object] = {"hidden": hidden, "population": arguments.population}
        for name, value in {"forward": best, **{n: v for n, v in medians.items() if n.startswith("step")}}.items():
            line[name] = f"{arguments.population * config.data.window / value / 1e6:.2f} M/s, {best / value:.2f}"
        print(json.dumps(line), flush=True)


def step_of(replica: Replica, pairs: np.ndarray) -> Callable[[], object]:
    """Make a whole step, at an update of size 0."""

    def step() -> object:
        replica.apply_sum(replica.sums(pairs), 0.0)
        return replica.state

    return step


def forward_of(config: Config, batch: int, tokens: np.ndarray) -> Callable[[], object]:
    """Make a forward pass of many sequences, dealt to the devices in batches."""
    model = build_model(config.model, VOCAB)
    burn_in, mesh = config.data.burn_in, local_mesh()

    def work(chunk: Array, total: Array, params: object, tokens: Array) -> Array:
        return total + jnp.sum(
            jax.vmap(lambda window: Member(model, params).cross_entropy(window, burn_in))(tokens[chunk])
        )

    deal = jax.jit(make_deal(mesh, work))
    params = model.init(jax.random.key(0))
    batches = tokens.reshape(-1, batch, tokens.shape[-1])
    return lambda: deal(jnp.int32(len(batches)), jnp.float32(0), params, batches)


if __name__ == "__main__":
    main()
