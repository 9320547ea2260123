"""Perturbations: named by their seed alone, of the right moments, and summed exactly."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODELS, PAIRS, params_of, seeds_of, space_of

from esjax.models.primitives import Affine, LowRank, LowRankAffine, add_up
from esjax.noise import Factors, draw, pair_seeds, stream_seed
from esjax.signs import PackedSigns

NOISES = ["rademacher", "gaussian"]
SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 3)]


def epsilons_of(noise: object) -> list[np.ndarray]:
    """Write the ε of each leaf out in full, in float64; the axis of pairs, where there is one, comes last."""

    def written_out(part: jax.Array | Factors) -> np.ndarray | Affine:
        if not isinstance(part, Factors):
            return np.asarray(part, np.float64)
        left, right = np.asarray(part.left, np.float64), np.asarray(part.right, np.float64)
        matrix = np.einsum("rm...,rn...->mn...", left, right) / math.sqrt(len(left))
        if part.shift is None:
            return matrix
        return Affine(matrix, np.einsum("r...,rn...->n...", np.asarray(part.shift), right) / math.sqrt(len(left)))

    return jax.tree.leaves(jax.tree.map(written_out, noise, is_leaf=lambda part: isinstance(part, Factors)))


def leaves_of(member: object) -> tuple[list[jax.Array], int]:
    """List the leaves of a member, those that it keeps in factors written out; and tell how many it keeps so."""
    parts, treedef = jax.tree.flatten(member, is_leaf=lambda part: isinstance(part, LowRank | LowRankAffine))
    written_out = [part if isinstance(part, jax.Array) else add_up(part) for part in parts]
    kept = sum(not isinstance(part, jax.Array) for part in parts)
    return jax.tree.leaves(jax.tree.unflatten(treedef, written_out)), kept


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
    members, kept = leaves_of(member)
    assert kept == (4 if factored and space == "low_rank" else 0)
    rest = zip(jax.tree.leaves(params), epsilons_of(drawn), jax.tree.leaves(model.unit), members, strict=True)
    for leaf, epsilon, unit, got in rest:
        np.testing.assert_allclose(got, np.asarray(leaf, np.float64) - 0.3 * unit * epsilon, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_members_of_a_split_pair_have_every_other_column_in_common(
    space: str, rank: int, factored: bool, packed: bool
) -> None:
    """Reference: params + sigma * unit * ε in float64, with the sign on every other column, or entry of a full ε."""
    model = MODELS["gru"]._replace(factored=factored)
    chosen = space_of(model, space=space, rank=rank, sigma=0.3, split=True, packed=packed)
    params, seed = params_of(model), seeds_of()[2]
    epsilons = epsilons_of(chosen.sample(seed))
    for sign in (1.0, -1.0):
        member = chosen.perturb(params, chosen.sample_pair(seed), jnp.float32(sign))
        members, _ = leaves_of(member)
        rest = zip(jax.tree.leaves(params), epsilons, jax.tree.leaves(model.unit), members, strict=True)
        for leaf, epsilon, unit, got in rest:
            is_full = space == "full" or leaf is params.start
            places = np.arange(leaf.size).reshape(leaf.shape) if is_full else np.arange(leaf.shape[-1])
            direction = np.where(places % 2 == 0, 1.0, sign)
            expected = np.asarray(leaf, np.float64) + 0.3 * unit * direction * epsilon
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_two_halves_of_split_pairs_are_weighed_apart(space: str, rank: int) -> None:
    """Reference: the sums of whole perturbations with one weight and with the other, of which each column takes one."""
    model = MODELS["gru"]
    split, whole = (space_of(model, space=space, rank=rank, split=value) for value in (True, False))
    noise = whole.sample(seeds_of())
    weights = np.random.default_rng(1).integers(-127, 128, (PAIRS, 2)).astype(np.float32)
    common, turned = (whole.weigh(noise, jnp.asarray(weights[:, half])) for half in (0, 1))
    got = split.weigh(noise, jnp.asarray(weights))

    def expected(name: str, common: jax.Array, turned: jax.Array) -> np.ndarray:
        is_full = space == "full" or name == "start"
        places = np.arange(common.size).reshape(common.shape) if is_full else np.arange(common.shape[-1])
        return np.where(places % 2 == 0, common, turned)

    for (path, leaf), one, two in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(common), jax.tree.leaves(turned), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected(jax.tree_util.keystr(path, simple=True), one, two))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [1, 3])
def test_packed_signs_are_the_same(name: str, rank: int) -> None:
    """Equality of two ways: kept as bits until they are used, or drawn as numbers."""
    seed = seeds_of()[2]
    packed = space_of(MODELS[name], rank=rank, packed=True).sample_pair(seed)
    plain = space_of(MODELS[name], rank=rank).sample_pair(seed)
    parts = jax.tree.leaves(packed, is_leaf=lambda part: isinstance(part, PackedSigns))
    assert all(isinstance(part, PackedSigns) for part in parts)
    for part, numbers in zip(parts, jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(part.unpack(), numbers)


def test_a_column_of_packed_signs_is_that_of_the_matrix() -> None:
    words = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 9), jnp.uint32)
    matrix = PackedSigns(words, 37, (3, 70))
    assert set(np.unique(matrix.unpack())) == {-1.0, 1.0}
    for number in (0, 1, 26, 27, 69):
        np.testing.assert_array_equal(matrix.column(jnp.int32(number)), matrix.unpack()[:, number])


@pytest.mark.parametrize("model", ["rnn", "gru"])
@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_weighted_sum_is_exact_in_any_order(model: str, space: str, rank: int) -> None:
    """Reference: integer arithmetic in Python's order; then the same pairs backwards."""
    chosen = space_of(MODELS[model], space=space, rank=rank)
    noise = chosen.sample(seeds_of())
    weights = np.random.default_rng(1).integers(-127, 128, PAIRS).astype(np.float32)
    total = chosen.weigh(noise, jnp.asarray(weights))
    backwards = chosen.weigh(jax.tree.map(lambda leaf: leaf[..., ::-1], noise), jnp.asarray(weights[::-1].copy()))
    for leaf, again, epsilon in zip(
        jax.tree.leaves(total), jax.tree.leaves(backwards), epsilons_of(noise), strict=True
    ):
        # epsilons_of divides a low-rank ε by √rank, the total does not; the one full ε, that of the start, is ±1.
        undo = math.sqrt(rank) if space == "low_rank" and (np.abs(epsilon) != 1).any() else 1.0
        np.testing.assert_array_equal(leaf, np.rint(epsilon * undo @ weights))
        np.testing.assert_array_equal(leaf, again)


@pytest.mark.parametrize(("space", "rank"), SPACES)
def test_the_mean_scales_the_sum_and_divides_by_the_root_of_the_rank(space: str, rank: int) -> None:
    """Reference: Σ weight * ε / PAIRS in float64."""
    chosen = space_of(MODELS["gru"], space=space, rank=rank)
    noise = chosen.sample(seeds_of())
    weights = jnp.arange(PAIRS, dtype=jnp.float32) - 5
    mean = chosen.mean(chosen.weigh(noise, weights), jnp.float32(1 / PAIRS))
    for leaf, epsilon in zip(jax.tree.leaves(mean), epsilons_of(noise), strict=True):
        np.testing.assert_allclose(leaf, epsilon @ np.asarray(weights) / PAIRS, atol=1e-5)
