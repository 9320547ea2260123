"""Learning rates against closed forms, updates against float64 loops and arithmetic by hand."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esjax.config.settings import OptimConfig, replace
from esjax.core.units import in_units
from esjax.errors import EsjaxError
from esjax.replica.optimizer import DECAY_STEPS, last_step, learning_rate, make_optimizer
from esjax.replica.transformation import fit_optimizer

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


@pytest.mark.parametrize(("decay_steps", "steps", "warmup"), [(10, None, 0), (None, 8, 3), (5, 20, 7)])
def test_the_last_step_is_that_after_which_the_rate_is_zero(
    decay_steps: int | None, steps: int | None, warmup: int
) -> None:
    config = OptimConfig(learning_rate=PEAK, schedule="cosine", decay_steps=decay_steps, warmup_steps=warmup)
    last = last_step(config, steps)
    assert last is not None
    found = rates(config, steps, last + 3)
    assert min(found[:last]) > SCHEDULE_TOLERANCE
    assert found[last:] == close([0.0] * 3)


def test_other_schedules_have_no_last_step() -> None:
    assert last_step(OptimConfig(schedule="inverse_sqrt", decay_steps=3), 9) is None
    assert last_step(OptimConfig(schedule="constant"), 9) is None


# --- any optax transformation ---

LEAVES = {"matrix": jnp.full((4, 3), 2.0), "vector": jnp.full(3, -1.0)}
UNITS = {"matrix": 0.5, "vector": 0.3}


def test_the_first_update_of_schedule_free_sgd_is_its_rate_times_the_gradient_in_units() -> None:
    """Its iterates begin at the first parameters: seen in other units, they would be the larger part of the update."""
    optimizer = in_units(fit_optimizer(optax.contrib.schedule_free_sgd(1e-3), LEAVES), UNITS)
    gradient = {"matrix": jnp.full((4, 3), 3.0), "vector": jnp.full(3, 5.0)}
    updates, _ = optimizer.update(gradient, optimizer.init(LEAVES), LEAVES)
    for name, unit in UNITS.items():
        np.testing.assert_allclose(updates[name], -1e-3 * gradient[name] * unit**2, rtol=0.01)


@pytest.mark.parametrize("make", [optax.contrib.prodigy, optax.contrib.dadapt_adamw, optax.contrib.dog])
def test_what_measures_the_way_from_the_first_parameters_sees_units_everywhere(make: Callable[[], Any]) -> None:
    """Reference: the same optimizer on parameters and gradients that are in units to begin with."""
    scaled, plain = in_units(fit_optimizer(make(), LEAVES), UNITS), make()
    seen = jax.tree.map(lambda leaf, unit: leaf / unit, LEAVES, UNITS)
    params, state, seen_state = LEAVES, scaled.init(LEAVES), plain.init(seen)
    for step in range(4):
        gradient = jax.tree.map(lambda leaf, step=step: leaf - step, LEAVES)
        updates, state = scaled.update(gradient, state, params)
        wanted, seen_state = plain.update(jax.tree.map(jnp.multiply, gradient, UNITS), seen_state, seen)
        params, seen = optax.apply_updates(params, updates), optax.apply_updates(seen, wanted)
    for name, unit in UNITS.items():
        np.testing.assert_allclose(params[name] / unit, seen[name], rtol=1e-5)


def test_the_loss_of_the_step_goes_to_those_that_take_a_value() -> None:
    """Reference: optax on its own. Sam takes no `value`, and no keyword that it does not know."""
    for make in (
        lambda: optax.contrib.reduce_on_plateau(patience=1, factor=0.5),
        lambda: optax.polyak_sgd(),
        lambda: optax.contrib.sam(optax.sgd(0.5), optax.sgd(0.1)),
    ):
        tried, plain = fit_optimizer(make(), LEAVES), make()
        state, wanted_state = tried.init(LEAVES), plain.init(LEAVES)
        for loss in (3.0, 3.0, 3.0):
            more = {} if "sam" in plain.update.__qualname__ else {"value": loss}
            found, state = tried.update(LEAVES, state, LEAVES, value=jnp.float32(loss))
            wanted, wanted_state = plain.update(LEAVES, wanted_state, LEAVES, **more)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (optax.lbfgs, "'grad' and 'value_fn'"),
        (lambda: optax.scale_by_zoom_linesearch(3), "'grad' and 'value_fn'"),
        (lambda: optax.scale_by_backtracking_linesearch(3), "'grad' and 'value_fn'"),
        (lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), "grad_fn must be provided"),
        (lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5), "no attribute 'fast'"),
        (lambda: optax.contrib.sophia(0.1), "obj_fn must be provided"),
        (
            lambda: optax.GradientTransformation(lambda params: (), lambda g, s, p=None: (g["matrix"], s)),
            "updates must have the shapes and types of the parameters, but they have another structure",
        ),
        (
            lambda: optax.stateless(lambda g, p: jax.tree.map(lambda leaf: leaf.astype(jnp.float16), g)),
            r"but \['matrix'\] is float16\[4, 3\], not float32\[4, 3\]",
        ),
        (
            lambda: optax.GradientTransformation(lambda params: jnp.zeros(2), lambda g, s, p=None: (g, jnp.zeros(4))),
            r"state after an update must .* the only leaf is float32\[4\], not float32\[2\]",
        ),
    ],
)
def test_an_optimizer_that_needs_more_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(EsjaxError, match=f"the optimizer cannot be used: .*{said}") as caught:
        fit_optimizer(make(), LEAVES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_random_keys_of_a_state_are_kept_as_integers(kind: str) -> None:
    """Reference: optax's own noise, update by update."""

    def make() -> optax.GradientTransformationExtraArgs:
        return optax.add_noise(0.1, 0.5, jax.random.key(3, impl=kind))

    tried, plain = fit_optimizer(make(), LEAVES), make()
    state, wanted_state = tried.init(LEAVES), plain.init(LEAVES)
    for _ in range(2):
        assert {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(state)} == {"int32", "uint32"}
        found, state = tried.update(LEAVES, state, LEAVES)
        wanted, wanted_state = plain.update(LEAVES, wanted_state, LEAVES)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
