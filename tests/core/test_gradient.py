"""From weighted seeds to a gradient: exact sums, and the estimate against the exact gradient."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, epsilons_of, layout_of, noise_of, params_of, seeds_of, tokens_of

from esjax import core
from esjax.core.noise import Totals
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.core.shaping import Shaped, shape
from esjax.models import Model
from esjax.models.member import Member, cross_entropy, over_sequences

SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 3)]
WEIGHTS = np.random.default_rng(3).integers(-127, 128, 40).astype(np.int8)


@cache
def weigher(name: str, space: str, rank: int, devices: int, chunk_pairs: int) -> Callable[..., Totals]:
    """Compile once what several tests call."""
    noise = noise_of(MODELS[name], space=space, rank=rank)
    return jax.jit(core.weigh(noise, mesh=mesh_of(devices), chunk_pairs=chunk_pairs))


def weigh(
    devices: int,
    chunk_pairs: int,
    pairs: np.ndarray,
    weights: np.ndarray,
    *,
    name: str = "gru",
    space: str = "low_rank",
    rank: int = 1,
    **more: Any,
) -> Totals:
    """Sum over some pairs of those that `seeds_of` names, on some devices, so many at a time."""
    seeds = pair_seeds(stream_seed(1, 0), 5, jnp.asarray(pairs, jnp.uint32))
    run = weigher(name, space, rank, devices, chunk_pairs)
    return run(params_of(MODELS[name]), seeds, jnp.asarray(weights), **more)


@pytest.mark.parametrize(("name", "space", "rank"), halved(MODELS, SPACES))
def test_the_total_is_the_same_bits_in_any_order_chunk_and_number_of_devices(name: str, space: str, rank: int) -> None:
    pairs = np.arange(40)
    shuffled = np.random.default_rng(4).permutation(40)
    totals = [
        weigh(devices, chunk, order, WEIGHTS[order], name=name, space=space, rank=rank)
        for devices, chunk, order in [(1, 40, pairs), (1, 7, pairs), (2, 8, pairs), (4, 3, pairs), (4, 3, shuffled)]
    ]
    for total in totals[1:]:
        jax.tree.map(np.testing.assert_array_equal, totals[0], total)
    assert all(leaf.dtype == jnp.int32 for leaf in totals[0])


@pytest.mark.parametrize("count", [0, 1, 4, 6, 12, 28, 39, 40])
def test_pairs_beyond_the_count_are_left_out(count: int) -> None:
    """Reference: the same pairs with the weights of the others set to 0."""
    pairs = np.arange(40)
    part = weigh(4, 4, pairs, WEIGHTS, count=jnp.int32(count))
    alone = weigh(1, 4, pairs, np.where(pairs < count, WEIGHTS, 0).astype(np.int8))
    jax.tree.map(np.testing.assert_array_equal, alone, part)


def test_totals_of_parts_add_up_to_the_whole() -> None:
    """Two ways: added up afterwards, and one after another."""
    run = partial(weigh, 2, 4)
    first, second = slice(0, 16), slice(16, 40)
    parts = [run(np.arange(40)[part], WEIGHTS[part]) for part in (first, second)]
    whole = run(np.arange(40), WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.tree.map(jnp.add, *parts))
    jax.tree.map(np.testing.assert_array_equal, whole, run(np.arange(40)[second], WEIGHTS[second], totals=parts[0]))


def test_totals_begin_with_zeros() -> None:
    """Reference: pairs that all weigh nothing."""
    model = MODELS["gru"]
    none = weigh(1, 20, np.arange(40), np.zeros(40, np.int8))
    for zeros, total in zip(layout_of(model).zeros(), none, strict=True):
        np.testing.assert_array_equal(zeros, total, strict=True)


def test_a_large_weighted_sum_stays_exact() -> None:
    """Reference: int64 numpy. 3000 weights of 127 sum to 381,000, more than float32 would keep with a fraction."""
    model = MODELS["gru"]
    noise = noise_of(model, space="full")
    start, *_ = weigh(2, 500, np.arange(3000), np.full(3000, 127, np.int8), space="full")
    signs, *_ = epsilons_of(noise, params_of(model), seeds_of(3000))
    np.testing.assert_array_equal(start, (127 * signs.astype(np.int64)).sum(axis=-1))


@pytest.mark.parametrize("split", [False, True])
def test_the_estimate_is_the_total_scaled(split: bool) -> None:
    """Reference: scale * Σ weight * ε / unit in float64, whatever the devices, to the same bits."""
    model = MODELS["gru"]
    noise, params, seeds = noise_of(model, split=split, rank=3), params_of(model), seeds_of(40)
    weights = np.stack([WEIGHTS, WEIGHTS[::-1]], axis=1) if split else WEIGHTS
    shaped = Shaped(jnp.asarray(weights), jnp.float32(0.01), 0)
    one, four = (jax.jit(core.estimate(noise, mesh=mesh_of(n), chunk_pairs=6))(params, seeds, shaped) for n in (1, 4))
    jax.tree.map(np.testing.assert_array_equal, one, four)
    rest = (one, model.unit, params)
    for got, unit, leaf, epsilon in zip(*map(jax.tree.leaves, rest), epsilons_of(noise, params, seeds), strict=True):
        whole, turned = (epsilon @ np.asarray(half, np.float64) for half in (WEIGHTS, weights.T[-1 if split else ...]))
        places = np.arange(leaf.shape[-1])  # of columns, and of the entries of vectors
        expected = np.where(places % 2 == 0, whole, turned)
        np.testing.assert_allclose(got, 0.01 * expected / unit, rtol=1e-5, atol=1e-5)


# The estimate against the exact gradient.
#
# One pair's raw estimate is g_k = (d_k / 2 sigma) ε_k. To first order d_k / 2 sigma = ∇·ε_k, with the gradient ∇ in
# units of each leaf, so that the mean of g_k is ∇ up to O(sigma²). With S = Σ_k g_k·∇ / (K |∇|²) the test asks for 1:
# each term is (∇·ε)² / |∇|², of mean 1 and variance at most E[(u·ε)⁴] - 1 for a unit vector u. For one matrix of rank
# 1 that is at most 9 - 1 (normals; less for ±1), so that the mean of K terms lies within 5 √(8 / K) of 1 in all but one
# of a million tries; sums over several leaves and higher ranks only lower the fourth moment towards 3. A flipped sign
# gives -1, a lost factor 2 gives 2 or 1/2, a dropped sigma 0.02 or 50, a dropped unit its square, leaf by leaf.
PAIRS = 4000
SIGMA = 0.02


def in_units(model: Model, gradient: Any) -> list[np.ndarray]:
    """Turn a gradient of plain parameters into one of parameters in units of each leaf."""
    return jax.tree.leaves(jax.tree.map(lambda leaf, unit: np.asarray(leaf, np.float64) * unit, gradient, model.unit))


def exact_gradient(model: Model, params: Any, tokens: Array) -> list[np.ndarray]:
    def loss(params: Any, window: Array) -> Array:
        return Member(model, params).cross_entropy(window, burn_in=1)

    return in_units(model, jax.jit(jax.grad(lambda params: jnp.mean(jax.vmap(partial(loss, params))(tokens))))(params))


def inner(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return sum(float(np.sum(a * b)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("noise", "space", "rank", "split"), halved(["rademacher", "gaussian"], SPACES, [False, True]))
def test_the_estimate_is_the_gradient_on_average(noise: str, space: str, rank: int, split: bool) -> None:
    model = MODELS["gru"]
    params, sequences = params_of(model), tokens_of(1, 3, 7)[0]
    chosen = noise_of(model, noise=noise, space=space, rank=rank, sigma=SIGMA, split=split)
    evaluate = core.evaluate(
        over_sequences(model, cross_entropy(burn_in=1)), chosen, batch_axis=None, mesh=mesh_of(4), chunk_pairs=256
    )
    seeds = seeds_of(PAIRS)
    losses = np.asarray(jax.jit(evaluate)(params, seeds, sequences))
    shaped = shape(losses, "raw", SIGMA, np.arange(PAIRS) // 8 if split else None)
    run = jax.jit(core.estimate(chosen, mesh=mesh_of(4), chunk_pairs=250))
    estimate = in_units(model, run(params, seeds, shaped))
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
