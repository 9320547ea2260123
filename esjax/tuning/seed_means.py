"""Compares the settings of a sweep by their means over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esjax.tuning.intervals import front_runners, half_width
from esjax.tuning.sweep import Outcome

SEED = "seed"


class SeedMean(NamedTuple):
    """The mean held-out loss of one combination of settings over the seeds.

    Attributes:
        values: Values by axis, without the seed.
        held_out: Mean of the held-out losses, nats per token.
        interval: Half of the 95% interval of the mean (Student's t); infinity for a single seed.
        seeds: Number of seeds.
        ahead: Whether this combination is the best one, or does not differ from it significantly: the 95% interval of
            the difference, paired by seed, includes 0.
    """

    values: Mapping[str, Any]
    held_out: float
    interval: float
    seeds: int
    ahead: bool


def seed_means(outcomes: Sequence[Outcome]) -> list[SeedMean]:
    """Compare combinations of settings over the seeds that all of them have finished.

    Args:
        outcomes: Outcomes of one sweep.

    Returns:
        A mean for each combination with a finished run, best first. Empty if the sweep has no axis of seeds, or no
        seed is finished in all combinations.
    """
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for one in outcomes:
        if SEED in one.values and one.held_out is not None and one.state == "finished":
            key = tuple(f"{name}={value}" for name, value in one.values.items() if name != SEED)
            groups.setdefault(key, []).append(one)
    by_seed = [
        {one.values[SEED]: one.held_out for one in group if one.held_out is not None} for group in groups.values()
    ]
    common = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    if not common:
        return []
    losses = [[losses[seed] for seed in common] for losses in by_seed]
    ahead = front_runners([np.negative(values).tolist() for values in losses])
    means = [
        SeedMean(
            {name: value for name, value in group[0].values.items() if name != SEED},
            float(np.mean(values)),
            half_width(values),
            len(common),
            i in ahead,
        )
        for i, (group, values) in enumerate(zip(groups.values(), losses, strict=True))
    ]
    return sorted(means, key=lambda mean: mean.held_out)
