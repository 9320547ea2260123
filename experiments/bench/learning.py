"""Held-out loss by seconds and by tokens, from the same initial weights on the same text; all methods train in turns.

The methods: noise on weights (the defaults; with noise on the output layer, too; split pairs; full), noise on
activations (credit by gates, with and without learned feedback; by discount; by gates for the model mingru), OpenES of
evosax, and backpropagation for both models. All have the optimizer, schedule and average of a run. Short trials, taken
in turns, find the step size of each method by the held-out loss; also the number of windows that members of evosax
share, and the batch size of backpropagation, since these have no usual value.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.learners import Learner, Point, backpropagation, evosax, ours, scorer, train_in_turns
from bench.report import Report, Row, print_row
from bench.search import Choice, best_of, search
from bench.settings import Learning
from esjax.config.models import GruConfig, MinGruConfig
from esjax.config.settings import GATED_WINDOWS, Config, DataConfig, EsConfig, replace
from esjax.data.corpus import Corpus, load_corpus
from esjax.models.model import Params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TURNS = 4
"""Number of turns of a trial."""

BACKPROPAGATION_RATE = 0.03
"""Usual step size of backpropagation, in units."""


class Method(NamedTuple):
    """A method of training.

    Attributes:
        make: `(choice) -> learner`.
        rate: Usual step size.
        windows: Numbers of windows that are tried, the usual one first.
    """

    make: Callable[[Choice], Learner]
    rate: float
    windows: tuple[int, ...] = (1,)


def run(settings: Learning) -> Report:
    """Search, then train."""
    config = Config(
        seed=settings.seed,
        data=DataConfig(text=settings.text),
        model=GruConfig(hidden_size=settings.hidden, head_size=settings.head),
    )
    corpus = load_corpus(config.data)
    held_out = scorer(config, corpus)
    seconds = settings.seconds / 3 if settings.search_seconds is None else settings.search_seconds
    trials: dict[str, dict[Choice, float]] = {}
    chosen: dict[str, Choice] = {}
    makers = methods(settings, config, corpus)
    for name in settings.methods:
        method = makers[name]
        chosen[name], trials[name] = Choice(method.rate, method.windows[0]), {}
        if seconds:
            rates = [factor * method.rate for factor in settings.factors]
            try_out = partial(_try_out, method, held_out, seconds)
            trials[name] = search(try_out, rates, method.windows, settings.extensions)
            chosen[name] = best_of(trials[name])
            print_row({"method": name, **chosen[name]._asdict(), "held-out": trials[name][chosen[name]]})
    learners = {name: makers[name].make(chosen[name]) for name in settings.methods}
    curves = train_in_turns(learners, held_out, settings.seconds, settings.every)
    rows = [_row(name, chosen[name], trials[name], curve, settings.targets) for name, curve in curves.items()]
    baselines = corpus.baselines(corpus.held_out)
    notes = ["On the same documents: " + ", ".join(f"{name} {value:.3f}" for name, value in baselines.items()) + "."]
    return Report(rows, partial(plot, rows, settings.targets), notes)


def methods(settings: Learning, config: Config, corpus: Corpus) -> dict[str, Method]:
    """Name every method."""
    model = MinGruConfig(hidden_size=settings.hidden, head_size=settings.head, gate_tokens=3)
    elementwise = replace(config, model=model)
    of_elementwise = scorer(elementwise, corpus)

    def weights(**changes: Any) -> Method:
        chosen = replace(config, es=EsConfig(population_size=settings.population, **changes))
        return Method(lambda choice: ours(_at(chosen, choice.rate), corpus), config.optim.learning_rate)

    def activation(config: Config = config, score: Callable[[Params], float] | None = None, **changes: Any) -> Method:
        chosen = replace(config, es=EsConfig(space="activation", **changes))

        def make(choice: Choice) -> Learner:
            return ours(_at(chosen, choice.rate), corpus)._replace(score=score)

        return Method(make, config.optim.learning_rate)

    def rival(choice: Choice) -> Learner:
        return evosax(
            _at(config, choice.rate),
            corpus,
            population=settings.population,
            sequences=choice.windows,
            at_once=max(1, settings.at_once // choice.windows),
        )

    def exact(config: Config = config, score: Callable[[Params], float] | None = None) -> Method:
        def make(choice: Choice) -> Learner:
            return backpropagation(_at(config, choice.rate), corpus, choice.windows)._replace(score=score)

        return Method(make, BACKPROPAGATION_RATE, settings.batches)

    return {
        "low rank 1": weights(),
        "low rank 1, noisy output": weights(output_layer="noise"),
        "split": weights(pairing="split"),
        "low rank 4": weights(rank=4),
        "full": weights(space="full"),
        "gates": activation(),
        "gates, no feedback": activation(feedback="none", copies=8, population_size=8 * GATED_WINDOWS),
        "discount": activation(credit="discount", population_size=settings.population),
        "gates, mingru": activation(elementwise, of_elementwise),
        "evosax": Method(rival, config.optim.learning_rate, settings.evosax_windows),
        "backpropagation": exact(),
        "backpropagation, mingru": exact(elementwise, of_elementwise),
    }


def _try_out(
    method: Method, held_out: Callable[[Params], float], seconds: float, choices: Sequence[Choice]
) -> dict[Choice, float]:
    learners = {choice: method.make(choice) for choice in choices}
    curves = train_in_turns(learners, held_out, seconds, seconds / TURNS)
    losses = {choice: curve[-1].held_out for choice, curve in curves.items()}
    return {choice: loss if math.isfinite(loss) else math.inf for choice, loss in losses.items()}


def _at(config: Config, rate: float) -> Config:
    return replace(config, optim=replace(config.optim, learning_rate=rate))


def _row(name: str, choice: Choice, trials: dict[Choice, float], curve: list[Point], targets: tuple[float, ...]) -> Row:
    last = curve[-1]
    tried = [[*choice, loss if math.isfinite(loss) else None] for choice, loss in trials.items()]
    row: dict[str, Any] = {"method": name, "step size": choice.rate, "windows": choice.windows}
    row |= {"M tokens/s": last.tokens / last.seconds / 1e6}
    for target in targets:
        reached = next((point for point in curve if point.held_out < target), None)
        row[f"below {target}: s"] = reached.seconds if reached else None
        row[f"below {target}: M tokens"] = reached.tokens / 1e6 if reached else None
    row |= {"seconds": last.seconds, "held-out": last.held_out, "trials": tried}
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
