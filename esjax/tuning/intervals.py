"""Which of several candidates is best, as far as repeats show it.

Every candidate is measured under the same conditions, such as the same windows or the same seeds. So what the
conditions differ in cancels in the difference of two candidates, and its interval is by far the narrower one.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
"""Probability with which an interval holds the true mean."""


def half_width(values: Sequence[float]) -> float:
    """Return half of the interval that holds the mean of independent normal values, by Student's t distribution.

    Args:
        values: Measurements of one thing.

    Returns:
        At least 0; infinity for less than two values.
    """
    from scipy.special import stdtrit  # takes most of a second

    if len(values) < 2:
        return math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return error * float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))


def front_runners(candidates: Sequence[Sequence[float]]) -> list[int]:
    """Find the candidate of the highest mean, and those that are not seen to differ from it.

    Args:
        candidates: Values of each, higher is better, one for each condition; the conditions are the same, in order.

    Returns:
        Positions, that of the highest mean first; then, in order, those where the interval of the paired difference
        from it includes 0. A candidate with a value that is not finite is none of them.
    """
    finite = [i for i, values in enumerate(candidates) if np.isfinite(values).all()]
    if not finite:
        return []
    best = max(finite, key=lambda i: float(np.mean(candidates[i])))
    ahead = {i: np.subtract(candidates[best], candidates[i]).tolist() for i in finite if i != best}
    return [best, *(i for i, by in ahead.items() if float(np.mean(by)) <= half_width(by))]
