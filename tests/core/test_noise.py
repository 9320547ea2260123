"""Perturbations: named by their seed alone, of the right moments, and summed exactly."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from conftest import NEWER_EMITTERS
from small import (
    MODELS,
    PAIRS,
    added_up,
    dense_member,
    epsilons_of,
    is_full,
    kept_in_factors,
    layout_of,
    member_of,
    names_of,
    noise_of,
    params_of,
    seeds_of,
)

from esjax.core.noise import Noise, full, low_rank
from esjax.core.signs import draw

NOISES = ["rademacher", "gaussian"]
SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 3)]


@pytest.mark.parametrize(("name", "noise", "space", "rank"), halved(MODELS, NOISES, SPACES))
def test_the_seed_alone_names_a_perturbation(name: str, noise: str, space: str, rank: int) -> None:
    """To the last bit, but for biases whose noise is a sum of products of normals: XLA may fuse those."""
    sample = layout_of(MODELS[name], noise=noise, space=space, rank=rank).sample
    seeds = seeds_of()
    together = jax.jit(sample, compiler_options=NEWER_EMITTERS)(seeds)
    mapped = jax.jit(jax.vmap(sample), compiler_options=NEWER_EMITTERS)(seeds)
    sums = 1e-6 if name == "gru" and noise == "gaussian" and rank > 1 else 0.0
    by_itself = jax.jit(sample, compiler_options=NEWER_EMITTERS)
    for pair in range(PAIRS):
        alone = by_itself(seeds[pair])
        for one, batch, vmapped in zip(*map(jax.tree.leaves, (alone, together, mapped)), strict=True):
            np.testing.assert_allclose(one, batch[..., pair], rtol=0, atol=sums)
            np.testing.assert_allclose(one, vmapped[pair], rtol=0, atol=sums)


@pytest.mark.parametrize(("name", "noise", "space", "rank"), halved(MODELS, NOISES, SPACES))
def test_a_perturbation_written_out_is_its_factors(name: str, noise: str, space: str, rank: int) -> None:
    """Reference: Σ_r left_r right_rᵀ / √rank in float64, of the numbers in the order of the leaves."""
    chosen, params, seed = (
        noise_of(MODELS[name], noise=noise, space=space, rank=rank),
        params_of(MODELS[name]),
        seeds_of()[2],
    )
    written = jax.jit(chosen.lay_out(params).epsilon)(seed, params)
    jax.tree.map(lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape), written, params)
    for got, expected in zip(jax.tree.leaves(written), epsilons_of(chosen, params, seed), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_bias_is_a_row_of_its_matrix_whatever_comes_first(rank: int) -> None:
    """Reference: the numbers of the seed in the order of the leaves, as factors in float64; a dict's bias is first."""
    params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 3))}
    layout = low_rank(0.1, rank).lay_out(params)
    seed = seeds_of()[0]
    assert layout.numbers == rank * (1 + 4 + 3)
    numbers = np.asarray(draw("rademacher", seed, layout.numbers), np.float64)
    shift, left, right = numbers[:rank], numbers[rank : 5 * rank].reshape(4, rank), numbers[5 * rank :].reshape(3, rank)
    written = jax.jit(layout.epsilon)(seed, params)
    np.testing.assert_allclose(written["kernel"], left @ right.T / math.sqrt(rank), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(written["bias"], right @ shift / math.sqrt(rank), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_entries_have_mean_zero_variance_one_and_are_uncorrelated(noise: str, space: str, rank: int) -> None:
    """Closed form: E[ε] = 0, E[ε εᵀ] = 1.

    With n samples a mean has deviation sqrt(variance / n). Products of up to four normals have variance at most 9 - 1
    for ε² of rank 1 (E[a⁴]E[b⁴] = 9), so that 5.5 deviations hold for the few thousand numbers looked at. They are
    spread over all leaves.
    """
    samples = 4000
    layout, params = layout_of(MODELS["gru"], noise=noise, space=space, rank=rank), params_of(MODELS["gru"])
    written = jax.jit(jax.vmap(lambda seed: layout.epsilon(seed, params)))(seeds_of(samples))
    whole = np.concatenate([np.asarray(leaf, np.float64).reshape(samples, -1) for leaf in jax.tree.leaves(written)], 1)
    flat = whole[:, np.linspace(0, whole.shape[1] - 1, 60).astype(int)]
    bound = 5.5 / math.sqrt(samples)
    assert np.abs(flat.mean(axis=0)).max() < bound
    moments = flat.T @ flat / samples
    assert np.abs(moments - np.eye(60)).max() < bound * math.sqrt(8)


@pytest.mark.parametrize(("noise", "space", "rank", "is_dense"), halved(NOISES, SPACES, [False, True]))
def test_a_member_is_the_parameters_plus_a_step_along_its_noise(
    noise: str, space: str, rank: int, is_dense: bool
) -> None:
    """Reference: params + sign * sigma * unit * ε, added up in float64."""
    model = MODELS["gru"]
    chosen = noise_of(model, noise=noise, space=space, rank=rank, sigma=0.3)
    params, seed = params_of(model), seeds_of()[2]
    make = jax.jit(partial(dense_member if is_dense else member_of, chosen))
    for sign in (1.0, -1.0):
        member = make(params, seed, sign)
        assert len(kept_in_factors(member)) == (4 if space == "low_rank" and not is_dense else 0)
        rest = (params, model.unit, added_up(member))
        for leaf, unit, got, epsilon in zip(
            *map(jax.tree.leaves, rest), epsilons_of(chosen, params, seed), strict=True
        ):
            np.testing.assert_allclose(
                got, np.asarray(leaf, np.float64) + sign * 0.3 * unit * epsilon, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize(("name", "space", "rank", "packed"), halved(MODELS, SPACES, [False, True]))
def test_members_of_a_split_pair_have_every_other_column_in_common(
    name: str, space: str, rank: int, packed: bool
) -> None:
    """Reference: params + sigma * unit * ε in float64, with the sign on every other column, or entry of a full ε."""
    model = MODELS[name]
    chosen = noise_of(model, space=space, rank=rank, sigma=0.3, split=True, packed=packed)
    params, seed = params_of(model), seeds_of()[2]
    make = jax.jit(partial(member_of, chosen))
    for sign in (1.0, -1.0):
        member = make(params, seed, sign)
        assert len(kept_in_factors(member)) == (0 if space == "full" else {"rnn": 6, "gru": 4}[name])
        rest = (params, model.unit, added_up(member))
        for path, leaf, unit, got, epsilon in zip(
            names_of(params), *map(jax.tree.leaves, rest), epsilons_of(chosen, params, seed), strict=True
        ):
            direction = np.where(places_of(is_full(chosen, path), leaf) % 2 == 0, 1.0, sign)
            expected = np.asarray(leaf, np.float64) + 0.3 * unit * direction * epsilon
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def places_of(has_own_entries: bool, leaf: jax.Array) -> np.ndarray:
    """Number the entries of a leaf, or its columns."""
    return np.arange(leaf.size).reshape(leaf.shape) if has_own_entries else np.arange(leaf.shape[-1])


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_two_halves_of_split_pairs_are_weighed_apart(space: str, rank: int) -> None:
    """Reference: the sums of whole perturbations with one weight and with the other, of which each column takes one."""
    model = MODELS["gru"]
    split, whole = (layout_of(model, space=space, rank=rank, split=value) for value in (True, False))
    weights = np.random.default_rng(1).integers(-127, 128, (PAIRS, 2)).astype(np.float32)
    weigh = jax.jit(whole.weigh)
    common, turned = (weigh(seeds_of(), jnp.asarray(weights[:, half])) for half in (0, 1))
    got = jax.jit(split.weigh)(seeds_of(), jnp.asarray(weights))
    for name, leaf, one, two in zip(names_of(params_of(model)), got, common, turned, strict=True):
        expected = np.where(places_of(is_full(whole.noise, name), one) % 2 == 0, one, two)
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(("model", "space", "rank"), halved(MODELS, SPACES))
def test_the_weighted_sum_is_exact_in_any_order(model: str, space: str, rank: int) -> None:
    """Reference: integer arithmetic in Python's order; then the same pairs backwards."""
    chosen, params, seeds = noise_of(MODELS[model], space=space, rank=rank), params_of(MODELS[model]), seeds_of()
    weigh = jax.jit(chosen.lay_out(params).weigh)
    weights = np.random.default_rng(1).integers(-127, 128, PAIRS).astype(np.float32)
    totals = weigh(seeds, jnp.asarray(weights))
    backwards = weigh(seeds[::-1], jnp.asarray(weights[::-1].copy()))
    for name, total, again, epsilon in zip(
        names_of(params), totals, backwards, epsilons_of(chosen, params, seeds), strict=True
    ):
        # A low-rank ε is divided by √rank, the total is not.
        undo = 1.0 if is_full(chosen, name) else math.sqrt(rank)
        np.testing.assert_array_equal(total, np.rint(epsilon * undo @ weights))
        np.testing.assert_array_equal(total, again)


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_gradient_scales_the_sum_and_divides_by_the_unit_and_the_root_of_the_rank(space: str, rank: int) -> None:
    """Reference: Σ weight * ε / PAIRS / unit in float64."""
    model = MODELS["gru"]
    chosen, params, seeds = noise_of(model, space=space, rank=rank), params_of(model), seeds_of()
    layout = chosen.lay_out(params)
    weights = jnp.arange(PAIRS, dtype=jnp.float32) - 5
    gradient = jax.jit(layout.gradient)(jax.jit(layout.weigh)(seeds, weights), jnp.float32(1 / PAIRS), params)
    jax.tree.map(lambda leaf, like: np.testing.assert_equal(leaf.shape, like.shape), gradient, params)
    for leaf, unit, epsilon in zip(
        *map(jax.tree.leaves, (gradient, model.unit)), epsilons_of(chosen, params, seeds), strict=True
    ):
        np.testing.assert_allclose(leaf, epsilon @ np.asarray(weights) / PAIRS / unit, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("make", [full, low_rank])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 2, 3, 4)])
def test_a_number_beside_another_leaf_is_no_bias(shape: tuple[int, ...], make: Callable[..., Noise]) -> None:
    """Reference: a number takes one number of the noise, and an array with no factors one for each entry."""
    params = {"number": jnp.float32(1), "other": jnp.zeros(shape)}
    layout, seed = make(0.1).lay_out(params), seeds_of()[0]
    numbers = draw("rademacher", seed, layout.numbers)
    written = jax.jit(layout.epsilon)(seed, params)
    np.testing.assert_array_equal(written["number"], numbers[0])
    if make is full or len(shape) != 2:
        np.testing.assert_array_equal(written["other"], numbers[1:].reshape(shape))
