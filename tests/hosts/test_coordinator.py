"""The coordinator continues, whichever messages hosts send or leave out."""

import random
from contextlib import suppress
from functools import partial

import msgspec
import numpy as np
import pytest
from fault_runs import BUDGET, BUDGET_SUMS, FIXED, FIXED_SUMS, all_modes, both_modes
from hosts_simulation import (
    DELAY,
    FIRST_STATE,
    KNOWN_ANSWERS,
    QUANTUM,
    RUN,
    SCALE,
    VECTOR_LENGTH,
    Device,
    Simulation,
    check_updates,
    config_of,
    next_state,
    values_of,
)
from hosts_simulation import body_of as bytes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import pass_messages
from storms import Sent, body_of, requests, volume

from esjax.config.settings import Config
from esjax.data.delivery import PackedText
from esjax.exchange import update_record
from esjax.exchange.values import make_exchange
from esjax.hosts.coordination.audits import GRACE
from esjax.hosts.coordination.coordinator import LAST_ROUND, Coordinator
from esjax.hosts.coordination.registry import FORGET, MAX_HOSTS, SILENT
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Closed, Publish, Record, Snapshot, Terms
from esjax.hosts.protocol.tasks import Apply
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import Worker

DIRECTIONS = ["request", "reply", "broadcast"]
EXAMPLES = 8
"""Of simulations that take long."""


# Alone, with a clock that stands still.


@all_modes
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("device_batch", [1, QUANTUM, 100])
def test_a_host_alone_needs_no_time_to_pass(config: Config, block: int | None, device_batch: int) -> None:
    data = config_of(block_interval=block).data
    config = msgspec.structs.replace(config, data=data)
    coordinator = Coordinator(
        config,
        Terms(
            "",
            1,
            QUANTUM,
            0,
            {},
            {},
            exchange=make_exchange(VECTOR_LENGTH if config.es.exchange == "sums" else 0, SCALE),
        ),
        step=0,
        now=0.0,
        rng=np.random.default_rng(0),
        text=PackedText(b"", 0, ""),
        block=None if block is None else (lambda number: bytes([number]) * 64),
        with_audits=False,
    )
    worker = Worker("alone", "", "", {}, {}, now=0.0, jitter=lambda: 0.0, built=True, step=0, device_batch=device_batch)
    device = Device(speed=50.0)
    device.config = config
    updates: list[bytes] = []
    closed: list[Closed] = []
    tasks = 0
    while device.step < 7:
        for action in pass_messages(coordinator, worker, 0.0):
            if isinstance(action, Record):
                updates.append(action.payload)
            elif isinstance(action, Closed):
                closed.append(action)
        task = worker.task()
        assert task is not None
        if isinstance(task, Apply):
            assert len(updates) > device.step  # what is made was recorded
        worker.finished(device.do(task)[0], 0.0)
        tasks += 1
        assert tasks < 1000
    assert len(updates) == len(closed) == 7
    check_updates(updates, config)
    if block is not None:
        assert device.blocks_used == {step: bytes([step // block]) * 64 for step in range(7)}


# Liveness.


@pytest.mark.parametrize("lost", [0.3, 0.6])
@pytest.mark.parametrize("direction", DIRECTIONS)
@both_modes
def test_training_goes_on_though_messages_are_lost(config: Config, direction: str, lost: float) -> None:
    sim = Simulation(config)
    sim.fate = lambda way, host, message: [] if way == direction and sim.random.random() < lost else [DELAY]
    sim.add("a")
    sim.run_steps(6, limit=2000)
    check_updates(sim.updates, config)


CALAMITIES = st.lists(
    st.tuples(
        st.sampled_from(["kill", "join", "cut", "heal", "hang", "wake", "stop", "go on", "restart", "slow", "leave"]),
        st.integers(0, 2),
        st.sampled_from(DIRECTIONS),
        st.floats(0.1, 20),
    ),
    max_size=10,
)


@both_modes
@settings(max_examples=EXAMPLES, deadline=None)
@given(CALAMITIES)
def test_training_goes_on_after_any_calamity(config: Config, calamities: list[tuple[str, int, str, float]]) -> None:
    hosts = config_of(spot_check=0.2, digest_interval=7).hosts
    config = msgspec.structs.replace(config, checkpoint_time=10.0, evaluate_time=7.0, hosts=hosts)
    sim = Simulation(config)
    sim.add("0")
    for what, number, direction, seconds in calamities:
        host = sim.hosts.get(str(number))
        if what == "join" and (host is None or host.over):
            sim.add(str(number))
        elif what == "restart":
            sim.kill()
            sim.run(min(seconds, 5.0))
            sim.start()
        elif host is None:
            pass
        elif what == "kill":
            sim.kill_host(str(number))
        elif what == "cut":
            host.cut.add(direction)
        elif what == "heal":
            host.cut.clear()
        elif what == "hang" or what == "wake":
            host.device.hung = what == "hang"
        elif what == "stop" or what == "go on":
            host.running = what == "go on"
        elif what == "slow":
            host.device.speed = 20.0 if host.device.speed < 20 else 1.0
        elif what == "leave":
            host.worker.leave("it was stopped")
        sim.run(seconds)
    for host in sim.hosts.values():
        host.cut.clear()
        host.device.hung, host.running, host.device.speed = False, True, 20.0
    if all(host.worker.leaving or host.over for host in sim.hosts.values()):
        sim.add("last")
    sim.run_steps(5, limit=60)
    assert not any(host.worker.refused for host in sim.hosts.values())
    check_updates(sim.updates, config)
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for snapshot in sim.checkpoints:
        assert snapshot.data == states[snapshot.step]


def test_a_host_that_fetches_the_state_gives_its_pairs_to_others() -> None:
    sim = Simulation(config_of(digest_interval=2))
    for name in ("a", "b", "c"):
        sim.add(name, load_seconds=1000.0 if name == "c" else 0.0)
    sim.run_steps(3)
    wrong = sim.hosts["c"].device
    wrong.state = wrong.state[:8] + b"w" * 32
    sim.run_steps(10, limit=100)


@both_modes
def test_a_block_that_changes_while_it_is_fetched(config: Config) -> None:
    config = msgspec.structs.replace(config, data=config_of(block_interval=2).data)
    sim = Simulation(config)
    sim.add("a")
    slow = sim.add("b")
    sim.run_steps(3)
    is_block = lambda message: isinstance(message, wire.Part) and message.size == 64  # noqa: E731
    sim.fate = lambda way, host, message: [7.0] if host == "b" and is_block(message) else [DELAY]
    sim.run_steps(30)
    sim.fate = lambda way, host, message: [DELAY]
    sim.run(100)
    for host in sim.hosts.values():
        assert host.device.blocks_used
        for step, block in host.device.blocks_used.items():
            assert block == bytes([step // 2]) * 64
    assert max(slow.device.blocks_used) > 34
    check_updates(sim.updates, config)


# Checkpoints, digests, evaluations.


def with_audits(*names: str, seconds: float = 5.0) -> Simulation:
    sim = Simulation(config_of(checkpoint_time=seconds, evaluate_time=seconds), snapshot_bytes=3 * wire.PART)
    for name in names:
        sim.add(name)
    sim.run_steps(3)
    return sim


def until_upload(sim: Simulation) -> str:
    """Run until the first part of a snapshot has come, and name the reference host."""
    before = len(sim.messages(wire.Upload))
    sim.run(60, lambda: len(sim.messages(wire.Upload)) > before)
    return next(name for _, _, name, message in reversed(sim.log) if isinstance(message, wire.Upload))


@pytest.mark.parametrize(
    ("how", "seconds"), [("kill", SILENT), ("leave", 0.0), ("cut", SILENT), ("mute", GRACE)], ids=str
)
def test_another_host_takes_over_from_a_reference_host(how: str, seconds: float) -> None:
    sim = with_audits("a", "b", seconds=40.0)
    sim.fate = lambda way, host, message: [1.0] if isinstance(message, wire.Upload) else [DELAY]
    reference = sim.hosts[until_upload(sim)]
    assert reference.name == "a"
    stored = len(sim.checkpoints)
    if how == "kill":
        sim.kill_host("a")
    elif how == "leave":
        reference.worker.leave("it was stopped")
    elif how == "cut":
        reference.cut = {"request"}
    else:
        sim.fate = lambda way, host, message: [] if host == "a" and isinstance(message, wire.Upload) else [DELAY]
    sim.run(seconds + 8)  # long before the next one is due
    assert len(sim.checkpoints) > stored
    assert sim.server.status(sim.now).reference == 1
    assert sim.server.audits.measured.held_out is not None
    check_snapshots(sim)


def check_snapshots(sim: Simulation) -> None:
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for snapshot in sim.checkpoints:
        assert snapshot.data.rstrip(b"+") == states[snapshot.step].rstrip(b"+")
    check_updates(sim.updates, sim.config)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_interrupted_upload_goes_on_or_is_made_again(direction: str) -> None:
    sim = with_audits("a")
    sim.fate = lambda way, host, message: [0.5] if isinstance(message, wire.Upload) else [DELAY]
    until_upload(sim)
    stored = len(sim.checkpoints)
    sim.hosts["a"].cut = {direction}
    sim.run(15)
    sim.hosts["a"].cut = set()
    sim.run(60)
    assert len(sim.checkpoints) > stored + 1
    assert not sim.printed("damaged")
    check_snapshots(sim)


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({"size": 3 * wire.PART + 1}, bytes(wire.PART)),
        ({"size": 2**40}, bytes(wire.PART)),
        ({"offset": wire.PART}, bytes(wire.PART)),
        ({"step": 10**6}, bytes(wire.PART)),
        ({}, b""),
        ({}, bytes(wire.PART + 1)),
        ({"offset": 3 * wire.PART - 1}, bytes(2)),
    ],
    ids=["size", "huge", "gap", "step", "empty", "too much", "beyond the end"],
)
def test_parts_that_do_not_belong_to_the_snapshot_are_rejected(changes: dict[str, int], body: bytes) -> None:
    sim = with_audits("a", "b")
    sim.fate = lambda way, host, message: [] if isinstance(message, wire.Upload) else [DELAY]
    until_upload(sim)
    (upload, *_) = sim.messages(wire.Upload)
    reply = sim.server.receive(Envelope(msgspec.structs.replace(upload, **changes), body), sim.now).message
    assert isinstance(reply, wire.Rejected)
    assert sim.server.counters["messages no honest host sends"] == 0


def test_only_the_current_blocks_are_handed_out() -> None:
    sim = Simulation(config_of(block_interval=2))
    host = sim.add("a")
    sim.run_steps(10)
    joined = host.worker.joined
    assert joined is not None
    for block, is_there in ((4, True), (5, True), (6, True), (2, False), (8, False), (2**32 - 1, False)):
        fetch = wire.Fetch(joined.session, "block", "", 0, block)
        assert isinstance(sim.server.receive(Envelope(fetch), sim.now).message, wire.Part) == is_there


def test_a_round_ends_without_a_host_that_left() -> None:
    sim = with_audits("a", "b", "c")
    sim.fate = lambda way, host, message: [] if host == "b" and isinstance(message, wire.Digest) else [DELAY]
    stored = len(sim.checkpoints)
    until_upload(sim)
    sim.kill_host("b")
    sim.run(GRACE + 5)
    assert len(sim.checkpoints) > stored


def test_a_snapshot_is_kept_only_when_digests_have_shown_it_to_be_right() -> None:
    sim = with_audits("a", "b", "c")
    sim.fate = lambda way, host, message: [3.0] if host == "b" and isinstance(message, wire.Digest) else [DELAY]
    stored = len(sim.checkpoints)
    until_upload(sim)
    sim.run(2)
    assert len(sim.checkpoints) == stored
    sim.run(3)
    assert len(sim.checkpoints) == stored + 1
    assert sim.digests[-1][0] == sim.checkpoints[-1].step


def test_a_disk_that_fails_stops_no_training() -> None:
    sim = with_audits("a", "b")
    sim.store_fails = True
    sim.run(30)
    assert len(sim.checkpoints) == 1
    sim.store_fails = False
    sim.run(10)
    assert len(sim.checkpoints) > 1
    check_snapshots(sim)


def test_a_state_that_the_disk_does_not_take_at_the_end_is_not_taken_for_kept() -> None:
    """The state is asked for once, and the goodbye does not wait for it; a restart keeps it."""
    sim = with_audits("a", "b", seconds=1e6)
    sim.store_fails = True
    step = sim.server.step
    sim.server.stop(sim.now, done=False)
    before = sim.now
    sim.run(60, lambda: sim.server.finished)
    assert sim.now - before < 5
    assert {message.step for message in sim.messages(wire.Upload)} == {step}
    assert sim.server.audits.plan(step, sim.now, last=True).upload is None
    assert sim.server.audits._kept_step == 0
    sim.kill()
    sim.start()
    sim.store_fails = False
    sim.run_steps(2)
    sim.server.stop(sim.now, done=False)
    sim.run(60, lambda: sim.server.finished)
    assert sim.checkpoints[-1].step == step + 2
    check_snapshots(sim)


def test_a_state_counts_as_kept_only_when_it_is_written() -> None:
    """The audits wait for the caller, however long it writes."""
    sim = with_audits("a", "b", seconds=1e6)
    step = sim.server.step
    sim.server.stop(sim.now, done=False)
    audits, written = sim.server.audits, list[Snapshot]()
    stored = audits.stored
    audits.stored = written.append  # type: ignore[method-assign,assignment]
    sim.run(60, lambda: bool(written))
    assert (audits._kept_step, audits.under_way) == (0, True)
    sim.run(5)
    assert not sim.server.finished
    stored(*written)
    assert (audits._kept_step, audits.under_way) == (step, False)
    sim.run(1)
    assert sim.server.finished


@pytest.mark.parametrize(("measured", "first"), [(False, 0.0), (True, 30.0)])
def test_after_a_restart_the_next_held_out_loss_is_not_beside_the_one_before(measured: bool, first: float) -> None:
    """Reference: the clock, from the restart to the first step that asks for it."""
    sim = Simulation(config_of(evaluate_time=30.0))
    sim.add("a")
    sim.run_steps(2)
    sim.measured = measured
    sim.coordinator = None
    sim.start()
    since, before = sim.now, len(sim.log)
    sim.run(50)
    asked = [at for at, _, _, sent in sim.log[before:] if isinstance(sent, wire.Step) and sent.measure is not None]
    # The host takes a few seconds to come back, and a step lasts one.
    assert first <= asked[0] - since < first + 10


def test_a_host_that_measures_gets_no_pairs_meanwhile() -> None:
    sim = Simulation(config_of(evaluate_time=30.0))
    sim.add("a", measure_seconds=10.0)
    sim.add("b")
    for _ in range(60):
        sim.run(1)
        assert sim.server.status(sim.now).hosts[0].state in ("joining", "ready")
    assert sim.server.audits.measured.held_out is not None
    assert not sim.printed("hung")
    assert max(np.diff([at for at, _, _, message in sim.log if isinstance(message, wire.Step)])) < 12
    check_updates(sim.updates, FIXED)


@both_modes
def test_a_host_alone_measures_and_trains(config: Config) -> None:
    sim = Simulation(msgspec.structs.replace(config, evaluate_time=10.0))
    sim.add("a", measure_seconds=50.0)
    sim.run(200)
    assert len(sim.closed) > 10
    assert not sim.printed("hung")
    assert sim.server.audits.measured.held_out is not None


def test_one_checkpoint_is_written_at_a_time() -> None:
    """Also if the run is to end meanwhile; the simulation asserts it. The last step is kept all the same."""
    sim = Simulation(config_of(checkpoint_time=1))
    sim.add("a")
    sim.add("b")
    sim.store_seconds = 5.0
    sim.run(22, lambda: sim.is_storing and len(sim.checkpoints) > 2)
    assert sim.is_storing
    end(sim)
    assert sim.checkpoints[-1].step == len(sim.ledger)


# The end.


def test_without_hosts_it_ends_at_once() -> None:
    sim = Simulation(FIXED)
    sim.run(1)
    sim.server.stop(sim.now, done=True)
    sim.run(1, lambda: sim.server.finished)
    assert sim.server.finished


def end(sim: Simulation, done: bool = True) -> None:
    since = sim.now
    sim.server.stop(sim.now, done)
    sim.run(200, lambda: sim.server.finished)
    assert sim.server.finished
    assert sim.now - since <= LAST_ROUND + 1
    sim.run(1)


@both_modes
@pytest.mark.parametrize("dying", [["a"], ["b"], ["a", "b"], ["a", "b", "c"]], ids="".join)
@pytest.mark.parametrize("delay", [0.0, 0.01, 1.0])
def test_it_ends_though_hosts_die(config: Config, dying: list[str], delay: float) -> None:
    sim = Simulation(config, snapshot_bytes=2 * wire.PART)
    for name in ("a", "b", "c"):
        sim.add(name, measure_seconds=2.0)
    sim.run_steps(3)
    step = sim.server.step
    for name in dying:
        sim.at(sim.now + delay, partial(sim.kill_host, name))
    end(sim)
    survivors = list(sim.hosts.values())
    if survivors:
        assert sim.checkpoints[-1].step == step
        assert sim.server.audits.measured.held_out == 1 + 1 / (1 + step)
    assert all(host.worker.left for host in survivors)
    check_snapshots(sim)


def test_it_ends_though_the_broadcast_that_says_so_is_lost() -> None:
    sim = with_audits("a", "b")
    step = sim.server.step
    sim.fate = lambda way, host, message: [] if isinstance(message, wire.Step) else [DELAY]
    end(sim)
    assert sim.checkpoints[-1].step == step


def test_a_checkpoint_that_is_stored_is_not_asked_for_again() -> None:
    sim = with_audits("a")
    end(sim, done=False)
    uploads = len(sim.messages(wire.Upload))
    sim.kill()
    sim.start()
    sim.run(30, lambda: sim.server.status(sim.now).paused is False)
    sim.server.stop(sim.now, done=True)
    sim.run(30, lambda: sim.server.finished)
    assert len(sim.messages(wire.Upload)) == uploads


def test_no_update_is_made_after_the_end() -> None:
    sim = Simulation(FIXED)
    sim.add("a")
    sim.run_steps(3)
    step = sim.server.step
    end(sim, done=False)
    sim.run(20)
    assert sim.server.step == step
    assert len(sim.ledger) == step


# Who is here.


def test_the_number_of_hosts_is_limited() -> None:
    sim = Simulation(FIXED)
    sim.add("a")
    sim.run_steps(1)
    for number in range(2 * MAX_HOSTS):
        join = wire.Join(f"host {number}", "", "", list(KNOWN_ANSWERS.items()), [], "", number, 1)
        reply = sim.server.receive(Envelope(join), sim.now).message
        assert isinstance(reply, wire.Welcome if number < MAX_HOSTS - 1 else wire.Rejected)
    assert sim.server.counters["too many hosts"] == MAX_HOSTS + 1
    frames = wire.encode(Envelope(sim.server.status(sim.now)))
    assert wire.decode(frames, "reply")
    sim.now += FORGET
    sim.run_steps(1)
    assert len(sim.server.status(sim.now).hosts) == 1


def test_one_name_takes_no_more_than_two_places() -> None:
    sim = Simulation(FIXED)
    for number in range(3 * MAX_HOSTS):
        sim.now += 1.0  # else it joins too often
        join = wire.Join("one", "", "", list(KNOWN_ANSWERS.items()), [], "", number, 1)
        assert isinstance(sim.server.receive(Envelope(join), sim.now).message, wire.Welcome)
    assert len(sim.server.status(sim.now).hosts) == 1
    assert sim.server.counters["too many hosts"] == 0


@pytest.mark.parametrize("budget", [None, 1.0], ids=["fixed", "budget"])
def test_split_pairs_are_compared_within_their_windows_on_any_hosts(budget: float | None) -> None:
    """With a budget each host has another range of pairs, and its last window may be cut off."""
    config = config_of(budget=budget, split=True)
    sim = Simulation(config)
    sim.add("a")
    sim.add("b", speed=7.0)
    sim.run_steps(6)
    check_updates(sim.updates, config)
    last = update_record.unpack_update(sim.updates[-1])
    assert last.weights.shape == (len(last.pairs()), 2)
    assert len(last.header.spans) == (1 if budget is None else 2)
    assert budget is None or last.header.spans[0][1] % 3 > 0


def test_slots_are_used_again_but_not_within_a_step() -> None:
    sim = Simulation(BUDGET)
    sim.add("a")
    sim.run_steps(2)
    sim.add("b")
    sim.run_steps(2)
    sim.run(0.5)
    sim.kill_host("b")
    sim.run(FORGET + 3)
    sim.add("c")
    sim.run_steps(2)
    assert [host.slot for host in sim.server.status(sim.now).hosts] == [0, 1]
    check_updates(sim.updates, BUDGET)


def test_no_slot_is_used_again_within_a_step() -> None:
    sim = Simulation(FIXED)
    first = sim.add("a", key="bad", speed=4.0)
    sim.run(4)
    assert first.device.scored
    sim.server.refuse_key("bad", sim.now)
    sim.kill_host("a")
    second = sim.add("b")
    sim.run(1)
    assert second.worker.joined is not None
    assert second.worker.joined.slot == 1
    sim.run_steps(1)
    assert [host.name for host in sim.server.status(sim.now).hosts] == ["b"]
    sim.add("c")
    sim.run(1)
    assert sorted(host.slot for host in sim.server.status(sim.now).hosts) == [0, 1]


def test_the_pairs_of_a_host_that_is_not_ready_any_more_are_given_to_others() -> None:
    sim = Simulation(FIXED)
    sim.add("a")
    host = sim.add("b")
    sim.run_steps(3)
    joined = host.worker.joined
    assert joined is not None
    beat = wire.Beat(joined.session, 1, 0, "joining", 10**6)
    assert isinstance(sim.server.receive(Envelope(beat), sim.now).message, wire.Ok)
    (published,) = [action.envelope.message for action in sim.server.drain() if isinstance(action, Publish)]
    assert isinstance(published, wire.Extra)
    assert {slot for slot, _, _ in published.leases} == {0}


def test_a_host_that_comes_in_the_middle_of_a_step_takes_its_share() -> None:
    sim = Simulation(FIXED)
    sim.add("slow", speed=0.5)
    sim.run(3)
    sim.add("fast", speed=20.0)
    sim.run_steps(1)
    assert sim.now < 30
    assert 2 * FIXED.es.population // 4 > len(sim.hosts["slow"].device.scored)
    sim.run_steps(3)
    check_updates(sim.updates, FIXED)


def test_leases_that_are_too_many_for_one_message_come_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esjax.hosts.coordination.steps.SPAN_LIMIT", 3)
    config = config_of(spot_check=0.5, population=200)
    sim = Simulation(config)
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    sim.run_steps(10)
    leased: dict[int, set[int]] = {step: set() for step in range(11)}
    for message in sim.messages(wire.Step, "a") + sim.messages(wire.Extra, "a"):
        assert len(message.leases) <= 3
        leased[message.step] |= {pair for _, first, count in message.leases for pair in range(first, first + count)}
    assert all(leased[step] == set(range(100)) for step in range(10))
    check_updates(sim.updates, config)


def test_the_status_describes_run_and_hosts() -> None:
    sim = Simulation(config_of(evaluate_time=4))
    sim.add("a", speed=30.0)
    sim.add("b", speed=10.0)
    sim.run_steps(20)
    reply = sim.server.receive(Envelope(wire.AskStatus()), sim.now).message
    assert isinstance(reply, wire.Status)
    assert (reply.run, reply.incarnation, reply.step, reply.paused, reply.reference) == (RUN, 1, 20, False, 0)
    assert reply.loss == sim.closed[-1].loss
    assert reply.held_out == sim.server.audits.measured.held_out
    fast, slow = reply.hosts
    assert (fast.name, fast.slot, fast.state, slow.name) == ("a", 0, "ready", "b")
    assert fast.members_per_second == pytest.approx(60, rel=0.1)
    assert slow.members_per_second == pytest.approx(20, rel=0.1)
    assert fast.share + slow.share == pytest.approx(1)
    tokens = sim.config.data.batch_size * sim.config.data.window
    assert reply.member_tokens_per_second == pytest.approx(80 * tokens, rel=0.3)


# Storms.


def storm_in(sim: Simulation, storm: list[Sent | bytes | float]) -> None:
    """Send random requests to a coordinator; none of them may have an effect."""
    for weather in storm:
        if isinstance(weather, float):
            sim.run(weather)
            continue
        if isinstance(weather, bytes):
            with suppress(wire.WireError):
                wire.decode([weather], "request")
            continue
        message, right = weather.message, b"\0" * 40
        if isinstance(message, wire.Losses):
            pairs = sum(count for _, count in message.spans)
            state = FIRST_STATE
            for update in sim.updates:
                state = next_state(state, update)
            is_small = message.spans and pairs < 1000
            right = bytes_of(values_of(sim.config, state, message.spans)) if is_small else b""
        frames = wire.encode(Envelope(message, body_of(weather, right)))
        reply = sim.server.receive(wire.decode(frames, "request"), sim.now)
        wire.decode(wire.encode(reply), "reply")
        sim.carry_out()


def mad_host(sim: Simulation) -> list[int]:
    """Let a host join that sends anything; return its session, and invented ones."""
    join = wire.Join("mad", "", "other", list(KNOWN_ANSWERS.items()), [], "", 5, 1)
    welcome = sim.server.receive(Envelope(join), sim.now).message
    assert isinstance(welcome, wire.Welcome)
    ready = wire.Beat(welcome.session, welcome.incarnation, 3, "ready", 1)
    sim.server.receive(Envelope(ready), sim.now)
    return [welcome.session, welcome.session, welcome.session + 1, 0]


@all_modes
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_after_a_storm_an_honest_host_trains_on(config: Config, data: st.DataObject) -> None:
    sim = Simulation(msgspec.structs.replace(config, checkpoint_time=3.0, evaluate_time=3.0))
    sim.add("a")
    sim.run_steps(3)
    weather = requests(mad_host(sim), 3, 1) | st.binary(max_size=30) | st.sampled_from([0.1, 1.0])
    storm_in(sim, data.draw(st.lists(weather, max_size=25)))
    sim.run_steps(3, limit=120)
    check_updates(sim.updates, sim.config)
    check_snapshots(sim)
    assert not sim.hosts["a"].worker.refused


@pytest.mark.nightly
@pytest.mark.parametrize("config", [FIXED, FIXED_SUMS, BUDGET_SUMS], ids=["fixed", "fixed sums", "budget sums"])
def test_a_long_storm_makes_nothing_grow(config: Config) -> None:
    sim = Simulation(config)
    sim.add("a")
    sim.run_steps(3)
    rng = random.Random(0)
    sessions = mad_host(sim)
    some: list[Sent] = []

    @settings(max_examples=300, deadline=None, database=None)
    @given(requests(sessions, 3, 1))
    def collect(sent: Sent) -> None:
        some.append(sent)

    collect()
    storm_in(sim, rng.choices(some, k=500))
    before = volume(sim.server)
    for _ in range(5):
        storm_in(sim, rng.choices(some, k=500))
        assert volume(sim.server) < 2 * before
    sim.run(FORGET + 5)
    sim.run_steps(3)
    check_updates(sim.updates, config)


def test_only_valid_messages_move_the_run() -> None:
    """Without an honest host, no message makes a step, a checkpoint or an announcement of one."""
    sim = Simulation(FIXED)
    sessions = [5, 6, 0]
    some: list[Sent] = []

    @settings(max_examples=200, deadline=None, database=None)
    @given(requests(sessions, 0, 1))
    def collect(sent: Sent) -> None:
        some.append(sent)

    collect()
    storm_in(sim, [sent for sent in some if not isinstance(sent.message, wire.Join)])
    assert sim.server.step == 0
    assert not sim.ledger
    assert not sim.server.status(sim.now).hosts
    assert not any(isinstance(action, Publish | Record) for action in sim.server.drain())


@pytest.mark.parametrize("name", ["\x1b[2Jmad", "two\nlines", "b\xe9ll\x07"])
def test_a_host_whose_name_a_terminal_would_obey_is_turned_away(name: str) -> None:
    sim = Simulation(FIXED)
    reply = sim.server.receive(Envelope(wire.Join(name, "", "", list(KNOWN_ANSWERS.items()), [], "", 5, 1)), sim.now)
    assert isinstance(reply.message, wire.Refused)
    assert reply.message.reason.isprintable()
    assert not sim.server.status(sim.now).hosts
