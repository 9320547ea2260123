"""What a running job survives, as far as the state machines show it; the rows are those of the list of faults.

Where a row says that nothing is lost, the reference is a run with one host and without faults: its updates are the same
bytes. With a time budget the population is what came back, so there every update is made again from honest losses of
the pairs that it names.
"""

import math
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
from hosts_simulation import (
    DELAY,
    FIRST_STATE,
    QUANTUM,
    RUN,
    STATE_BYTES,
    TEXT,
    VECTOR_LENGTH,
    Device,
    Host,
    Simulation,
    body_of,
    check_updates,
    config_of,
    hash_state,
    next_state,
    values_of,
)

from esjax.config.settings import Config, from_yaml, to_yaml
from esjax.core.shaping import shape
from esjax.exchange import update_record
from esjax.exchange.gradient_sums import TAIL
from esjax.exchange.values import SLOT_PAIRS
from esjax.hosts.coordination.registry import FORGET, SILENT, STRIKES
from esjax.hosts.coordination.steps import STUCK
from esjax.hosts.protocol import transfers, wire
from esjax.hosts.protocol.actions import Publish, Terms
from esjax.hosts.protocol.request_channel import DEAF
from esjax.hosts.protocol.tasks import Score, Scored
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import BEAT

FIXED = config_of()
BUDGET = config_of(budget=1.0)
FIXED_SUMS = config_of(sums=True)
BUDGET_SUMS = config_of(budget=1.0, sums=True)
both_modes = pytest.mark.parametrize("config", [FIXED, BUDGET], ids=["fixed", "budget"])
both_exchanges = pytest.mark.parametrize("sums", [False, True], ids=["losses", "sums"])
all_modes = pytest.mark.parametrize(
    "config", [FIXED, BUDGET, FIXED_SUMS, BUDGET_SUMS], ids=["fixed", "budget", "fixed sums", "budget sums"]
)
PAIRS = FIXED.es.population // 2
STEP = 2.0
"""Seconds in which any step here is done, by one host of the usual speed."""


def fault_free(config: Config) -> Simulation:
    return _fault_free(to_yaml(config))


@cache
def _fault_free(settings: str) -> Simulation:
    sim = Simulation(from_yaml(settings, ""))
    sim.add("alone", speed=10_000.0)
    return sim


def check_run(sim: Simulation) -> None:
    """Check that the updates are those of a run without faults, and that all replicas made the same ones."""
    if sim.config.es.time_per_step is None:
        reference, steps = fault_free(sim.config), len(sim.updates)
        reference.run_steps(max(0, steps - len(reference.updates)))
        assert sim.updates == reference.updates[:steps]
    check_updates(sim.updates, sim.config)
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for host in sim.hosts.values():
        assert host.device.state == states[host.device.step], host.name


def run_with(config: Config, *names: str, steps: int = 3, **settings: Any) -> Simulation:
    """Start a run that has been through a few steps, and is in the middle of one."""
    sim = Simulation(config)
    for name in names:
        sim.add(name, **settings)
    sim.run_steps(steps)
    sim.run(0.1)
    return sim


def ask(sim: Simulation, host: Host, message: wire.Message, body: bytes = b"") -> wire.Message:
    """Let the coordinator answer a made-up message."""
    frames = wire.encode(Envelope(message, body))
    return sim.server.receive(wire.decode(frames, "request"), sim.now, host.key).message


def losses_message(sim: Simulation, host: Host, pairs: int, **changes: object) -> tuple[wire.Losses, bytes]:
    """Make honest losses of some of the pairs that a host is scoring."""
    joined = host.worker.joined
    assert joined is not None
    step = sim.server.step
    assert host.device.step == step
    first = joined.slot * SLOT_PAIRS if sim.config.es.time_per_step else 0
    dtype = "<i4" if joined.vector_length else "<f4"
    message = wire.Losses(joined.session, joined.incarnation, step, [(first, pairs)], False, dtype)
    body = body_of(values_of(sim.config, host.device.state, message.spans))
    return msgspec.structs.replace(message, **changes), body


def status_of(sim: Simulation, name: str) -> wire.HostStatus:
    return next(host for host in sim.server.status(sim.now).hosts if host.name == name)


@all_modes
def test_row_01_a_killed_worker_costs_nothing(config: Config) -> None:
    sim = run_with(config, "a", "b", "c")
    sim.kill_host("b")
    before = sim.now
    sim.run_steps(1)
    if config.es.time_per_step:
        assert sim.now - before < 2 * STEP
    sim.run_steps(6)
    check_run(sim)


@both_modes
def test_row_01_the_status_says_how_long_a_killed_worker_has_said_nothing(config: Config) -> None:
    sim = run_with(config, "a", "b", steps=3)
    sim.kill_host("b")
    killed_at = sim.now
    while sim.now - killed_at < FORGET - 5:
        sim.run(1)
        host, silent = status_of(sim, "b"), sim.now - killed_at
        assert silent <= host.last_seen < silent + BEAT + 1
        if host.last_seen < 6:
            assert host.state in ("ready", "straggling")
        else:
            assert host.state == ("silent" if host.last_seen < SILENT else "lost")
        assert (host.members_per_second > 0) is (host.state != "lost")
    sim.run(10)
    assert [host.name for host in sim.server.status(sim.now).hosts] == ["a"]


@both_modes
def test_row_04_a_worker_that_was_lost_is_ready_again(config: Config) -> None:
    sim = run_with(config, "a", "b", steps=3)
    sim.hosts["b"].cut = {"request"}
    sim.run(SILENT + 5)
    assert status_of(sim, "b").state == "lost"
    sim.hosts["b"].cut = set()
    sim.run(60, lambda: status_of(sim, "b").state == "ready")
    assert status_of(sim, "b").state == "ready"
    sim.run_steps(3)
    check_run(sim)


def test_row_07_a_paused_run_has_no_rate() -> None:
    sim = run_with(FIXED, "a", steps=5)
    assert sim.server.status(sim.now).member_tokens_per_second > 0
    sim.hosts["a"].worker.leave("it was stopped")
    sim.run(1)
    status = sim.server.status(sim.now)
    assert (status.paused, status.member_tokens_per_second, status.hosts) == (True, 0.0, [])


@both_exchanges
def test_row_01_pairs_of_a_killed_worker_are_scored_by_others(sums: bool) -> None:
    sim = run_with(config_of(sums=sums), "a", "b")
    sim.kill_host("b")
    step = sim.server.step
    sim.run_steps(1)
    scored = {pair for at, pair in sim.hosts["a"].device.scored if at == step}
    assert scored == set(range(PAIRS))


@all_modes
def test_row_02_a_restarted_coordinator_goes_on(config: Config) -> None:
    sim = run_with(config, "a", "b", steps=5)
    step = len(sim.ledger)
    sim.kill()
    sim.run(3)
    sim.start()
    assert sim.server.step == step
    sim.run_steps(5)
    check_run(sim)
    for host in sim.hosts.values():
        assert host.worker.joined is not None
        assert host.worker.joined.incarnation == 2
        assert host.device.made == list(range(host.device.step))  # each update once, and no snapshot
        assert any(at > step for at, _ in host.device.scored)


@both_exchanges
def test_row_02_hosts_come_back_to_a_coordinator_that_knows_less(sums: bool) -> None:
    """Its last record was torn: hosts have made an update that the ledger has lost."""
    sim = run_with(config_of(sums=sums), "a", "b", steps=5)
    sim.kill()
    del sim.ledger[3:]
    sim.start()
    sim.run_steps(5)
    check_run(sim)


@all_modes
def test_row_03_what_was_recorded_is_published_after_a_restart(config: Config) -> None:
    sim = run_with(config, "a", "b")
    sim.crash_after_record = step = sim.server.step
    sim.run(30, lambda: sim.coordinator is None)
    assert sim.coordinator is None
    assert all(host.device.step <= step for host in sim.hosts.values())  # no host has received it
    recorded = sim.ledger[step][1]
    published: list[bytes] = []
    sim.start()

    def listen(direction: str, host: str, frames: list[bytes]) -> list[bytes]:
        if direction == "broadcast":
            envelope = wire.decode(frames, "broadcast")
            if isinstance(envelope.message, wire.Step) and envelope.message.step == step + 1:
                published.append(envelope.body)
        return frames

    sim.tamper = listen
    sim.run_steps(3)
    assert published
    assert set(published) == {recorded}
    check_run(sim)


@pytest.mark.parametrize("seconds", [1.0, 5.0, 19.0, 60.0, 200.0])
@all_modes
def test_row_04_after_a_cut_the_ledger_says_what_was_missed(config: Config, seconds: float) -> None:
    sim = run_with(config, "a", "b")
    cut = sim.hosts["b"]
    cut.cut = {"request", "reply", "broadcast"}
    before = len(sim.ledger)
    sim.run(seconds)
    assert len(sim.ledger) - before >= seconds / STEP - SILENT / STEP - 1  # the other one trains on
    cut.cut = set()
    sim.run(DEAF + 2 * BEAT)
    sim.run_steps(5)
    assert cut.device.step >= len(sim.ledger) - 1
    assert cut.device.made == list(range(cut.device.step))
    check_run(sim)


def test_row_04_after_a_long_cut_a_snapshot_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "FAR", 20)
    sim = run_with(config_of(checkpoint_time=10), "a", "b")
    cut = sim.hosts["b"]
    cut.cut = {"request", "reply", "broadcast"}
    sim.run(200)
    cut.cut = set()
    sim.run(DEAF + 2 * BEAT)
    assert cut.device.step >= len(sim.ledger) - 1
    assert cut.device.loaded
    assert len(cut.device.made) < len(sim.ledger) - 100
    check_run(sim)


@pytest.mark.parametrize("direction", ["request", "reply", "broadcast"])
@all_modes
def test_row_05_one_way_loss_is_noticed(config: Config, direction: str) -> None:
    sim = run_with(config, "a", "b")
    deaf = sim.hosts["b"]
    connection, since = deaf.connection, sim.now
    deaf.cut = {direction}
    sim.run(60, lambda: deaf.connection > connection or sim.printed("b is lost"))
    assert sim.now - since <= 25
    deaf.cut = set()
    sim.run(2 * DEAF)
    sim.run_steps(5)
    assert deaf.device.scored[-1][0] >= len(sim.ledger) - 2
    check_run(sim)


@both_exchanges
def test_row_06_the_pairs_of_a_straggler_run_twice(sums: bool) -> None:
    sim = run_with(config_of(sums=sums), "a", "b")
    slow = sim.hosts["b"].device
    slow.speed /= 10
    step, before = sim.server.step, sim.now
    sim.run_steps(1)
    assert sim.now - before < 3 * STEP
    fast = sim.hosts["a"].device
    assert set(slow.scored) & set(fast.scored)
    assert {pair for at, pair in slow.scored + fast.scored if at == step} == set(range(PAIRS))
    assert status_of(sim, "b").state == "straggling"
    sim.run(60)
    assert status_of(sim, "b").state != "put aside"
    check_run(sim)


def test_row_06_a_straggler_is_reported_once_until_it_is_in_time_again() -> None:
    sim = run_with(FIXED, "a", "b")
    slow, told = sim.hosts["b"].device, "b is late: it gets no pairs for a while"
    assert told not in sim.lines
    slow.speed = 0.5
    sim.run(60)  # it is tried in vain after 10 s, and after 20 s more
    assert sim.lines.count(told) == 1
    slow.speed = 20.0
    sim.run(60, lambda: status_of(sim, "b").state == "ready")
    sim.run(1)
    slow.speed = 0.5
    sim.run(10)
    assert sim.lines.count(told) == 2


@both_exchanges
def test_row_06_the_first_answer_counts(sums: bool) -> None:
    """If a straggler finishes before the host that took over, the step does not wait for that one."""
    sim = run_with(config_of(sums=sums), "a", "b")
    sim.hosts["a"].device.speed = sim.hosts["b"].device.speed = 100
    sim.run_steps(1)
    sim.run(0.05)
    slow = sim.hosts["b"]
    slow.running = False
    sim.run(60, lambda: status_of(sim, "b").state == "straggling")
    sim.hosts["a"].device.hung = True
    slow.running = True
    sim.run(5)
    sim.hosts["a"].device.hung = False
    sim.run_steps(3)
    check_run(sim)


def test_row_06_a_late_host_gets_pairs_again_if_no_other_is_left() -> None:
    sim = run_with(FIXED, "a", "b")
    sim.hosts["b"].device.speed = 0.5
    sim.run(100)
    assert status_of(sim, "b").state == "straggling"
    sim.hosts["b"].device.speed = 20.0
    sim.hosts["a"].worker.leave("it was stopped")
    sim.run_steps(2, limit=15)
    check_run(sim)


def test_row_06_a_host_that_has_left_sets_no_deadline_for_others() -> None:
    sim = Simulation(FIXED)
    sim.add("a", speed=1000.0)
    sim.add("b")
    sim.run_steps(5)
    sim.hosts["b"].device.speed = 2.0
    sim.run(0.3)  # by now it is done with its pairs of this step
    sim.hosts["a"].worker.leave("it was stopped")
    sim.run_steps(2)
    before = len(sim.messages(wire.Extra, "b"))
    for _ in range(30):
        sim.run(1)
        assert status_of(sim, "b").state == "ready"
    assert len(sim.messages(wire.Extra, "b")) <= before + 1
    check_run(sim)


def test_row_06_a_straggler_does_not_delay_a_step_with_a_time_budget() -> None:
    sim = run_with(BUDGET, "a", "b")
    sim.hosts["b"].device.speed /= 100
    before = sim.now
    sim.run_steps(10)
    assert sim.now - before < 10 * 2 * STEP
    check_run(sim)


@all_modes
def test_row_06_a_slow_host_is_waited_for_if_it_is_alone(config: Config) -> None:
    sim = Simulation(config)
    sim.add("slow", speed=1.0)
    sim.run_steps(4)
    assert sim.now < 4 * PAIRS / 1.0 + 20
    check_run(sim)


@both_modes
def test_row_07_without_workers_the_job_pauses(config: Config) -> None:
    sim = run_with(config, "a", "b")
    sim.kill_host("a")
    sim.kill_host("b")
    sim.run(200)
    steps = len(sim.ledger)
    assert sim.server.status(sim.now).paused
    assert sim.printed("no host is ready")
    sim.run(1000)
    assert len(sim.ledger) == steps
    sim.add("c")
    sim.run_steps(5)
    assert not sim.server.status(sim.now).paused
    check_run(sim)


@all_modes
def test_row_08_losses_that_come_twice_count_once(config: Config) -> None:
    sim = run_with(config, "a", "b")
    message, body = losses_message(sim, sim.hosts["a"], QUANTUM)
    for _ in range(3 if config is not BUDGET_SUMS else 0):  # of what a host has handed in it makes no other sum
        reply = ask(sim, sim.hosts["a"], message, body)
        assert isinstance(reply, wire.Ok)
    sim.fate = lambda direction, host, message: [DELAY, 0.3, 2.0] if isinstance(message, wire.Losses) else [DELAY]
    sim.run_steps(5)
    assert sim.server.counters["messages no honest host sends"] == 0
    if not config.es.time_per_step:
        assert {closed.population for closed in sim.closed} == {2 * PAIRS}
    check_run(sim)


@all_modes
def test_row_09_losses_for_an_old_step_or_incarnation_are_rejected(config: Config) -> None:
    sim = run_with(config, "a")
    host = sim.hosts["a"]
    step = sim.server.step
    old, body = losses_message(sim, host, QUANTUM, step=step - 1)
    reply = ask(sim, host, old, body)
    assert isinstance(reply, wire.Rejected)
    assert (reply.step, reply.incarnation, reply.rejoin) == (step, 1, False)
    assert sim.server.counters["losses for an old step"] == 1
    other, body = losses_message(sim, host, QUANTUM, incarnation=0)
    reply = ask(sim, host, other, body)
    assert isinstance(reply, wire.Rejected)
    assert (reply.step, reply.incarnation, reply.rejoin) == (step, 1, True)
    assert sim.server.counters["messages no honest host sends"] == 0
    sim.run_steps(3)
    check_run(sim)


@all_modes
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step": 50}, id="future"),
        pytest.param({"spans": [(2**25 + PAIRS, QUANTUM)]}, id="never leased"),
        pytest.param({"spans": [(2**31 - 1, QUANTUM)]}, id="beyond everything"),
    ],
)
def test_row_10_losses_that_were_not_asked_for_are_a_strike(config: Config, changes: dict[str, object]) -> None:
    sim = run_with(config, "a", "b")
    host = sim.hosts["b"]
    for strike in range(STRIKES):
        assert status_of(sim, "b").state != "put aside"
        message, body = losses_message(sim, host, QUANTUM, **changes)
        reply = ask(sim, host, message, body)
        assert isinstance(reply, wire.Rejected)
        assert sim.server.counters["messages no honest host sends"] == strike + 1
    assert status_of(sim, "b").state == "put aside"
    sim.run_steps(3)
    assert host.worker.refused.startswith("put aside: ")
    check_run(sim)


@both_exchanges
def test_row_10_pairs_of_another_host_are_a_strike(sums: bool) -> None:
    sim = run_with(config_of(sums=sums), "a", "b")
    step = sim.server.step
    sim.run(0.05)
    theirs = next(pair for at, pair in sim.hosts["a"].device.scored if at == step)
    message, body = losses_message(sim, sim.hosts["b"], QUANTUM, spans=[(theirs - theirs % QUANTUM, QUANTUM)])
    reply = ask(sim, sim.hosts["b"], message, body)
    assert isinstance(reply, wire.Rejected)
    assert sim.server.counters["messages no honest host sends"] == 1


def spoil(values: dict[int, float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Make a device whose losses of some pairs are other ones."""

    def twist(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        changed = losses.copy()
        for pair, value in values.items():
            changed[pairs % PAIRS == pair, 1] = value
        return changed

    return twist


@all_modes
def test_row_11_losses_that_are_not_finite_weigh_nothing(config: Config) -> None:
    bad = {0: math.nan, 1: math.inf, 2: -math.inf, 3: 1e30}
    sim = Simulation(config)
    sim.add("a", twist=spoil(bad))
    sim.run_steps(3)
    check_updates(sim.updates, config, spoil(bad))
    for update, closed in zip(map(update_record.unpack_update, sim.updates), sim.closed, strict=True):
        is_bad = np.isin(update.pairs() % PAIRS, list(bad))
        if not config.es.sums(0):
            assert not update.weights[is_bad].any()
            assert update.weights[~is_bad].any()
        assert update.header.void_pairs == closed.void_pairs == is_bad.sum()
        assert 2 < closed.loss < 3
        assert update.header.loss == closed.loss


@both_exchanges
def test_row_11_a_step_of_mostly_bad_losses_is_void(sums: bool) -> None:
    bad = dict.fromkeys(range(PAIRS // 2 + 1), math.nan)
    sim = Simulation(config_of(sums=sums))
    sim.add("a", twist=spoil(bad))
    sim.run_steps(3)
    for update, closed in zip(map(update_record.unpack_update, sim.updates), sim.closed, strict=True):
        assert not update.header.applied
        assert not update.weights.size
        assert update.header.void_pairs == len(bad)
        assert "not finite" in closed.trouble
    assert sum("not finite; no update" in line for line in sim.lines) == 1
    assert sim.hosts["a"].device.step >= 2  # and training goes on
    check_updates(sim.updates, sim.config, spoil(bad))


@pytest.mark.parametrize("split", [False, True])
def test_row_45_one_pair_does_not_erase_the_others(split: bool) -> None:
    """Reference: the weights of the same losses if this pair were not finite, and so counted for nothing."""
    config, lie = config_of(split=split), 9
    sim = Simulation(config)

    def twist(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        return np.where((pairs == lie)[:, None], np.array([9e8, -9e8], np.float32), losses)

    for name in ("a", "b", "c"):
        sim.add(name, twist=twist)
    sim.run_steps(5)
    state = FIRST_STATE
    for payload in sim.updates:
        update = update_record.unpack_update(payload)
        losses = values_of(config, state, update.header.spans)
        losses[lie] = np.nan
        expected = shape(losses, examples=update.pairs() // 3 if split else None).weights
        others = update.pairs() != lie
        np.testing.assert_array_equal(update.weights[others], expected[others])
        assert np.count_nonzero(expected) > PAIRS / 2
        state = next_state(state, payload)
    assert [closed.outliers for closed in sim.closed] == [1] * 5


def test_row_12_equal_losses_change_nothing_and_are_reported() -> None:
    sim = Simulation(FIXED)
    sim.add("a", twist=lambda losses, pairs: np.full_like(losses, 2.5))
    sim.run_steps(3)
    for update in map(update_record.unpack_update, sim.updates):
        assert not update.header.applied
        assert update.header.loss == 2.5
    assert sum("equal; no update" in line for line in sim.lines) == 1


@all_modes
@pytest.mark.parametrize(
    ("change", "cut"),
    [
        pytest.param({}, slice(0, -8), id="one pair too few"),
        pytest.param({}, slice(0, -1), id="one byte too few"),
        pytest.param({}, slice(0, 0), id="none"),
        pytest.param({"dtype": "<f8"}, slice(None), id="dtype"),
        pytest.param({"dtype": "<f2"}, slice(None), id="half precision"),
    ],
)
def test_row_13_losses_of_the_wrong_number_or_type_are_rejected(
    config: Config, change: dict[str, object], cut: slice
) -> None:
    sim = run_with(config, "a", "b")
    message, body = losses_message(sim, sim.hosts["a"], QUANTUM, **change)
    reply = ask(sim, sim.hosts["a"], message, body[cut])
    assert isinstance(reply, wire.Rejected)
    assert sim.server.counters["messages no honest host sends"] == 1
    sim.run_steps(3)
    check_run(sim)


@all_modes
@pytest.mark.parametrize("final", [False, True])
def test_row_13_a_host_that_hands_in_no_losses_harms_no_other(config: Config, final: bool) -> None:
    sim = run_with(config, "a", "b")
    message, _ = losses_message(sim, sim.hosts["a"], QUANTUM, spans=[], final=final)
    ask(sim, sim.hosts["a"], message, b"")
    sim.run_steps(3)
    check_run(sim)


@pytest.mark.parametrize("config", [FIXED_SUMS, BUDGET_SUMS], ids=["fixed sums", "budget sums"])
@pytest.mark.parametrize(
    "tail",
    [
        pytest.param([QUANTUM + 1, 0, 0], id="more pairs than there are"),
        pytest.param([-1, 0, 0], id="fewer than none"),
        pytest.param([1, 0, -1], id="negative differences"),
    ],
)
def test_row_13_an_impossible_gradient_sum_is_rejected(config: Config, tail: list[int]) -> None:
    sim = run_with(config, "a", "b")
    message, _ = losses_message(sim, sim.hosts["a"], QUANTUM)
    body = np.array([0] * (VECTOR_LENGTH - TAIL) + tail, np.int32).tobytes()
    assert isinstance(ask(sim, sim.hosts["a"], message, body), wire.Rejected)
    assert sim.server.counters["messages no honest host sends"] == 1
    sim.run_steps(3)
    check_run(sim)


@pytest.mark.parametrize("config", [FIXED_SUMS, BUDGET_SUMS], ids=["fixed sums", "budget sums"])
def test_row_13_whatever_a_host_adds_the_updates_can_be_read(config: Config) -> None:
    class Mad(Device):
        def do(self, task: object) -> object:  # type: ignore[override]
            result, seconds = super().do(task)  # type: ignore[arg-type]
            if isinstance(task, Score) and isinstance(result, Scored):
                values = result.values.copy()
                values[:, :-TAIL] = rng.choice([-(2**31), 2**31 - 1, 0, 5], values[:, :-TAIL].shape)
                for row, (_, count) in zip(values, task.spans, strict=True):
                    row[-TAIL:] = rng.choice([0, count, 1]), *rng.choice([0, 2**26], 2)
                result = Scored(values, result.seconds)
            return result, seconds

    rng = np.random.default_rng(0)
    sim = Simulation(config)
    sim.add("a")
    sim.add("b", Mad())
    sim.run_steps(40)
    headers = [update_record.unpack_update(update).header for update in sim.updates]
    assert any(header.applied for header in headers)
    assert any(header.void_pairs for header in headers)
    assert "<i4" in {header.dtype for header in headers}
    assert all(0 <= header.void_pairs <= PAIRS * 10 for header in headers)
    assert not sim.hosts["a"].worker.failed
    assert sim.hosts["a"].device.step >= 39


PACK = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x91" * 200_000, id="deep array"),
        pytest.param(b"\x81" * 200_000, id="deep map"),
        pytest.param(b"\x92" + PACK("ask_status") + b"\x91" * 200_000, id="deep extra field"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="huge array"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="huge map"),
        pytest.param(b"\x9a" + PACK("losses") + PACK(1) * 3 + b"\xdd\xff\xff\xff\xff", id="huge list of spans"),
        pytest.param(b"\x99" + PACK("join") + b"\xdb\xff\xff\xff\xff", id="huge string"),
        pytest.param(b"\x99" + PACK("join") + b"\xc6\xff\xff\xff\xff", id="huge bytes"),
        pytest.param(b"\xc9\xff\xff\xff\xff\x01", id="huge extension"),
        pytest.param(b"\x82" + PACK("type") + PACK("join") + PACK("type") + PACK("beat"), id="duplicate keys"),
        pytest.param(PACK(["losses", 1, 1, 1, [[0, 1]] * (update_record.SPAN_LIMIT + 1), 1.0, False]), id="many spans"),
        pytest.param(PACK(["ask_status", 1]), id="extra field"),
        pytest.param(PACK(["ask_status"]) + b"x", id="trailing bytes"),
        pytest.param(PACK(["beat", 2**63, 1, 1, "ready", 1]), id="large number"),
        pytest.param(PACK(["beat", -1, 1, 1, "ready", 1]), id="negative number"),
        pytest.param(b"\x99" + PACK("join") + b"\xa2\xff\xfe", id="no text"),
        pytest.param(b"\0" * (wire.MAX_REQUEST_HEADER + 1), id="too long"),
    ],
)
def test_row_16_hostile_bytes_cost_nothing(data: bytes) -> None:
    frames = [wire.MARK + bytes([wire.VERSION]) + data]
    tracemalloc.start()
    try:
        with pytest.raises(wire.WireError):
            wire.decode(frames, "request")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@both_modes
def test_row_17_replayed_requests_are_harmless(config: Config) -> None:
    config = msgspec.structs.replace(config, checkpoint_time=2.0, evaluate_time=2.0)
    sim = Simulation(config)
    captured: list[list[bytes]] = []

    def capture(direction: str, host: str, frames: list[bytes]) -> list[bytes]:
        if direction == "request":
            captured.append(frames)
        return frames

    sim.tamper = capture
    sim.add("a")
    sim.add("b")
    sim.add("c")
    sim.run_steps(3)
    sim.hosts["c"].worker.leave("it was stopped")
    for _ in range(400):
        sim.run(0.05)
        for frames in sim.random.sample(captured, min(5, len(captured))):
            sim.server.receive(wire.decode(frames, "request"), sim.now)
            sim.carry_out()
    sim.run_steps(3)
    assert not sim.hosts["a"].worker.refused
    assert not sim.hosts["b"].worker.refused
    assert sim.server.counters["messages no honest host sends"] == 0
    assert len(sim.checkpoints) > 3
    check_run(sim)


def test_row_17_a_replayed_request_to_join_ends_no_session() -> None:
    sim = run_with(FIXED, "a")
    (join,) = sim.messages(wire.Join)
    reply = ask(sim, sim.hosts["a"], join)
    assert isinstance(reply, wire.Rejected)
    message, body = losses_message(sim, sim.hosts["a"], QUANTUM)
    assert isinstance(ask(sim, sim.hosts["a"], message, body), wire.Ok)


def test_row_17_a_replayed_goodbye_delays_no_host() -> None:
    sim = run_with(FIXED, "a", "b")
    joined = sim.hosts["b"].worker.joined
    assert joined is not None
    ask(sim, sim.hosts["b"], wire.Leave(joined.session, ""))
    sim.run_steps(5)
    assert status_of(sim, "b").state == "ready"
    check_run(sim)


@both_modes
def test_row_19_a_revoked_key_is_dropped_at_once(config: Config) -> None:
    sim = Simulation(config)
    sim.add("a", key="good")
    sim.add("b", key="bad")
    sim.run_steps(3)
    sim.run(0.1)
    sim.revoked.add("bad")
    sim.run(2 * BEAT)
    assert "revoked" in sim.hosts["b"].worker.refused
    assert sim.server.counters["revoked key"] == 1
    assert sim.printed("b is dropped: its key was revoked")
    sim.run_steps(3)
    assert [host.name for host in sim.server.status(sim.now).hosts] == ["a"]
    check_run(sim)


def test_row_19_a_session_belongs_to_a_key() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a", key="mine")
    sim.run_steps(1)
    host.key = "another"
    message, body = losses_message(sim, host, QUANTUM)
    reply = ask(sim, host, message, body)
    assert isinstance(reply, wire.Rejected)
    assert reply.rejoin


@both_modes
def test_row_21_of_two_hosts_of_one_name_the_newer_counts(config: Config) -> None:
    sim = run_with(config, "a", "b")
    older = sim.hosts.pop("b")
    sim.hosts["b, too"] = older
    older.name = "b, too"  # to the network
    sim.add("b")
    sim.run_steps(4)
    assert sim.printed("two hosts are called b; the newer one counts")
    assert "another host joined as 'b'" in older.worker.refused
    sim.run_steps(3)
    assert status_of(sim, "b").state == "ready"
    check_run(sim)


def test_row_21_a_host_that_asks_twice_is_one_host() -> None:
    sim = Simulation(FIXED)
    sim.fate = lambda direction, host, message: [] if isinstance(message, wire.Welcome) and sim.now < 5 else [DELAY]
    sim.add("a")
    sim.run_steps(3)
    assert sim.lines == ["a joins: fake"] * 2
    assert len(sim.server.status(sim.now).hosts) == 1


def test_row_22_another_version_is_refused_and_both_are_named() -> None:
    sim = Simulation(FIXED)
    theirs = wire.VERSION + 1

    def speak(direction: str, host: str, frames: list[bytes]) -> list[bytes]:
        return [wire.MARK + bytes([theirs]) + b"what a later version says"] if direction == "request" else frames

    sim.tamper = speak
    host = sim.add("a")
    sim.run(1)
    assert f"version {theirs} of the protocol, the coordinator {wire.VERSION}" in host.worker.refused
    assert sim.server.counters["other protocol version"] == 1


def test_row_23_another_noise_is_refused_with_both_values() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a", known_answers={"rademacher": "abcd", "gaussian": "1"})
    sim.run(1)
    assert "rademacher (abcd, not 1234)" in host.worker.refused
    assert not sim.server.status(sim.now).hosts


@pytest.mark.parametrize("name", ["rademacher", "gaussian", "windows", "parameters", "sampling"])
def test_row_54_other_draws_are_refused_with_what_differs_and_the_flags(name: str) -> None:
    """Gaussian noise counts only where a run uses it: its last bits differ between processors."""
    right = {"rademacher": "1", "gaussian": "2", "windows": "3", "parameters": "4", "sampling": "5"}
    terms = Terms(run="r", incarnation=1, quantum=2, vocab_size=3, known_answers=right, custom={})

    def answer(wrong: dict[str, str], flags: str, noise: str = "gaussian") -> str:
        return terms.objection(wire.Join("a", "", "", [*(right | wrong).items()], [], "", 0, 0, flags), noise)

    assert answer({}, "jax_enable_x64") == ""
    assert bool(answer({name: "0"}, "", "rademacher")) == (name != "gaussian")
    refusal = answer({name: "0"}, "jax_enable_x64")
    assert f"this host draws other numbers than the coordinator: {name} (0, not {right[name]})" in refusal
    assert "this host sets jax_enable_x64" in refusal
    assert "sets" not in answer({name: "0"}, "")


def test_row_23_custom_parts_of_the_run_are_needed() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a", custom={"model": "mine"})
    sim.run(1)
    assert "no custom parts" in host.worker.refused


@both_exchanges
def test_row_24_a_replica_that_differs_fetches_the_right_state(sums: bool) -> None:
    config = config_of(digest_interval=5, checkpoint_time=4, sums=sums)
    sim = run_with(config, "a", "b", "c")
    wrong = sim.hosts["c"].device
    wrong.state = wrong.state[:8] + b"w" * (STATE_BYTES - 8)
    sim.run_steps(30)
    assert wrong.loaded
    assert sim.printed("the state of c differs")
    assert status_of(sim, "c").state == "ready"
    states = {host.device.step: host.device.state for host in sim.hosts.values()}
    assert all(states[host.device.step] == host.device.state for host in sim.hosts.values())
    check_checkpoints(sim)


@both_exchanges
@pytest.mark.parametrize("delay", [DELAY, 3.0], ids=["before", "after"])
def test_row_24_losses_of_a_wrong_replica_do_not_count(delay: float, sums: bool) -> None:
    """Not from the step on at which it is found out, be they handed in before or after that."""
    sim = run_with(config_of(digest_interval=6, sums=sums), "a", "b", "c", steps=4)
    wrong = sim.hosts["c"].device
    wrong.state = wrong.state[:8] + b"w" * (STATE_BYTES - 8)

    def fate(direction: str, host: str, message: wire.Message) -> list[float]:
        if host == "c":
            return [delay] if isinstance(message, wire.Losses) else [DELAY]
        return [1.2] if isinstance(message, wire.Digest) else [DELAY]

    sim.fate = fate
    sim.run_steps(12)
    (found,) = [step for step, _ in sim.digests[:1]]
    state = FIRST_STATE
    for update in sim.updates[:found]:
        state = next_state(state, update)
    check_updates(sim.updates[found:], sim.config, state=state)
    assert wrong.loaded


def test_row_24_a_host_that_fetches_half_a_state_must_fetch_it_when_it_is_back() -> None:
    """Its losses count only after it has the right state, and it gets no pairs before it reports that it is ready."""
    sim = Simulation(config_of(digest_interval=5, checkpoint_time=4.0), snapshot_bytes=3 * wire.PART)
    for name in ("a", "b", "c"):
        sim.add(name)
    sim.run_steps(8)
    wrong = sim.hosts["c"]
    wrong.device.state = wrong.device.state[:8] + b"w" * (STATE_BYTES - 8)
    fetched = len(sim.messages(wire.Fetch, "c"))
    sim.fate = lambda way, host, message: [0.5] if isinstance(message, wire.Part) else [DELAY]
    sim.run(60, lambda: len(sim.messages(wire.Fetch, "c")) == fetched + 2)  # of three parts
    host = next(host for host in sim.server._registry if host.name == "c")
    assert host.resync
    wrong.worker._is_astray = False  # it forgets that its state is wrong
    wrong.worker._supplies.give_up()
    loaded = len(wrong.device.loaded)
    sim.run_steps(20)
    assert len(wrong.device.loaded) == loaded + 1
    assert status_of(sim, "c").state == "ready"
    assert wrong.device.state == sim.hosts["a"].device.state or wrong.device.step != sim.hosts["a"].device.step
    assert not host.resync
    check_checkpoints(sim)


def check_checkpoints(sim: Simulation) -> None:
    """Check that every snapshot and digest is that of a replay."""
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for snapshot in sim.checkpoints:
        assert snapshot.data[:STATE_BYTES] == states[snapshot.step]
    for step, digest in sim.digests:
        assert digest == hash_state(states[step])


def test_row_24_a_wrong_reference_host_is_outvoted_and_not_kept() -> None:
    config = config_of(checkpoint_time=4)
    sim = run_with(config, "a", "b", "c")
    wrong = sim.hosts["a"].device
    wrong.state = wrong.state[:8] + b"w" * (STATE_BYTES - 8)
    sim.run_steps(30)
    assert len(sim.checkpoints) > 3
    check_checkpoints(sim)
    assert wrong.loaded
    states = {host.device.step: host.device.state for host in sim.hosts.values()}
    assert all(states[host.device.step] == host.device.state for host in sim.hosts.values())


def test_row_24_a_replica_that_differs_again_and_again_is_put_aside() -> None:
    class Broken(Device):
        def do(self, task: object) -> object:  # type: ignore[override]
            result = super().do(task)  # type: ignore[arg-type]
            self.state = self.state[:-1] + b"w"
            return result

    config = config_of(digest_interval=5, checkpoint_time=4)
    sim = Simulation(config)
    sim.add("a")
    sim.add("b")
    sim.add("c", Broken())
    sim.run_steps(60)
    status = status_of(sim, "c")
    assert status.state == "put aside"
    assert "its state differs from the others' again and again" in status.note
    assert "put aside" in sim.hosts["c"].worker.refused
    check_checkpoints(sim)


def test_row_24_other_hardware_fetches_the_state_of_every_checkpoint() -> None:
    """It rounds differently, which is no fault."""

    class Other(Device):
        def do(self, task: object) -> object:  # type: ignore[override]
            result = super().do(task)  # type: ignore[arg-type]
            if type(task).__name__ == "Apply":
                self.state = self.state[:-1] + b"o"
            return result

    # Losses of the simulation follow from a hash of the state, so they differ by more than those of real hardware.
    config = config_of(checkpoint_time=4, spot_check=0.0)
    sim = Simulation(config)
    sim.add("a")
    sim.add("b", Other(), kind="other")
    sim.run_steps(60)
    assert len(sim.hosts["b"].device.loaded) > 3
    assert status_of(sim, "b").state == "ready"
    check_checkpoints(sim)


def lie(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return losses + np.where(pairs % 2, [[0.1], [-0.1]], 0.0).astype(np.float32).T


@both_exchanges
@pytest.mark.parametrize("liar", ["a", "b", "c"])
def test_row_25_nothing_that_a_liar_says_counts(liar: str, sums: bool) -> None:
    config = config_of(spot_check=1.0, sums=sums)
    sim = Simulation(config)
    for name in ("a", "b", "c"):
        sim.add(name, twist=lie if name == liar else None)
    sim.run_steps(10)
    assert status_of(sim, liar).state == "put aside"
    assert f"its {'gradient sums' if sums else 'losses'} differ" in status_of(sim, liar).note
    assert "put aside" in sim.hosts[liar].worker.refused
    assert {host.state for host in sim.server.status(sim.now).hosts if host.name != liar} == {"ready"}
    check_run(sim)


@both_exchanges
def test_row_25_a_sample_finds_a_liar_in_time(sums: bool) -> None:
    sim = Simulation(config_of(spot_check=0.3, sums=sums))
    for name in ("a", "b", "c"):
        sim.add(name, twist=lie if name == "c" else None)
    sim.run_steps(30)
    assert status_of(sim, "c").state == "put aside"


@pytest.mark.parametrize("kind", [wire.Step, wire.Extra, wire.Pulse])
@all_modes
def test_row_26_a_missed_broadcast_is_caught_up(config: Config, kind: type[wire.Message]) -> None:
    """The devices of the simulation see that nothing is made out of order."""
    sim = run_with(config, "a", "b")
    missed = sim.server.step + 2
    sim.fate = lambda direction, host, message: (
        [] if host == "b" and isinstance(message, kind) and getattr(message, "step", 0) == missed else [DELAY]
    )
    sim.run_steps(8)
    assert sim.hosts["b"].device.step >= len(sim.ledger) - 1
    check_run(sim)


@all_modes
def test_row_26_a_host_alone_goes_on_without_broadcasts(config: Config) -> None:
    sim = run_with(config, "a")
    sim.fate = lambda direction, host, message: [] if direction == "broadcast" else [DELAY]
    sim.run_steps(10)
    assert sim.now < 100
    check_run(sim)


@all_modes
@pytest.mark.parametrize("seed", range(3))
def test_row_26_whatever_is_lost_delayed_or_doubled(config: Config, seed: int) -> None:
    config = msgspec.structs.replace(config, checkpoint_time=5.0, evaluate_time=5.0)
    sim = Simulation(config, seed=seed)

    def fate(direction: str, host: str, message: wire.Message) -> list[float]:
        copies = sim.random.choices([0, 1, 2], [0.1, 0.8, 0.1])[0]
        return [sim.random.choices([DELAY, sim.random.random(), 5.0], [0.8, 0.15, 0.05])[0] for _ in range(copies)]

    sim.fate = fate
    for name in ("a", "b", "c"):
        sim.add(name)
    sim.run_steps(30, limit=2000)
    assert sim.server.counters["messages no honest host sends"] == 0
    sim.fate = lambda direction, host, message: [DELAY]
    sim.run(60)
    assert {host.worker.phase for host in sim.hosts.values()} == {"ready"}
    check_run(sim)
    check_checkpoints(sim)


def test_row_27_a_hundred_joining_hosts_do_not_delay_the_others() -> None:
    sim = Simulation(FIXED, snapshot_bytes=3 * wire.PART)
    sim.add("a")
    sim.add("b")
    sim.run_steps(5)
    usual = sim.now
    sim.run_steps(5)
    usual = sim.now - usual
    before, requests = sim.now, len(sim.log)
    for number in range(100):
        sim.add(f"joiner {number}", compile_seconds=5.0)
    sim.run_steps(5)
    assert sim.now - before < 1.5 * usual
    sim.run(10)
    assert all(host.worker.phase == "ready" for host in sim.hosts.values())
    asked = [message for _, direction, _, message in sim.log[requests:] if direction == "request"]
    fetched = sum(isinstance(message, wire.Fetch) for message in asked)
    assert fetched == 100 * (1 + 3)  # the text, and each part of the snapshot, once
    sim.run_steps(5)
    check_run(sim)


def test_row_27_a_step_of_a_hundred_hosts_costs_each_a_few_messages() -> None:
    sim = Simulation(config_of(population=2 * 100 * QUANTUM))
    for number in range(100):
        sim.add(f"host {number}", speed=50.0)
    sim.run(1.5)
    before, sent = len(sim.log), dict(sim.bytes_sent)
    steps = 4
    sim.run_steps(steps)
    messages = len(sim.log) - before
    assert messages < steps * 100 * 4
    pairs = 100 * QUANTUM
    assert sim.bytes_sent["request"] - sent["request"] < steps * (8 * pairs + 100 * 100)
    down = sim.bytes_sent["broadcast"] - sent["broadcast"]
    assert down < steps * 100 * (pairs + 100 * 20 + 200)


@pytest.mark.parametrize("direction", ["request", "reply"])
def test_row_28_an_interrupted_snapshot_is_resumed(direction: str) -> None:
    parts = 6
    sim = Simulation(FIXED, snapshot_bytes=parts * wire.PART)
    sim.add("a")
    sim.run_steps(2)
    joiner = sim.add("b")
    sim.run(30, lambda: sum(m.what == "state" for m in sim.messages(wire.Fetch, "b")) == 3)
    joiner.cut = {direction}
    sim.run(25)
    joiner.cut = set()
    sim.run_steps(30)
    assert joiner.worker.phase == "ready"
    offsets = [message.offset for message in sim.messages(wire.Fetch, "b") if message.what == "state"]
    assert sorted(set(offsets)) == [number * wire.PART for number in range(parts)]
    assert offsets == sorted(offsets)  # never from the beginning
    check_run(sim)


def test_row_28_a_snapshot_is_resumed_with_a_new_coordinator() -> None:
    parts = 6
    sim = Simulation(FIXED, snapshot_bytes=parts * wire.PART)
    sim.add("a")
    sim.run_steps(2)
    joiner = sim.add("b")
    sim.run(30, lambda: sum(m.what == "state" for m in sim.messages(wire.Fetch, "b")) == 3)
    sim.kill()
    sim.start()
    sim.run_steps(5)
    sim.run(10)
    assert joiner.worker.phase == "ready"
    offsets = [message.offset for message in sim.messages(wire.Fetch, "b") if message.what == "state"]
    assert offsets == sorted(offsets)
    check_run(sim)


@pytest.mark.parametrize("what", ["download", "upload"])
def test_row_28_a_damaged_snapshot_is_taken_again(what: str) -> None:
    sim = Simulation(config_of(checkpoint_time=3), snapshot_bytes=3 * wire.PART)
    damaged = 0

    def damage(direction: str, host: str, frames: list[bytes]) -> list[bytes]:
        nonlocal damaged
        if damaged or len(frames) == 1 or direction == "broadcast":
            return frames
        message = wire.decode(frames, "request" if direction == "request" else "reply").message
        is_state = isinstance(message, wire.Upload if what == "upload" else wire.Part) and message.size > wire.PART
        if not is_state or message.offset != wire.PART:  # type: ignore[attr-defined]
            return frames
        damaged += 1
        return [frames[0], frames[1][:-1] + b"?"]

    sim.tamper = damage
    sim.add("a")
    sim.run_steps(10)
    assert damaged == 1
    assert sim.printed("arrived damaged") == (what == "upload")
    assert len(sim.checkpoints) > 2
    check_run(sim)
    check_checkpoints(sim)


@all_modes
def test_row_29_updates_that_come_while_a_snapshot_loads_are_made_once(config: Config) -> None:
    sim = Simulation(msgspec.structs.replace(config, checkpoint_time=5.0), snapshot_bytes=3 * wire.PART)
    sim.add("a")
    sim.run_steps(15)
    sim.fate = lambda direction, host, message: [0.4] if isinstance(message, wire.Part) else [DELAY]
    joiner = sim.add("b", load_seconds=3.0)
    sim.run_steps(20)
    (loaded,) = joiner.device.loaded
    assert loaded > 0
    assert joiner.device.made == list(range(loaded, joiner.device.step))
    assert joiner.worker.phase == "ready"
    check_run(sim)


def test_row_30_no_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only time is the one that is passed in."""

    def read() -> float:
        raise AssertionError("a clock was read")

    for clock in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "localtime"):
        monkeypatch.setattr(time, clock, read)
    sim = Simulation(config_of(checkpoint_time=3, evaluate_time=3, digest_interval=3))
    sim.add("a")
    sim.add("b")
    sim.run_steps(10)
    sim.kill_host("b")
    sim.run_steps(10)
    sim.server.status(sim.now)
    check_run(sim)


def test_row_35_an_old_coordinator_is_ignored() -> None:
    sim = run_with(FIXED, "a", "b", steps=5)
    old = sim.server
    sim.kill()
    sim.start()
    sim.run_steps(5)
    old.stop(sim.now, done=True)
    old.tick(sim.now)
    old.tick(sim.now + 100)
    voices = [action.envelope for action in old.drain() if isinstance(action, Publish)]
    assert any(isinstance(voice.message, wire.Bye) for voice in voices)
    for host in sim.hosts.values():
        for voice in voices:
            host.worker.receive(voice, sim.now)
    # For a while it answers, too.
    new = sim.server
    sim.coordinator = old
    old.drain()
    sim.run(15)
    assert not old.drain()
    sim.coordinator = new
    for steps in (0, 5):
        sim.run_steps(steps)
        for host in sim.hosts.values():
            assert host.worker.joined is not None
            assert host.worker.joined.incarnation == 2
    check_run(sim)


@all_modes
def test_row_36_a_worker_that_is_stopped_hands_in_what_it_has(config: Config) -> None:
    sim = run_with(config, "a", "b", speed=10.0)
    sim.run_steps(1)
    sim.run(0.5)
    step, leaver = sim.server.step, sim.hosts["b"]
    leaver.worker.leave("it was stopped")
    sim.run(5, lambda: leaver.worker.left)
    assert leaver.worker.left
    assert sim.printed("b leaves: it was stopped")
    assert [host.name for host in sim.server.status(sim.now).hosts] == ["a"]
    finished = {pair for at, pair in leaver.device.scored if at == step}
    assert finished
    before = set(sim.hosts["a"].device.scored)
    sim.run_steps(1)
    if not config.es.time_per_step:
        again = {pair for at, pair in set(sim.hosts["a"].device.scored) - before if at == step}
        assert again
        assert not again & finished
    else:
        named = update_record.unpack_update(sim.updates[step]).pairs().tolist()
        assert finished <= set(named)
    sim.run_steps(2)
    check_run(sim)


@both_modes
def test_row_36_a_coordinator_that_is_stopped_keeps_the_newest_state(config: Config) -> None:
    sim = run_with(config, "a", "b", steps=5)
    step = sim.server.step
    sim.server.stop(sim.now, done=False)
    sim.run(10, lambda: sim.server.finished)
    assert sim.server.finished
    assert len(sim.ledger) == step
    assert sim.checkpoints[-1].step == step
    assert sim.digests[-1][0] == step
    assert sim.server.audits.measured.held_out == 1 + 1 / (1 + step)
    assert isinstance(sim.messages(wire.Bye, "a")[-1], wire.Bye)
    check_checkpoints(sim)
    sim.kill()
    sim.run(30)
    sim.start()
    sim.run_steps(5)
    check_run(sim)


@both_modes
def test_row_38_a_hung_process_is_noticed_though_its_socket_lives(config: Config) -> None:
    sim = run_with(config, "a", "b")
    sim.run_steps(1)
    sim.hosts["b"].device.hung = True
    since = sim.now
    sim.run(100, lambda: status_of(sim, "b").state == "straggling")
    sim.run_steps(1)
    assert sim.now - since < STUCK
    assert status_of(sim, "b").last_seen < 2 * BEAT
    sim.run_steps(5)
    sim.hosts["b"].device.hung = False
    sim.run(120)
    assert status_of(sim, "b").state == "ready"
    check_run(sim)


@both_modes
def test_row_38_the_only_host_hangs_and_comes_back(config: Config) -> None:
    sim = run_with(config, "a")
    sim.hosts["a"].device.hung = True
    sim.run(STUCK + 5)
    assert sim.printed("a is hung")
    assert sim.server.status(sim.now).paused
    sim.hosts["a"].device.hung = False
    sim.run_steps(3)
    check_run(sim)


def test_row_38_the_pairs_of_a_hung_host_are_given_to_others_at_work() -> None:
    sim = run_with(FIXED, "a", "b")
    for host in sim.hosts.values():
        host.device.speed = 0.3
    sim.run_steps(1)
    sim.hosts["b"].device.hung = True
    before = len(sim.log)
    sim.run(STUCK + 3)
    extra = [m for _, _, host, m in sim.log[before:] if isinstance(m, wire.Extra) and host == "a"]
    assert any(slot == 0 for message in extra for slot, _, _ in message.leases)
    assert sim.printed("b is hung")


@both_modes
@pytest.mark.parametrize("seconds", [10.0, 60.0, 300.0])
def test_row_38_a_stopped_process_comes_back(config: Config, seconds: float) -> None:
    sim = run_with(config, "a", "b")
    sim.hosts["b"].running = False
    before = len(sim.ledger)
    sim.run(seconds)
    assert len(sim.ledger) > before + seconds / (2 * STEP) - 3
    sim.hosts["b"].running = True
    sim.run(60)
    assert status_of(sim, "b").state == "ready"
    check_run(sim)


@both_modes
def test_row_39_compiling_is_not_death(config: Config) -> None:
    sim = run_with(config, "a")
    slow = sim.add("b", compile_seconds=400.0)
    sim.run(350)
    assert status_of(sim, "b").state == "compiling"
    assert not sim.printed("b is lost")
    assert not sim.printed("b is hung")
    sim.run(100)
    assert slow.worker.phase == "ready"
    sim.run_steps(5)
    assert slow.device.scored
    check_run(sim)


@both_exchanges
def test_row_39_a_halved_chunk_still_hands_in_whole_quanta(sums: bool) -> None:
    sim = Simulation(config_of(sums=sums))
    sim.add("a", device_batch=1, speed=3.0)
    sim.add("b", device_batch=3 * QUANTUM, speed=8.0)
    sim.run_steps(5)
    assert sim.server.counters["messages no honest host sends"] == 0
    check_run(sim)


def test_row_40_a_text_that_came_in_wrong_is_refused_by_its_hash() -> None:
    sim = Simulation(FIXED)
    sim.tamper = lambda direction, host, frames: [
        TEXT.replace(b"all", b"any") if frame == TEXT else frame for frame in frames
    ]
    host = sim.add("a")
    sim.run(5)
    assert host.worker.failed == "the text has another hash"
    assert host.worker.left


def test_row_40_a_host_with_another_text_stays_out() -> None:
    sim = run_with(FIXED, "a")
    sim.kill()
    sim.text = b"another text"
    sim.start()
    sim.run(30)
    assert f"the run {RUN} now has another text" in sim.hosts["a"].worker.refused


def test_row_40_another_text_is_not_handed_out() -> None:
    sim = run_with(FIXED, "a")
    joined = sim.hosts["a"].worker.joined
    assert joined is not None
    reply = ask(sim, sim.hosts["a"], wire.Fetch(joined.session, "text", "another hash", 0))
    assert isinstance(reply, wire.Rejected)
    assert "another text" in reply.reason
