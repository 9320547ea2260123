"""From losses to shaped weights: what each pair's perturbation counts for in the update.

Shaping works on the difference of a pair, d = loss(+ε) - loss(-ε). Both signs see the same tokens, so d does not
depend on how hard the pair's window was, and pairs with different windows can be compared. Where the members of a pair
have one half of their noise in common, it works on their sum as well, over that of others with the same windows.

Weights are small integers, so that the update is a sum of integers: the same in any order, on any number of
devices and hosts, and a byte or two a pair to send. A sum Σ weight * ε grows with a positive d along +ε: it
points uphill in loss, like a gradient.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int8, Integer
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
        weights: Integer weight of each pair, or of each half of its noise.
        scale: Factor that makes the sum Σ weight * ε the mean of (shaped value * ε) over the pairs that count.
        void_pairs: Number of pairs that weigh 0 because a loss of theirs is not finite.
        trouble: Why the step must not be applied, or "".
    """

    weights: Int8[ndarray, " pairs *halves"]
    scale: float
    void_pairs: int
    trouble: str = ""


def shape(
    losses: Float[ndarray, "pairs 2"],
    method: Shaping,
    sigma: float,
    windows: Integer[ndarray, " pairs"] | None = None,
) -> Shaped:
    """Turn the losses of pairs into integer weights.

    What shaping works on is the difference d of a pair's losses. Where its members have one half of their noise in
    common (`EsConfig.pairing`), that half has a value of its own: their sum, less the mean sum of the other pairs with
    the same windows, which like d does not know how hard a window is. A pair that is alone with its windows says
    nothing of that half.

    Args:
        losses: Nats per token of the members +ε and -ε; lower is better.
        method: zscore: d over its standard deviation. centered_rank: rank of d, from -1/2 to 1/2, equal values
            share their mean rank (Salimans et al. 2017, section 2.1). sign: ±1, or 0 where d is 0. raw: d / (2 sigma),
            whose sum is an unbiased estimate of the gradient.
        sigma: Size of the perturbations; enters `raw` alone.
        windows: Which windows each pair read, for pairs that have one half of their noise in common. None: antithetic
            pairs.

    Returns:
        The weights, [pairs], or [pairs, 2] with those of the common half first; all are 0 where there is trouble: most
        pairs are not finite, or all losses that are compared are equal.
    """
    # Not all(axis=1), which takes ten times as long.
    finite = (np.abs(losses[:, 0]) < LARGEST_LOSS) & (np.abs(losses[:, 1]) < LARGEST_LOSS)
    weights = np.zeros(len(losses) if windows is None else (len(losses), 2), np.int8)
    void_pairs = int(np.count_nonzero(~finite))
    if 2 * void_pairs > len(losses):
        return Shaped(weights, 0.0, void_pairs, f"{void_pairs} of {len(losses)} pairs have a loss that is not finite")
    # float64, in the order of the pairs: one result, whoever computed the losses.
    kept = losses[finite] if void_pairs else losses
    difference = kept[:, 0].astype(np.float64) - kept[:, 1]
    what = difference if windows is None else np.stack([_over_others(kept, windows[finite]), difference], axis=1)
    if not what.any():
        alike = "pair" if windows is None else "pair, and the sums of those with the same windows,"
        return Shaped(weights, 0.0, void_pairs, f"the two losses of every {alike} are equal")
    value, step = _SHAPINGS[method](what.ravel(), sigma)
    weights[finite] = np.clip(np.rint(value / step), -LIMIT, LIMIT).reshape(what.shape)
    return Shaped(weights, step / len(difference), void_pairs)


def _over_others(losses: Float[ndarray, "pairs 2"], windows: Integer[ndarray, " pairs"]) -> ndarray:
    """Give the sum of each pair's losses over the mean sum of the other pairs with its windows; 0 for one alone."""
    total = losses[:, 0].astype(np.float64) + losses[:, 1]
    _, group = np.unique(windows, return_inverse=True)
    count = np.bincount(group)
    others = np.maximum(count - 1, 1)[group]
    return np.where(count[group] > 1, total - (np.bincount(group, total)[group] - total) / others, 0.0)


def _zscore(values: ndarray, sigma: float) -> tuple[ndarray, float]:
    deviation = np.sqrt(np.mean(values**2))  # about 0, the mean by symmetry
    return values / deviation, 1 / STEPS_PER_DEVIATION


def _centered_rank(values: ndarray, sigma: float) -> tuple[ndarray, float]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    return mean_rank[inverse] / max(len(values) - 1, 1) - 0.5, 0.5 / LIMIT


def _sign(values: ndarray, sigma: float) -> tuple[ndarray, float]:
    return np.sign(values), 1.0


def _raw(values: ndarray, sigma: float) -> tuple[ndarray, float]:
    value = values / (2 * sigma)
    return value, float(np.abs(value).max() / LIMIT)


_SHAPINGS = {"zscore": _zscore, "centered_rank": _centered_rank, "sign": _sign, "raw": _raw}
