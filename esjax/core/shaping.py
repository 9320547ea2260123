"""From losses to shaped weights: what each pair's perturbation counts for in the update.

Shaping works on the difference of a pair, d = loss(+ε) - loss(-ε). Both members see the same example, so d does not
depend on how hard the example was, and pairs with different examples can be compared. In split pairs the members share
one half of their noise: that half is credited by the pair's summed loss, relative to the other pairs on the same
example.

Weights are small integers, so that the update is a sum of integers: the same in any order, on any number of devices and
hosts, and a byte or two a pair to send. A sum Σ weight * ε grows with a positive d along +ε: it points uphill in loss,
as a gradient does.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, Integer

Shaping = Literal["zscore", "centered_rank", "sign", "raw"]

LIMIT = 127
"""Largest size of a weight."""

LARGEST_LOSS = 1e9
"""Losses beyond this size count as not finite: a member that far off has nothing to say."""

STEPS_PER_DEVIATION = 16
"""Resolution of `zscore`: rounding adds 1/(12 * 16²) = 0.03% to the variance; clipped at 127/16 = 7.9 deviations."""

Numbers = Any
"""Arrays of numpy, computed with in float64 on the host, or of JAX, computed with in float32 and jitted if you like."""


class Shaped(NamedTuple):
    """Shaped weights of one step.

    Attributes:
        weights: Integer weight of each pair, int8 [pairs]; of split pairs [pairs, 2], that of the shared half first.
        scale: Factor that makes the sum `Σ weight * ε` the mean of `shaped value * ε` over the pairs that count.
        void_pairs: Number of pairs that weigh 0 because a loss of theirs is not finite.
    """

    weights: Int8[Numbers, "pairs ..."]
    scale: Float[Numbers, ""] | float
    void_pairs: Integer[Numbers, ""] | int

    @property
    def trouble(self) -> str:
        """Why all weights are 0, or ""; for values that are not traced."""
        pairs, void_pairs = len(self.weights), int(self.void_pairs)
        if 2 * void_pairs > pairs:
            return f"{void_pairs} of {pairs} pairs have a loss that is not finite"
        if np.any(self.weights):
            return ""
        alike = "pair" if np.ndim(self.weights) == 1 else "pair, and the sums of those with the same windows,"
        return f"the two losses of every {alike} differ by the same amount, or are equal"


def is_finite(losses: Float[Numbers, "pairs 2"]) -> Any:
    """Return which pairs count: both losses are finite, and at most `LARGEST_LOSS` in size."""
    # Not all(axis=1), which takes ten times as long in numpy.
    return (abs(losses[:, 0]) < LARGEST_LOSS) & (abs(losses[:, 1]) < LARGEST_LOSS)


def shape(
    losses: Float[Numbers, "pairs 2"],
    method: Shaping = "zscore",
    sigma: float = 1.0,
    examples: Integer[Numbers, " pairs"] | None = None,
) -> Shaped:
    """Turn the losses of pairs into integer weights.

    Args:
        losses: Losses of the members +ε and -ε of each pair, [pairs, 2]; lower is better. Numpy arrays are computed
            with in float64, JAX arrays in float32, in jitted code too.
        method: How a difference d becomes a value. zscore: d over its standard deviation. centered_rank: rank of d,
            from -1/2 to 1/2, equal values share their mean rank (Salimans et al. 2017, section 2.1). sign: ±1, or 0
            where d is 0. raw: d / (2 sigma), whose sum is an unbiased estimate of the gradient of the smoothed loss.
        sigma: Size of the perturbations; enters `raw` alone.
        examples: For split pairs: number of the example that each pair was scored on. A pair's summed loss counts
            relative to the mean of the other pairs on the same example; where there is none, not at all. None:
            antithetic pairs.

    Returns:
        An int8 weight for each pair, their scale, and the number of void pairs. A pair with a loss that is not finite
        is void, and its weight is 0. If more than half the pairs are void, or all losses that are compared are equal,
        all weights are 0, and `Shaped.trouble` names the reason.

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
    # In the order of the pairs: one result, whichever host computed the losses.
    known = xp.where(finite[:, None], losses, 0).astype(jnp.float32 if xp is jnp else np.float64)
    counted = xp.sum(finite.astype(known.dtype))
    difference = known[:, 0] - known[:, 1]
    compared = difference[:, None]
    if examples is not None:
        compared = xp.stack([_over_others(xp, known, finite, examples), difference], axis=1)
    counts = xp.broadcast_to(finite[:, None], compared.shape)
    value, step = _SHAPINGS[method](xp, compared.ravel(), counts.ravel(), sigma)
    usable = (2 * counted >= len(losses)) & xp.any(compared != 0)
    weights = xp.clip(xp.rint(value / step), -LIMIT, LIMIT).reshape(compared.shape)
    weights = xp.where(usable & counts, weights, 0).astype(np.int8)
    scale = xp.where(usable, step / xp.maximum(counted, 1), 0.0)
    weights = weights if examples is not None else weights[:, 0]
    void_pairs = xp.sum(~finite, dtype=np.int32)
    return Shaped(weights, scale, void_pairs) if xp is jnp else Shaped(weights, float(scale), int(void_pairs))


def _over_others(xp: Any, losses: Numbers, finite: Numbers, examples: Numbers) -> Numbers:
    """Return the sum of each pair's losses over the mean sum of the other pairs with its example; 0 for one alone."""
    pairs = len(losses)
    if xp is jnp:
        _, group = jnp.unique(examples, return_inverse=True, size=pairs)
    else:
        _, group = np.unique(examples, return_inverse=True)

    def sum_up(values: Numbers) -> Numbers:
        """Sum over the pairs of each pair's example."""
        if xp is np:
            return np.bincount(group, values, minlength=pairs)[group]
        return jnp.zeros(pairs, values.dtype).at[group].add(values)[group]

    total = xp.where(finite, losses[:, 0] + losses[:, 1], 0.0)
    count = sum_up(finite.astype(total.dtype))
    others = (sum_up(total) - total) / xp.maximum(count - 1, 1)
    return xp.where(finite & (count > 1), total - others, 0.0)


def _zscore(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    # About 0, the mean by symmetry.
    deviation = xp.sqrt(xp.sum(values**2) / xp.maximum(xp.sum(counts.astype(values.dtype)), 1))
    return values / xp.where(deviation > 0, deviation, 1.0), 1 / STEPS_PER_DEVIATION


def _centered_rank(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    ordered = xp.sort(xp.where(counts, values, xp.inf))  # those that do not count come last
    ends = xp.searchsorted(ordered, values, side="left") + xp.searchsorted(ordered, values, side="right")
    ranks, most = (ends - 1).astype(values.dtype) / 2, xp.sum(counts.astype(values.dtype)) - 1
    return ranks / xp.maximum(most, 1) - 0.5, 0.5 / LIMIT


def _sign(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, float]:
    return xp.sign(values), 1.0


def _raw(xp: Any, values: Numbers, counts: Numbers, sigma: float) -> tuple[Numbers, Numbers]:
    value = values / (2 * sigma)
    largest = xp.max(abs(value))
    return value, xp.where(largest > 0, largest, 1.0) / LIMIT


_SHAPINGS = {"zscore": _zscore, "centered_rank": _centered_rank, "sign": _sign, "raw": _raw}
