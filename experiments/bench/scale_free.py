"""Held-out loss with the population, the width or the batch four times as large or small, other settings unchanged.

Losses are compared after the same number of member-tokens, seed by seed.
"""

from bench.ablation import DEFAULTS, compared
from bench.learners import ours, scorer, train_for_tokens
from bench.report import Report
from bench.settings import ScaleFree
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.data.corpus import load_corpus


def run(settings: ScaleFree) -> Report:
    """Train at every scale, from each seed; seeds take turns."""
    factor, population = settings.factor, settings.population
    base = Config(
        data=DataConfig(text=settings.text),
        es=EsConfig(population_size=population),
        model=GruConfig(hidden_size=settings.hidden, head_size=2 * settings.hidden),
    )
    scaled = {(DEFAULTS, ""): base}
    for name, size in {"÷": 1 / factor, "x": factor}.items():
        changed = f"{name} {factor}"
        scaled["population", changed] = replace(base, es=EsConfig(population_size=2 * round(population * size / 2)))
        hidden = round(settings.hidden * size)
        scaled["width", changed] = replace(base, model=GruConfig(hidden_size=hidden, head_size=2 * hidden))
    scaled["batch", f"x {factor}"] = replace(base, data=replace(base.data, batch_size=factor))
    scaled = {key: config for key, config in scaled.items() if key[0] in (DEFAULTS, *settings.scaled)}
    corpus = load_corpus(base.data)
    scorers = {config.model: scorer(config, corpus) for config in scaled.values()}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in scaled}
    for seed in range(settings.seeds):
        for key, config in scaled.items():
            learner = ours(replace(config, seed=seed), corpus)
            found[key].append(train_for_tokens(learner, scorers[config.model], settings.tokens))
    return compared(found, settings.tokens)
