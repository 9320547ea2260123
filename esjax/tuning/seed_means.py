"""A sweep's settings compared over its seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esjax.tuning.intervals import front_runners, half_width
from esjax.tuning.sweep import Outcome

SEED = "seed"


class SeedMean(NamedTuple):
    """What the runs of one combination of settings came to, over the seeds.

    Attributes:
        values: By axis, without that of seeds.
        held_out: Mean of the held-out losses, nats per token.
        interval: Half of the 95% interval of the mean; infinity for a single seed.
        seeds: Number of seeds.
        ahead: Whether it is the best of all combinations, or is not seen to differ from it: the 95% interval of the
            difference, seed by seed, includes 0.
    """

    values: Mapping[str, Any]
    held_out: float
    interval: float
    seeds: int
    ahead: bool


def seed_means(outcomes: Sequence[Outcome]) -> list[SeedMean]:
    """Compare combinations of settings over the seeds for which all of them have finished, best first.

    Args:
        outcomes: Of one sweep.

    Returns:
        A mean for each combination that has a finished run; none without an axis of seeds, or a seed in common.
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
