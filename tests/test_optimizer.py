"""Learning rates against closed forms, updates against float64 loops and arithmetic by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esjax.config import OptimConfig, replace
from esjax.errors import EsjaxError
from esjax.optimizer import DECAY_STEPS, learning_rate, make_optimizer

# A schedule takes some ten float32 operations on numbers up to the peak: 10 * 6e-8 of the peak.
PEAK = 0.3
SCHEDULE_TOLERANCE = PEAK * 1e-6


pytestmark = pytest.mark.usefixtures("lenient_promotion")


def rates(config: OptimConfig, steps: int | None, count: int) -> list[float]:
    schedule = learning_rate(config, steps)
    return [float(schedule(jnp.int32(step))) for step in range(count)]


def close(expected: list[float]) -> object:
    return pytest.approx(expected, rel=0, abs=SCHEDULE_TOLERANCE)


def warm_up(step: int, steps: int) -> float:
    """A line from 1/steps of the peak at step 0 to the peak at step `steps`."""
    return PEAK * (1 + (steps - 1) * step / steps) / steps


def test_a_constant_rate_stays() -> None:
    assert rates(OptimConfig(learning_rate=PEAK, schedule="constant"), None, 5) == close([PEAK] * 5)


def test_a_warm_up_is_a_line_that_does_not_begin_at_zero() -> None:
    found = rates(OptimConfig(learning_rate=PEAK, schedule="constant", warmup_steps=4), None, 8)
    assert found == close([warm_up(step, 4) for step in range(4)] + [PEAK] * 4)
    assert found[0] == pytest.approx(PEAK / 4, abs=SCHEDULE_TOLERANCE)


@pytest.mark.parametrize(("decay_steps", "steps"), [(10, None), (None, 10), (10, 99)])
def test_a_cosine_falls_to_zero_at_its_end(decay_steps: int | None, steps: int | None) -> None:
    config = OptimConfig(learning_rate=PEAK, schedule="cosine", decay_steps=decay_steps)
    expected = [PEAK * (1 + math.cos(math.pi * min(step, 10) / 10)) / 2 for step in range(13)]
    assert rates(config, steps, 13) == close(expected)


def test_a_cosine_after_a_warm_up_ends_at_the_same_step() -> None:
    config = OptimConfig(learning_rate=PEAK, schedule="cosine", decay_steps=10, warmup_steps=4)
    falling = [PEAK * (1 + math.cos(math.pi * min(step - 4, 6) / 6)) / 2 for step in range(4, 13)]
    assert rates(config, None, 13) == close([warm_up(step, 4) for step in range(4)] + falling)


@pytest.mark.parametrize("decay_steps", [5, None])
def test_an_inverse_root_has_fallen_to_71_percent_at_decay_steps(decay_steps: int | None) -> None:
    decay = decay_steps or DECAY_STEPS
    config = OptimConfig(learning_rate=PEAK, schedule="inverse_sqrt", decay_steps=decay_steps)
    found = rates(config, None, decay + 1)
    assert found == close([PEAK / math.sqrt(1 + step / decay) for step in range(decay + 1)])
    assert found[decay] / found[0] == pytest.approx(0.7071, abs=1e-4)


def test_an_inverse_root_after_a_warm_up_begins_at_the_peak() -> None:
    found = rates(OptimConfig(learning_rate=PEAK, schedule="inverse_sqrt", warmup_steps=4), None, 5)
    assert found == close([warm_up(step, 4) for step in range(4)] + [PEAK])


def updates_of(config: OptimConfig, gradients: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Apply an optimizer for some steps: the weights after each."""
    optimizer = make_optimizer(config, None)
    weights = jnp.asarray(params, jnp.float32)
    state = optimizer.init(weights)
    update = jax.jit(optimizer.update)
    rows = []
    for gradient in gradients:
        change, state = update(jnp.asarray(gradient, jnp.float32), state, weights)
        weights = weights + change
        rows.append(np.asarray(weights))
    return np.array(rows)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_adam_is_that_of_the_paper(weight_decay: float) -> None:
    """A float64 loop of Kingma & Ba 2015, algorithm 1, with decay decoupled (Loshchilov & Hutter 2019, algorithm 2)."""
    beta1, beta2, eps, rate = 0.8, 0.9, 0.5, 0.1
    config = OptimConfig(
        schedule="constant", learning_rate=rate, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
    )
    rng = np.random.default_rng(0)
    gradients, start = rng.normal(size=(20, 6)), rng.normal(size=6)

    weights, mean, square = start.copy(), np.zeros(6), np.zeros(6)
    expected = []
    for step, gradient in enumerate(gradients, start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        direction = (mean / (1 - beta1**step)) / (np.sqrt(square / (1 - beta2**step)) + eps)
        weights = weights - rate * (direction + weight_decay * weights)
        expected.append(weights)

    # About ten float32 operations a step on numbers around 1, and 20 steps: 20 * 10 * 6e-8.
    np.testing.assert_allclose(updates_of(config, gradients, start), expected, rtol=0, atol=1.2e-5)


def test_adam_moves_downhill_by_the_learning_rate_at_first() -> None:
    config = OptimConfig(schedule="constant", learning_rate=0.25, eps=1e-12)
    found = updates_of(config, np.array([[4.0, -0.001]]), np.zeros(2))
    # 1 - 0.999 in float32 is off by 6e-5 of itself, half of that after the root.
    np.testing.assert_allclose(found, [[-0.25, 0.25]], rtol=1e-4)


def test_sgd_keeps_a_share_of_the_last_update() -> None:
    config = OptimConfig(optimizer="sgd", schedule="constant", learning_rate=0.5, momentum=0.5)
    found = updates_of(config, np.array([[1.0], [2.0], [0.0]]), np.array([10.0]))
    # Velocities 1; 2 + 0.5 = 2.5; 0 + 1.25 = 1.25; half of each is taken off. All are exact in float32.
    np.testing.assert_array_equal(found, [[9.5], [8.25], [7.625]])


def test_sgd_without_momentum_is_the_gradient() -> None:
    config = OptimConfig(optimizer="sgd", schedule="constant", learning_rate=0.5, momentum=0.0)
    np.testing.assert_array_equal(updates_of(config, np.array([[1.0], [2.0]]), np.array([10.0])), [[9.5], [8.5]])


def test_weight_decay_takes_a_share_of_each_weight_times_the_learning_rate() -> None:
    config = OptimConfig(optimizer="sgd", schedule="constant", learning_rate=0.5, momentum=0.5, weight_decay=0.25)
    found = updates_of(config, np.zeros((2, 2)), np.array([8.0, -16.0]))
    # 1 - 0.5 * 0.25 = 7/8 is kept a step, and the decay gathers no momentum.
    np.testing.assert_array_equal(found, [[7.0, -14.0], [6.125, -12.25]])


def test_the_schedule_reaches_the_updates() -> None:
    config = OptimConfig(
        optimizer="sgd", learning_rate=1.0, momentum=0.0, schedule="cosine", decay_steps=2, warmup_steps=0
    )
    # Rates 1, 1/2 and 0; half a turn's cosine in float32 is within 1e-7 of 0.
    found = updates_of(config, np.ones((3, 1)), np.zeros(1))
    np.testing.assert_allclose(found, [[-1.0], [-1.5], [-1.5]], atol=1e-6)


def test_cosine_without_an_end_is_refused() -> None:
    cosine = OptimConfig(schedule="cosine")
    with pytest.raises(EsjaxError, match="decay_steps or steps"):
        make_optimizer(cosine, None)
    make_optimizer(cosine, 10)
    make_optimizer(replace(cosine, decay_steps=10), None)
