"""Intervals and what they tell apart, against figures worked out by hand and against their own definition."""

import math

import numpy as np
import pytest

from esjax.tuning.intervals import front_runners, half_width


def test_an_interval_by_hand() -> None:
    """Of 1, 2, 3, 4: mean square deviation 5/3, so a standard error of √(5/12), times t = 3.1824 of three degrees."""
    assert half_width([1, 2, 3, 4]) == pytest.approx(3.182446 * math.sqrt(5 / 12), rel=1e-6)
    assert half_width([7, 7]) == 0


@pytest.mark.parametrize("values", [[], [1.0]])
def test_a_single_value_has_no_interval(values: list[float]) -> None:
    assert half_width(values) == math.inf


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """A binomial count of 4000 trials; beyond five standard deviations lies less than a millionth of it."""
    samples = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5)).tolist()
    held = sum(abs(np.mean(sample) - 3.0) <= half_width(sample) for sample in samples)
    assert abs(held - 0.95 * 4000) < 5 * math.sqrt(4000 * 0.95 * 0.05)


def test_what_the_conditions_have_in_common_cancels() -> None:
    """Conditions differ by hundreds, candidates by 1.0 ± 0.1: paired they are told apart, by their own spread never."""
    worse, better = [100.0, 300.0, 500.0, 700.0], [101.1, 300.9, 501.0, 701.0]
    assert front_runners([worse, better]) == [1]
    assert half_width(better) > 100


def test_near_ties_are_not_told_apart() -> None:
    """Differences of -1 and 3 from the best: a mean of 1, ± 12.7 times a standard error of 2. Of 10 and 10: ± 0."""
    assert front_runners([[0.0, 0.0], [-1.0, 3.0], [-11.0, -7.0]]) == [1, 0]
    assert front_runners([[1.0, 2.0], [1.0, 2.0]]) == [0, 1]
    assert front_runners([[1.0], [5.0]]) == [1, 0]  # one condition shows no spread


def test_a_candidate_without_a_number_is_not_ahead() -> None:
    assert front_runners([[math.nan, 9.0], [1.0, 2.0], [0.0, 2.5]]) == [1, 2]
    assert front_runners([[math.nan], [math.inf]]) == []
    assert front_runners([]) == []
