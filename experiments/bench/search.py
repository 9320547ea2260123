"""Searches the step size of a method, and the windows of a step, by short trials: the same for every method."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

FACTOR = 3.0
"""From one step size to the next one outward."""


class Choice(NamedTuple):
    """What is tried.

    Attributes:
        rate: Step size.
        windows: Those of a step, or of a member.
    """

    rate: float
    windows: int


Trials = Callable[[Sequence[Choice]], dict[Choice, float]]
"""`(choices) -> losses` trains with each for a short while; infinite where a loss is not finite."""


def search(trials: Trials, rates: Sequence[float], windows: Sequence[int], extensions: int) -> dict[Choice, float]:
    """Try every step size with every number of windows, then go outward until the best step size lies between others.

    Args:
        trials: Tries some.
        rates: Step sizes to begin with.
        windows: Numbers of windows.
        extensions: How often a further step size is tried, at most, where the best one is at an end.

    Returns:
        The loss of everything that was tried.
    """
    found = trials([Choice(rate, number) for number in windows for rate in rates])
    for _ in range(extensions):
        best = best_of(found)
        tried = [choice.rate for choice in found if choice.windows == best.windows]
        outward = [FACTOR * best.rate] * (best.rate == max(tried)) + [best.rate / FACTOR] * (best.rate == min(tried))
        if not outward:
            break
        found |= trials([Choice(rate, best.windows) for rate in outward])
    return found


def best_of(found: dict[Choice, float]) -> Choice:
    """Name what lost least."""
    return min(found, key=lambda choice: found[choice])
