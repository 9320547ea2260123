"""What honest values can be: bounds by hand, sums of real replicas, and a run in which a false sum arrives once."""

import copy
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, noise_of, params_of, tokens_of

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.core.seeds import pair_seeds
from esjax.core.shaping import OUTLYING
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, LARGEST, TAIL, Bounds, Section
from esjax.exchange.usual_sums import UsualSums
from esjax.exchange.values import Exchange, LossExchange, make_exchange, pack_conclusion
from esjax.models import build_model
from esjax.replica.estimators.estimator import CROSS_ENTROPY
from esjax.replica.estimators.partial_sums import Chunk, make_sum_of_weights
from esjax.replica.replica import Replica
from esjax.replica.update import init_state
from esjax.runs.checkpoint import digest

SPANS = [(2, 3)]
"""Three pairs of a step of eight."""

BOUNDS = Bounds(
    lowest_loss=-1.0,
    highest_loss=1e3,
    sections=(Section("gradient", 2, 100), Section("feedback", 1, 5), Section("states", 16, 9, 2)),
    room=8,
)
HONEST = [300, -300, 15, *[0] * 4, *[9, -9] * 3, *[0] * 6, 3, 7, 11]
"""Each number as large as it can be."""


def unpacked(exchange: Exchange, total: Any, spans: Any = SPANS) -> Any:
    return exchange.unpack(spans, *exchange.pack(np.array([total], np.int64)))


def test_the_largest_honest_sum_is_taken() -> None:
    np.testing.assert_array_equal(unpacked(make_exchange(len(HONEST), 1.0, BOUNDS), HONEST), [HONEST])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 301),
        (1, -301),
        (1, -(2**31)),
        (0, LARGEST),
        (2, 16),
        (7, 10),
        (6, 1),  # the state of pair 1, which another host scores
        (13, -1),
        (-TAIL, 4),
        (-TAIL, -1),
        (-TAIL + 1, -4),  # cross entropy is not negative
        (-TAIL + 1, LARGEST // 8 * 3 + 1),
        (-1, -1),
        (-1, LARGEST // 8 * 3 + 1),
    ],
)
def test_a_number_out_of_bounds_is_refused(place: int, value: int) -> None:
    total = [*HONEST]
    total[place] = value
    assert unpacked(make_exchange(len(HONEST), 1.0, BOUNDS), total) is None


def test_losses_have_the_bounds_of_their_type() -> None:
    """Cross entropy is from 0 to 1,000 nats a token; a custom loss may be anything below 10^9."""
    losses = np.array([[2, 3], [4, 6], [5, 5.5], [1.0, 1.25], [9e8, -9e8], [-5, 2], [2000, 2]], np.float32)
    spans, es = [(0, 7)], EsConfig(population_size=14)
    bounded = LossExchange(CROSS_ENTROPY).conclude(losses, spans, es)
    assert (bounded.void_pairs, bounded.note) == (3, "3 of 7 pairs have a loss that is not finite")
    assert bounded.loss == pytest.approx(np.mean([2, 3, 4, 6, 5, 5.5, 1, 1.25, 2, 2]))
    assert not bounded.weights[4:].any()
    custom = LossExchange().conclude(losses, spans, es)
    assert (custom.void_pairs, custom.outliers) == (0, 2)
    typical = custom.weights[[0, 1, 2, 3, 5]].astype(float)
    assert custom.weights[4] == int(np.sqrt(np.sum(typical**2) / 2))  # two outliers weigh as much as all others


@pytest.mark.usefixtures("lenient_promotion")
def test_an_outlier_does_not_change_the_spread_of_differences() -> None:
    """By hand: the other differences of a chunk, and 16 spreads of the step before."""
    model, noise = MODELS["gru"], noise_of(MODELS["gru"])
    losses = np.array([[2.5, 2], [1, 2], [9e8, -9e8], [3, 2.75]], np.float32)

    def evaluate_chunk(params: Any, seeds: Array, windows: Array) -> Array:
        return jnp.asarray(losses)

    sum_chunk = make_sum_of_weights(noise, evaluate_chunk, "zscore", 4, ())
    state = dataclasses.replace(init_state(params_of(model), optax.sgd(1.0)), spread=jnp.float32(0.5))
    numbers = jnp.arange(4, dtype=jnp.uint32)
    chunk = Chunk(numbers, pair_seeds(1, 0, numbers), tokens_of(4), jnp.ones(4, bool))
    assert sum_chunk(state, chunk)[-1] == (0.5 + 1 + OUTLYING * 0.5 + 0.25) * DIFFERENCE_STEPS


def rows_of(rng: np.random.Generator, pairs: list[int]) -> np.ndarray:
    """Sums of honest hosts: independent noise for each pair."""
    rows = [rng.normal(0, 16 * np.sqrt(count), 50) for count in pairs]
    tails = [[count, 0, 1000 * count] for count in pairs]
    return np.concatenate([np.rint(rows), tails], axis=1).astype(np.int64)


def test_a_sum_far_larger_than_usual_is_left_out() -> None:
    """Sums of 8 to 512 pairs; then one of them is twenty times as large, or its differences are."""
    rng, usual = np.random.default_rng(0), UsualSums([slice(0, 50)])
    pairs = [8, 64, 64, 128, 512]
    for _ in range(20):
        assert usual.take(rows_of(rng, pairs)).all()
    for place in range(5):
        for columns in (slice(0, 50), slice(52, 53)):
            rows = rows_of(rng, pairs)
            rows[place, columns] *= 20
            assert np.flatnonzero(~usual.take(rows)).tolist() == [place]
    rows = rows_of(rng, pairs)
    rows[1, 3] = LARGEST
    assert np.flatnonzero(~usual.take(rows)).tolist() == [1]


def test_the_first_sums_are_compared_with_each_other() -> None:
    rows = rows_of(np.random.default_rng(0), [64] * 5)
    rows[2, 0] = LARGEST
    assert UsualSums([slice(0, 50)]).take(rows).tolist() == [True, True, False, True, True]


def test_what_stays_larger_becomes_usual_and_a_liar_does_not() -> None:
    """A gradient that doubles each step; one that jumps; and a host that sends ten times as much in every step."""
    rng, usual = np.random.default_rng(0), UsualSums([slice(0, 50)])

    def is_taken(factor: int) -> bool:
        rows = rows_of(rng, [128])
        rows[:, :50] *= factor
        return bool(usual.take(rows)[0])

    assert all(is_taken(2**step) for step in range(12))
    jump = [is_taken(2**20) for _ in range(20)]
    assert jump == sorted(jump)
    assert (jump[0], jump[-1]) == (False, True)
    usual = UsualSums([slice(0, 50)])
    for _ in range(50):
        rows = rows_of(rng, [64] * 4)
        rows[1, :50] *= 10
        assert usual.take(rows).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("knows_the_others", "least", "most"), [(False, 1.5, 2.0), (True, 2.0, 3.0)], ids=["ignorant", "omniscient"]
)
def test_how_much_longer_one_host_of_five_makes_a_sum(knows_the_others: bool, least: float, most: float) -> None:
    """It sends as much as is taken, in any direction or in that of the others' sum. Reference: the honest sum."""
    rng, usual = np.random.default_rng(0), UsualSums([slice(0, 2000)])

    def honest() -> np.ndarray:
        rows = np.concatenate([rng.normal(0, 160 * 32, (5, 2000)), np.tile([1024, 0, 1024000], (5, 1))], axis=1)
        return np.rint(rows).astype(np.int64)

    for _ in range(20):
        assert usual.take(honest()).all()
    longest = 0.0
    for factor in np.arange(1.0, 6.0, 0.05):
        rows = honest()
        length = np.linalg.norm(rows[:, :2000].sum(axis=0).astype(float))
        rows[0, :2000] = factor * (rows[1:, :2000].sum(axis=0) if knows_the_others else rows[0, :2000])
        if copy.deepcopy(usual).take(rows)[0]:
            longest = max(longest, float(np.linalg.norm(rows[:, :2000].sum(axis=0).astype(float)) / length))
    assert least < longest < most


SETTINGS: dict[str, Config] = {
    "weights": Config(
        data=DataConfig(window=5),
        es=EsConfig(population_size=128, exchange="sums", chunk_pairs=16),
        model=GruConfig(hidden_size=4, head_size=8),
    ),
    "activations": Config(
        data=DataConfig(window=5, carry=True),
        es=EsConfig(space="activation", population_size=128, chunk_pairs=16),
        model=GruConfig(hidden_size=4, head_size=8),
    ),
}
DIVIDED = [(first, 16) for first in range(0, 64, 16)]


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("which", SETTINGS)
def test_row_46_a_false_sum_reaches_no_optimizer(which: str) -> None:
    """Reference: a run in which the liar's pairs are missing in that step. State: weights, moments, feedback, spread.

    Honest sums are all taken. A false one with ±(2^31-1) is refused as it arrives; one just within the bounds is left
    out of the step.
    """
    config = SETTINGS[which]
    stream = np.random.default_rng(2).integers(0, 11, 500).astype(np.uint8)
    liar, lies_at, digests = 2, 6, []
    for lie in ("none", "largest", "bound", "missing"):
        replica = Replica(config, build_model(config.model, 11), stream, mesh_of(2))
        exchange = make_exchange(replica.vector_length, replica.scale, replica.bounds)
        for step in range(9):
            sums = replica.score(DIVIDED)
            if step == lies_at and lie == "largest":
                false = sums[liar].astype(np.int64)
                false[7] = LARGEST
                assert unpacked(exchange, false, [DIVIDED[liar]]) is None
            if step == lies_at and lie == "bound":
                first = replica.bounds.sections[0]
                sums[liar, : first.length] = int(first.most * 16)
            taken: list[np.ndarray] = []
            for row, span in zip(sums, DIVIDED, strict=True):
                values = exchange.unpack([span], *exchange.pack(row[None]))
                assert values is not None
                taken.append(values)
            if step == lies_at and lie in ("largest", "missing"):
                taken.pop(liar)
            concluded = exchange.conclude(np.concatenate(taken), [(0, 64)], config.es)
            is_out = step == lies_at and lie != "none"
            assert concluded.outliers == (16 if is_out and lie == "bound" else 0)
            assert concluded.void_pairs == (16 if is_out else 0)
            replica.update(pack_conclusion(step, [(0, 64)], concluded, exchange.vector_length, 1))
        digests.append(digest(replica.state))
    assert digests[1] == digests[2] == digests[3] != digests[0]
