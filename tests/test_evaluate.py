"""The population's losses: the same however they are computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, PAIRS, params_of, seeds_of, space_of, tokens_of

from esjax.config import GruConfig, Precision
from esjax.evaluate import PAIRS_AXIS, cross_entropy, make_deal, make_evaluate
from esjax.member import Member
from esjax.models import Model, build_model
from esjax.models.primitives import round_matrices

LOSS = cross_entropy(burn_in=1)


def evaluate(
    model: Model,
    devices: int = 1,
    chunk_pairs: int = 64,
    pairs: int = PAIRS,
    precision: Precision = "float32",
    **settings: Any,
) -> Array:
    space = space_of(model, **settings)
    run = jax.jit(make_evaluate(model, space, LOSS, mesh_of(devices), chunk_pairs, precision))
    return run(params_of(model), seeds_of(pairs), tokens_of(pairs))


SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 2)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("space", "rank"), SPACES)
@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_population_is_a_loop_over_members(name: str, space: str, rank: int, noise: str) -> None:
    check_loop(name, "float32", space=space, rank=rank, noise=noise)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["full", "low_rank"])
def test_in_bfloat16_it_is_a_loop_over_members_of_rounded_matrices(name: str, space: str) -> None:
    check_loop(name, "bfloat16", space=space)


def check_loop(name: str, precision: Precision, **settings: Any) -> None:
    """Reference: one member, one sequence at a time, without vmap."""
    model = MODELS[name]
    chosen = space_of(model, **settings)
    losses = evaluate(model, precision=precision, **settings)
    params, seeds, tokens = params_of(model), seeds_of(), tokens_of()

    @jax.jit
    def loss_of(seed: Array, sign: Array, sequence: Array) -> Array:
        member = Member(model, round_matrices(chosen.perturb(params, chosen.sample(seed), sign), precision))
        return member.cross_entropy(sequence, burn_in=1)

    for pair in range(PAIRS):
        for side, sign in enumerate([1.0, -1.0]):
            alone = np.mean([loss_of(seeds[pair], jnp.float32(sign), sequence) for sequence in tokens[pair]])
            # A last bit may decide how a state is rounded to bfloat16, to one part in 256.
            np.testing.assert_allclose(losses[pair, side], alone, rtol=1e-5 if precision == "float32" else 1e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["low_rank", "full"])
def test_bfloat16_changes_losses_and_hardly_their_order(name: str, space: str) -> None:
    """Rounding leaves 8 of 24 bits. Members of a pair share a rounded matrix where noise is of low rank.

    Where it is full each is rounded by itself, by 1/512 of a weight at most: a fiftieth of sigma.
    """
    exact, rounded = evaluate(MODELS[name], space=space), evaluate(MODELS[name], precision="bfloat16", space=space)
    assert (np.asarray(exact) != np.asarray(rounded)).any()
    np.testing.assert_allclose(exact, rounded, rtol=1e-2)
    differences = [losses[:, 0] - losses[:, 1] for losses in (exact, rounded)]
    assert np.corrcoef(np.array(differences))[0, 1] > 0.999


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_members_are_those_of_the_added_up_matrices(name: str, rank: int) -> None:
    factored = evaluate(MODELS[name], rank=rank)
    added_up = evaluate(MODELS[name]._replace(factored=False), rank=rank)
    np.testing.assert_allclose(factored, added_up, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["full", "low_rank"])
def test_one_device_is_two_is_four_bit_for_bit(name: str, space: str) -> None:
    one = evaluate(MODELS[name], devices=1, chunk_pairs=3, space=space)
    np.testing.assert_array_equal(one, evaluate(MODELS[name], devices=2, chunk_pairs=3, space=space))
    np.testing.assert_array_equal(one, evaluate(MODELS[name], devices=4, chunk_pairs=3, space=space))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_devices_change_no_bit_at_the_size_of_the_defaults(precision: Precision) -> None:
    """Larger products are split and summed in ways that small ones are not."""
    model = build_model(GruConfig(), vocab_size=83)
    one, four = (evaluate(model, devices, chunk_pairs=32, pairs=200, precision=precision) for devices in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_pairs", [1, 2, 5, 12])
def test_the_chunk_size_changes_no_more_than_the_last_bits(name: str, chunk_pairs: int) -> None:
    """A loss near 2 is a mean of 10 terms, each a sum of up to 16 products: a few units of 1.2e-7 relative."""
    np.testing.assert_allclose(
        evaluate(MODELS[name], chunk_pairs=3), evaluate(MODELS[name], chunk_pairs=chunk_pairs), rtol=2e-6
    )


@pytest.mark.parametrize("pairs", [1, 5, 11])
def test_any_number_of_pairs_fits_any_number_of_devices(pairs: int) -> None:
    whole = evaluate(MODELS["gru"], chunk_pairs=2)
    part = jax.jit(make_evaluate(MODELS["gru"], space_of(MODELS["gru"]), LOSS, mesh_of(4), 2))(
        params_of(MODELS["gru"]), seeds_of()[:pairs], tokens_of()[:pairs]
    )
    np.testing.assert_array_equal(whole[:pairs], part)


def test_both_signs_see_the_same_tokens_and_differ() -> None:
    losses = evaluate(MODELS["gru"], sigma=1e-7)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert (np.asarray(evaluate(MODELS["gru"]))[:, 0] != np.asarray(evaluate(MODELS["gru"]))[:, 1]).all()


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy() -> None:
    """Closed form: the loss 3 * start[0] differs between the signs by 2 * 3 * sigma * unit * ε."""
    model = MODELS["gru"]
    space = space_of(model, sigma=0.25)
    run = make_evaluate(model, space, lambda member, tokens, key: 3 * member.params.start[0], mesh_of(1), 8)
    losses = run(params_of(model), seeds_of(), tokens_of())
    signs = space.sample(seeds_of()).start[0]
    np.testing.assert_allclose(losses[:, 0] - losses[:, 1], 2 * 3 * 0.25 * signs, rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_chunks_are_dealt_to_the_devices_in_turn_each_once(devices: int, count: int) -> None:
    """Reference: chunk k leaves its mark and the device's in row k, and no other row is touched."""

    def mark(chunk: Array, marks: Array, value: Array) -> Array:
        return marks.at[chunk].add(jnp.stack([value, jax.lax.axis_index(PAIRS_AXIS)]))

    marks = jax.jit(make_deal(mesh_of(devices), mark))(jnp.int32(count), jnp.zeros((9, 2), jnp.int32), jnp.int32(7))
    expected = [[7, chunk % devices] if chunk < count else [0, 0] for chunk in range(9)]
    np.testing.assert_array_equal(marks, expected)
