"""The population's losses: the same however they are computed."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, PAIRS, dense_member, epsilons_of, member_of, noise_of, params_of, seeds_of, tokens_of

from esjax import core
from esjax.config.models import GruConfig
from esjax.config.settings import Precision
from esjax.core.interpreter import interpret
from esjax.core.population import PAIRS_AXIS, deal
from esjax.models import Model, build_model
from esjax.models.member import Member, cross_entropy, over_sequences

LOSS = cross_entropy(burn_in=1)


def evaluate(
    model: Model,
    devices: int | None = 1,
    chunk_pairs: int = 64,
    pairs: int = PAIRS,
    precision: Precision = "float32",
    **settings: Any,
) -> Array:
    """Score a population. None for the devices: without a mesh."""
    mesh = None if devices is None else mesh_of(devices)
    noise = noise_of(model, **settings)
    run = core.evaluate(over_sequences(model, LOSS), noise, mesh=mesh, chunk_pairs=chunk_pairs, precision=precision)
    return jax.jit(run)(params_of(model), seeds_of(pairs), tokens_of(pairs))


@cache
def losses_of(name: str, devices: int | None = 1, chunk_pairs: int = 64, **settings: Any) -> Array:
    """Compute once what several tests compare with."""
    return evaluate(MODELS[name], devices, chunk_pairs, **settings)


SPACES = [("full", 1), ("low_rank", 1), ("low_rank", 2)]


@pytest.mark.parametrize(("name", "space", "rank", "noise"), halved(MODELS, SPACES, ["rademacher", "gaussian"]))
def test_the_population_is_a_loop_over_members(name: str, space: str, rank: int, noise: str) -> None:
    check_loop(name, "float32", space=space, rank=rank, noise=noise)


@pytest.mark.parametrize(("name", "space"), halved(MODELS, ["full", "low_rank"]))
def test_in_bfloat16_it_is_a_loop_over_members_of_rounded_matrices(name: str, space: str) -> None:
    check_loop(name, "bfloat16", space=space)


def check_loop(name: str, precision: Precision, **settings: Any) -> None:
    """Reference: one member, one sequence at a time, without vmap."""
    model = MODELS[name]
    losses = losses_of(name, precision=precision, **settings)
    params, seeds, tokens = params_of(model), seeds_of(), tokens_of()
    noise = noise_of(model, **settings)

    def score(params: Any, sequence: Array) -> Array:
        return Member(model, params).cross_entropy(sequence, burn_in=1)

    @jax.jit
    def loss_of(seed: Array, sign: Array, sequence: Array) -> Array:
        return interpret(score)(member_of(noise, params, seed, sign, precision), sequence)

    for pair in range(PAIRS):
        for side, sign in enumerate([1.0, -1.0]):
            alone = np.mean([loss_of(seeds[pair], jnp.float32(sign), sequence) for sequence in tokens[pair]])
            # A last bit may decide how a state is rounded to bfloat16, to one part in 256.
            np.testing.assert_allclose(losses[pair, side], alone, rtol=1e-5 if precision == "float32" else 1e-3)


@pytest.mark.parametrize(("name", "space"), halved(MODELS, ["low_rank", "full"]))
def test_bfloat16_changes_losses_and_hardly_their_order(name: str, space: str) -> None:
    """Rounding leaves 8 of 24 bits. Members of a pair share a rounded matrix where noise is of low rank.

    Where it is full each is rounded by itself, by 1/512 of a weight at most: a fiftieth of sigma.
    """
    exact, rounded = losses_of(name, space=space), losses_of(name, precision="bfloat16", space=space)
    assert (np.asarray(exact) != np.asarray(rounded)).any()
    np.testing.assert_allclose(exact, rounded, rtol=1e-2)
    differences = [losses[:, 0] - losses[:, 1] for losses in (exact, rounded)]
    assert np.corrcoef(np.array(differences))[0, 1] > 0.999


@pytest.mark.parametrize(("name", "space", "rank"), halved(MODELS, SPACES))
def test_members_are_those_of_the_added_up_matrices(name: str, space: str, rank: int) -> None:
    """Reference: the model with plain arrays, params + sign * sigma * unit * ε, which nothing interprets."""
    model = MODELS[name]
    noise, params = noise_of(model, space=space, rank=rank), params_of(model)

    def loss_of(seed: Array, tokens: Array, sign: Array) -> Array:
        member = Member(model, dense_member(noise, params, seed, sign))
        return jnp.mean(jax.vmap(partial(member.cross_entropy, burn_in=1))(tokens))

    of_pairs = jax.vmap(jax.vmap(loss_of, in_axes=(None, None, 0)), in_axes=(0, 0, None))
    added_up = jax.jit(of_pairs)(seeds_of(), tokens_of(), jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(losses_of(name, space=space, rank=rank), added_up, rtol=1e-5)


@pytest.mark.parametrize(("name", "space"), halved(MODELS, ["full", "low_rank"]))
def test_one_device_is_two_is_four_bit_for_bit(name: str, space: str) -> None:
    one = losses_of(name, devices=1, chunk_pairs=3, space=space)
    for devices in (2, 4, None):
        np.testing.assert_array_equal(one, losses_of(name, devices=devices, chunk_pairs=3, space=space))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_devices_change_no_bit_at_the_size_of_the_defaults(precision: Precision) -> None:
    """Larger products are split and summed in ways that small ones are not."""
    model = build_model(GruConfig(), vocab_size=83)
    one, four = (evaluate(model, devices, chunk_pairs=32, pairs=200, precision=precision) for devices in (1, 4))
    np.testing.assert_array_equal(one, four)


@pytest.mark.parametrize(("name", "chunk_pairs"), halved(MODELS, [1, 2, 5, 12]))
def test_the_chunk_size_changes_no_more_than_the_last_bits(name: str, chunk_pairs: int) -> None:
    """A loss near 2 is a mean of 10 terms, each a sum of up to 16 products: a few units of 1.2e-7 relative."""
    np.testing.assert_allclose(losses_of(name, chunk_pairs=3), losses_of(name, chunk_pairs=chunk_pairs), rtol=2e-6)


@pytest.mark.parametrize("pairs", [1, 5, 11])
def test_any_number_of_pairs_fits_any_number_of_devices(pairs: int) -> None:
    model = MODELS["gru"]
    whole = losses_of("gru", chunk_pairs=2)
    run = core.evaluate(over_sequences(model, LOSS), noise_of(model), mesh=mesh_of(4), chunk_pairs=2)
    part = jax.jit(run)(params_of(model), seeds_of()[:pairs], tokens_of()[:pairs])
    np.testing.assert_array_equal(whole[:pairs], part)


def test_both_signs_see_the_same_tokens_and_differ() -> None:
    losses = losses_of("gru", sigma=1e-7)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert (np.asarray(losses_of("gru"))[:, 0] != np.asarray(losses_of("gru"))[:, 1]).all()


def test_a_loss_of_ones_own_takes_the_place_of_cross_entropy() -> None:
    """Closed form: the loss 3 * start[0] differs between the signs by 2 * 3 * sigma * unit * ε."""
    model = MODELS["gru"]
    noise, params = noise_of(model, sigma=0.25), params_of(model)
    custom = over_sequences(model, lambda member, tokens, key: 3 * member.params.start[0])
    losses = core.evaluate(custom, noise, mesh=mesh_of(1), chunk_pairs=8)(params, seeds_of(), tokens_of())
    start, *_ = epsilons_of(noise, params, seeds_of())
    np.testing.assert_allclose(losses[:, 0] - losses[:, 1], 2 * 3 * 0.25 * start[0], rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_chunks_are_dealt_to_the_devices_in_turn_each_once(devices: int, count: int) -> None:
    """Reference: chunk k leaves its mark and the device's in row k, and no other row is touched."""

    def mark(chunk: Array, marks: Array, value: Array) -> Array:
        return marks.at[chunk].add(jnp.stack([value, jax.lax.axis_index(PAIRS_AXIS)]))

    marks = jax.jit(deal(mesh_of(devices), mark))(jnp.int32(count), jnp.zeros((9, 2), jnp.int32), jnp.int32(7))
    expected = [[7, chunk % devices] if chunk < count else [0, 0] for chunk in range(9)]
    np.testing.assert_array_equal(marks, expected)
