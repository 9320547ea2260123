"""Speed of an evaluation with devices or threads, by the size of a chunk and the type of its products."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bench.measure import Candidate, all_threads, alternate, elsewhere, spread
from bench.ours import evaluation, replica_of
from bench.report import Report, Row, print_row
from bench.settings import Execution
from bench.throughput import Size, sizes
from esjax.config.settings import Config, replace
from esjax.devices.mesh import local_mesh

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULTS = "defaults"

THREADS = "one device, a thread a core"


def run(settings: Execution) -> Report:
    """Measure every size."""
    rows = [print_row(row) for size in sizes(settings) for row in measure(size, settings)]
    return Report(rows, partial(plot, rows), ["Evaluations; chunks are multiples of the default number of pairs."])


def measure(size: Size, settings: Execution) -> list[Row]:
    """Measure one size: all candidates in turns."""
    config = size.config
    pairs = replica_of(config, local_mesh()).chunk_pairs
    chunks = {factor: max(2, round(factor * pairs)) for factor in settings.chunks}
    ways: dict[str, dict[str, Any]] = {DEFAULTS: {}, "bfloat16": {"precision": "bfloat16"}}
    ways |= {f"chunk of {factor:g}": {"chunk_pairs": chunk} for factor, chunk in chunks.items()}
    candidates = {name: evaluate(replace(config, es=replace(config.es, **way))) for name, way in ways.items()}
    if jax.default_backend() == "cpu":
        with elsewhere(with_threads, config, environment=all_threads()) as there:
            rates = alternate(candidates | there, settings.rounds)
    else:
        rates = alternate(candidates, settings.rounds)
    model = config.model
    return [
        {
            "model": model.__struct_config__.tag,
            "hidden": model.hidden_size,
            "sequences": size.sequences,
            "chunk, pairs": pairs,
            "way": name,
            "M/s": float(np.median(found)) / 1e6,
            "÷ defaults": spread(found / rates[DEFAULTS]),
        }
        for name, found in rates.items()
    ]


def evaluate(config: Config) -> Candidate:
    """Make an evaluation on all devices of this process."""
    return evaluation(config, replica_of(config, local_mesh()))


def with_threads(config: Config) -> Mapping[str, Candidate]:
    """Make an evaluation in a process with one device that has all threads, the default of JAX."""
    return {THREADS: evaluate(config)}


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the rates relative to those of the defaults."""
    axes = figure.add_subplot()
    models = list(dict.fromkeys("{model} {hidden}, {sequences}".format(**row) for row in rows))
    for model in models:
        mine = [row for row in rows if "{model} {hidden}, {sequences}".format(**row) == model]
        axes.plot([row["÷ defaults"].median for row in mine], [row["way"] for row in mine], "o", label=model)
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.set(xlabel="rate ÷ that of the defaults", xlim=(0, None))
    axes.legend(title="model, sequences a member")
