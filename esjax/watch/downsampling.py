"""Turns the metrics of a run into points to draw: downsampled, smoothed, and averaged over seeds."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy import ndarray

from esjax.averages import Average

Axis = Literal["steps", "seconds", "member-tokens"]
"""The horizontal axis of a plot."""

COLUMN_OF: dict[Axis, str] = {"steps": "step", "seconds": "seconds", "member-tokens": "member_tokens"}
"""The column of the metrics for each axis."""

POINTS = 2000
"""Most points of a curve: more than a screen has columns."""


class Curve(NamedTuple):
    """Points of one column of the metrics; arrays of float64 [points].

    Attributes:
        step: Steps done at each point.
        seconds: Training time at each point.
        member_tokens: Member-tokens scored at each point.
        value: Mean of the column over the `stride` measurements of a point.
        stride: Measurements for each point, a power of two.
    """

    step: ndarray
    seconds: ndarray
    member_tokens: ndarray
    value: ndarray
    stride: int

    def over(self, axis: Axis) -> ndarray:
        """Return the positions of the points on an axis."""
        return getattr(self, COLUMN_OF[axis])


def make_curve(metrics: Mapping[str, ndarray], column: str, points: int = POINTS) -> Curve:
    """Reduce a column of the metrics to at most `points` points.

    A point is the mean of `stride` consecutive measurements; a remainder shorter than `stride` is left out. So the
    points of a growing run do not change until the stride doubles.

    Args:
        metrics: Columns, see `esjax.runs.reader.RunView`.
        column: Name of the column; steps where it is missing or not finite are left out.
        points: Most points, at least 1.
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
    """Average exponentially over earlier points: a value `span` steps back has 1/e of the weight of the newest.

    Distances are in steps, not in points, so the result does not depend on the number of points.

    Args:
        step: Steps done at each point, increasing.
        value: Value at each point.
        span: Memory in steps; 0 returns `value` unchanged.
    """
    if span <= 0:
        return value
    average = Average()
    keeps = np.exp(-np.diff(step, prepend=step[:1]) / span)
    return np.array([average.add(new, keep) for new, keep in zip(value, keeps, strict=True)])


class Band(NamedTuple):
    """The mean and the range of several curves; arrays of float64 [points].

    Attributes:
        x: Positions on the axis, increasing.
        mean: Mean of the curves.
        low: Smallest value of the curves.
        high: Largest value of the curves.
    """

    x: ndarray
    mean: ndarray
    low: ndarray
    high: ndarray


def mean_and_range(x: Sequence[ndarray], y: Sequence[ndarray]) -> Band:
    """Return the mean and the range of curves at all of their points, on the part of the axis that all curves cover.

    Curves are interpolated linearly. Beyond the end of one curve the mean would jump, so the band ends there. If the
    curves share no part of the axis, the band is empty.

    Args:
        x: Positions of the points of each curve, increasing; at least one curve of at least one point.
        y: Values of each curve at these points.
    """
    points = np.unique(np.concatenate(x))
    points = points[(points >= max(one[0] for one in x)) & (points <= min(one[-1] for one in x))]
    values = np.stack([np.interp(points, *curve) for curve in zip(x, y, strict=True)])
    return Band(points, values.mean(axis=0), values.min(axis=0), values.max(axis=0))
