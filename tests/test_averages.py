"""Averages over time, against optax and by hand."""

import math

import numpy as np
import optax
import pytest

from esjax.averages import Average, NamedMean, join_means, running_speed
from esjax.watch.downsampling import smooth


def test_the_start_of_an_average_is_corrected_as_in_adam() -> None:
    """Reference: optax's first moment and its correction, written for gradients."""
    values, keep = np.array([4.0, 1.0, 3.0, 3.5]), math.exp(-1 / 20)
    moment, corrected = 0.0, []
    for count, value in enumerate(values, 1):
        moment = float(optax.tree.update_moment(value, moment, keep, 1))
        corrected.append(float(optax.tree.bias_correction(moment, keep, count)))
    average = Average()
    np.testing.assert_allclose([average.add(value, keep) for value in values], corrected, rtol=1e-5)
    np.testing.assert_allclose(smooth(np.arange(1.0, 5.0), values, 20.0), corrected, rtol=1e-5)


def test_an_average_starts_again_after_what_is_not_finite() -> None:
    average = Average()
    assert [average.add(value, 0.5) for value in (4.0, math.inf, 1.0, 4.0)] == [4.0, math.inf, 1.0, 3.0]
    assert math.isnan(average.add(math.nan, 0.5))
    assert average.add(2.0, 0.5) == 2.0


def test_a_running_speed_by_hand() -> None:
    """10 pairs a second, then 20: 0.7 times 10 and 0.3 times 20; no time at all is taken as a millionth of a second."""
    speed = running_speed(0.0, 20, 2.0)
    assert speed == 10
    assert math.isclose(running_speed(speed, 40, 2.0), 13)
    assert running_speed(0.0, 3, 0.0) == 3e6


def test_means_of_parts_are_joined_by_name() -> None:
    """Reference: numpy's weighted average."""
    draws = np.random.default_rng(0)
    parts = [NamedMean(name, float(draws.normal()), int(draws.integers(1, 9))) for name in "babcab"]
    joined = join_means(parts)
    assert [one.name for one in joined] == ["a", "b", "c"]
    for name, mean, pairs in joined:
        means, counts = zip(*((one.mean, one.pairs) for one in parts if one.name == name), strict=True)
        assert mean == pytest.approx(np.average(means, weights=counts), rel=1e-12)
        assert pairs == sum(counts)
    assert join_means(joined) == joined
    assert join_means([NamedMean("a", 1e308, 3), NamedMean("a", 1e308, 4)]) == [NamedMean("a", 1e308, 7)]
