"""What a step costs a host when it exchanges losses, and when it exchanges sums, by the number of hosts.

With losses, a host scores its share of the pairs and then grows the noise of all of them again. With sums, it grows
that of its share alone, and sends and gets a number for each weight. Noise on weights; one process is timed, as one
host of many with an equal share; both ways alternately, medians:

    python experiments/bench_exchange.py [--populations 4096 65536] [--hosts 1 4 16] [--hidden 32] [--rounds 5]
"""

import argparse
import json
import statistics
import time

import esjax

esjax.prepare_devices()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from esjax.config import Config, EsConfig, GruConfig  # noqa: E402
from esjax.devices import local_mesh  # noqa: E402
from esjax.models import build_model  # noqa: E402
from esjax.replica import Replica  # noqa: E402

VOCAB = 83


def main() -> None:
    """Print a line of JSON for each population and number of hosts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", type=int, nargs="+", default=[4096, 65536])
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    stream = np.random.default_rng(0).integers(1, VOCAB, 2**16).astype(np.uint8)
    model = GruConfig(hidden_size=arguments.hidden)
    for population in arguments.populations:
        by_losses, by_sums = (
            Replica(
                Config(es=EsConfig(population_size=population, exchange=exchange), model=model),
                build_model(model, VOCAB),
                stream,
                local_mesh(),
            )
            for exchange in ("losses", "sums")
        )
        pairs = np.arange(population // 2, dtype=np.uint32)
        weights = np.random.default_rng(1).integers(-127, 128, len(pairs)).astype(np.int8)
        for hosts in arguments.hosts:
            share = pairs[: max(by_losses.chunk_pairs, len(pairs) // hosts)]
            seconds: dict[str, list[float]] = {"losses": [], "sums": []}
            for _ in range(arguments.rounds + 1):
                started = time.perf_counter()
                by_losses.losses(share)
                by_losses.apply(pairs, weights, 0.0)
                jax.block_until_ready(by_losses.state)
                middle = time.perf_counter()
                by_sums.apply_sum(by_sums.sums(share), 0.0)
                jax.block_until_ready(by_sums.state)
                seconds["losses"].append(middle - started)
                seconds["sums"].append(time.perf_counter() - middle)
            losses, sums = (statistics.median(seconds[way][1:]) for way in ("losses", "sums"))
            line = {
                "population": population,
                "hosts": hosts,
                "losses_ms": round(1000 * losses, 1),
                "sums_ms": round(1000 * sums, 1),
                "ratio": round(losses / sums, 2),
                "losses_up": 8 * len(share),
                "losses_down": len(pairs),
                "sums_up": 4 * by_sums.numbers,
                "sums_down": 2 * by_sums.numbers,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
