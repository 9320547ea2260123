"""Shaping: hand arithmetic, and what must happen to losses that are not finite; on the host and in jitted code."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.core.shaping import LIMIT, Shaped, shape

METHODS = ["zscore", "centered_rank", "sign", "raw"]

Shape = Callable[..., Shaped]
"""`(losses, method, sigma, examples) -> shaped`."""


@cache
def compiled(method: Any, sigma: float) -> Callable[..., Shaped]:
    """Compile once what several tests call."""
    return jax.jit(partial(shape, method=method, sigma=sigma))


def in_jax(losses: np.ndarray, method: Any, sigma: float, examples: np.ndarray | None = None) -> Shaped:
    given = None if examples is None else jnp.asarray(examples, jnp.int32)
    return compiled(method, sigma)(jnp.asarray(losses), examples=given)


@pytest.fixture(params=[shape, in_jax], ids=["numpy", "jax"])
def shaping(request: pytest.FixtureRequest) -> Shape:
    """Shape on the host, in float64; or in jitted code, in float32."""
    return request.param


def losses_of(*differences: float, level: float = 2.0) -> np.ndarray:
    """Pairs at different levels of difficulty, with the given loss(+ε) - loss(-ε)."""
    base = level + np.arange(len(differences))
    return np.stack([base + np.array(differences) / 2, base - np.array(differences) / 2], axis=1).astype(np.float32)


def values_of(shaping: Shape, losses: np.ndarray, method: str, sigma: float = 0.25) -> np.ndarray:
    """Shaped values; `scale` holds the division by the number of pairs that count as well."""
    return values(shaping(losses, method, sigma))


def values(shaped: Shaped) -> np.ndarray:
    weights = np.asarray(shaped.weights, np.float64)
    return weights * float(shaped.scale) * (len(weights) - int(shaped.void_pairs))


def test_zscore_by_hand(shaping: Shape) -> None:
    # Root mean square of (3, -1, 1, -1) is √3.
    np.testing.assert_allclose(
        values_of(shaping, losses_of(3, -1, 1, -1), "zscore"), np.array([3, -1, 1, -1]) / np.sqrt(3), atol=0.5 / 16
    )


def test_the_common_half_of_pairs_is_compared_with_others_of_their_windows(shaping: Shape) -> None:
    """By hand: sums 4, 6, 11 share windows, and so do 20, 24; 40 has its windows alone."""
    sums, differences = np.array([4, 6, 11, 20, 24, 40]), np.array([1, -1, 2, 0, 2, -4])
    losses = np.stack([sums + differences, sums - differences], axis=1).astype(np.float32) / 2
    shaped = shaping(losses, "raw", 0.5, np.array([7, 7, 7, 8, 8, 9]))
    common = [4 - (6 + 11) / 2, 6 - (4 + 11) / 2, 11 - (4 + 6) / 2, 20 - 24, 24 - 20, 0]
    expected = np.stack([common, differences], axis=1)  # over 2 sigma = 1
    np.testing.assert_allclose(values(shaped), expected, atol=0.5 * 6 / LIMIT)
    # Neither half knows how hard windows are.
    harder = losses + np.array([50, 50, 50, 0, 0, 9], np.float32)[:, None]
    np.testing.assert_array_equal(shaping(harder, "raw", 0.5, np.array([7, 7, 7, 8, 8, 9])).weights, shaped.weights)


def test_a_step_whose_pairs_differ_in_their_sums_alone_is_not_void(shaping: Shape) -> None:
    losses = np.array([[1, 1], [2, 2], [3, 3], [6, 6]], np.float32)
    assert shaping(losses, "zscore", 0.1).trouble
    shaped = shaping(losses, "sign", 0.1, np.zeros(4, int))
    assert not shaped.trouble
    assert shaped.weights.tolist() == [[-1, 0], [-1, 0], [0, 0], [1, 0]]
    alike = shaping(np.ones((4, 2), np.float32), "zscore", 0.1, np.zeros(4, int))
    assert "sums of those with the same windows" in alike.trouble


def test_a_pair_that_is_not_finite_is_no_measure_of_others(shaping: Shape) -> None:
    losses = np.array([[1, 2], [np.nan, 2], [3, 4], [5, 7]], np.float32)
    shaped = shaping(losses, "zscore", 0.1, np.zeros(4, int))
    kept = shaping(losses[[0, 2, 3]], "zscore", 0.1, np.zeros(3, int))
    np.testing.assert_array_equal(shaped.weights, np.insert(kept.weights, 1, 0, axis=0))
    assert shaped.void_pairs == 1


def test_centered_rank_by_hand(shaping: Shape) -> None:
    # Ranks 3, 0.5, 2, 0.5 of 0..3, the two equal ones sharing theirs.
    np.testing.assert_allclose(
        values_of(shaping, losses_of(3, -1, 1, -1), "centered_rank"),
        np.array([3, 0.5, 2, 0.5]) / 3 - 0.5,
        atol=0.25 / LIMIT,
    )


def test_sign_by_hand(shaping: Shape) -> None:
    np.testing.assert_array_equal(values_of(shaping, losses_of(3, -0.25, 0, -1), "sign"), [1, -1, 0, -1])


def test_raw_is_the_finite_difference(shaping: Shape) -> None:
    # d / (2 * 0.25), in steps of the largest over LIMIT.
    np.testing.assert_allclose(
        values_of(shaping, losses_of(3, -1, 1, -1), "raw"), np.array([6, -2, 2, -2]), atol=3.0 / LIMIT
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_worse_plus_side_weighs_uphill(shaping: Shape, method: str) -> None:
    weights = shaping(losses_of(2, -2, 1, -1), method, 0.1).weights
    assert (np.sign(weights) == [1, -1, 1, -1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_pairs_difficulty_does_not_matter(shaping: Shape, method: str) -> None:
    differences = (1.5, -0.5, 0.25, -2.0)
    easy, hard = losses_of(*differences), losses_of(*differences, level=64.0)
    np.testing.assert_array_equal(shaping(easy, method, 0.1).weights, shaping(hard, method, 0.1).weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_a_pair_that_is_not_finite_weighs_nothing_and_changes_no_other(shaping: Shape, method: str, bad: float) -> None:
    good = losses_of(3, -1, 1, -2)
    mixed = np.insert(good, 2, [[bad, 2.0]], axis=0)
    expected, got = shaping(good, method, 0.1), shaping(mixed, method, 0.1)
    assert got.void_pairs == 1
    assert not got.trouble
    np.testing.assert_array_equal(np.delete(got.weights, 2), expected.weights)
    assert got.weights[2] == 0
    assert got.scale == expected.scale


def noisy(pairs: int) -> np.ndarray:
    """Losses of pairs, four of which share an example, with normal differences."""
    rng = np.random.default_rng(pairs)
    level, difference = np.arange(pairs) // 4 + rng.normal(0, 0.2, pairs), rng.normal(0, 0.1, pairs)
    return np.stack([level + difference, level - difference], axis=1).astype(np.float32)


# The losses of pairs 5, 9 and 10, of which two share an example.
OUTLYING: dict[str, dict[int, tuple[float, float]]] = {
    "one": {5: (9e8, -9e8)},
    "small": {5: (6, 2)},
    "a sum": {5: (9e8, 9e8)},
    "several": {},
}
OUTLYING["several"] = {5: (-9e8, 9e8), 9: (3e4, 2.0), 10: (2.0, 60.0)}


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", OUTLYING)
def test_outliers_change_no_other_weight(shaping: Shape, method: str, is_split: bool, which: str) -> None:
    """Reference: the same pairs with losses that are not finite, which count for nothing."""
    losses, examples = noisy(64), np.arange(64) // 4 if is_split else None
    without, places = losses.copy(), [*OUTLYING[which]]
    for place, pair in OUTLYING[which].items():
        losses[place], without[place] = pair, np.nan
    got, expected = shaping(losses, method, 0.1, examples), shaping(without, method, 0.1, examples)
    if which == "a sum" and not is_split:  # the difference is 0, as that of many pairs may be
        assert got.outliers == 0
        return
    assert (got.outliers, expected.outliers, got.void_pairs) == (len(places), 0, 0)
    others = np.delete(got.weights, places, axis=0)
    np.testing.assert_array_equal(others, np.delete(expected.weights, places, axis=0))
    assert np.count_nonzero(others) > 50
    np.testing.assert_allclose(got.slope, expected.slope, rtol=1e-6)
    # An outlier points where it should, and all outliers together weigh as much as all other pairs at most.
    half = 0 if which == "a sum" else -1
    squares = np.sum(np.atleast_2d(others.T)[half].astype(float) ** 2)
    most = 1 if method == "sign" else min(LIMIT, int(np.sqrt(squares / len(places))))
    assert np.atleast_1d(got.weights[5])[half] == (-1 if which == "several" else 1) * most


@given(
    st.lists(st.tuples(st.floats(-8e8, 8e8), st.floats(-8e8, 8e8)), min_size=13, max_size=13),
    st.sampled_from([method for method in METHODS if method != "raw"]),
    st.booleans(),
)
def test_a_fifth_of_the_pairs_cannot_make_the_estimate_twice_as_long(
    false: list[tuple[float, float]], method: Any, is_split: bool
) -> None:
    """Reference: the same pairs, a liar's void. As noise is independent, the length is that of the weights."""
    losses, examples = noisy(64), np.arange(64) // 4 if is_split else None
    honest = losses.copy()
    losses[::5], honest[::5] = false, np.nan
    got, expected = (shape(some, method, 0.1, examples) for some in (losses, honest))
    length, reference = (one.scale * np.linalg.norm(one.weights.astype(float)) for one in (got, expected))
    assert length <= 2 * reference


def test_few_pairs_and_many_zeros_are_no_outliers(shaping: Shape) -> None:
    """Of two pairs neither is usual; a reward that most members do not get has differences of 0 or 1."""
    assert shaping(losses_of(0.001, 1), "zscore", 0.1).outliers == 0
    assert shaping(losses_of(*[0] * 99, 1, -1), "zscore", 0.1).outliers == 0


def test_a_step_whose_losses_are_mostly_not_finite_is_void(shaping: Shape) -> None:
    losses = losses_of(1, -1, 2, -2)
    losses[:2] = np.nan
    assert not shaping(losses, "zscore", 0.1).trouble
    losses[2, 1] = np.inf
    shaped = shaping(losses, "zscore", 0.1)
    assert "3 of 4 pairs" in shaped.trouble
    assert not shaped.weights.any()


@pytest.mark.parametrize("method", METHODS)
def test_equal_losses_are_trouble_and_no_update(shaping: Shape, method: str) -> None:
    shaped = shaping(losses_of(0, 0, 0), method, 0.1)
    assert "equal" in shaped.trouble
    assert not shaped.weights.any()


# The slope is Σ value * d / Σ d² over the pairs; for d = (3, -1, 1, -1), Σ |d| = 6 and Σ d² = 12. A value is off by
# half a step at most, and the slope by half a step times 6/12.
@pytest.mark.parametrize(
    ("method", "slope", "step"),
    [
        ("zscore", 1 / np.sqrt(3), 1 / 16),
        ("raw", 1 / (2 * 0.25), 6 / LIMIT),
        ("sign", 6 / 12, 0),
        ("centered_rank", (3 / 2 + 1 / 3 + 1 / 6 + 1 / 3) / 12, 0.5 / LIMIT),
    ],
)
def test_the_slope_by_hand(shaping: Shape, method: str, slope: float, step: float) -> None:
    """A void pair has no part in it."""
    losses = losses_of(3, -1, 1, -1)
    for some in (losses, np.insert(losses, 1, [[np.nan, 1.0]], axis=0)):
        np.testing.assert_allclose(shaping(some, method, 0.25).slope, slope, atol=step / 2 * 6 / 12 + 1e-6)


def test_the_slope_of_split_pairs_is_that_of_the_half_that_flips(shaping: Shape) -> None:
    """By hand, with the losses of `test_the_common_half_of_pairs_is_compared_with_others_of_their_windows`."""
    sums, differences = np.array([4, 6, 11, 20, 24, 40]), np.array([1, -1, 2, 0, 2, -4])
    losses = np.stack([sums + differences, sums - differences], axis=1).astype(np.float32) / 2
    windows = np.array([7, 7, 7, 8, 8, 9])
    np.testing.assert_allclose(shaping(losses, "sign", 0.5, windows).slope, 10 / 26, rtol=1e-6)
    np.testing.assert_allclose(shaping(losses, "raw", 0.25, windows).slope, 2, atol=12 / LIMIT / 2 * 10 / 26 + 1e-6)
    # Both halves share one deviation: squares of the shared one add up to 90.5, of the other to 26.
    deviation = np.sqrt((90.5 + 26) / 12)
    np.testing.assert_allclose(shaping(losses, "zscore", 0.5, windows).slope, 1 / deviation, atol=1 / 32 * 10 / 26)


@pytest.mark.parametrize("method", METHODS)
def test_equal_losses_have_no_slope(shaping: Shape, method: str) -> None:
    assert shaping(losses_of(0, 0, 0), method, 0.1).slope == 0


@given(st.lists(st.floats(width=32), min_size=2, max_size=40), st.sampled_from(METHODS))
def test_any_floats_give_small_finite_integers(values: list[float], method: str) -> None:
    losses = np.array(values[: len(values) // 2 * 2], np.float32).reshape(-1, 2)
    shaped = shape(losses, method, 0.1)  # type: ignore[arg-type]
    assert shaped.weights.dtype == np.int8
    assert np.abs(shaped.weights.astype(int)).max() <= LIMIT
    assert np.isfinite(shaped.scale)
