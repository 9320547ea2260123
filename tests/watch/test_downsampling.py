"""Points of curves: means by hand, bounded in number, and the same while a run continues."""

import math

import numpy as np
import pytest

from esjax.watch.downsampling import make_curve, mean_and_range, smooth


def metrics(steps: int) -> dict[str, np.ndarray]:
    step = np.arange(1.0, steps + 1)
    return {"step": step, "seconds": step / 2, "member_tokens": 100 * step, "loss": step**2}


def test_few_measurements_are_drawn_as_they_are() -> None:
    curve = make_curve(metrics(3), "loss", points=3)
    assert curve.stride == 1
    assert curve.value.tolist() == [1.0, 4.0, 9.0]
    assert curve.over("steps").tolist() == [1.0, 2.0, 3.0]
    assert curve.over("seconds").tolist() == [0.5, 1.0, 1.5]
    assert curve.over("member-tokens").tolist() == [100.0, 200.0, 300.0]


def test_many_are_averaged_and_stand_at_their_last_step() -> None:
    curve = make_curve(metrics(5), "loss", points=3)
    assert curve.stride == 2
    assert curve.value.tolist() == [2.5, 12.5]
    assert curve.step.tolist() == [2.0, 4.0]


def test_a_clock_that_went_back_does_not_bend_the_curve() -> None:
    """As in runs that a crash interrupted before the clock was in the ledger."""
    columns = metrics(5) | {"seconds": np.array([1.0, 5.0, 3.0, 4.0, 6.0])}
    assert make_curve(columns, "loss").over("seconds").tolist() == [1.0, 5.0, 5.0, 5.0, 6.0]


def test_what_was_not_measured_is_left_out() -> None:
    columns = metrics(5) | {"held_out": np.array([math.nan, 2.0, math.inf, 4.0, math.nan])}
    curve = make_curve(columns, "held_out")
    assert curve.step.tolist() == [2.0, 4.0]
    assert curve.value.tolist() == [2.0, 4.0]
    assert len(make_curve(columns, "nothing").value) == 0
    assert len(make_curve({}, "loss").value) == 0


def test_points_stay_as_they_are_while_a_run_goes_on() -> None:
    columns = metrics(40)
    before = make_curve({}, "loss", points=10)
    for steps in range(1, 41):
        curve = make_curve({name: values[:steps] for name, values in columns.items()}, "loss", points=10)
        assert len(curve.value) <= 10
        if curve.stride == before.stride:
            np.testing.assert_array_equal(curve.value[: len(before.value)], before.value)
        before = curve


def test_smoothing_is_an_exponentially_weighted_mean() -> None:
    """Reference: the weighted mean written out."""
    value = np.array([4.0, 1.0, 3.0])
    half, eighth = math.exp(-1 / 2), math.exp(-3 / 2)  # one and two steps are between the points
    smoothed = smooth(np.array([1.0, 2.0, 4.0]), value, 2.0)
    last = (4 * eighth + 1 * math.exp(-1) + 3) / (eighth + math.exp(-1) + 1)
    np.testing.assert_allclose(smoothed, [4.0, (4 * half + 1) / (half + 1), last], rtol=1e-12)


@pytest.mark.parametrize("span", [0.0, 1.0, 1e6])
def test_smoothing_keeps_what_is_constant(span: float) -> None:
    np.testing.assert_allclose(smooth(np.arange(5.0), np.full(5, 3.0), span), 3.0, rtol=1e-12)
    assert len(smooth(np.zeros(0), np.zeros(0), span)) == 0


def test_without_a_span_nothing_is_changed() -> None:
    value = np.array([4.0, 1.0, 3.0])
    np.testing.assert_array_equal(smooth(np.arange(3.0), value, 0.0), value)


def test_the_mean_of_curves_goes_as_far_as_all_of_them() -> None:
    """By hand: the first is x + 1, the second 10 up to x = 2 and then falls by 2; they share x from 1 to 4."""
    x = [np.array([0.0, 2.0, 4.0]), np.array([1.0, 2.0, 5.0])]
    y = [np.array([1.0, 3.0, 5.0]), np.array([10.0, 10.0, 4.0])]
    band = mean_and_range(x, y)
    assert band.x.tolist() == [1.0, 2.0, 4.0]
    assert (band.low.tolist(), band.high.tolist()) == ([2.0, 3.0, 5.0], [10.0, 10.0, 6.0])
    assert band.mean.tolist() == [6.0, 6.5, 5.5]


def test_curves_that_share_no_part_of_the_axis_have_no_mean() -> None:
    band = mean_and_range([np.array([1.0, 2.0]), np.array([3.0])], [np.array([1.0, 2.0]), np.array([3.0])])
    assert [len(column) for column in band] == [0, 0, 0, 0]
