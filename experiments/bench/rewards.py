"""What a reward in Python costs beside the text that members write for it.

The same population writes with and without the reward, in turns. A reward that takes no time shows the cost of
decoding, of the way to the worker processes and back, and of the calls. A reward that sleeps shows how many of its
calls run at once.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.report import Report, Row, print_row
from bench.settings import Rewards
from esjax.config.models import GruConfig
from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.vocabulary import FIRST, Vocabulary
from esjax.devices.mesh import local_mesh
from esjax.models import build_model
from esjax.models.custom.code import load_custom
from esjax.replica.replica import Replica
from esjax.rewards.scoring import Scorer, make_scorer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = "etaoinshrdlucmfwypvbgkjqxz"

VOCABULARY = Vocabulary("char", tuple(LETTERS + LETTERS.upper() + "0123456789 .,;:!?-'\"()[]&$%+=/*@"))
"""About as many ids as that of Shakespeare has."""

SLEEP = 0.05
"""Seconds of a slow call."""

CODE = f"""import time

def free(prompts, completions):
    return [0.0] * len(prompts)

def slow(prompts, completions):
    time.sleep({SLEEP})
    return [0.0] * len(prompts)
"""
"""The file that worker processes load."""


class NoScorer:
    """Scores nothing: the time of writing alone."""

    def __init__(self, scorer: Scorer) -> None:
        """Take all but the losses from a scorer."""
        self.prompts, self.stops, self.tool = scorer.prompts, scorer.stops, scorer.tool
        self.load, self.finish = scorer.load, scorer.finish

    def losses(self, drawn: np.ndarray, tokens: np.ndarray, failed: np.ndarray) -> Callable[[], np.ndarray]:
        """Return losses of 0."""
        return lambda: np.zeros(tokens.shape[:2], np.float32)


def run(settings: Rewards) -> Report:
    """Measure both rewards."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "prompts.txt").write_text("\n".join(a + b for a in LETTERS for b in LETTERS))
        (Path(folder) / "code.py").write_text(CODE)
        rows = [overhead(settings, Path(folder)), at_once(settings, Path(folder))]
    return Report(rows, partial(plot, rows), ["time ÷ writing: with the reward, over writing alone."])


def plot(rows: list[Row], figure: "Figure") -> None:
    """Draw a bar for each row."""
    axes = figure.subplots()
    for row in rows:
        axes.barh(f"{row['reward']}: {row['measured']}", row["value"].median)
    axes.grid(alpha=0.25)


def overhead(settings: Rewards, folder: Path) -> Row:
    """Time a population with a reward that takes no time, beside writing alone."""
    config, scorer = scorer_of(settings, folder, "free", settings.population)
    model = build_model(config.model, VOCABULARY.size)
    replicas = {
        name: Replica(config, model, None, local_mesh(), scorer=one)
        for name, one in (("writing", NoScorer(scorer)), ("reward", scorer))
    }
    pairs = np.arange(config.es.pairs)
    rates = alternate({name: Candidate(partial(one.losses, pairs)) for name, one in replicas.items()}, settings.rounds)
    scorer.close()
    return print_row(
        {"reward": "takes no time", "measured": "time ÷ writing", "value": spread(rates["writing"] / rates["reward"])}
    )


def at_once(settings: Rewards, folder: Path) -> Row:
    """Time calls that sleep: how many of them run at once."""
    _, scorer = scorer_of(settings, folder, "slow", 2 * settings.slow_calls)
    drawn, tokens = np.zeros((settings.slow_calls, 1), int), np.full((settings.slow_calls, 2, 1, 1), FIRST, np.int32)
    failed = np.zeros(settings.slow_calls, bool)
    slow = Candidate(lambda: scorer.losses(drawn, tokens, failed)(), settings.slow_calls * SLEEP)
    rates = alternate({"slow": slow}, settings.rounds)
    scorer.close()
    return print_row({"reward": f"sleeps {SLEEP} s", "measured": "calls at once", "value": spread(rates["slow"])})


def scorer_of(settings: Rewards, folder: Path, name: str, population: int) -> tuple[Config, Scorer]:
    """Make the settings of a population that writes, and its scorer."""
    config = Config(
        model=GruConfig(),
        data=DataConfig(batch_size=1),
        es=EsConfig(population_size=population),
        reward=RewardConfig(prompts=str(folder / "prompts.txt"), length=settings.length),
    )
    scorer = make_scorer(config, load_custom(reward=f"{folder / 'code.py'}:{name}"), VOCABULARY, print)
    assert scorer is not None
    return config, scorer
