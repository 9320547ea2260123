"""How models grow: held-out bits per byte by the number of weights and by the member-tokens, all in the same seconds.

Every model is trained in several widths: by noise on weights, by noise on activations where it can be, and by
backpropagation, each with its usual step size. Hidden layers of heads and MLPs are twice as wide as the model. The
methods take turns.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import jax
import msgspec

from bench.learners import Learner, backpropagation, ours, scorer, train_in_turns
from bench.learning import BACKPROPAGATION_RATE
from bench.report import Report, Row, print_row
from bench.settings import Growth
from esjax.config.models import MODELS, ModelConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.data.corpus import Corpus, load_corpus
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS = 256
"""Windows of a step of backpropagation."""


def run(settings: Growth) -> Report:
    """Train every model in every width."""
    data = DataConfig(text=settings.text, vocabulary=settings.vocabulary)
    corpus = load_corpus(data)
    rows = []
    for name, width in product(settings.models, settings.widths):
        config = Config(seed=settings.seed, data=data, model=model_of(name, width))
        rows += [print_row(row) for row in measure(settings, config, corpus, width)]
    notes = [f"{settings.seconds:g} s of training each, in {settings.turns} turns. {settings.text}, {data.vocabulary}."]
    return Report(rows, partial(plot, rows), notes)


def model_of(name: str, width: int) -> ModelConfig:
    """Make the settings of a model of a width: a head or MLP twice as wide, and gates that see 3 tokens."""
    usual = msgspec.to_builtins(MODELS[name]())
    sizes: dict[str, Any] = {
        field: 2 * width for field in ("head_size", "mlp_size") if usual.get(field, 0) > usual["hidden_size"]
    }
    if "gate_tokens" in usual:
        sizes["gate_tokens"] = 3
    return MODELS[name](hidden_size=width, **sizes)


def measure(settings: Growth, config: Config, corpus: Corpus, width: int) -> Iterator[Row]:
    """Train a model in all ways."""
    made = {name: learner for name in settings.methods if (learner := make(name, config, corpus, settings.population))}
    weights = sum(leaf.size for leaf in jax.tree.leaves(next(iter(made.values())).params()))
    turn = settings.seconds / settings.turns
    for name, curve in train_in_turns(made, scorer(config, corpus), settings.seconds, turn).items():
        bits = [point.held_out * corpus.bits_of_a_nat for point in curve]
        yield {
            "model": config.model.__struct_config__.tag,
            "width": width,
            "method": name,
            "weights": weights,
            "M member-tokens": curve[-1].tokens / 1e6,
            "bits/byte": bits[-1],
            "curve": [[point.seconds, point.tokens, at] for point, at in zip(curve, bits, strict=True)],
        }


def make(name: str, config: Config, corpus: Corpus, population: int) -> Learner | None:
    """Make what trains a model by a method; None: the model has no such noise."""
    if name == "backpropagation":
        exact = replace(config, optim=replace(config.optim, learning_rate=BACKPROPAGATION_RATE))
        return backpropagation(exact, corpus, WINDOWS)
    es = EsConfig(population_size=population) if name == "noise on weights" else EsConfig(space="activation")
    try:
        return ours(replace(config, es=es), corpus)
    except EsjaxError:
        if name == "noise on weights":
            raise
        return None


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the last values over the weights, and the curves of the widest models over the member-tokens."""
    over_weights, over_tokens = figure.subplots(1, 2, sharey=True)
    styles = dict(zip(dict.fromkeys(row["method"] for row in rows), ("-", "--", ":"), strict=False))
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["model"] for row in rows))}
    for (model, colour), (method, style) in product(colours.items(), styles.items()):
        mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        if not mine:
            continue
        how: dict[str, Any] = {"color": colour, "linestyle": style, "marker": "."}
        sizes = [row["weights"] for row in mine]
        over_weights.plot(sizes, [row["bits/byte"] for row in mine], label=f"{model}, {method}", **how)
        _, tokens, bits = zip(*mine[-1]["curve"], strict=True)
        over_tokens.plot(tokens, bits, **how)
    over_weights.set(xlabel="weights", ylabel="held-out bits per byte", xscale="log")
    over_tokens.set(xlabel="member-tokens, widest models", xscale="log")
    figure.legend(loc="outside right center", fontsize="small")
