"""Cost of the update relative to the evaluation. Every host draws the noise of the whole population again and sums it.

One setting of a gru changes at a time; then follow the rnns of `bench throughput`. With several hosts, the evaluation
is one host's share of the pairs; the update is always of all pairs.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.ours import replica_of
from bench.report import Report, Row, print_row
from bench.settings import Update
from esjax.config.models import GruConfig, ModelConfig, RnnConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.devices.mesh import local_mesh

if TYPE_CHECKING:
    from matplotlib.figure import Figure


RNN = "model"
"""Entry of the column `changed` for rnns."""


def run(settings: Update) -> Report:
    """Measure every setting."""
    base = {"population": settings.population, "hosts": 1, "hidden": settings.hidden, "rank": 1, "sequences": 1}
    tried = {
        "population": settings.populations,
        "hosts": settings.hosts,
        "hidden": settings.widths,
        "rank": settings.ranks,
        "sequences": settings.sequences,
    }
    rows: list[Row] = [
        print_row({"changed": name, **measure(gru(**base | {name: value}), settings.rounds)})
        for name, values in tried.items()
        for value in values
    ]
    for hidden, layers, sequences, population in settings.rnns:
        rnn = RnnConfig(hidden_size=hidden, n_layers=layers)
        for hosts in settings.rnn_hosts:
            row = measure(Setting(rnn, population, hosts, 1, sequences), settings.rounds)
            rows.append(print_row({"changed": RNN, **row}))
    return Report(rows, partial(plot, rows), ["A step is a host's share of the evaluation, and the update."])


class Setting(NamedTuple):
    """A setting to measure."""

    model: ModelConfig
    population: int
    hosts: int
    rank: int
    sequences: int


def gru(population: int, hosts: int, hidden: int, rank: int, sequences: int) -> Setting:
    """Set up the model of most rows."""
    return Setting(GruConfig(hidden_size=hidden, head_size=2 * hidden), population, hosts, rank, sequences)


def measure(setting: Setting, rounds: int) -> Row:
    """Measure one setting."""
    model, population, hosts, rank, sequences = setting
    config = Config(
        es=EsConfig(population_size=population, rank=rank, exchange="losses"),
        model=model,
        data=DataConfig(batch_size=sequences),
    )
    replica = replica_of(config, local_mesh())
    pairs = np.arange(config.es.pairs, dtype=np.uint32)
    weights = np.random.default_rng(1).integers(-127, 128, len(pairs)).astype(np.int8)
    share = pairs[: max(replica.chunk_pairs, len(pairs) // hosts)]

    def update() -> object:
        replica.apply(pairs, weights, 0.0)
        return replica.state

    rates = alternate({"evaluation": Candidate(lambda: replica.losses(share)), "update": Candidate(update)}, rounds)
    ratio = rates["evaluation"] / rates["update"]
    return {
        "model": f"rnn, {model.n_layers} layers" if isinstance(model, RnnConfig) else "gru",
        "population": population,
        "hosts": hosts,
        "hidden": model.hidden_size,
        "rank": rank,
        "sequences": sequences,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(replica.state.params)),
        "evaluation ms": 1e3 / float(np.median(rates["evaluation"])),
        "update ms": 1e3 / float(np.median(rates["update"])),
        "update ÷ evaluation": spread(ratio),
        "update ÷ step": spread(ratio / (1 + ratio)),
    }


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the ratio against each setting."""
    names = list(dict.fromkeys(row["changed"] for row in rows if row["changed"] != RNN))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        mine = [row for row in rows if row["changed"] == name]
        ratios = [row["update ÷ evaluation"] for row in mine]
        values = [row[name] for row in mine]
        axes.plot(values, [ratio.median for ratio in ratios], "o-")
        axes.fill_between(values, [ratio.low for ratio in ratios], [ratio.high for ratio in ratios], alpha=0.3)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("update ÷ evaluation")
