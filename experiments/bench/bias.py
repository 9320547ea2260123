"""What limits an estimator, leaf by leaf: its bias or its variance.

Many estimates are made at the same weights and of the same windows, with other noise each. The cosine of one estimate
with the exact gradient shows both; the cosine of their mean shows what the average gains; and the *limit* is the cosine
that the mean of infinitely many estimates would have, from the product of the means of the even and of the odd ones.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bench.report import Report, Row
from bench.settings import Bias
from esjax.config.models import MODELS
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.core.leaves import leaf_path
from esjax.data.corpus import load_corpus
from esjax.devices.mesh import local_mesh
from esjax.models import build_model
from esjax.models.custom import Custom
from esjax.training.run import Trainer
from esjax.tuning.gradient_cosine import steps_of_estimates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ESTIMATORS = {
    "low rank": EsConfig(),
    "low rank, noisy output": EsConfig(output_layer="noise"),
    "discount": EsConfig(space="activation", credit="discount"),
    "gates, no feedback": EsConfig(space="activation", feedback="none"),
    "gates": EsConfig(space="activation"),
}


def run(settings: Bias) -> Report:
    """Train a little, then average."""
    config = Config(
        steps=settings.steps,
        data=DataConfig(text=settings.text),
        es=EsConfig(space="activation"),
        model=MODELS[settings.model](),
    )
    corpus = load_corpus(config.data)
    trainer = Trainer(config, corpus, custom=Custom())
    for _ in trainer:
        pass
    params = jax.device_get(trainer.params)
    model = build_model(config.model, corpus.vocabulary.size)
    # The windows of all steps are those of step 0.
    data = replace(config.data, new_tokens_interval=settings.estimates)
    rows: list[Row] = []
    for name in settings.estimators:
        es = ESTIMATORS[name]
        chosen = replace(config, data=data, es=replace(es, population_size=settings.windows * es.members_per_pair))
        pairs = steps_of_estimates(chosen, model, params, corpus.stream(), local_mesh(), settings.estimates)
        estimates, gradients, _ = zip(*pairs, strict=True)
        for leaf, *drawn, exact in zip(
            [leaf_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(gradients[0])[0]],
            *(map(_flat, jax.tree.leaves(estimate)) for estimate in estimates),
            map(_flat, jax.tree.leaves(gradients[0])),
            strict=True,
        ):
            rows.append({"estimator": name, "leaf": leaf, **_compare(np.stack(drawn), exact)})
    held_out = trainer.last.held_out if trainer.last else None
    notes = [f"{settings.estimates} estimates of {settings.windows} windows, at a held-out loss of {held_out}."]
    return Report(rows, partial(plot, rows), notes)


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).ravel()


def _compare(drawn: np.ndarray, exact: np.ndarray) -> Row:
    """Return the cosines of one estimate (their mean), of the mean of all, and of the mean of infinitely many."""
    even, odd, mean = drawn[::2].mean(axis=0), drawn[1::2].mean(axis=0), drawn.mean(axis=0)
    size = float(np.linalg.norm(exact))
    single = [float(one @ exact / max(np.linalg.norm(one) * size, 1e-300)) for one in drawn]
    signal = float(even @ odd)
    return {
        "one": float(np.mean(single)),
        "all": float(mean @ exact / max(np.linalg.norm(mean) * size, 1e-300)),
        "limit": float(mean @ exact / (signal**0.5 * size)) if signal > 0 and size else None,
    }


def plot(rows: list[Row], figure: "Figure") -> None:
    """Draw the cosine of one estimate, of all, and the limit, for each leaf."""
    names = list(dict.fromkeys(row["estimator"] for row in rows))
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names, strict=True):
        mine = [row for row in rows if row["estimator"] == name]
        for column in ("one", "all", "limit"):
            axes.plot([row[column] for row in mine], range(len(mine)), "o", label=column)
        axes.set(title=name, xlabel="cosine", yticks=range(len(mine)), yticklabels=[row["leaf"] for row in mine])
    axes.legend()
