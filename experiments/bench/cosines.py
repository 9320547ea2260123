"""The cosine between an estimate and the exact gradient by population, for each estimator.

It is measured at the weights of a short run with noise on activations. For noise on all weights the table adds the
prediction 1 / sqrt(1 + n r / K) for n parameters, K pairs with one window each, and the dispersion r of the windows'
gradients. (With r = 1, equal windows, it is that of Dust, 2026.)
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bench.report import Report, Row
from bench.settings import Cosines
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.data.corpus import load_corpus
from esjax.devices.mesh import local_mesh
from esjax.models import build_model
from esjax.models.custom import Custom
from esjax.training.run import Trainer
from esjax.tuning.gradient_cosine import gradient_cosines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPACES = {
    "full": EsConfig(space="full", output_layer="noise"),
    "low_rank": EsConfig(space="low_rank", output_layer="noise"),
    "low_rank, exact output": EsConfig(space="low_rank"),
    "discount": EsConfig(space="activation", credit="discount"),
    "gates": EsConfig(space="activation"),
}


def run(settings: Cosines) -> Report:
    """Train a little, then compare."""
    config = Config(
        steps=settings.steps,
        data=DataConfig(text=settings.text),
        es=EsConfig(space="activation"),
        model=GruConfig(hidden_size=settings.hidden, head_size=2 * settings.hidden),
    )
    corpus = load_corpus(config.data)
    trainer = Trainer(config, corpus, custom=Custom())
    for _ in trainer:
        pass
    size, mesh, params = corpus.vocabulary.size, local_mesh(), jax.device_get(trainer.params)
    model, stream = build_model(config.model, size), corpus.stream()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows = []
    for space in settings.spaces:
        es = SPACES[space]
        for population in settings.populations:
            chosen = replace(config, es=replace(es, population_size=population))
            found = [*gradient_cosines(chosen, model, params, stream, mesh, settings.repeats)]
            row: dict[str, Any] = {"space": space, "population": population}
            cosines = np.array([compared.cosine for compared in found])
            row["cosine"] = float(cosines.mean())
            row["standard error"] = float(cosines.std(ddof=1) / len(cosines) ** 0.5) if len(cosines) > 1 else None
            if es.output_layer == "noise":
                row["dispersion"] = dispersion = float(np.mean([compared.dispersion for compared in found]))
                row["law"] = (1 + parameters * dispersion / (population / 2)) ** -0.5
            rows.append(row)
    held_out = trainer.last.held_out if trainer.last else None
    notes = [f"Means of {settings.repeats} comparisons; {parameters:,} parameters."]
    notes += [f"At a held-out loss of {held_out:.3f}."] if held_out else []
    return Report(rows, partial(plot, rows), notes)


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the cosines, and the predictions as crosses."""
    axes = figure.add_subplot()
    for space in dict.fromkeys(row["space"] for row in rows):
        mine = [row for row in rows if row["space"] == space]
        errors = [row["standard error"] or 0.0 for row in mine]
        populations = [row["population"] for row in mine]
        line, *_ = axes.errorbar(populations, [row["cosine"] for row in mine], errors, fmt="o-", label=space)
        if "law" in mine[0]:
            color = line.get_color()
            axes.plot(populations, [row["law"] for row in mine], "x--", color=color)
    axes.set(xlabel="population", ylabel="cosine with the exact gradient", xscale="log", yscale="log")
    axes.legend()
