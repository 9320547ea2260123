"""From losses to shaped weights: what each pair's perturbation counts for in the update.

Shaping works on the difference of a pair, d = loss(+ε) - loss(-ε). Both signs see the same tokens, so d does not
depend on how hard the pair's window was, and pairs with different windows can be compared.

Weights are small integers, so that the update is a sum of integers: the same in any order, on any number of
devices and hosts, and one byte a pair to send. A sum Σ weight * ε grows with a positive d along +ε: it points
uphill in loss, like a gradient.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int8
from numpy import ndarray

Shaping = Literal["zscore", "centered_rank", "sign", "raw"]

LIMIT = 127
"""Largest size of a weight."""

LARGEST_LOSS = 1e9
"""Nats beyond which a loss counts as not finite: a member that far off has nothing to say."""

STEPS_PER_DEVIATION = 16
"""Resolution of `zscore`: rounding adds 1/(12 * 16²) = 0.03% to the variance; clipped at 127/16 = 7.9 deviations."""


class Shaped(NamedTuple):
    """Shaped weights of one step.

    Attributes:
        weights: Integer weight of each pair.
        scale: Factor that makes the sum Σ weight * ε the mean of (shaped value * ε) over the pairs that count.
        void_pairs: Number of pairs that weigh 0 because a loss of theirs is not finite.
        trouble: Why the step must not be applied, or "".
    """

    weights: Int8[ndarray, " pairs"]
    scale: float
    void_pairs: int
    trouble: str = ""


def shape(losses: Float[ndarray, "pairs 2"], method: Shaping, sigma: float) -> Shaped:
    """Turn the losses of antithetic pairs into integer weights.

    Args:
        losses: Nats per token of the members +ε and -ε; lower is better.
        method: zscore: d over its standard deviation. centered_rank: rank of d, from -1/2 to 1/2, equal values
            share their mean rank (Salimans et al. 2017, section 2.1). sign: ±1, or 0 where d is 0. raw: d / (2 sigma),
            whose sum is an unbiased estimate of the gradient.
        sigma: Size of the perturbations; enters `raw` alone.

    Returns:
        The weights; all are 0 where there is trouble: most pairs are not finite, or every pair's losses are equal.
    """
    finite = (np.abs(losses[:, 0]) < LARGEST_LOSS) & (np.abs(losses[:, 1]) < LARGEST_LOSS)  # all() takes ten times
    weights = np.zeros(len(losses), np.int8)
    void_pairs = int(np.count_nonzero(~finite))
    if 2 * void_pairs > len(losses):
        return Shaped(weights, 0.0, void_pairs, f"{void_pairs} of {len(losses)} pairs have a loss that is not finite")
    # float64, in the order of the pairs: one result, whoever computed the losses.
    kept = losses[finite] if void_pairs else losses
    difference = kept[:, 0].astype(np.float64) - kept[:, 1]
    if not difference.any():
        return Shaped(weights, 0.0, void_pairs, "the two losses of every pair are equal")
    value, step = _SHAPINGS[method](difference, sigma)
    weights[finite] = np.clip(np.rint(value / step), -LIMIT, LIMIT)
    return Shaped(weights, step / len(difference), void_pairs)


def _zscore(difference: ndarray, sigma: float) -> tuple[ndarray, float]:
    deviation = np.sqrt(np.mean(difference**2))  # about 0, the mean by symmetry
    return difference / deviation, 1 / STEPS_PER_DEVIATION


def _centered_rank(difference: ndarray, sigma: float) -> tuple[ndarray, float]:
    _, inverse, counts = np.unique(difference, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return mean_rank[inverse] / max(len(difference) - 1, 1) - 0.5, 0.5 / LIMIT


def _sign(difference: ndarray, sigma: float) -> tuple[ndarray, float]:
    return np.sign(difference), 1.0


def _raw(difference: ndarray, sigma: float) -> tuple[ndarray, float]:
    value = difference / (2 * sigma)
    return value, float(np.abs(value).max() / LIMIT)


_SHAPINGS = {"zscore": _zscore, "centered_rank": _centered_rank, "sign": _sign, "raw": _raw}
