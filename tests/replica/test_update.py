"""The update: optimizers and averaging by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from small import MODELS, epsilons_of, names_of, noise_of, params_of, seeds_of

from esjax import core
from esjax.core.shaping import Shaped
from esjax.models.model import Params
from esjax.replica.update import TrainState, init_state, make_apply

WEIGHTS = np.random.default_rng(3).integers(-127, 128, 40).astype(np.int8)
SCALE = 0.01


def gradient_of(step: int) -> Params:
    """Estimate a gradient from made-up weights."""
    model = MODELS["gru"]
    run = jax.jit(core.estimate(noise_of(model), mesh=mesh_of(1), chunk_pairs=20))
    return run(params_of(model), seeds_of(40, step), Shaped(jnp.asarray(WEIGHTS), jnp.float32(SCALE), 0))


def step_by_hand(optimizer: optax.GradientTransformation, average: float, steps: int) -> list[TrainState]:
    """Run a few updates with made-up weights."""
    model = MODELS["gru"]
    apply = jax.jit(make_apply(optimizer, model.unit, average))
    state = init_state(params_of(model), optimizer)
    states = [state]
    for step in range(steps):
        state, _ = apply(state, gradient_of(step), jnp.float32(0))
        states.append(state)
    return states


def test_an_update_moves_each_leaf_by_its_unit_against_the_estimate() -> None:
    """Reference: params - learning_rate * unit * scale * Σ weight * ε, written out in float64."""
    model = MODELS["gru"]
    before, after = (jax.tree.leaves(state.params) for state in step_by_hand(optax.sgd(0.5), 0, 1))
    params = params_of(model)
    epsilons = epsilons_of(noise_of(model), params, seeds_of(40, 0))
    for name, old, new, unit, epsilon in zip(
        names_of(params), before, after, jax.tree.leaves(model.unit), epsilons, strict=True
    ):
        expected = np.asarray(old, np.float64) - 0.5 * unit * SCALE * (epsilon @ WEIGHTS.astype(np.float64))
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_norms_are_in_units_of_each_leaf() -> None:
    model = MODELS["gru"]
    optimizer = optax.sgd(0.5)
    state = init_state(params_of(model), optimizer)
    after, info = make_apply(optimizer, model.unit, 0)(state, gradient_of(0), jnp.float32(0))
    moved = jax.tree.map(
        lambda new, old, unit: np.sum(((new - old) / unit) ** 2), after.params, state.params, model.unit
    )
    np.testing.assert_allclose(info.update_norm, math.sqrt(sum(jax.tree.leaves(moved))), rtol=1e-3)
    np.testing.assert_allclose(info.update_norm, 0.5 * info.gradient_norm, rtol=1e-5)


def test_the_average_looks_back_over_a_share_of_the_run() -> None:
    """Reference: Shamir & Zhang's recursion, avg_t = (1 - w) avg + w params_t, w = (η+1)/(t+η), η + 1 = 1 / share."""
    states = step_by_hand(optax.sgd(0.1), 0.25, 6)
    average = None
    for t, state in enumerate(states[1:], start=1):
        weight = min(1.0, 4 / (t + 3))
        leaf = np.asarray(state.params.embedding, np.float64)
        average = leaf if average is None else (1 - weight) * average + weight * leaf
        np.testing.assert_allclose(state.average.embedding, average, rtol=1e-5, atol=1e-6)


def test_without_averaging_the_newest_weights_are_evaluated() -> None:
    state = step_by_hand(optax.sgd(0.1), 0, 3)[-1]
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)


@pytest.mark.usefixtures("lenient_promotion")
def test_any_optax_transformation_will_do() -> None:
    before, *_, after = step_by_hand(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), 0, 2)
    assert int(after.step) == 2
    assert (np.asarray(before.params.embedding) != np.asarray(after.params.embedding)).any()
