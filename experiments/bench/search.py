"""Searches the step size of a method, and the windows of a step, by short trials; the same way for every method."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

FACTOR = 3.0
"""Ratio of a step size to the next one outward."""


class Choice(NamedTuple):
    """A choice that is tried.

    Attributes:
        rate: Step size.
        windows: Windows of a step, or of a member.
    """

    rate: float
    windows: int


Trials = Callable[[Sequence[Choice]], dict[Choice, float]]
"""`(choices) -> losses` trains with each for a short time; a loss that is not finite is returned as infinite."""


def search(trials: Trials, rates: Sequence[float], windows: Sequence[int], extensions: int) -> dict[Choice, float]:
    """Try every step size with every number of windows, then further step sizes until the best lies between others.

    Args:
        trials: Function that runs trials.
        rates: Step sizes to begin with.
        windows: Numbers of windows.
        extensions: Most further step sizes.

    Returns:
        The loss of every choice that was tried.
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
    """Return the choice with the lowest loss."""
    return min(found, key=lambda choice: found[choice])
