"""Held-out loss over seconds and over tokens, from the same first weights on the same text, all trained in turns.

Noise on weights (the defaults; full; low rank 4), noise on activations, evosax's OpenES with the same optimizer, and
backpropagation with Adam. The step size of each is the best of the same few multiples of its usual one, by the
held-out loss after trials that are short and taken in turns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.learners import Learner, Point, backpropagation, evosax, ours, scorer, train_in_turns
from bench.report import Report, Row
from bench.settings import Learning
from esjax.config import Config, DataConfig, EsConfig, GruConfig, replace
from esjax.data.corpus import Corpus, load_corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BACKPROPAGATION_RATE = 0.005
"""Adam's usual rate for backpropagation with such models."""


def run(settings: Learning) -> Report:
    """Search step sizes, then train."""
    config = Config(
        data=DataConfig(text=settings.text),
        model=GruConfig(hidden_size=settings.hidden, head_size=settings.head),
    )
    corpus = load_corpus(config.data)
    held_out = scorer(config, corpus)
    makers = methods(settings, config, corpus)
    rates, trials = {}, {}
    for name in settings.methods:
        maker, usual = makers[name]
        tried = {factor: usual * factor for factor in settings.factors} if settings.search_seconds else {1.0: usual}
        if len(tried) > 1:
            learners = {str(rate): maker(rate) for rate in tried.values()}
            curves = train_in_turns(learners, held_out, settings.search_seconds, settings.search_seconds)
            trials[name] = {rate: curve[-1].held_out for rate, curve in curves.items()}
            rates[name] = float(min(trials[name], key=lambda rate: _or_infinite(trials[name][rate])))
        else:
            rates[name] = usual
    learners = {name: makers[name][0](rates[name]) for name in settings.methods}
    curves = train_in_turns(learners, held_out, settings.seconds, settings.every)
    rows = [_row(name, rates[name], trials.get(name, {}), curve, settings.targets) for name, curve in curves.items()]
    baselines = corpus.baselines(corpus.held_out)
    notes = ["On the same documents: " + ", ".join(f"{name} {value:.3f}" for name, value in baselines.items()) + "."]
    return Report(rows, partial(plot, rows, settings.targets), notes)


def methods(settings: Learning, config: Config, corpus: Corpus) -> dict[str, tuple[Callable[[float], Learner], float]]:
    """Name every method: how to make it from a step size, and its usual step size."""

    def es(**changes: Any) -> tuple[Callable[[float], Learner], float]:
        chosen = replace(config, es=EsConfig(population_size=settings.population, **changes))
        return lambda rate: ours(_at(chosen, rate), corpus), config.optim.learning_rate

    def rival(rate: float) -> Learner:
        return evosax(
            _at(config, rate),
            corpus,
            population=settings.population,
            sequences=settings.evosax_sequences,
            at_once=max(1, settings.at_once // settings.evosax_sequences),
        )

    return {
        "low rank 1": es(),
        "low rank 4": es(rank=4),
        "full": es(space="full"),
        "activation": es(space="activation"),
        "evosax": (rival, config.optim.learning_rate),
        "backpropagation": (
            lambda rate: backpropagation(config, corpus, rate, settings.batch),
            BACKPROPAGATION_RATE,
        ),
    }


def _at(config: Config, rate: float) -> Config:
    return replace(config, optim=replace(config.optim, learning_rate=rate))


def _or_infinite(loss: float) -> float:
    return loss if loss == loss else float("inf")


def _row(name: str, rate: float, trials: dict[str, float], curve: list[Point], targets: tuple[float, ...]) -> Row:
    last = curve[-1]
    row: dict[str, Any] = {"method": name, "step size": rate, "M tokens/s": last.tokens / last.seconds / 1e6}
    for target in targets:
        reached = next((point for point in curve if point.held_out < target), None)
        row[f"below {target}: s"] = reached.seconds if reached else None
        row[f"below {target}: M tokens"] = reached.tokens / 1e6 if reached else None
    row |= {"seconds": last.seconds, "held-out": last.held_out, "trials": trials}
    return {**row, "curve": [list(point) for point in curve]}


def plot(rows: Sequence[Row], targets: tuple[float, ...], figure: "Figure") -> None:
    """Draw the curves."""
    over_seconds, over_tokens = figure.subplots(1, 2, sharey=True)
    for row in rows:
        seconds, tokens, held_out = zip(*row["curve"], strict=True)
        over_seconds.plot(seconds, held_out, label=row["method"])
        over_tokens.plot([count / 1e6 for count in tokens], held_out)
    for axes in (over_seconds, over_tokens):
        for target in targets:
            axes.axhline(target, color="gray", linewidth=0.5)
    over_seconds.set(xlabel="seconds of training", ylabel="held-out nats a token")
    over_tokens.set(xlabel="millions of (member-)tokens", xscale="log")
    over_seconds.legend()
