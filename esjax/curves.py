"""From the metrics of a run to the points that are drawn: few enough, over an axis, smoothed."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy import ndarray

Axis = Literal["steps", "seconds", "member-tokens"]
"""What curves are drawn over."""

COLUMN_OF: dict[Axis, str] = {"steps": "step", "seconds": "seconds", "member-tokens": "member_tokens"}
"""Names of the axes among the metrics."""

POINTS = 2000
"""Points of a curve at most: more than a screen has columns."""


class Curve(NamedTuple):
    """Points of one column of the metrics; arrays of float64 of one length.

    Attributes:
        step: Steps done at each point.
        seconds: Training time at each point.
        member_tokens: Member-tokens scored at each point.
        value: Mean of the column over the measurements that a point stands for.
        stride: Measurements that a point stands for, a power of two.
    """

    step: ndarray
    seconds: ndarray
    member_tokens: ndarray
    value: ndarray
    stride: int

    def over(self, axis: Axis) -> ndarray:
        """Return where the points are on an axis."""
        return getattr(self, COLUMN_OF[axis])


def make_curve(metrics: Mapping[str, ndarray], column: str, points: int = POINTS) -> Curve:
    """Draw a column of the metrics with not more than so many points.

    A point stands for `stride` measurements that follow each other; the last ones, too few for a point, are left out.
    So the points of a run that goes on stay as they are until the stride doubles.

    Args:
        metrics: Columns, see `esjax.runs.RunView`.
        column: Which; NaN, and steps without it, are left out.
        points: How many points at most, at least 1.
    """
    none = np.zeros(0)
    values = metrics.get(column, none)
    there = np.flatnonzero(np.isfinite(values))
    stride = 1
    while len(there) > points * stride:
        stride *= 2
    there = there[: len(there) // stride * stride]
    ends = there[stride - 1 :: stride]
    unknown = np.full(len(values), np.nan)
    step, seconds, member_tokens = (metrics.get(name, unknown)[ends] for name in COLUMN_OF.values())
    seconds = np.fmax.accumulate(seconds)  # in older runs the clock went back after a crash
    return Curve(step, seconds, member_tokens, values[there].reshape(-1, stride).mean(axis=1), stride)


def smooth(step: ndarray, value: ndarray, span: float) -> ndarray:
    """Average exponentially over what came before: what is `span` steps back weighs 1/e of the newest.

    It goes by steps, not by points, so that it looks the same however many points are drawn.

    Args:
        step: Steps done at each point, rising.
        value: At each point.
        span: Memory in steps; 0: nothing is changed.
    """
    if span <= 0:
        return value
    total = weight = 0.0
    smoothed = []
    for kept, new in zip(np.exp(-np.diff(step, prepend=step[:1]) / span), value, strict=True):
        total, weight = kept * total + new, kept * weight + 1
        smoothed.append(total / weight)
    return np.array(smoothed)
