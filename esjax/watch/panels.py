"""What plots and the page draw of a run: columns of its metrics, their titles and units."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy import ndarray

from esjax.runs.reader import RunView
from esjax.runs.step_info import NAMED_REWARD

PANELS: Mapping[str, str] = MappingProxyType(
    {
        "held_out": "held-out text",
        "loss": "population, training text",
        "reward": "population, training prompts",
        "greedy_reward": "held-out prompts, greedy",
        "pass_at_k": "held-out prompts, pass@k",
    }
)
"""Title of the panel for each column, in the order of the panels."""

LOSSES = ("held_out", "loss")
"""Columns that a logarithmic axis is for; rewards may be 0 or less."""

EVALUATIONS = ("held_out", "greedy_reward", "pass_at_k")
"""Columns of evaluations, which smoothing leaves as they are; the others have a number for each step."""

FIRST = "first value"
"""Name of the line at the first held-out loss of a run with a reward in Python."""


def panels_of(views: Sequence[RunView]) -> dict[str, str]:
    """Return the title of each panel for which one of the runs has numbers, by column."""
    columns = {column for view in views for column, values in drawn(view).items() if np.isfinite(values).any()}
    named = {column: f"{column.removeprefix(NAMED_REWARD)}, training prompts" for column in named_rewards(columns)}
    return {column: title for column, title in {**PANELS, **named}.items() if column in columns}


def named_rewards(columns: Iterable[str]) -> list[str]:
    """Return the columns of rewards that have names, in order."""
    return sorted(column for column in columns if column.startswith(NAMED_REWARD))


def lines_beside(view: RunView) -> Mapping[str, float]:
    """Return what the held-out loss of a run is compared with, by name: n-gram models, in nats per token.

    A reward in Python makes a model forget its text, so the loss of that is compared with its first value.
    """
    held_out = view.metrics.get("held_out", np.zeros(0))
    first = held_out[np.isfinite(held_out)][:1]
    if not _scores_text(view) or not len(first):
        return view.baselines
    return {**view.baselines, FIRST: float(first[0])}


def drawn(view: RunView) -> Mapping[str, ndarray]:
    """Return the metrics of a run without what repeats others: a loss that is minus the mean reward."""
    if not _scores_text(view):
        return view.metrics
    return {name: values for name, values in view.metrics.items() if name != "loss"}


def unit_of(view: RunView, column: str) -> str:
    """Return the unit of a column; with a reward in Python, the held-out loss stays in nats per token."""
    if column == "pass_at_k":
        return "fraction of prompts"
    if column not in LOSSES:
        return view.unit.removeprefix("minus ")
    return "nats per token" if column == "held_out" and _scores_text(view) else view.unit


def _scores_text(view: RunView) -> bool:
    return bool(np.isfinite(view.metrics.get("reward", np.zeros(0))).any())
