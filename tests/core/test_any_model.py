"""Models that know nothing of esjax: losses, estimates and gradients against arithmetic written out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from conftest import mesh_of
from framework_models import CASES, LENGTH, VOCAB, Case
from jax.extend.core import jaxprs_in_params
from jaxtyping import Array

import esjax
from esjax.core.interpreter import interpret
from esjax.core.shaping import LIMIT

PAIRS, SIGMA = 6, 0.05


def tokens_of(pairs: int = PAIRS) -> Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (pairs, LENGTH + 1)), jnp.int32)


def moved(case: Case, noise: esjax.Noise, units: Any, seed: Array, sign: Array) -> Any:
    """Reference: the parameters plus sign * sigma * unit * ε, every matrix added up."""
    epsilon = noise.lay_out(case.params).epsilon(seed, case.params)
    return jax.tree.map(lambda w, e, u: w + sign * SIGMA * u * e, case.params, epsilon, units)


@pytest.mark.parametrize(("name", "rank"), halved(CASES, [1, 2]))
def test_losses_are_those_of_added_up_weights_and_nothing_is_added_up(name: str, rank: int) -> None:
    case, tokens, seeds = CASES[name](), tokens_of(), esjax.pair_seeds(3, 4, PAIRS)
    units = esjax.initial_units(case.params)
    noise = esjax.low_rank(SIGMA, rank, units=units, **case.noise)
    losses = jax.jit(esjax.evaluate(case.loss, noise))(case.params, seeds, tokens)
    loss = jax.jit(lambda seed, sign, window: case.loss(moved(case, noise, units, seed, sign), window))
    expected = [[loss(seed, sign, window) for sign in (1.0, -1.0)] for seed, window in zip(seeds, tokens, strict=True)]
    np.testing.assert_allclose(losses, expected, rtol=3e-6, atol=1e-6)
    # The noise moves losses by far more than that.
    assert np.abs(losses[:, 0] - losses[:, 1]).max() > 1e-3
    assert esjax.explain(case.loss, noise, case.params, tokens[0]) == []


@pytest.mark.parametrize(("name", "rank"), halved(CASES, [1, 3]))
def test_the_estimate_is_the_sum_of_weighted_noise_to_the_bit(name: str, rank: int) -> None:
    """Reference: Σ weight * ε * √rank in integers, then the same two float operations."""
    case, seeds = CASES[name](), esjax.pair_seeds(3, 4, PAIRS)
    units = esjax.initial_units(case.params)
    noise = esjax.low_rank(SIGMA, rank, units=units, **case.noise)
    weights = np.random.default_rng(5).integers(-LIMIT, LIMIT + 1, PAIRS).astype(np.int8)
    scale = np.float32(0.0123)
    epsilon = jax.jit(noise.lay_out(case.params).epsilon)
    epsilons = [epsilon(seed, case.params) for seed in seeds]
    shaped = esjax.Shaped(jnp.asarray(weights), scale, 0)

    def expected(unit: float, *leaves: Array) -> np.ndarray:
        # A low-rank ε times √rank is a whole number, and so is a ±1; no other case is left.
        whole = [np.rint(np.asarray(leaf) * math.sqrt(rank)) for leaf in leaves]
        is_thin = all(
            np.allclose(one, np.asarray(leaf) * math.sqrt(rank), atol=1e-5)
            for one, leaf in zip(whole, leaves, strict=True)
        )
        parts = whole if is_thin else [np.asarray(leaf) for leaf in leaves]
        total = sum(int(weight) * part.astype(np.int64) for weight, part in zip(weights, parts, strict=True))
        by = scale * np.float32(1 / (unit * (math.sqrt(rank) if is_thin else 1.0)))
        return np.asarray(total, np.float32) * by

    for devices in (1, 2):
        got = jax.jit(esjax.estimate(noise, mesh=mesh_of(devices), chunk_pairs=4))(case.params, seeds, shaped)
        assert str(jax.tree.structure(got)) == str(jax.tree.structure(case.params))
        jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(expected, units, *epsilons))


# The gradient of the smoothed loss, estimated from pairs. See tests/core/test_gradient.py for the bound: with
# S = Σ_k g_k·∇ / (K |∇|²) the terms have mean 1 and variance at most 8 for a single matrix of rank 1, less for several.
MANY, SMALL = 3000, 0.01


@pytest.mark.parametrize("name", CASES)
def test_value_and_grad_takes_the_place_of_that_of_jax(name: str) -> None:
    """Reference: `jax.value_and_grad`, leaf by leaf where a leaf has a share of the gradient to be seen.

    A flipped sign gives -1, a lost unit or a wrong axis something far from 1.
    """
    case, tokens = CASES[name](), tokens_of(1)[0]
    units = esjax.initial_units(case.params)
    noise = esjax.low_rank(SMALL, units=units, **case.noise)
    run = jax.jit(esjax.value_and_grad(case.loss, noise, MANY, shaping="raw", batch_axis=None))
    value, estimate = run(case.params, 7, tokens)
    exact_value, exact = jax.jit(jax.value_and_grad(case.loss))(case.params, tokens)
    assert abs(value - exact_value) < 1e-2

    # In units, where the estimate's noise is the same for all entries.
    ours, theirs = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(jax.tree.map(jnp.multiply, tree, units))]
        for tree in (estimate, exact)
    )
    squared = sum(float(np.sum(leaf**2)) for leaf in theirs)
    inner = sum(float(np.sum(one * two)) for one, two in zip(ours, theirs, strict=True))
    assert abs(inner / squared - 1) < 5 * math.sqrt(8 / MANY)
    for one, two in zip(ours, theirs, strict=True):
        share = float(np.sum(two**2)) / squared
        if share > 0.05:
            assert abs(np.sum(one * two) / np.sum(two**2) - 1) < 5 * math.sqrt(8 / MANY / share)


def test_layers_that_are_stacked_have_noise_of_their_own() -> None:
    """Reference: the layers' ε are uncorrelated products of vectors; without `stacked` they would share one side."""
    params = {"w": jnp.zeros((3, 5, 4))}
    stacked = esjax.low_rank(0.1, stacked=lambda path, leaf: True).lay_out(params)
    epsilon = jax.jit(stacked.epsilon)
    samples = np.stack([epsilon(seed, params)["w"] for seed in esjax.pair_seeds(0, 0, 200)])
    assert all(np.linalg.matrix_rank(layer) == 1 for layer in samples[0])
    flat = samples.reshape(200, -1)
    moments = np.abs(flat.T @ flat / 200 - np.eye(60))
    assert moments.max() < 5.5 / math.sqrt(200)
    one_array = jax.jit(esjax.low_rank(0.1).lay_out(params).epsilon)(esjax.pair_seeds(0, 0, 1)[0], params)["w"]
    assert np.linalg.matrix_rank(one_array.reshape(15, 4)) == 1 or np.linalg.matrix_rank(one_array.reshape(3, 20)) == 1


def test_a_layer_of_packed_noise_is_found_by_its_number() -> None:
    """Reference: the layer's matrix with its noise written out."""
    params, seed = {"w": jnp.zeros((3, 6, 4))}, esjax.pair_seeds(0, 0, 1)[0]
    layout = esjax.low_rank(0.1, rank=2, stacked=lambda path, leaf: True, packed=True).lay_out(params)
    member, x = layout.member(params, layout.draw(seed), jnp.float32(1)), jnp.arange(6.0)
    written = layout.epsilon(seed, params)["w"] * 0.1 * layout.units["w"]
    for number in range(3):
        got = interpret(lambda params, number: x @ params["w"][number])(member, jnp.int32(number))
        np.testing.assert_allclose(got, x @ written[number], rtol=1e-5, atol=1e-6)


def test_the_program_of_a_population_is_not_much_longer_than_a_plain_one() -> None:
    """Reference: the operations of a plain population; the rules add a few for each product. Tracing takes as long."""
    case, tokens = CASES["nnx transformer"](), tokens_of()
    noise = esjax.low_rank(SIGMA)
    seeds = esjax.pair_seeds(0, 0, PAIRS)

    def count(jaxpr: Any) -> int:
        return sum(1 + sum(map(count, jaxprs_in_params(equation.params))) for equation in jaxpr.eqns)

    ours = jax.make_jaxpr(esjax.evaluate(case.loss, noise, chunk_pairs=PAIRS))(case.params, seeds, tokens)
    plain = jax.make_jaxpr(jax.vmap(case.loss, (None, 0)))(case.params, tokens)
    assert count(ours.jaxpr) < 4 * count(plain.jaxpr)
