"""The seam for hosts: any pairs of a step, the same bits whoever scores them, and nothing compiled twice."""

import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from conftest import mesh_of

from esjax import core
from esjax.config.models import GruConfig, MinGruConfig, TransformerConfig
from esjax.config.settings import Config, DataConfig, EsConfig, OptimConfig, replace
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.packing import draw_windows, follow_windows
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.exchange import update_record
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, LOSS_STEPS, TAIL
from esjax.models import build_model
from esjax.models.member import Member, cross_entropy, over_sequences
from esjax.replica import chunking
from esjax.replica.estimators.carried_state import STEPS
from esjax.replica.estimators.estimator import LossEstimator, make_estimator
from esjax.replica.replica import Replica
from esjax.replica.snapshot import from_bytes, to_bytes
from esjax.replica.streams import WINDOWS
from esjax.runs.checkpoint import digest

pytestmark = pytest.mark.usefixtures("lenient_promotion")

VOCAB = 11
STREAM = np.random.default_rng(2).integers(0, VOCAB, 500).astype(np.uint8)
CONFIG = Config(
    seed=4,
    data=DataConfig(window=5, batch_size=2, new_tokens_interval=2),
    es=EsConfig(population_size=64, chunk_pairs=4),
    model=GruConfig(hidden_size=4, head_size=8),
)
MODEL = build_model(CONFIG.model, VOCAB)
WEIGHTS = np.random.default_rng(3).integers(-127, 128, 32).astype(np.int8)


def is_hidden(path: str, leaf: Any) -> bool:
    """Tell which leaves have noise where the output layer gets its exact gradient."""
    return not path.startswith("head_output")


def make(devices: int = 1, stream: np.ndarray | None = STREAM, config: Config = CONFIG, **es: Any) -> Replica:
    config = replace(config, es=replace(config.es, **es))
    return Replica(config, build_model(config.model, VOCAB), stream, mesh_of(devices))


@pytest.fixture
def short_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls so small that a few pairs take several of them."""
    monkeypatch.setattr(chunking, "CALL_PAIRS", 8)
    monkeypatch.setattr(chunking, "CALL_WEIGHED_PAIRS", 8)


def test_losses_are_those_of_the_pure_function() -> None:
    """Reference: seeds, windows and losses by the public functions, step by step."""
    host = make(2)
    host.apply(np.arange(32), WEIGHTS, 0.01)
    host.skip()
    pairs = np.array([3, 0, 2**32 - 1, 77, 5])
    wide = jnp.asarray(pairs, jnp.uint32)
    # Step 2 and two steps to a set of windows: the second set.
    windows = draw_windows(jnp.asarray(STREAM), pair_seeds(stream_seed(4, WINDOWS), 1, wide), 2, 6)
    params = jax.tree.map(np.asarray, host.state.params)
    noise = core.low_rank(0.2, units=MODEL.unit, where=is_hidden)
    evaluate = core.evaluate(over_sequences(MODEL, cross_entropy(1)), noise, mesh=mesh_of(1), chunk_pairs=4)
    expected = evaluate(params, pair_seeds(stream_seed(4, 0), 2, wide), windows)
    np.testing.assert_allclose(host.losses(pairs), expected, rtol=1e-6)


def test_split_pairs_share_windows_and_have_two_weights_each() -> None:
    """Reference: windows and losses by the public functions; weights of one half alone move that half alone.

    The output layer has no noise and does not move, nor do rows of the embedding that no window reads.
    """
    host = make(2, pairing="split", pairs_per_window=3)
    pairs = np.arange(8)
    groups = jnp.asarray(pairs // 3, jnp.uint32)
    windows = draw_windows(jnp.asarray(STREAM), pair_seeds(stream_seed(4, WINDOWS), 0, groups), 2, 6)
    params = jax.tree.map(np.asarray, host.state.params)
    noise = core.low_rank(0.2, units=MODEL.unit, split=True, where=is_hidden)
    evaluate = core.evaluate(over_sequences(MODEL, cross_entropy(1)), noise, mesh=mesh_of(1), chunk_pairs=4)
    expected = evaluate(params, pair_seeds(stream_seed(4, 0), 0, jnp.asarray(pairs, jnp.uint32)), windows)
    np.testing.assert_allclose(host.losses(pairs), expected, rtol=1e-6)
    one = np.arange(3)  # of one window
    host.apply(one, np.stack([np.zeros(3, np.int8), WEIGHTS[:3]], axis=1), 0.01)
    moved = jax.tree.map(lambda before, after: np.asarray(after) != before, params, host.state.params)
    assert not any(leaf.any() for leaf in moved.head_output)
    is_read = np.isin(np.arange(VOCAB), [STOP, *np.asarray(windows[0]).ravel()])
    assert 1 < is_read.sum() < VOCAB
    assert not moved.embedding[~is_read].any()
    for leaf in jax.tree.leaves(moved._replace(embedding=moved.embedding[is_read], head_output=())):
        assert not leaf[..., ::2].any()
        assert leaf[..., 1::2].all()


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.nightly), 4])
@pytest.mark.usefixtures("short_calls")
def test_a_pairs_losses_are_the_same_bits_in_any_lease_on_any_devices(devices: int) -> None:
    whole = make().losses(np.arange(32))
    host = make(devices)
    assert host.device_batch == 4 * devices
    np.testing.assert_array_equal(whole, host.losses(np.arange(32)))
    chunks = np.random.default_rng(5).permutation(8)
    for lease in (chunks[:1], chunks[1:4], chunks[4:]):
        pairs = (4 * lease[:, None] + np.arange(4)).reshape(-1)
        np.testing.assert_array_equal(whole[pairs], host.losses(pairs))


def test_a_lease_changes_no_bit_at_the_size_of_the_defaults() -> None:
    """Larger products are split and summed in ways that small ones are not."""
    config = Config(model=GruConfig())
    whole = make(1, config=config).losses(np.arange(512))
    host = make(4, config=config)
    assert host.chunk_pairs == 128
    for pairs in (np.arange(128, 256), np.concatenate([np.arange(384, 512), np.arange(128)])):
        np.testing.assert_array_equal(whole[pairs], host.losses(pairs))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 31])
def test_any_number_of_pairs_is_scored(count: int) -> None:
    host = make(4)
    losses = host.losses(np.arange(count))
    assert losses.shape == (count, 2)
    np.testing.assert_array_equal(losses, host.losses(np.arange(32))[:count])


def state_after(host: Replica, pairs: np.ndarray, weights: np.ndarray) -> str:
    info = host.apply(pairs, weights, 0.01, 0.5)
    assert float(info.update_norm) > 0
    assert int(host.state.step) == 1
    return digest(host.state)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.nightly), 4])
@pytest.mark.usefixtures("short_calls")
def test_an_update_is_the_same_bits_in_any_order_on_any_devices(devices: int) -> None:
    shuffled = np.random.default_rng(6).permutation(32)
    expected = state_after(make(), np.arange(32), WEIGHTS)
    assert state_after(make(devices), np.arange(32), WEIGHTS) == expected
    assert state_after(make(devices), shuffled, WEIGHTS[shuffled]) == expected
    assert state_after(make(devices, time_per_step=1.0), shuffled, WEIGHTS[shuffled]) == expected
    halves = np.stack([WEIGHTS, WEIGHTS[::-1]], axis=1)
    expected = state_after(make(pairing="split"), np.arange(32), halves)
    assert state_after(make(devices, pairing="split"), shuffled, halves[shuffled]) == expected


def test_a_pair_that_is_left_out_weighs_nothing() -> None:
    kept = np.array([1, 4, 30])
    weights = np.zeros(32, np.int8)
    weights[kept] = WEIGHTS[kept]
    assert state_after(make(2), kept, WEIGHTS[kept]) == state_after(make(2), np.arange(32), weights)


def test_nothing_is_compiled_for_another_number_of_pairs_or_another_text(caplog: pytest.LogCaptureFixture) -> None:
    host = make(4)
    host.losses(np.arange(3))
    host.apply(np.arange(3), WEIGHTS[:3], 0.01)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in (1, 16, 17, 32):
            host.losses(np.arange(count) + 2**20)
            host.apply(np.arange(count), WEIGHTS[:count], 0.01)
            host.use_tokens(np.roll(STREAM, count))
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_a_text_may_come_later_and_change() -> None:
    host = make(stream=None)
    with pytest.raises(AssertionError, match="use_tokens"):
        host.losses(np.arange(4))
    with pytest.raises(AssertionError, match="use_tokens"):  # an update reads which tokens its windows hold
        host.apply(np.arange(4), WEIGHTS[:4], 0.01)
    host.use_tokens(STREAM)
    assert state_after(host, np.arange(32), WEIGHTS) == state_after(make(), np.arange(32), WEIGHTS)
    other = (STREAM + 1) % VOCAB
    host = make()
    before = host.losses(np.arange(4))
    host.use_tokens(other)
    assert (host.losses(np.arange(4)) != before).all()
    np.testing.assert_array_equal(host.losses(np.arange(4)), make(stream=other).losses(np.arange(4)))


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(EsjaxError, match="5 tokens"):
        make(stream=STREAM[:5])


def test_an_update_that_is_not_finite_only_counts() -> None:
    config = replace(CONFIG, optim=OptimConfig(optimizer="sgd", learning_rate=3e38, schedule="constant"))
    host = make(config=config)
    before = jax.tree.map(np.array, host.state)
    info = host.apply(np.arange(32), WEIGHTS, 1.0)
    assert not np.isfinite(info.update_norm)
    assert int(host.state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before.params, host.state.params)


SUMS = {
    "gates": EsConfig(space="activation", population_size=128, copies=4, chunk_pairs=4),
    "discount": EsConfig(space="activation", credit="discount", population_size=128, copies=4, chunk_pairs=4),
    "weights": EsConfig(population_size=64, exchange="sums", chunk_pairs=4),
}
with_sums = pytest.mark.parametrize("es", SUMS.values(), ids=SUMS)


@pytest.mark.parametrize(("es", "devices"), halved(SUMS.values(), [1, 4]))
@pytest.mark.usefixtures("short_calls")
def test_sums_come_to_the_same_in_any_leases_on_any_devices(es: EsConfig, devices: int) -> None:
    """The last chunk is not whole."""
    config = replace(CONFIG, es=es)
    whole = make(config=config).sums(np.arange(30))
    host = make(devices, config=config)
    size = sum(leaf.size for leaf in jax.tree.leaves(host.state.params))
    feedback = 4 * 8 + 8 * VOCAB if es.is_gated else 0  # two matrices: from logits to hidden units, and to the state
    assert len(whole) == host.vector_length == size + feedback + TAIL
    assert whole[-TAIL] == 30
    assert whole[:size].any()
    assert whole[size:-TAIL].any() == es.is_gated
    parts = [host.sums(np.arange(*part)) for part in [(28, 30), (0, 4), (16, 28), (4, 16)]]
    np.testing.assert_array_equal(np.sum(parts, axis=0), whole)
    for one in (host, make(config=config)):
        info = one.apply_sum(whole, one.scale / 30)
        assert float(info.update_norm) > 0
    assert digest(host.state) == digest(one.state)
    assert (host.sums(np.arange(30)) != whole).any()  # of the next step


@pytest.mark.parametrize("es", [CONFIG.es, *SUMS.values()], ids=["losses", *SUMS])
def test_an_update_takes_the_place_of_the_old_state_in_memory(es: EsConfig) -> None:
    """Reference: JAX deletes the arrays whose memory a program takes over."""
    data = replace(CONFIG.data, new_tokens_interval=1, carry=es.space == "activation")

    def update(host: Replica) -> None:
        pairs = np.arange(32)
        if host.vector_length:
            host.apply_sum(host.sums(pairs), host.scale / 32)
        else:
            host.apply(pairs, WEIGHTS, 0.01)

    host = make(config=replace(CONFIG, data=data, es=es))
    for _ in range(2):
        before = jax.tree.leaves(host.state)
        assert not host.is_lost
        update(host)
        assert all(leaf.is_deleted() for leaf in before)
    assert int(host.state.step) == 2


@pytest.mark.parametrize("es", [CONFIG.es, *SUMS.values()], ids=["losses", *SUMS])
def test_an_update_that_is_not_finite_is_a_void_step(es: EsConfig) -> None:
    data = replace(CONFIG.data, new_tokens_interval=1, carry=es.space == "activation")
    one, two = (make(2, config=replace(CONFIG, data=data, es=es)) for _ in range(2))
    for host in (one, two):
        if host.vector_length:
            total = host.sums(np.arange(32))
            host.apply_sum(total, host.scale / 32)
        else:
            host.apply(np.arange(32), WEIGHTS, 0.01)
    info = one.apply_sum(total, np.inf) if one.vector_length else one.apply(np.arange(32), WEIGHTS, np.inf)
    two.skip()
    assert not np.isfinite(info.update_norm)
    assert digest(one.state) == digest(two.state)


@pytest.mark.parametrize("how", ["begin", "snapshot"])
def test_an_update_makes_no_second_state_also_after_one_was_read(how: str) -> None:
    """Reference: the addresses of the arrays. JAX shares memory with numpy where it is aligned to 64 bytes."""
    model = GruConfig(hidden_size=64, head_size=64)
    host = make(config=replace(CONFIG, model=model))
    if how == "begin":
        host.begin(jax.tree.map(aligned, host.state.params))
    else:
        host.resume_from(jax.tree.map(lambda leaf: jax.device_put(aligned(leaf), leaf.sharding), host.state))
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((host.state.params, host.state.opt_state))]
    host.apply(np.arange(32), WEIGHTS, 0.01)
    after = jax.tree.leaves((host.state.params, host.state.opt_state))
    assert [leaf.unsafe_buffer_pointer() for leaf in after] == before


def aligned(leaf: Any) -> np.ndarray:
    """Copy an array to an address that 64 divides."""
    values = np.asarray(leaf)
    room = np.empty(values.nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    copy = room[first : first + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def test_devices_that_fail_while_they_compute_lose_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is on its way when the program that makes it returns; a failure is seen when its result is read."""
    host = make()

    def fail(tree: Any) -> Any:
        raise jax.errors.JaxRuntimeError("out of memory")

    monkeypatch.setattr(jax, "block_until_ready", fail)
    assert not host.is_lost
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        host.apply(np.arange(32), WEIGHTS, 0.01)
    assert host.is_lost


def test_to_compile_leaves_the_first_state() -> None:
    host, reference = make(2), make(2)
    host.warm_up()
    assert digest(host.state) == digest(reference.state)


def test_sums_of_weights_are_those_of_the_losses() -> None:
    """Reference: the losses of the same pairs, and what their signs weigh."""
    host, reference = make(2, config=replace(CONFIG, es=SUMS["weights"])), make(2, output_layer="noise")
    losses = reference.losses(np.arange(32)).astype(np.float64)
    total = host.sums(np.arange(32))
    assert total[-TAIL] == 32
    assert total[-TAIL + 1] / LOSS_STEPS == pytest.approx(losses.mean(axis=1).sum(), rel=1e-3)
    difference = losses[:, 0] - losses[:, 1]
    assert total[-TAIL + 2] / DIFFERENCE_STEPS == pytest.approx(np.abs(difference).sum(), rel=1e-3)
    host.apply_sum(total, 1 / 32)
    reference.apply(np.arange(32), np.sign(difference).astype(np.int8), 1 / 32)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    # With losses, rows of the embedding that a pair does not read are left out.
    params = [one.state.params._replace(embedding=()) for one in (host, reference)]
    jax.tree.map(close, *params)


def test_carried_states_are_those_of_reading_on() -> None:
    """Reference: one state that reads all of a window's tokens so far, and rounding once a step.

    Weights that stay as they are: the step size is too small for any change of a float32.
    """
    data = replace(CONFIG.data, carry=True, new_tokens_interval=1)
    es = replace(SUMS["gates"], population_size=24)
    optim = OptimConfig(optimizer="sgd", learning_rate=1e-30)
    config = replace(CONFIG, data=data, es=es, optim=optim)
    host = make(2, config=config)
    params = jax.tree.map(jnp.array, host.state.params)
    whole, steps = [], 4
    for step in range(steps):
        seeds = pair_seeds(stream_seed(4, WINDOWS), 0, jnp.arange(6))
        whole.append(follow_windows(jnp.asarray(STREAM), seeds, 2, 5, jnp.int32(step)))
        total = host.sums(np.arange(4)) + host.sums(np.arange(4, 6))
        host.apply_sum(total, host.scale / 6)
    tokens = jnp.concatenate(whole, axis=2).reshape(12, -1)
    right = jax.vmap(Member(MODEL, params).read)(tokens)
    assert host.state.carried.shape == (6, 2, 4)
    np.testing.assert_allclose(host.state.carried.reshape(12, 4), right, atol=steps / STEPS)
    assert np.abs(np.asarray(right)).max() > 100 * steps / STEPS


def test_after_a_void_step_carried_states_start_anew_and_windows_go_on() -> None:
    """Reference: a state that reads the windows of the step after it, and no others.

    A host that only replays, without a text, and one that takes a snapshot after the void step agree to the bit.
    """
    data = replace(CONFIG.data, carry=True, new_tokens_interval=1)
    config = replace(CONFIG, data=data, es=replace(SUMS["gates"], population_size=24))
    host, replaying, late = make(2, config=config), make(config=config, stream=None), make(config=config)
    for step in range(4):
        is_void = step == 2
        total = host.sums(np.arange(6))
        header = update_record.UpdateHeader(step, [(0, 6)], host.scale / 6, not is_void, 1.0, 0, host.vector_length)
        payload = update_record.pack_update(update_record.Update(header, total[:0] if is_void else total))
        before = jax.tree.map(np.asarray, host.state)
        for one in (host, replaying) if step < 3 else (host, replaying, late):
            one.update(payload)
        assert (np.asarray(host.state.carried) != before.carried).any()
        if is_void:
            jax.tree.map(np.testing.assert_array_equal, host.state.params, before.params)
            late.state = from_bytes(to_bytes(host.state), late.state)
            np.testing.assert_array_equal(late.sums(np.arange(6)), host.sums(np.arange(6)))
    assert digest(host.state) == digest(replaying.state) == digest(late.state)
    seeds = pair_seeds(stream_seed(4, WINDOWS), 0, jnp.arange(6))
    windows = follow_windows(jnp.asarray(STREAM), seeds, 2, 5, jnp.int32(3))
    right = jax.vmap(Member(MODEL, jax.tree.map(jnp.asarray, before.params)).read)(windows.reshape(12, 5))
    np.testing.assert_allclose(host.state.carried.reshape(12, 4), right, atol=1 / STEPS)


@pytest.mark.parametrize("pairing", ["antithetic", "split"])
def test_an_update_of_another_pairing_is_refused(pairing: str) -> None:
    host, shape = make(pairing=pairing), (6,) if pairing == "split" else (6, 2)
    header = update_record.UpdateHeader(0, [(0, 6)], 0.1, True, 1.0, 0, halves=1 if pairing == "split" else 2)
    with pytest.raises(EsjaxError, match=r"update 0 was made with another es\.pairing"):
        host.update(update_record.pack_update(update_record.Update(header, np.ones(shape, np.int8))))
    assert int(host.state.step) == 0


@with_sums
def test_nothing_is_compiled_for_another_number_of_summed_pairs(es: EsConfig, caplog: pytest.LogCaptureFixture) -> None:
    host = make(4, config=replace(CONFIG, es=es))
    total = host.sums(np.arange(3))
    host.apply_sum(total, 0.1)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for count in (1, 16, 17, 32):
            host.apply_sum(host.sums(np.arange(count) + 2**20), 0.1)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


def test_many_cores_share_a_population() -> None:
    """A population is cut into 16 chunks whatever the number of devices, so that 16 cores have work."""
    config = Config(model=GruConfig())
    assert {make(devices, config=config).chunk_pairs for devices in (1, 2, 4)} == {2048 // 16}


@pytest.mark.parametrize("model", [TransformerConfig(context=6), MinGruConfig(), GruConfig()])
def test_a_chunk_has_room_for_its_logits_where_windows_are_read_at_once(model: Any) -> None:
    """By hand: the logits of both members, of 3 windows of 6 tokens and 11 ids, 4 bytes each."""
    config = Config(data=DataConfig(window=5, batch_size=3), model=model)
    built = build_model(model, VOCAB)
    params = built.init(jax.random.key(0))
    estimator = make_estimator(config, built, params, built.units(params), None, packed=False)
    assert isinstance(estimator, LossEstimator)
    logits = 0 if isinstance(model, GruConfig) else 2 * 3 * 6 * 11 * 4
    assert estimator.logit_bytes == logits
    assert estimator.pair_bytes == estimator.noise_bytes + logits


def test_the_logits_of_a_chunk_fit_a_core_where_windows_are_read_at_once() -> None:
    """By hand: the logits of both members, of windows of 65 tokens and 11 ids, 4 bytes each, fit 91 times."""
    data = DataConfig(window=64)
    assert make(1, config=Config(data=data, model=MinGruConfig())).chunk_pairs == 64
    assert make(1, config=Config(data=data, model=GruConfig())).chunk_pairs == 128
    many = build_model(MinGruConfig(), 2000)  # 1 MB for a pair
    assert Replica(Config(model=MinGruConfig()), many, STREAM, mesh_of(1)).chunk_pairs == 8
