"""The update: exact sums, the estimate against the exact gradient, optimizers and averaging by hand."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, params_of, seeds_of, space_of, tokens_of

from esjax.es import TrainState, init_state, make_apply_total, make_weigh_pairs, zero_total
from esjax.evaluate import cross_entropy, make_evaluate
from esjax.fitness import shape
from esjax.member import Member
from esjax.noise import Space, Total, stream_seed

WEIGHTS = np.random.default_rng(3).integers(-127, 128, 40).astype(np.int8)


def weigh(space: Space, devices: int, chunk_pairs: int, pairs: np.ndarray, weights: np.ndarray, step: int = 5) -> Total:
    """Sum over some pairs of those that `seeds_of` names, on some devices, so many at a time."""
    padding = -len(pairs) % chunk_pairs
    padded = [np.concatenate([array, np.zeros((padding, *array.shape[1:]), array.dtype)]) for array in (pairs, weights)]
    chunks = [array.reshape(-1, chunk_pairs, *array.shape[1:]) for array in (padded[0].astype(np.uint32), padded[1])]
    run = jax.jit(make_weigh_pairs(space, mesh_of(devices)))
    two = jnp.ones((2, *weights.shape[1:]))
    params = jax.eval_shape(lambda: space.mean(space.weigh(space.sample(seeds_of(2)), two), jnp.float32(1)))
    return run(zero_total(space, params), stream_seed(1, 0), jnp.int32(step), *chunks, np.int32(len(chunks[0])))


@pytest.mark.parametrize(("space", "rank"), [("full", 1), ("low_rank", 1), ("low_rank", 3)])
def test_the_total_is_the_same_bits_in_any_order_chunk_and_number_of_devices(space: str, rank: int) -> None:
    chosen = space_of(MODELS["rnn"], space=space, rank=rank)
    pairs = np.arange(40)
    shuffled = np.random.default_rng(4).permutation(40)
    totals = [
        weigh(chosen, devices, chunk, order, WEIGHTS[order])
        for devices, chunk, order in [(1, 40, pairs), (1, 7, pairs), (2, 8, pairs), (4, 3, pairs), (4, 3, shuffled)]
    ]
    for total in totals[1:]:
        jax.tree.map(np.testing.assert_array_equal, totals[0], total)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(totals[0]))


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10])
def test_chunks_beyond_the_count_are_left_out(count: int) -> None:
    """Reference: the same pairs without the others."""
    space = space_of(MODELS["gru"])
    run = jax.jit(make_weigh_pairs(space, mesh_of(4)))
    pairs, weights = np.arange(40, dtype=np.uint32).reshape(10, 4), WEIGHTS.reshape(10, 4)
    zeros = zero_total(space, params_of(MODELS["gru"]))
    part = run(zeros, stream_seed(1, 0), jnp.int32(5), pairs, weights, np.int32(count))
    alone = weigh(space, 1, 4, np.arange(4 * count), WEIGHTS[: 4 * count])
    jax.tree.map(np.testing.assert_array_equal, alone, part)


def test_totals_of_parts_add_up_to_the_whole() -> None:
    space = space_of(MODELS["gru"])
    parts = [weigh(space, 2, 4, np.arange(40)[part], WEIGHTS[part]) for part in (slice(0, 16), slice(16, 40))]
    added = jax.tree.map(jnp.add, *parts)
    jax.tree.map(np.testing.assert_array_equal, weigh(space, 2, 4, np.arange(40), WEIGHTS), added)


def test_a_large_weighted_sum_stays_exact() -> None:
    """Reference: int64 numpy. 3000 weights of 127 sum to 381,000, more than float32 would keep with a fraction."""
    space = space_of(MODELS["gru"], space="full")
    total = weigh(space, 2, 500, np.arange(3000), np.full(3000, 127, np.int8))
    signs = np.asarray(space.sample(seeds_of(3000)).start, np.int64)
    np.testing.assert_array_equal(total.start, (127 * signs).sum(axis=-1))


# The estimate against the exact gradient.
#
# One pair's raw estimate is g_k = (d_k / 2 sigma) ε_k. To first order d_k / 2 sigma = ∇·ε_k, with the gradient ∇ in
# units of each leaf, so that the mean of g_k is ∇ up to O(sigma²). With S = Σ_k g_k·∇ / (K |∇|²) the test asks for 1:
# each term is (∇·ε)² / |∇|², of mean 1 and variance at most E[(u·ε)⁴] - 1 for a unit vector u. For one matrix of rank
# 1 that is at most 9 - 1 (normals; less for ±1), so that the mean of K terms lies within 5 √(8 / K) of 1 in all but one
# of a million tries; sums over several leaves and higher ranks only lower the fourth moment towards 3. A flipped sign
# gives -1, a lost factor 2 gives 2 or 1/2, a dropped sigma 0.02 or 50.
PAIRS = 4000
SIGMA = 0.02


def exact_gradient(model: Any, params: Any, tokens: Array) -> list[np.ndarray]:
    def loss(params: Any, window: Array) -> Array:
        return Member(model, params).cross_entropy(window, burn_in=1)

    mean = jax.jit(jax.grad(lambda params: jnp.mean(jax.vmap(partial(loss, params))(tokens))))(params)
    in_units = jax.tree.map(lambda leaf, unit: np.asarray(leaf, np.float64) * unit, mean, model.unit)
    return jax.tree.leaves(in_units)


def inner(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return sum(float(np.sum(a * b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize(("space", "rank"), [("full", 1), ("low_rank", 1), ("low_rank", 3)])
def test_the_estimate_is_the_gradient_on_average(noise: str, space: str, rank: int, split: bool) -> None:
    model = MODELS["gru"]
    params, sequences = params_of(model), tokens_of(1, 3, 7)[0]
    chosen = space_of(model, noise=noise, space=space, rank=rank, sigma=SIGMA, split=split)
    evaluate = jax.jit(make_evaluate(model, chosen, cross_entropy(burn_in=1), mesh_of(4), 256))
    seeds = seeds_of(PAIRS)
    losses = np.asarray(evaluate(params, seeds, jnp.broadcast_to(sequences, (PAIRS, *sequences.shape))))
    shaped = shape(losses, "raw", SIGMA, np.arange(PAIRS) // 8 if split else None)
    total = weigh(chosen, 4, 250, np.arange(PAIRS), shaped.weights)
    estimate = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(chosen.mean(total, jnp.float32(shaped.scale)))]
    gradient = exact_gradient(model, params, sequences)
    squared = inner(gradient, gradient)
    assert abs(inner(estimate, gradient) / squared - 1) < 5 * math.sqrt(8 / PAIRS)
    # What is left over is noise: |estimate|² = |∇|² (1 + about n / K), n weights. Members that share one half of their
    # noise tell of n / 2 weights twice, and the mean of the other 7 pairs adds a seventh to one half's noise.
    weights = sum(leaf.size for leaf in gradient) / (2 if split else 1)
    assert inner(estimate, estimate) < squared * (1 + 3 * weights / PAIRS) * 1.5
    # Leaf by leaf too, where a leaf has enough of the gradient to be seen.
    for got, exact in zip(estimate, gradient, strict=True):
        share = inner([exact], [exact]) / squared
        if share > 0.05:
            assert abs(inner([got], [exact]) / inner([exact], [exact]) - 1) < 5 * math.sqrt(8 / PAIRS / share)


def step_by_hand(optimizer: optax.GradientTransformation, average: float, steps: int) -> list[TrainState]:
    """Run a few updates with made-up weights."""
    model = MODELS["gru"]
    space = space_of(model)
    apply = jax.jit(make_apply_total(space.mean, optimizer, model.unit, average))
    state = init_state(params_of(model), optimizer)
    states = [state]
    for step in range(steps):
        state, _ = apply(state, weigh(space, 1, 20, np.arange(40), WEIGHTS, step), jnp.float32(0.01))
        states.append(state)
    return states


def test_an_update_moves_each_leaf_by_its_unit_against_the_estimate() -> None:
    """Reference: params - learning_rate * unit * scale * Σ weight * ε, written out in float64."""
    model = MODELS["gru"]
    assert model.unit is not None
    space = space_of(model)
    before, after = step_by_hand(optax.sgd(0.5), 0, 1)
    noise = space.sample(seeds_of(40, 0))
    weights = WEIGHTS.astype(np.float64)
    start = np.asarray(before.params.start) - 0.5 * model.unit.start * 0.01 * (
        np.asarray(noise.start, np.float64) @ weights
    )
    np.testing.assert_allclose(after.params.start, start, rtol=1e-5)
    old, unit, epsilon = before.params.recurrent, model.unit.recurrent, noise.recurrent
    left, right, shift = (np.asarray(side, np.float64)[0] for side in (epsilon.left, epsilon.right, epsilon.shift))
    matrix = np.asarray(old.matrix) - 0.5 * unit.matrix * 0.01 * np.einsum("k,mk,nk->mn", weights, left, right)
    np.testing.assert_allclose(after.params.recurrent.matrix, matrix, rtol=1e-5, atol=1e-6)
    bias = np.asarray(old.bias) - 0.5 * unit.bias * 0.01 * np.einsum("k,k,nk->n", weights, shift, right)
    np.testing.assert_allclose(after.params.recurrent.bias, bias, rtol=1e-5, atol=1e-6)


def test_the_norms_are_in_units_of_each_leaf() -> None:
    model = MODELS["gru"]
    space = space_of(model)
    optimizer = optax.sgd(0.5)
    state = init_state(params_of(model), optimizer)
    total = weigh(space, 1, 20, np.arange(40), WEIGHTS, step=0)
    after, info = make_apply_total(space.mean, optimizer, model.unit, 0)(state, total, jnp.float32(0.01))
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
