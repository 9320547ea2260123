"""The core as a user calls it: batches, keys, frozen leaves, losses that are not finite, and mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from combinations import halved
from conftest import mesh_of
from jaxtyping import Array
from mistakes import BATCH, MISTAKES, NOISE, PAIRS, PARAMS, SEEDS, loss

import esjax


@pytest.mark.parametrize(("shaping", "split"), halved(["zscore", "centered_rank", "sign", "raw"], [False, True]))
def test_one_call_is_the_four_one_after_another(shaping: Any, split: bool) -> None:
    noise = esjax.low_rank(0.1, split=split)
    value, gradient = jax.jit(esjax.value_and_grad(loss, noise, PAIRS, shaping=shaping))(PARAMS, 9, BATCH[:2])
    seeds = esjax.pair_seeds(9, 0, PAIRS)
    losses = jax.jit(esjax.evaluate(loss, noise))(PARAMS, seeds, BATCH[:2])
    shaped = esjax.shape(losses, shaping, noise.sigma, jnp.arange(PAIRS) // 4 if split else None)
    expected = jax.jit(esjax.estimate(noise))(PARAMS, seeds, shaped)
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-6), gradient, expected)
    assert np.abs(gradient["w"]).max() > 0


@pytest.mark.parametrize(("devices", "chunk_pairs"), halved([1, 2, 4], [2, 3]))
def test_devices_change_no_bit(devices: int, chunk_pairs: int) -> None:
    run = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS, mesh=mesh_of(devices), chunk_pairs=chunk_pairs))
    alone = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS, chunk_pairs=chunk_pairs))
    jax.tree.map(np.testing.assert_array_equal, run(PARAMS, 3, BATCH), alone(PARAMS, 3, BATCH))


def test_pairs_share_the_examples_of_their_group() -> None:
    """Reference: each example written out for its pairs; then one example for all."""
    run = jax.jit(esjax.evaluate(loss, NOISE))
    written_out = run(PARAMS, SEEDS, jnp.repeat(BATCH[:2], 4, axis=0))
    np.testing.assert_array_equal(run(PARAMS, SEEDS, BATCH[:2]), written_out)
    shared = jax.jit(esjax.evaluate(loss, NOISE, batch_axis=None))(PARAMS, SEEDS, BATCH[0])
    # Another program: products of one example and of many may be summed in another order.
    every = run(PARAMS, SEEDS, jnp.broadcast_to(BATCH[0], BATCH.shape))
    np.testing.assert_allclose(shared, every, rtol=1e-6)


def test_a_batch_may_be_a_tree_of_which_some_leaves_serve_all_pairs() -> None:
    def scaled(params: Any, example: dict[str, Array]) -> Array:
        return example["scale"] * loss(params, example["x"])

    batch, axes = {"x": BATCH, "scale": jnp.float32(2)}, {"x": 0, "scale": None}
    got = jax.jit(esjax.evaluate(scaled, NOISE, batch_axis=axes))(PARAMS, SEEDS, batch)
    np.testing.assert_allclose(got, 2 * esjax.evaluate(loss, NOISE)(PARAMS, SEEDS, BATCH), rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_only_the_first_pairs_are_evaluated_in_whole_chunks(count: int) -> None:
    run = jax.jit(esjax.evaluate(loss, NOISE, chunk_pairs=2))
    every, some = run(PARAMS, SEEDS, BATCH), run(PARAMS, SEEDS, BATCH, jnp.int32(count))
    whole = -(-count // 2) * 2
    np.testing.assert_array_equal(some[:whole], every[:whole])
    assert not some[whole:].any()


def test_both_members_of_a_pair_get_one_key_and_no_two_pairs_the_same() -> None:
    def drawn(params: Any, example: None, key: Array) -> Array:
        return jax.random.uniform(key) + 0 * params["b"][0]

    losses = jax.jit(esjax.evaluate(drawn, NOISE))(PARAMS, SEEDS, None)
    np.testing.assert_array_equal(losses[:, 0], losses[:, 1])
    assert len(set(np.asarray(losses[:, 0]).tolist())) == PAIRS


def test_frozen_leaves_are_not_moved_and_get_no_gradient() -> None:
    noise = esjax.low_rank(0.1, where=lambda path, leaf: path != "b")
    seen = jax.jit(esjax.evaluate(lambda params, x: jnp.sum(params["b"]), noise))(PARAMS, SEEDS, BATCH)
    assert not seen.any()
    _, gradient = esjax.value_and_grad(loss, noise, PAIRS)(PARAMS, 0, BATCH)
    assert not gradient["b"].any()
    assert gradient["w"].any()


def test_leaves_of_integers_are_left_alone() -> None:
    params = {**PARAMS, "steps": jnp.int32(7), "key": jax.random.key(0)}
    _, gradient = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS))(params, 0, BATCH)
    assert gradient["steps"] == 0
    assert gradient["key"].dtype == jax.dtypes.float0  # as jax.grad has it
    assert set(gradient) == set(params)


def test_a_key_of_jax_names_noise_as_a_seed_does() -> None:
    run = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS))
    one, same, other = (run(PARAMS, jax.random.key(seed, impl="threefry2x32"), BATCH)[1]["w"] for seed in (4, 4, 5))
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(other)).any()


def test_a_pair_with_a_loss_that_is_not_finite_counts_for_nothing() -> None:
    """Reference: the other pairs alone."""
    broken = BATCH.at[3].set(jnp.nan)
    value, gradient = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS, shaping="sign"))(PARAMS, 5, broken)
    rest = np.delete(np.arange(PAIRS), 3)
    seeds = esjax.pair_seeds(5, 0, PAIRS)[rest]
    losses = jax.jit(esjax.evaluate(loss, NOISE))(PARAMS, seeds, BATCH[rest])
    expected = jax.jit(esjax.estimate(NOISE))(PARAMS, seeds, esjax.shape(losses, "sign"))
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-6)
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-6), gradient, expected)


def test_mostly_broken_losses_give_no_gradient() -> None:
    run = jax.jit(esjax.value_and_grad(loss, NOISE, PAIRS))
    value, gradient = run(PARAMS, 5, BATCH.at[:5].set(jnp.inf))
    assert jnp.isfinite(value)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert jnp.isnan(run(PARAMS, 5, jnp.full_like(BATCH, jnp.nan))[0])


def test_a_loop_with_optax_learns_and_compiles_once() -> None:
    """Closed form: the loss |w - 3|² has its minimum at 3."""
    optimizer, traced = optax.adam(0.1), []

    def distance(params: Array, target: Array) -> Array:
        traced.append(1)
        return jnp.sum((params - target) ** 2)

    run = esjax.value_and_grad(distance, esjax.low_rank(0.05), 32, batch_axis=None)

    @jax.jit
    def step(params: Array, state: Any, seed: Array) -> tuple[Array, Any]:
        _, gradient = run(params, seed, jnp.float32(3))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = jnp.zeros((4, 3)), optimizer.init(jnp.zeros((4, 3)))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes types
        params, state = step(params, state, jnp.int32(0))
        after_first = len(traced)
        for seed in range(1, 150):
            params, state = step(params, state, jnp.int32(seed))
    np.testing.assert_allclose(params, 3, atol=0.3)
    assert len(traced) == after_first


def test_units_size_noise_and_gradient() -> None:
    """Closed form: a loss that is one entry differs within a pair by 2 sigma unit; its slope is 1."""
    units = {"w": 0.5, "b": 4.0}
    noise = esjax.full(0.1, units=units)
    losses = jax.jit(esjax.evaluate(lambda params, x: params["b"][0], noise))(PARAMS, SEEDS, BATCH)
    np.testing.assert_allclose(np.abs(losses[:, 0] - losses[:, 1]), 2 * 0.1 * 4, rtol=1e-6)
    run = esjax.value_and_grad(lambda params, x: params["b"][0], noise, 512, shaping="raw", batch_axis=None)
    _, gradient = jax.jit(run)(PARAMS, 0, None)
    np.testing.assert_allclose(gradient["b"][0], 1.0, rtol=1e-5)
    by_path = esjax.full(0.1, units=lambda path, leaf: units[path])
    np.testing.assert_array_equal(
        losses, jax.jit(esjax.evaluate(lambda params, x: params["b"][0], by_path))(PARAMS, SEEDS, BATCH)
    )


def test_first_weights_give_units_and_zeros_the_default() -> None:
    """By hand: the root mean square of (3, 4, 0, 0) is 2.5, in eighths of an octave 2^(11/8); zeros: 1/√16 and 0.3."""
    params = {"w": jnp.array([3.0, 4.0, 0.0, 0.0]), "kernel": jnp.zeros((16, 2)), "bias": jnp.zeros(2)}
    assert esjax.initial_units(params) == {"w": 2 ** (11 / 8), "kernel": 0.25, "bias": 0.3}


def test_an_optimizer_sees_everything_in_units() -> None:
    """By hand: plain descent of rate 1 along the gradient times the unit, times the unit again."""
    units, gradient = {"w": 2.0, "b": 0.5}, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    scaled = esjax.in_units(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)), units)
    updates, _ = scaled.update(gradient, scaled.init(PARAMS), PARAMS)
    for name, unit in units.items():
        np.testing.assert_allclose(
            updates[name], -unit * (unit * gradient[name] + 0.1 * PARAMS[name] / unit), rtol=1e-6
        )


@pytest.fixture(scope="module")
def said() -> dict[str, tuple[str, str]]:
    """What is said of each mistake by a program whose types nobody checks."""
    program = Path(__file__).parents[1] / "mistakes.py"
    return json.loads(subprocess.run([sys.executable, program], check=True, capture_output=True).stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_in_one_line(name: str, said: dict[str, tuple[str, str]]) -> None:
    kind, words, _ = MISTAKES[name]
    assert said[name][0] == kind.__name__
    assert re.search(words, said[name][1])
    assert "\n" not in said[name][1]


def test_the_core_brings_in_nothing_else_of_the_package_and_no_framework() -> None:
    code = (
        "import sys, esjax.core; ours = {m for m in sys.modules if m.startswith('esjax.') and m[:10] != 'esjax.core'};"
        "print(sorted(ours), [m for m in ('flax', 'equinox', 'zmq', 'msgspec', 'orbax') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[] []"
