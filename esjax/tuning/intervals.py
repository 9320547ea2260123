"""Finds the best of several candidates by paired differences with confidence intervals.

Every candidate is measured under the same conditions, such as the same windows or the same seeds. The effect of the
conditions cancels in the difference of two candidates, so the interval of a difference is much narrower.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
"""Probability that an interval contains the true mean."""


def half_width(values: Sequence[float]) -> float:
    """Return half of the 95% interval of a mean, by Student's t distribution.

    Args:
        values: Independent measurements of the same quantity, assumed to be normal.

    Returns:
        At least 0; infinity for fewer than two values.
    """
    from scipy.special import stdtrit  # importing it takes most of a second

    if len(values) < 2:
        return math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return error * float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))


def front_runners(candidates: Sequence[Sequence[float]]) -> list[int]:
    """Find the candidate with the highest mean, and those that do not differ from it significantly.

    Args:
        candidates: Values of each candidate, higher is better, one for each condition; all in the same order.

    Returns:
        Positions of candidates, first that of the highest mean; then, in order, those for which the 95% interval of
        the paired difference includes 0. Candidates with a value that is not finite are left out.
    """
    finite = [i for i, values in enumerate(candidates) if np.isfinite(values).all()]
    if not finite:
        return []
    best = max(finite, key=lambda i: float(np.mean(candidates[i])))
    ahead = {i: np.subtract(candidates[best], candidates[i]).tolist() for i in finite if i != best}
    return [best, *(i for i, by in ahead.items() if float(np.mean(by)) <= half_width(by))]
