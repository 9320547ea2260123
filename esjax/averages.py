"""Averages: of a quantity over time, and of what several parts of a step measured."""

import math
from collections.abc import Iterable
from typing import NamedTuple

SHORTEST = 1e-6
"""Shortest duration in seconds that a speed is computed from, so that speeds are finite."""


class Average:
    """An exponential average whose start is corrected, as in Adam (Kingma & Ba 2015, section 3).

    The weights of all values so far are divided by their sum, so the first value counts as much as any other of its
    age. Without that, the average would stay near where it started.
    """

    def __init__(self) -> None:
        """Start without a value."""
        self._total = self._weight = 0.0

    def add(self, value: float, keep: float) -> float:
        """Add a value, and return the average.

        Args:
            value: The new value, which weighs 1. After one that is not finite, the average starts again.
            keep: What the weights of all values before are multiplied by, from 0 to 1.
        """
        if not math.isfinite(self._total):
            self._total = self._weight = 0.0
        self._total = keep * self._total + value
        self._weight = keep * self._weight + 1
        return self._total / self._weight


class NamedMean(NamedTuple):
    """The mean of a quantity that has a name, over so many pairs."""

    name: str
    mean: float
    pairs: int


def join_means(means: Iterable[NamedMean]) -> list[NamedMean]:
    """Join means of parts to one for each name, in the order of the names."""
    joined: dict[str, NamedMean] = {}
    for name, mean, pairs in means:
        before = joined.get(name, NamedMean(name, 0.0, 0))
        total = before.pairs + pairs
        # In this order, means that are large numbers do not overflow.
        joined[name] = NamedMean(name, before.mean * (before.pairs / total) + mean * (pairs / total), total)
    return [joined[name] for name in sorted(joined)]


def running_speed(before: float, pairs: int, seconds: float) -> float:
    """Return the average of a speed with a new measurement, which weighs 0.3; in pairs a second.

    Args:
        before: The average before; 0 before the first measurement.
        pairs: Pairs that were scored.
        seconds: Time of scoring them.
    """
    speed = pairs / max(seconds, SHORTEST)
    return 0.7 * before + 0.3 * speed if before else speed
