"""The metrics of a run without a folder, in bounded memory."""

import math

import numpy as np
from numpy import ndarray

from esjax.runs.step_info import StepInfo

MOST = 4096
"""Most rows that are kept."""


class History:
    """Step infos of a run. In a long run, a row stands for several consecutive steps.

    A row is the info of its last step, with the mean of the losses and rewards of its steps, and what was last measured
    on held-out documents and prompts.
    """

    def __init__(self) -> None:
        """Start without a step."""
        self._rows: list[StepInfo] = []
        self._open: StepInfo | None = None  # a row that is not complete yet
        self._steps = 0  # of the open row
        self._stride = 1

    def add(self, info: StepInfo) -> None:
        """Add a step."""
        self._open = info if self._open is None else _join(self._open, info, self._steps)
        self._steps += 1
        if self._steps < self._stride:
            return
        self._rows.append(self._open)
        self._open, self._steps = None, 0
        if len(self._rows) == MOST:
            self._rows = [_join(*two, 1) for two in zip(self._rows[::2], self._rows[1::2], strict=True)]
            self._stride *= 2

    def columns(self) -> dict[str, ndarray]:
        """Return an array of float64 [rows] for each number of `StepInfo.row`, NaN where a row has no such number."""
        rows = [info.row() for info in (self._rows if self._open is None else [*self._rows, self._open])]
        fields = [name for name in StepInfo._fields if name != "rewards"]
        names = dict.fromkeys([*fields, *(name for row in rows for name in row)])
        return {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in names}


def _join(first: StepInfo, then: StepInfo, weight: int) -> StepInfo:
    """Join two rows; `weight` is the number of steps of the first, in steps of the second."""
    losses = [(first.loss, weight), (then.loss, 1)]
    finite = [(loss, parts) for loss, parts in losses if math.isfinite(loss)]
    count = sum(parts for _, parts in finite)
    loss = sum(loss * parts for loss, parts in finite) / count if count else math.nan
    newest = {
        name: getattr(first, name) if getattr(then, name) is None else getattr(then, name)
        for name in ("held_out", "greedy_reward", "pass_at_k")
    }
    before = first.rewards or {}
    rewards = then.rewards and {
        name: (before.get(name, value) * weight + value) / (weight + 1) for name, value in then.rewards.items()
    }
    return then._replace(loss=loss, reward=None if then.reward is None else -loss, rewards=rewards, **newest)
