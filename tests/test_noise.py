"""Perturbations: named by their seed alone, of the right moments, and summed exactly."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODELS, PAIRS, params_of, seeds_of, space_of

from esjax.models.primitives import LowRank
from esjax.noise import Factors, draw, pair_seeds, stream_seed

NOISES = ["rademacher", "gaussian"]
SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 3)]


def epsilon_of(leaf: jax.Array | Factors) -> np.ndarray:
    """Write a leaf's ε out in full, in float64; the axis of pairs, where there is one, comes last."""
    if isinstance(leaf, Factors):
        left, right = np.asarray(leaf.left, np.float64), np.asarray(leaf.right, np.float64)
        return np.einsum("rm...,rn...->mn...", left, right) / math.sqrt(len(left))
    return np.asarray(leaf, np.float64)


def epsilons_of(noise: object) -> list[np.ndarray]:
    leaves = jax.tree.leaves(noise, is_leaf=lambda leaf: isinstance(leaf, Factors))
    return [epsilon_of(leaf) for leaf in leaves]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_seed_alone_names_a_perturbation(noise: str, space: str, rank: int) -> None:
    sample = space_of(MODELS["rnn"], noise=noise, space=space, rank=rank).sample
    seeds = seeds_of()
    together = jax.jit(sample)(seeds)
    mapped = jax.jit(jax.vmap(sample))(seeds)
    for pair in range(PAIRS):
        alone = sample(seeds[pair])
        for one, batch, vmapped in zip(*map(jax.tree.leaves, (alone, together, mapped)), strict=True):
            np.testing.assert_array_equal(one, batch[..., pair])
            np.testing.assert_array_equal(one, vmapped[pair])


def test_rademacher_bits_are_those_of_threefry() -> None:
    """Reference: the two words of each block `fold_in(seed, 0), fold_in(seed, 1), ...`, read bit by bit in Python.

    The first words of all blocks come before the second ones; a set bit of any word is one -1.
    """
    seed = seeds_of(1)[0]
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    blocks = [np.asarray(jax.random.key_data(jax.random.fold_in(key, block))) for block in range(2)]
    words = [int(block[half]) for half in range(2) for block in blocks]
    expected = [-1.0 if (word >> (31 - bit)) & 1 else 1.0 for word in words for bit in range(32)][:100]
    np.testing.assert_array_equal(draw("rademacher", seed, 100), np.array(expected, np.float32))


def test_seeds_are_those_of_fold_in() -> None:
    """Reference: keys of JAX, derived one by one."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9, impl="threefry2x32"), 1), 5)
    expected = [jax.random.key_data(jax.random.fold_in(key, pair)) for pair in (0, 3, 2**32 - 1)]
    pairs = jnp.array([0, 3, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(pair_seeds(stream_seed(9, 1), 5, pairs), expected)


def test_runs_streams_steps_and_pairs_differ() -> None:
    pairs = jnp.arange(4)
    names = itertools.product([0, 1], [0, 1], [0, 1])
    seeds = np.concatenate([pair_seeds(stream_seed(run, stream), step, pairs) for run, stream, step in names])
    assert len({tuple(seed) for seed in seeds.tolist()}) == len(seeds)


def test_seeds_do_not_depend_on_the_range_they_are_asked_in() -> None:
    whole = pair_seeds(stream_seed(1, 0), 5, jnp.arange(20))
    np.testing.assert_array_equal(whole[7:12], pair_seeds(stream_seed(1, 0), 5, jnp.arange(7, 12)))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_entries_have_mean_zero_variance_one_and_are_uncorrelated(noise: str, space: str, rank: int) -> None:
    """Closed form: E[ε] = 0, E[ε εᵀ] = 1.

    With n samples a mean has deviation sqrt(variance / n). Products of up to four normals have variance at most 9 - 1
    for ε² of rank 1 (E[a⁴]E[b⁴] = 9), so that 5.5 deviations hold for the few thousand numbers looked at.
    """
    samples = 4000
    sample = space_of(MODELS["gru"], noise=noise, space=space, rank=rank).sample
    flat = np.concatenate([leaf.reshape(-1, samples) for leaf in epsilons_of(sample(seeds_of(samples)))])[:60].T
    bound = 5.5 / math.sqrt(samples)
    assert np.abs(flat.mean(axis=0)).max() < bound
    moments = flat.T @ flat / samples
    assert np.abs(moments - np.eye(60)).max() < bound * math.sqrt(8)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("space", "rank"), SPACES)
@pytest.mark.parametrize("factored", [True, False])
def test_a_member_is_the_parameters_plus_a_step_along_its_noise(
    noise: str, space: str, rank: int, factored: bool
) -> None:
    """Reference: params + sign * sigma * unit * ε, added up in float64."""
    model = MODELS["gru"]._replace(factored=factored)
    chosen = space_of(model, noise=noise, space=space, rank=rank, sigma=0.3)
    params, drawn = params_of(model), chosen.sample(seeds_of()[2])
    member = chosen.perturb(params, drawn, jnp.float32(-1.0))
    members = jax.tree.leaves(member, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    rest = zip(jax.tree.leaves(params), epsilons_of(drawn), jax.tree.leaves(model.unit), members, strict=True)
    for leaf, epsilon, unit, got in rest:
        if isinstance(got, LowRank):
            assert factored
            got = got.weight + got.scale * got.left.T @ got.right
        np.testing.assert_allclose(got, np.asarray(leaf, np.float64) - 0.3 * unit * epsilon, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_weighted_sum_is_exact_in_any_order(space: str, rank: int) -> None:
    """Reference: integer arithmetic in Python's order; then the same pairs backwards."""
    chosen = space_of(MODELS["rnn"], space=space, rank=rank)
    noise = chosen.sample(seeds_of())
    weights = np.random.default_rng(1).integers(-127, 128, PAIRS).astype(np.float32)
    total = chosen.weigh(noise, jnp.asarray(weights))
    backwards = chosen.weigh(jax.tree.map(lambda leaf: leaf[..., ::-1], noise), jnp.asarray(weights[::-1].copy()))
    for leaf, again, epsilon in zip(
        jax.tree.leaves(total), jax.tree.leaves(backwards), epsilons_of(noise), strict=True
    ):
        # epsilons_of divides a low-rank ε by √rank, the total does not.
        undo = math.sqrt(rank) if space == "low_rank" and epsilon.ndim == 3 else 1.0
        np.testing.assert_array_equal(leaf, np.rint(epsilon * undo @ weights))
        np.testing.assert_array_equal(leaf, again)


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_mean_scales_the_sum_and_divides_by_the_root_of_the_rank(space: str, rank: int) -> None:
    """Reference: Σ weight * ε / PAIRS in float64."""
    chosen = space_of(MODELS["rnn"], space=space, rank=rank)
    noise = chosen.sample(seeds_of())
    weights = jnp.arange(PAIRS, dtype=jnp.float32) - 5
    mean = chosen.mean(chosen.weigh(noise, weights), jnp.float32(1 / PAIRS))
    for leaf, epsilon in zip(jax.tree.leaves(mean), epsilons_of(noise), strict=True):
        np.testing.assert_allclose(leaf, epsilon @ np.asarray(weights) / PAIRS, atol=1e-5)
