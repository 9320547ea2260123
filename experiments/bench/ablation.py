"""Ablation: held-out loss after the same number of member-tokens, with one choice changed at a time."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.learners import Learner, arranged, ours, scorer, train_for_tokens
from bench.measure import spread
from bench.report import Report, Row
from bench.settings import Ablation
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.data.corpus import Corpus, load_corpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Maker = Callable[[Config, Corpus], Learner]
"""`(settings of a seed, text) -> run` with something changed."""


def changed(section: str, **changes: Any) -> Maker:
    """Return a function that changes some settings."""
    return lambda config, corpus: ours(
        replace(config, **{section: replace(getattr(config, section), **changes)}), corpus
    )


DEFAULTS = "defaults"

CHOICES: dict[str, dict[str, Maker]] = {
    DEFAULTS: {"": ours},
    "pairing": {
        "none, a window a member": partial(arranged, paired=False),
        "none, 64 members a window": partial(arranged, paired=False, pairs_a_window=64),
        **{f"split, {n} pairs a window": changed("es", pairing="split", pairs_per_window=n) for n in (2, 4, 16, 64)},
    },
    "pairs a window": {str(n): partial(arranged, pairs_a_window=n) for n in (8, 64, 2048)},
    "sequences a pair": {str(n): changed("data", batch_size=n) for n in (4,)},
    "window": {str(n): changed("data", window=n) for n in (8, 16, 64, 128)},
    "burn-in (the state is reset)": {str(n): changed("data", burn_in=n) for n in (0, 16, 64)},
    "rank": {str(n): changed("es", rank=n) for n in (2, 4)} | {"full": changed("es", space="full")},
    "space": {
        "activation": changed("es", space="activation"),
        "activation, the state carried": lambda config, corpus: changed("data", carry=True)(
            replace(config, es=replace(config.es, space="activation")), corpus
        ),
    },
    "noise": {"gaussian": changed("es", noise="gaussian")},
    "precision": {"bfloat16": changed("es", precision="bfloat16")},
    "shaping": {name: changed("es", shaping=name) for name in ("centered_rank", "sign", "raw")},
    "sigma": {str(sigma): changed("es", sigma=sigma) for sigma in (0.05, 0.1, 0.4)},
    "optimizer": {
        f"sgd, {rate}": changed("optim", optimizer="sgd", learning_rate=rate) for rate in (0.1, 0.3, 1.0, 3.0)
    },
    "schedule": {"constant": changed("optim", schedule="constant")},
    "average": {"none": changed("optim", average=0.0)},
}
"""Keys: the name of the choice, and of the alternative to its default."""


def run(settings: Ablation) -> Report:
    """Train with each choice, from each seed; seeds take turns."""
    base = Config(
        data=DataConfig(text=settings.text),
        es=EsConfig(population_size=settings.population),
        model=GruConfig(),
    )
    corpus = load_corpus(base.data)
    held_out = scorer(base, corpus)
    makers = {
        (choice, name): maker
        for choice, made in CHOICES.items()
        if choice == DEFAULTS or choice in (settings.choices or CHOICES)
        for name, maker in made.items()
    }
    found: dict[tuple[str, str], list[float]] = {key: [] for key in makers}
    for seed in range(settings.seeds):
        config = replace(base, seed=seed)
        for key, maker in makers.items():
            found[key].append(train_for_tokens(maker(config, corpus), held_out, settings.tokens))
    return compared(found, settings.tokens)


def compared(found: Mapping[tuple[str, str], Sequence[float]], tokens: int) -> Report:
    """Compare each choice with the defaults, seed by seed.

    Args:
        found: Held-out losses, one per seed, by choice and alternative.
        tokens: Member-tokens of each run.
    """
    defaults = np.array(found[DEFAULTS, ""])
    rows = [
        {
            "choice": choice,
            "in place of the default": name,
            "held-out": spread(np.array(losses)),
            "worse by": spread(np.array(losses) - defaults),
        }
        for (choice, name), losses in found.items()
    ]
    notes = [f"After {tokens / 1e6:g} M member-tokens; {len(defaults)} runs of each, compared seed by seed."]
    return Report(rows, partial(plot, rows), notes)


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw how much each choice loses."""
    figure.set_size_inches(9, 2 + 0.25 * len(rows))
    axes = figure.add_subplot()
    losses = [row["worse by"] for row in rows]
    axes.barh(range(len(rows)), [loss.median for loss in losses])
    low, high = ([abs(getattr(loss, end) - loss.median) for loss in losses] for end in ("low", "high"))
    axes.errorbar([loss.median for loss in losses], range(len(rows)), xerr=[low, high], fmt="none", color="black")
    axes.set_yticks(range(len(rows)), [f"{row['choice']} {row['in place of the default']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="held-out nats a token, above the defaults")
