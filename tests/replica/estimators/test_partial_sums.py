"""A chunk's part of the gradient, as integers: against numpy, at the limits, and what is read from the sum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from small import MODELS, epsilons_of, params_of

from esjax import core
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, OptimConfig, replace
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.exchange.gradient_sums import LARGEST, TAIL, steps_per_nat
from esjax.exchange.values import Conclusion, SumExchange
from esjax.models import build_model
from esjax.replica.estimators.partial_sums import Chunk, make_sum_of_activations
from esjax.replica.estimators.taps import Estimate
from esjax.replica.replica import Replica
from esjax.replica.update import init_state

MODEL = MODELS["gru"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_of_the_largest_gradients_fit(sign: float) -> None:
    """Reference: integers. Six pairs in chunks of four; 64 steps a nat have no room, and windows are half burn-in."""
    pairs, sequences, window, burn_in = 6, 2, 65535, 65536
    tokens = sequences * window
    steps = steps_per_nat(pairs * tokens)
    params = params_of(MODEL)

    def estimate_chunk(
        params: Any, feedback: Any, seeds: Any, windows: Any, are_there: Any, begin: Any = None
    ) -> Estimate:
        gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, sign * 1e30), params)
        return Estimate(gradient, jnp.full(len(seeds), sign * 1e8), are_there, MODEL.initial_state(params), [])

    sum_chunk = make_sum_of_activations(MODEL, estimate_chunk, MODEL.units(params), pairs, tokens, steps)
    state, windows = init_state(params, optax.sgd(1.0)), jnp.zeros((4, sequences, burn_in + window), jnp.int32)
    total = np.zeros(0, np.int64)
    for first in (0, 4):
        numbers = jnp.arange(first, first + 4, dtype=jnp.uint32)
        chunk = Chunk(numbers, pair_seeds(stream_seed(1, 0), 0, numbers), windows, numbers < pairs)
        part = np.asarray(sum_chunk(state, chunk), np.int64)
        total = total + part if total.size else part
    assert steps == 32
    assert total[-TAIL] == pairs
    assert LARGEST / 2 < 32 * 64 * pairs * tokens <= LARGEST
    np.testing.assert_array_equal(total[:-TAIL], sign * 32 * 64 * pairs * tokens)
    assert total[-TAIL + 1] == sign * (LARGEST // pairs * pairs)  # losses, too, are cut off


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(1, 64.0), (2**19 - 1, 64.0), (2**19, 32.0), (3 * 2**19, 16.0), (2**25, 0.5), (2**30, 2.0**-6)],
)
def test_a_gradient_is_as_fine_as_there_is_room_for(tokens: int, steps: float) -> None:
    """Reference: the largest power of two, up to 64, for which tokens of 64 nats a unit come to less than 2^31."""
    assert steps_per_nat(tokens) == steps
    assert steps * 64 * tokens < 2**31
    assert steps == 64 or 2 * steps * 64 * tokens >= 2**31


def conclude(total: np.ndarray, pairs: int, scale: float) -> Conclusion:
    return SumExchange(len(total), scale).conclude(total[None], [(0, pairs)], EsConfig())


def test_loss_scale_and_void_pairs_of_a_sum_by_hand() -> None:
    """Two parameters; 4 pairs count; their losses, in steps of 1/1024, come to 9 nats; the scale is of one pair."""
    total = np.array([30, -7, 4, 9 * 1024, 77], np.int32)
    assert conclude(total, 5, 0.5)[1:5] == (0.5 / 4, 9 / 4, 1, "")
    assert conclude(total, 4, 0.5)[1:5] == (0.5 / 4, 9 / 4, 0, "")
    assert conclude(total, 8, 0.5)[1:5] == (0.5 / 4, 9 / 4, 4, "")  # half of them still do


def test_sums_of_void_steps_by_hand() -> None:
    total = np.array([30, -7, 4, 9 * 1024, 77], np.int32)
    assert conclude(total, 9, 0.5)[1:5] == (0.0, 9 / 4, 5, "5 of 9 pairs have a loss that is not finite")
    total[-TAIL:] = 0
    assert conclude(total, 3, 0.5)[1:5] == (0.0, None, 3, "3 of 3 pairs have a loss that is not finite")
    equal = np.array([0, 0, 4, -1024, 0])
    assert conclude(equal, 4, 0.5)[1:5] == (0.0, -1 / 4, 0, "the gradient sum is 0")


CONFIG = Config(
    seed=4,
    data=DataConfig(window=5, batch_size=2),
    es=EsConfig(population_size=400, exchange="sums", chunk_pairs=20),
    optim=OptimConfig(optimizer="sgd", learning_rate=0.5, momentum=0.0, schedule="constant", average=0.0),
    model=GruConfig(hidden_size=4, head_size=8),
)


@pytest.mark.usefixtures("lenient_promotion")
def test_later_steps_weigh_by_the_spread_of_the_step_before() -> None:
    """Reference: float64 numpy, from the losses that a host which exchanges losses finds with the same parameters.

    In steps after the first a pair weighs its difference in deviations, to a sixteenth and cut off at 127/16; the
    deviation is that of a normal variable whose size has the mean of the differences of the step before.
    """
    vocabulary, pairs = 11, np.arange(200)
    stream = np.random.default_rng(2).integers(0, vocabulary, 500).astype(np.uint8)
    model = build_model(CONFIG.model, vocabulary)
    host = Replica(CONFIG, model, stream, mesh_of(2))
    reference = Replica(
        replace(CONFIG, es=replace(CONFIG.es, exchange="losses", output_layer="noise")), model, stream, mesh_of(2)
    )
    noise = core.low_rank(0.2, units=model.unit)
    deviation = 0.0
    for step in range(3):
        reference.state = host.state
        losses = reference.losses(pairs).astype(np.float64)
        differences = losses[:, 0] - losses[:, 1]
        total = host.sums(pairs)
        if step:
            np.testing.assert_allclose(host.state.spread, deviation, rtol=1e-3)
            exact = np.clip(16 * differences / deviation, -127, 127)
            seeds = pair_seeds(stream_seed(4, 0), step, jnp.arange(200))
            epsilon, *_ = epsilons_of(noise, host.state.params, seeds)  # of the start, the first leaf
            got = total[: len(epsilon)].astype(np.float64)
            expected = epsilon @ exact
            # Each of 200 weights is rounded by 1/2 at most; noise is ±1: errors of a deviation below 200^½ / 3.
            np.testing.assert_allclose(got, expected, atol=5 * 200**0.5 / 3)
            assert np.abs(expected).max() > 200
            before = np.asarray(host.state.params.start, np.float64)
        concluded = conclude(total, 200, host.scale)
        host.apply_sum(total, concluded.scale)
        if step:
            # In deviations the mean of (weight * ε), times the learning rate and the leaf's unit.
            moved = before - np.asarray(host.state.params.start, np.float64)
            assert model.unit
            np.testing.assert_allclose(moved, 0.5 * model.unit.start * got / 16 / 200, rtol=1e-4, atol=1e-7)
        # Of a normal variable of deviation 1 the size has the mean (2/π)^½.
        deviation = np.abs(differences).mean() / np.sqrt(2 / np.pi)
