"""Compares the settings of a sweep by their means over the seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esjax.tuning.intervals import front_runners, half_width
from esjax.tuning.sweep import Outcome, RankedBy, measure_of, order

SEED = "seed"


class SeedMean(NamedTuple):
    """The mean over the seeds of what runs are compared by, for one combination of settings.

    Attributes:
        values: Values by axis, without the seed.
        ranked_by: What runs are compared by.
        mean: Its mean: of held-out losses in nats per token, or of greedy rewards.
        interval: Half of the 95% interval of the mean (Student's t); infinity for a single seed.
        seeds: Number of seeds.
        ahead: Whether this combination is the best one, or does not differ from it significantly: the 95% interval of
            the difference, paired by seed, includes 0.
    """

    values: Mapping[str, Any]
    ranked_by: RankedBy
    mean: float
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
    ranked_by = measure_of(outcomes)
    for one in outcomes:
        is_finished = one.state == "finished" and one.ranked_by == ranked_by
        if SEED in one.values and one.value is not None and is_finished:
            key = tuple(f"{name}={value}" for name, value in one.values.items() if name != SEED)
            groups.setdefault(key, []).append(one)
    by_seed = [{one.values[SEED]: one.value for one in group if one.value is not None} for group in groups.values()]
    common = sorted(set.intersection(*map(set, by_seed))) if by_seed else []
    if not common:
        return []
    found = [[values[seed] for seed in common] for values in by_seed]
    ahead = front_runners([[-order(ranked_by, value) for value in values] for values in found])
    means = [
        SeedMean(
            {name: value for name, value in group[0].values.items() if name != SEED},
            ranked_by,
            float(np.mean(values)),
            half_width(values),
            len(common),
            i in ahead,
        )
        for i, (group, values) in enumerate(zip(groups.values(), found, strict=True))
    ]
    return sorted(means, key=lambda mean: order(ranked_by, mean.mean))
