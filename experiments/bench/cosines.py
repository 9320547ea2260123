"""The cosine of an estimate with the exact gradient, against the population, for the three spaces.

Beside it, for noise on weights, the law 1 / sqrt(1 + n r / K) for n parameters, K pairs of a window each, and the
dispersion r of the windows' gradients (with r = 1, all windows alike, it is that of Dust, 2026):

    python experiments/cosines.py [RUN_FOLDER] [--populations 256 1024 4096 16384] [--repeats 3]
"""

import argparse
import json
from pathlib import Path

import esjax

esjax.prepare_devices()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from esjax.checkpoint import restore_newest  # noqa: E402
from esjax.compass import bearings  # noqa: E402
from esjax.config import EsConfig, replace  # noqa: E402
from esjax.data.delivery import token_type  # noqa: E402
from esjax.data.packing import pack_stream  # noqa: E402
from esjax.devices import local_mesh  # noqa: E402
from esjax.loading import load_run_corpus  # noqa: E402
from esjax.models import build_model  # noqa: E402
from esjax.replica import Replica  # noqa: E402
from esjax.run_folder import RunFolder  # noqa: E402

SPACES = {
    "full": EsConfig(space="full"),
    "low_rank": EsConfig(space="low_rank"),
    "activation": EsConfig(space="activation"),
    "activation, exact logits": EsConfig(space="activation", exact_logits=True),
}


def main() -> None:
    """Print a line of JSON for each space and population."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="a run; the gradient is taken at its newest weights")
    parser.add_argument("--populations", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_folder)
    config, corpus = folder.config, load_run_corpus(folder)
    size, mesh = corpus.vocabulary.size, local_mesh()
    model = build_model(config.model, size)
    replica = Replica(config, model, None, mesh)
    params = jax.device_get(restore_newest(folder.checkpoints, replica.state, print).state.params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    stream = pack_stream(corpus.train).astype(token_type(size))
    for name, es in SPACES.items():
        for population in arguments.populations:
            chosen = replace(config, es=replace(es, population_size=population))
            found = [*bearings(chosen, model, params, stream, mesh, arguments.repeats)]
            cosines = [bearing.cosine for bearing in found]
            line = {"space": name, "population": population, "cosine": round(float(np.mean(cosines)), 4)}
            line["spread"] = round(float(np.std(cosines)), 4)
            if es.space != "activation":
                dispersion = float(np.mean([bearing.dispersion for bearing in found]))
                line["dispersion"] = round(dispersion, 1)
                line["law"] = round((1 + parameters * dispersion / (population / 2)) ** -0.5, 4)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
