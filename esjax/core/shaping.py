"""Shaping: from the losses of all pairs to one small integer per pair, its weight in the update, and one scale.

Shaping works on the difference of a pair, d = loss(+ε) - loss(-ε). Both members see the same example, so its difficulty
cancels, and pairs with different examples can be compared. Members of a split pair share the even columns of ε: this
half is credited by the pair's summed loss, relative to the other pairs on the same example.

Weights are integers, so Σ weight * ε is a sum of integers: the same in any order, on any number of devices and hosts.
A weight takes one byte to send. Where +ε raises the loss, d and the weight are positive: the sum points uphill, as a
gradient does.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, Integer

Shaping = Literal["zscore", "centered_rank", "sign", "raw"]

LIMIT = 127
"""Weights are from -127 to 127."""

LARGEST_LOSS = 1e9
"""A loss of this absolute value or more counts as not finite."""

STEPS_PER_DEVIATION = 16
"""Resolution of `zscore`. Rounding adds 1/(12 * 16²) = 0.03% to the variance; values are clipped at 127/16 = 7.9."""

OUTLYING = 16.0
"""Robust standard deviations beyond which a compared value is an outlier, see `Shaped.outliers`."""

NORMAL_MEDIAN = 0.6745
"""Median of the absolute value of a standard normal variable."""

Numbers = Any
"""Arrays of numpy, computed in float64 on the CPU, or of JAX, computed in float32, also in jitted code."""


class Shaped(NamedTuple):
    """Shaped weights of one step.

    Attributes:
        weights: Weight of each pair, int8 [pairs]; for split pairs [pairs, 2]: of the shared half, and of the other.
        scale: `scale * Σ weight * ε` is the mean of `shaped value * ε` over the pairs that are not void.
        void_pairs: Number of pairs with weight 0 because one of their losses is not finite.
        slope: Shaped value for each unit of difference, by least squares: for z-scores one over the standard deviation.
            The estimate is about `2 * sigma * slope` times the gradient.
        outliers: Number of pairs whose difference (or, for split pairs, whose summed loss relative to the others) lies
            beyond `OUTLYING` robust standard deviations. The squares of their weights add up to no more than those of
            all other pairs, and the other weights are what they would be if the outliers were void. The robust standard
            deviation is the median of the absolute values that are not 0, over 0.6745 (Huber 1981, section 5.1).
    """

    weights: Int8[Numbers, "pairs ..."]
    scale: Float[Numbers, ""] | float
    void_pairs: Integer[Numbers, ""] | int
    slope: Float[Numbers, ""] | float = 0.0
    outliers: Integer[Numbers, ""] | int = 0

    @property
    def trouble(self) -> str:
        """The reason why all weights are 0, or "". Not for traced values."""
        pairs, void_pairs = len(self.weights), int(self.void_pairs)
        if 2 * void_pairs > pairs:
            return f"{void_pairs} of {pairs} pairs have a loss that is not finite"
        if np.any(self.weights):
            return ""
        alike = "pair" if np.ndim(self.weights) == 1 else "pair, and the sums of those with the same windows,"
        return f"the two losses of every {alike} differ by the same amount, or are equal"


def is_finite(losses: Float[Numbers, "pairs 2"]) -> Any:
    """Return which pairs are not void: both absolute losses are below `LARGEST_LOSS`."""
    # all(axis=1) would take ten times as long in numpy.
    return (abs(losses[:, 0]) < LARGEST_LOSS) & (abs(losses[:, 1]) < LARGEST_LOSS)


def shape(
    losses: Float[Numbers, "pairs 2"],
    method: Shaping = "zscore",
    sigma: float = 1.0,
    examples: Integer[Numbers, " pairs"] | None = None,
) -> Shaped:
    """Turn the losses of pairs into integer weights.

    Args:
        losses: Losses of the members +ε and -ε of each pair, [pairs, 2]; lower is better. Numpy arrays are computed in
            float64, JAX arrays in float32, also in jitted code.
        method: How a difference d becomes a value. zscore: d over its standard deviation. centered_rank: rank of d,
            from -1/2 to 1/2, where equal values share their mean rank (Salimans et al. 2017, section 2.1). sign: ±1, or
            0 if d is 0. raw: d / (2 sigma); the estimate is then an unbiased one of the gradient of the smoothed loss
            (Salimans et al. 2017, section 2).
        sigma: Size of the perturbations, above 0; only `raw` uses it.
        examples: For split pairs: number of the example of each pair, [pairs]. The shared half is credited by the
            pair's summed loss less the mean summed loss of the other pairs on the same example; it gets weight 0 if
            there is no other pair. None: antithetic pairs.

    Returns:
        The weights, their scale, and the number of void pairs. A pair with a loss that is not finite is void and gets
        weight 0. If more than half of the pairs are void, or all compared losses are equal, all weights are 0 and
        `Shaped.trouble` gives the reason.

    Raises:
        ValueError: `losses` is not of shape [pairs, 2], or the method is unknown.
    """
    if not isinstance(losses, jax.Array):
        losses = np.asarray(losses)
    if np.ndim(losses) != 2 or losses.shape[1] != 2 or len(losses) == 0:
        raise ValueError(f"losses must be of shape [pairs, 2], got {list(np.shape(losses))}")
    if method not in _SHAPINGS:
        raise ValueError(f"method must be one of {', '.join(_SHAPINGS)}, got {method!r}")
    xp: Any = np if isinstance(losses, np.ndarray) else jnp
    finite = is_finite(losses)
    # Sums run in the order of the pairs, so the result does not depend on which host computed which loss.
    known = xp.where(finite[:, None], losses, 0).astype(jnp.float32 if xp is jnp else np.float64)
    counted = xp.sum(finite.astype(known.dtype))
    difference = known[:, 0] - known[:, 1]
    typical = finite & ~_outlying(xp, difference, finite)
    compared = difference[:, None]
    if examples is not None:
        group = _groups(xp, examples)
        total = known[:, 0] + known[:, 1]
        typical &= ~_outlying(xp, total - _medians(xp, total, typical, group), typical)
        compared = xp.stack([_over_others(xp, total, finite, typical, group), difference], axis=1)
    counts = xp.broadcast_to(typical[:, None], compared.shape)
    value, step = _SHAPINGS[method](xp, compared.ravel(), counts.ravel(), sigma)
    usable = (2 * counted >= len(losses)) & xp.any(compared != 0)
    weights = xp.clip(xp.rint(value / step), -LIMIT, LIMIT).reshape(compared.shape)
    most = _most_of_outliers(xp, weights, counts, finite[:, None] & ~counts)
    weights = xp.where(counts, weights, xp.clip(weights, -most, most))
    weights = xp.where(usable & finite[:, None], weights, 0).astype(np.int8)
    scale = xp.where(usable, step / xp.maximum(counted, 1), 0.0)
    weights = weights if examples is not None else weights[:, 0]
    void_pairs = xp.sum(~finite, dtype=np.int32)
    outliers = xp.sum(finite & ~typical, dtype=np.int32)
    # Of the half that flips sign: the other half of a split pair is credited by a sum, not by a difference.
    flipped = weights[..., -1] if examples is not None else weights
    difference = xp.where(typical, difference, 0)
    slope = xp.sum(flipped.astype(known.dtype) * step * difference) / xp.maximum(xp.sum(difference**2), 1e-30)
    if xp is jnp:
        return Shaped(weights, scale, void_pairs, slope, outliers)
    return Shaped(weights, float(scale), int(void_pairs), float(slope), int(outliers))


def _outlying(xp: Any, values: Numbers, counts: Numbers) -> Numbers:
    """Mark the values that lie beyond `OUTLYING` robust standard deviations of those that count and are not 0."""
    sizes = xp.where(counts, abs(values), 0)
    counts = sizes > 0
    ordered = xp.sort(xp.where(counts, sizes, xp.inf))
    median = ordered[xp.sum(counts, dtype=np.int32) // 2]
    return sizes > OUTLYING / NORMAL_MEDIAN * median


def _most_of_outliers(xp: Any, weights: Numbers, typical: Numbers, outlying: Numbers) -> Numbers:
    """Return the largest weight of an outlier, by half: the squares of all add up to at most those of typical pairs."""
    squares = xp.sum(xp.where(typical, weights**2, 0), axis=0, keepdims=True)
    outliers = xp.sum(outlying.astype(weights.dtype), axis=0, keepdims=True)
    return xp.maximum(xp.floor(xp.sqrt(squares / xp.maximum(outliers, 1))), 1)


def _groups(xp: Any, examples: Numbers) -> Numbers:
    """Number the groups of pairs with one example from 0 up."""
    if xp is jnp:
        return jnp.unique(examples, return_inverse=True, size=len(examples))[1]
    return np.unique(examples, return_inverse=True)[1]


def _sum_up(xp: Any, values: Numbers, group: Numbers) -> Numbers:
    """Sum over all pairs of each group, for each pair."""
    if xp is np:
        return np.bincount(group, values, minlength=len(group))[group]
    return jnp.zeros(len(group), values.dtype).at[group].add(values)[group]


def _medians(xp: Any, values: Numbers, counts: Numbers, group: Numbers) -> Numbers:
    """Return for each pair the median of its group's values that count."""
    ordered = values[xp.lexsort((xp.where(counts, values, xp.inf), group))]
    start = xp.searchsorted(xp.sort(group), group)
    return ordered[start + _sum_up(xp, counts.astype(values.dtype), group).astype(np.int32) // 2]


def _over_others(xp: Any, total: Numbers, finite: Numbers, typical: Numbers, group: Numbers) -> Numbers:
    """Return each pair's summed loss less the mean of the other typical pairs of its group; 0 if there is no other."""
    ours, own = xp.where(typical, total, 0.0), typical.astype(total.dtype)
    count = _sum_up(xp, own, group) - own
    others = (_sum_up(xp, ours, group) - ours) / xp.maximum(count, 1)
    return xp.where(finite & (count > 0), total - others, 0.0)


def _zscore(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    # The deviation is about 0: the mean is 0 by symmetry.
    known = xp.where(counts, values, 0)
    deviation = xp.sqrt(xp.sum(known**2) / xp.maximum(xp.sum(counts.astype(values.dtype)), 1))
    return values / xp.where(deviation > 0, deviation, 1.0), 1 / STEPS_PER_DEVIATION


def _centered_rank(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    ordered = xp.sort(xp.where(counts, values, xp.inf))  # void and outlying pairs come last
    ends = xp.searchsorted(ordered, values, side="left") + xp.searchsorted(ordered, values, side="right")
    ranks, most = (ends - 1).astype(values.dtype) / 2, xp.sum(counts.astype(values.dtype)) - 1
    return ranks / xp.maximum(most, 1) - 0.5, 0.5 / LIMIT


def _sign(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    return xp.sign(values), 1.0


def _raw(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, Numbers]:
    value = values / (2 * sigma)
    largest = xp.max(xp.where(counts, abs(value), 0))
    return value, xp.where(largest > 0, largest, 1.0) / LIMIT


_SHAPINGS = {"zscore": _zscore, "centered_rank": _centered_rank, "sign": _sign, "raw": _raw}
