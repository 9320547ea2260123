"""Messages that are lost, come twice, late or forged, or hold what no honest host sends.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import tracemalloc

import msgspec
import numpy as np
import pytest
from fault_runs import (
    BUDGET_SUMS,
    FIXED,
    FIXED_SUMS,
    PAIRS,
    all_modes,
    ask,
    both_exchanges,
    both_modes,
    check_checkpoints,
    check_run,
    losses_message,
    run_with,
    status_of,
)
from hosts_simulation import DELAY, QUANTUM, VECTOR_LENGTH, Device, Simulation, config_of

from esjax.config.settings import Config
from esjax.exchange import update_record
from esjax.exchange.gradient_sums import TAIL
from esjax.hosts.coordination.registry import STRIKES
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.tasks import Score, Scored


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
