"""Hosts that nobody has to trust: speed, deadlines, votes and quotas; rows are those of the list of faults."""

import signal
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hosts_simulation import (
    DELAY,
    FIRST_STATE,
    KNOWN_ANSWERS,
    QUANTUM,
    STATE_BYTES,
    TEXT,
    Device,
    Simulation,
    check_updates,
    config_of,
    hash_state,
    next_state,
)
from processes import Fleet, fleet, wait_until
from token_holder import TokenHolder

from esjax.config.settings import HostsConfig, replace
from esjax.errors import EsjaxError
from esjax.hosts.coordination import admission
from esjax.hosts.coordination.hold_ups import MOST, PAID_OFF, TOLERANCE, HoldUps
from esjax.hosts.coordination.registry import GROWTH, SILENT, STRIKES, Host
from esjax.hosts.coordination.steps import DEADLINE_FACTOR, FIRST_DEADLINE
from esjax.hosts.protocol import tasks, wire
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.status import fetch_status

__all__ = ["fleet"]

both_exchanges = pytest.mark.parametrize("sums", [False, True], ids=["losses", "sums"])


def shares(sim: Simulation, steps: int) -> dict[str, float]:
    """Return the part of the pairs that each host scores in the next steps, by name."""
    totals = dict.fromkeys((host.name for host in sim.server.status(sim.now).hosts), 0.0)
    for _ in range(steps):
        sim.run_steps(1)
        for host in sim.server.status(sim.now).hosts:
            totals[host.name] = totals.get(host.name, 0.0) + host.share / steps
    return totals


def states_of(sim: Simulation) -> list[bytes]:
    """Replay the ledger."""
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    return states


def check_kept(sim: Simulation) -> None:
    """Check that all digests and states that were kept are those of a replay."""
    states = states_of(sim)
    assert [digest for _, digest in sim.digests] == [hash_state(states[step]) for step, _ in sim.digests]
    assert all(kept.data[:STATE_BYTES] == states[kept.step] for kept in sim.checkpoints)


# Speed.


class Boaster(Device):
    """Claims that its work took no time."""

    def do(self, task: tasks.Task) -> tuple[tasks.Result, float]:
        result, seconds = super().do(task)
        if isinstance(result, tasks.Scored):
            result = tasks.Scored(result.values, 0.0)
        return result, seconds


def test_row_43_a_host_that_claims_no_time_gets_the_share_of_its_real_speed() -> None:
    """Reference: the speeds, 80, 80 and 20 pairs a second."""
    sim = Simulation(config_of(population=720))
    sim.add("a", speed=80.0)
    sim.add("b", speed=80.0)
    sim.add("boaster", Boaster(speed=20.0))
    sim.run_steps(25)
    before = sim.now
    assert shares(sim, 10)["boaster"] == pytest.approx(20 / 180, abs=0.03)
    assert (sim.now - before) / 10 < 1.1 * 360 / 180


@both_exchanges
def test_row_43_a_host_that_answers_at_once_takes_over_step_by_step(sums: bool) -> None:
    """A bound on growth: its share at most doubles from a step to the next, but for a quantum."""
    sim = Simulation(config_of(population=800, sums=sums))
    for name in ("a", "b", "c"):
        sim.add(name, speed=100.0)
    sim.run_steps(5)
    sim.add("new", speed=5.0)
    sim.run_steps(15)
    sim.hosts["new"].device.speed = 1e9
    found = []
    for _ in range(8):
        sim.run_steps(1)
        found.append(next(host.share for host in sim.server.status(sim.now).hosts if host.name == "new"))
    assert found[-1] > 2 * found[0]
    for before, after in pairwise(found):
        assert after <= GROWTH * before + 2 * QUANTUM / 400
    check_updates(sim.updates, sim.config)


@both_exchanges
def test_row_43_a_host_holds_no_more_than_half_of_a_long_step_while_another_is_idle(sums: bool) -> None:
    """The fast host needs 4 s for a step, and the slow one 6 s for a quantum: it is tried in some steps."""
    sim = Simulation(config_of(population=320, sums=sums, spot_check=0.0))
    for name, speed in (("fast", 40.0), ("slow", QUANTUM / 6)):
        sim.add(name, speed=speed)
    sim.run_steps(6)
    while sim.server._steps.leases.busy(1):
        sim.run_steps(1)
    before, step, held = sim.now, sim.server.step, []
    while sim.server.step == step:
        assert not sim.server._steps.leases.busy(1)
        held.append(sim.server._steps.leases.open_pairs(0))
        sim.run(0.2)
    assert max(held) == 80
    assert sim.now - before < 4 + 0.4
    check_updates(sim.updates, sim.config)


def test_row_43_a_host_that_is_too_slow_for_any_pairs_is_tried_ever_more_rarely() -> None:
    """A step takes the fast host 10 s, and a quantum the slow one 16 s. Reference: the steps of the fast host alone."""
    sim = Simulation(config_of(population=512, spot_check=0.0))
    sim.add("fast", speed=25.6)
    sim.run_steps(1)
    sim.add("slow", speed=QUANTUM / 16)
    began = sim.server.step
    sim.run(1200)
    assert sim.server.step - began >= 0.9 * 1200 / 10
    assert sim.hosts["slow"].device.scored
    check_updates(sim.updates, sim.config)


@both_exchanges
def test_row_44_a_host_that_beats_and_never_answers_loses_its_pairs(sums: bool) -> None:
    """It has all pairs, and no host has finished any: the others get them after the first deadline."""
    sim = Simulation(config_of(population=2 * QUANTUM, sums=sums))  # one quantum
    holder = TokenHolder(sim, "silent", "bad")
    holder.answer_after = None
    sim.run(0.5)
    for name in ("a", "b"):
        sim.add(name, key=name, compile_seconds=0.0)
    sim.run(1.0)
    (silent, *_) = sim.server.status(sim.now).hosts
    assert silent.name == "silent 0"
    assert not sim.ledger
    sim.run(FIRST_DEADLINE + 1)
    assert len(sim.ledger) > 1
    before = len(sim.ledger)
    sim.run(20)
    assert len(sim.ledger) - before > 60  # 0.2 s each
    check_updates(sim.updates, sim.config)


@both_exchanges
def test_row_44_a_host_that_stops_to_answer_costs_one_deadline(sums: bool) -> None:
    sim = Simulation(config_of(population=240, sums=sums))
    for name in ("a", "b"):
        sim.add(name, key=name, speed=20.0)
    holder = TokenHolder(sim, "bad", "bad")
    holder.answer_after = 2.0
    sim.run_steps(8)
    holder.answer_after = None
    before = sim.now
    sim.run_steps(1)
    usual = 120 / 40
    assert sim.now - before < (DEADLINE_FACTOR + 2) * usual
    sim.run_steps(2)
    assert sim.now - before < (DEADLINE_FACTOR + 5) * usual
    check_updates(sim.updates, sim.config)


def test_a_host_that_lost_speed_gets_its_share_again() -> None:
    """An idle host is tried with a quantum, and regains its share."""
    sim = Simulation(config_of(population=240))
    for name in ("a", "b"):
        sim.add(name, speed=100.0)
    sim.run_steps(5)
    sim.hosts["b"].device.speed = 1.0
    sim.run(30)
    assert shares(sim, 3)["b"] < 0.1
    sim.hosts["b"].device.speed = 100.0
    sim.run(100)
    assert shares(sim, 5)["b"] == pytest.approx(0.5, abs=0.1)
    check_updates(sim.updates, sim.config)


# Hold-ups.


def test_the_account_of_hold_ups_adds_up_and_is_paid_off() -> None:
    """Reference: sums of seconds by hand."""
    account = HoldUps(0.0)

    def step(now: float, good: float, bad: float) -> dict[str, float]:
        account.finished("good", 0, good, good)
        account.finished("bad", 1, bad, good)
        return account.closed(now + bad)

    assert step(0.0, 0.5, 0.5 * TOLERANCE) == {}  # as long as is tolerated
    assert step(0.75, 0.5, 0.75 + 1.5) == {}
    assert not account.rests("bad", 3.0)
    assert step(3.0, 0.5, 0.75 + 1.5) == {"bad": pytest.approx(2 * 1.5 / PAID_OFF - 2.25)}
    assert 2 * 1.5 > MOST > 1.5
    end = 3.0 + 2 * 1.5 / PAID_OFF
    assert account.rests("bad", end - 0.1)
    assert not account.rests("bad", end + 0.1)
    assert not account.rests("good", 6.0)


def test_a_host_that_loses_its_pairs_holds_up_the_step_no_longer_than_twice_as_long_as_it_had_them() -> None:
    account = HoldUps(0.0)
    for now in (0.0, 60.0):
        account.failed("bad", 0.9)
        account.finished("good", 0, 0.1, 0.1)
        account.finished("good", 0, 59.0, 59.0)  # what it redid
        assert account.closed(now + 60.0) == {}  # 1.8 s, paid off after 18 s
    account.failed("bad", 1.1)
    account.finished("good", 0, 0.1, 0.1)
    assert account.closed(180.0) == {"bad": pytest.approx(2.2 / PAID_OFF)}


# Digests, states and kinds.


class FalseDigest(Device):
    """Names another digest than that of its state."""

    def do(self, task: tasks.Task) -> tuple[tasks.Result, float]:
        result, seconds = super().do(task)
        return (tasks.Value("f" * 16), seconds) if isinstance(task, tasks.TakeDigest) else (result, seconds)


class FalseState(Device):
    """Sends another state, with the true digest, or with that of the state."""

    def __init__(self, *, names_it: bool, **settings: float) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self._names_it = names_it

    def do(self, task: tasks.Task) -> tuple[tasks.Result, float]:
        result, seconds = super().do(task)
        false = self.state[:8] + b"f" * (STATE_BYTES - 8)
        if isinstance(task, tasks.TakeSnapshot):
            return tasks.Value(false), seconds
        if isinstance(task, tasks.TakeDigest) and self._names_it:
            return tasks.Value(hash_state(false)), seconds
        return result, seconds


CHECKED = config_of(checkpoint_time=4.0, digest_interval=5)


@pytest.mark.parametrize("tokens", [("x", "y"), ("x", "x")], ids=["two tokens", "one token"])
def test_row_51_three_hosts_of_one_token_lie_about_digests(tokens: Sequence[str]) -> None:
    sim = Simulation(CHECKED)
    for number in range(3):
        sim.add(f"liar {number}", FalseDigest(), key="bad")
    for number, token in enumerate(tokens):
        sim.add(f"honest {number}", key=token)
    sim.run_steps(60)
    check_kept(sim)
    check_updates(sim.updates, sim.config)
    states = {host.name: host.state for host in sim.server.status(sim.now).hosts}
    assert states["honest 0"] == states["honest 1"] == "ready"
    is_decided = tokens[0] != tokens[1]
    assert bool(sim.digests) == is_decided
    assert (len(sim.checkpoints) > 2) == is_decided
    assert sim.printed("as many tokens") != is_decided
    assert {states[f"liar {number}"] for number in range(3)} == ({"put aside"} if is_decided else {"ready"})


def test_row_51_a_trusted_token_decides_a_tie() -> None:
    sim = Simulation(CHECKED)
    sim.kill()
    sim.trusted = "operator"
    sim.start()
    sim.add("liar", FalseDigest(), key="bad")
    sim.add("own", key="operator")
    sim.run_steps(50)
    check_kept(sim)
    assert len(sim.digests) > 3
    assert len(sim.checkpoints) > 2
    assert {host.name: host.state for host in sim.server.status(sim.now).hosts} == {"liar": "put aside", "own": "ready"}


def test_row_52_a_state_that_is_not_of_its_digest_is_not_stored() -> None:
    sim = Simulation(CHECKED)
    sim.add("liar", FalseState(names_it=False), key="bad")
    sim.add("honest", key="x")
    sim.run_steps(40)
    check_kept(sim)
    assert len(sim.checkpoints) > 2
    assert sim.printed("liar is put aside: it sent another state")
    assert "put aside" in sim.hosts["liar"].worker.refused


def test_row_52_a_reference_host_of_an_invented_kind_is_replaced() -> None:
    sim = Simulation(CHECKED)
    sim.add("liar", FalseState(names_it=True), key="bad", kind="invented")
    for name in ("x", "y"):
        sim.add(name, key=name)
    sim.run_steps(40)
    check_kept(sim)
    assert len(sim.digests) > 3
    assert len(sim.checkpoints) > 2


def test_row_52_a_state_that_no_other_token_confirms_is_said_to_be_unconfirmed() -> None:
    sim = Simulation(CHECKED)
    sim.add("liar", FalseState(names_it=True), key="bad", kind="invented")
    sim.add("honest", key="x")
    sim.run_steps(40)
    assert sim.digests == []
    assert len([line for line in sim.lines if "is kept unconfirmed" in line]) == 1


def test_a_state_of_the_only_ready_host_is_said_to_be_unconfirmed_only_if_the_next_one_is_too() -> None:
    for seconds, is_said in ((6.0, False), (12.0, True)):
        sim = Simulation(CHECKED)
        sim.add("first", key="x")
        sim.add("second", key="y", compile_seconds=seconds)
        sim.run(30)
        assert sim.checkpoints[1].step < sim.digests[0][0]  # it was kept before the second host could confirm it
        assert sim.printed("is kept unconfirmed") == is_said
        check_kept(sim)


def test_hosts_of_one_token_alone_confirm_each_other() -> None:
    sim = Simulation(CHECKED)
    for name in ("a", "b"):
        sim.add(name, key="x")
    sim.run_steps(30)
    check_kept(sim)
    assert len(sim.digests) > 3
    assert not sim.printed("unconfirmed")


# Put aside.


def strike(sim: Simulation, holder: TokenHolder) -> None:
    """Send messages that no correct host sends, until the host is put aside."""
    for _ in range(STRIKES):
        holder.ask(wire.Losses(holder.session, sim.incarnation, sim.server.step + 5, [(0, 4)], True), bytes(32))
    assert isinstance(holder.ask(wire.Beat(holder.session, sim.incarnation, 0, "ready", 1)), wire.Refused)


def test_a_token_whose_host_is_put_aside_for_its_messages_stays_out_until_a_restart() -> None:
    sim = Simulation(config_of())
    for name in ("a", "b"):
        sim.add(name, key=name)
    own = sim.add("c", key="bad")
    holder = TokenHolder(sim, "bad", "bad")
    sim.run(2)
    strike(sim, holder)
    again = sim.add("another name", key="bad")
    sim.run_steps(3)
    assert "bad 0, a host with this token, was put aside" in again.worker.refused
    assert "losses for step" in again.worker.refused
    assert not own.worker.refused  # what the token's other hosts send is judged by itself
    sim.kill()
    sim.start()
    assert isinstance(sim.server.receive(join_of("d"), sim.now, "bad").message, wire.Welcome)


def test_a_token_whose_host_is_put_aside_for_its_states_stays_out() -> None:
    sim = Simulation(CHECKED)
    for name in ("a", "b"):
        sim.add(name, key=name)
    sim.add("broken", FalseDigest(), key="bad")
    sim.run(60, lambda: sim.printed("broken is put aside"))
    again = sim.add("mended", key="bad")
    sim.run_steps(3)
    assert "its state differs" in again.worker.refused


def test_a_host_without_a_token_stays_out_by_its_name() -> None:
    sim = Simulation(CHECKED)
    for name in ("a", "b", "c"):
        sim.add(name, FalseDigest() if name == "c" else None)
    sim.run(60, lambda: sim.printed("c is put aside"))
    sim.kill_host("c")
    again, other = sim.add("c"), sim.add("d")
    sim.run_steps(3)
    assert "a host of this name was put aside" in again.worker.refused
    assert not other.worker.refused


def test_without_tokens_the_number_of_names_that_stay_out_is_limited() -> None:
    judge, most = Simulation(config_of()).server._admission, admission.MOST_OWNERS
    for number in range(most + 10):
        join = wire.Join(f"bad {number}", "", "fake", [], [], "", 1, 1)
        judge.exclude(Host(join, number, 0, None, b"", 0.0), "false losses")
    assert len(judge._excluded) == most
    assert f"bad {most + 9}" in judge._excluded


def test_with_one_token_for_all_a_host_that_is_put_aside_may_be_replaced() -> None:
    sim = Simulation(config_of())
    sim.add("a", key="x")
    holder = TokenHolder(sim, "bad", "x")
    sim.run(2)
    strike(sim, holder)
    again = sim.add("b", key="x")
    sim.run_steps(3)
    assert again.worker.phase == "ready"


# Quotas.


def join_of(name: str, instance: int = 1) -> Envelope:
    return Envelope(wire.Join(name, "", "fake", list(KNOWN_ANSWERS.items()), [], "", instance, 1))


def test_row_53_a_token_has_a_quota_of_hosts() -> None:
    sim = Simulation(replace(config_of(), hosts=HostsConfig(hosts_per_token=10)))
    hosts = [sim.add(f"many {number}", key="bad") for number in range(50)]
    sim.add("honest", key="x")
    sim.run(20)
    joined = [host for host in hosts if host.worker.joined]
    assert len(joined) == 10
    assert len(sim.server.status(sim.now).hosts) == 11
    waiting = next(host for host in hosts if not host.worker.joined)
    assert "hosts.hosts_per_token" in waiting.worker.waiting
    assert not waiting.worker.refused
    for host in joined[:3]:  # others take their places
        host.worker.leave("it was stopped")
    sim.run(30)
    assert sum(host.worker.joined is not None and not host.over for host in hosts) == 10
    assert sim.server.counters["hosts above the quota of a token"] > 0


def test_row_53_a_name_belongs_to_its_token() -> None:
    sim = Simulation(config_of())
    victim = sim.add("a", key="x")
    sim.run_steps(2)
    reply = sim.server.receive(join_of("a"), sim.now, "bad").message
    assert isinstance(reply, wire.Refused)
    assert "give each host a different --name" in reply.reason
    sim.run_steps(2)
    assert not victim.worker.refused
    reply = sim.server.receive(join_of("a", 2), sim.now, "x").message  # its own key may
    assert isinstance(reply, wire.Welcome)


def test_row_53_a_host_that_finds_no_place_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_HOSTS", 2)
    sim = Simulation(config_of())
    for name in ("a", "b", "c"):
        sim.add(name)
    sim.run(10)
    (late,) = [host for host in sim.hosts.values() if not host.worker.joined]
    assert "the run has 2 hosts" in late.worker.waiting
    next(host for host in sim.hosts.values() if host is not late).worker.leave("it was stopped")
    sim.run(2 * admission.FULL_WAIT)
    assert late.worker.joined
    assert late.worker.waiting == ""
    check_updates(sim.updates, sim.config)


def test_row_53_a_lost_host_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_HOSTS", 2)
    sim = Simulation(config_of())
    lost, _ = sim.add("a"), sim.add("b")
    sim.run_steps(2)
    sim.kill_host("a")
    sim.disconnect(lost)
    sim.run_steps(2)
    late = sim.add("c")
    sim.run(1)
    assert late.worker.joined


def test_row_53_a_token_joins_only_so_often() -> None:
    sim = Simulation(replace(config_of(), hosts=HostsConfig(hosts_per_token=5)))
    replies = [sim.server.receive(join_of("a", number), sim.now, "bad").message for number in range(30)]
    assert sum(isinstance(reply, wire.Welcome) for reply in replies) == 5 * admission.JOINS
    rejected = replies[-1]
    assert isinstance(rejected, wire.Rejected)
    assert 0 < rejected.wait <= admission.MINUTE
    assert isinstance(sim.server.receive(join_of("b"), sim.now, "x").message, wire.Welcome)


def test_row_53_downloads_of_a_token_are_limited_and_go_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the bytes of text and state, four copies a minute."""
    monkeypatch.setattr(admission, "LEAST_BYTES", 1)
    sim = Simulation(config_of(), snapshot_bytes=3 * wire.PART)
    greedy = sim.add("greedy", key="bad")
    sim.run_steps(2)
    joined = greedy.worker.joined
    assert joined is not None
    fetch = Envelope(wire.Fetch(joined.session, "state", "", 0))
    sizes = []
    for _ in range(100):
        reply = sim.server.receive(fetch, sim.now, "bad")
        sizes.append(len(reply.body))
    own = len(TEXT) + 3 * wire.PART  # what it fetched before
    quota = admission.COPIES * (len(TEXT) + 3 * wire.PART)
    assert quota - own - wire.PART <= sum(sizes) <= quota
    assert sim.server.counters["downloads above the quota of a token"] > 80
    late = sim.add("late", key="bad")
    honest = sim.add("honest", key="x")
    sim.run(10)
    assert honest.worker.phase == "ready"
    sim.run(2 * admission.MINUTE)
    assert late.worker.phase == "ready"  # its download went on where it waited


# Far hosts, and closed connections.


def test_row_57_updates_that_a_token_asks_for_are_limited_and_are_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: four requests a minute for each host."""
    monkeypatch.setattr(admission, "ASKS", 4)
    sim = Simulation(config_of())
    greedy = sim.add("greedy", key="bad")
    sim.add("honest", key="x")
    sim.run_steps(3)
    joined = greedy.worker.joined
    assert joined is not None
    replies = [sim.server.receive(Envelope(wire.CatchUp(joined.session, 0)), sim.now, "bad") for _ in range(20)]
    rejected = [reply.message for reply in replies if isinstance(reply.message, wire.Rejected)]
    assert len(rejected) >= 16
    assert all(0 < message.wait <= admission.MINUTE for message in rejected)
    assert sim.server.counters["downloads above the quota of a token"] == len(rejected)
    greedy.cut = {"broadcast"}
    sim.run(5)
    greedy.cut = set()
    asked = len(sim.messages(wire.CatchUp, "greedy"))
    missed = sim.server.step
    sim.run(admission.MINUTE)
    assert greedy.worker.step >= missed
    assert len(sim.messages(wire.CatchUp, "greedy")) - asked <= 5  # it waited as long as it was told to


@both_exchanges
def test_row_58_far_hosts_do_not_slow_a_near_one(sums: bool) -> None:
    """Reference: the near host alone, whose answers no other host checks."""

    def steps(far: int) -> int:
        sim = Simulation(config_of(population=256, spot_check=0.0, sums=sums))
        sim.fate = lambda way, host, message: [0.1 if host.startswith("far") else DELAY]
        sim.add("near", speed=1000.0)
        for number in range(far):
            sim.add(f"far {number}", speed=1000.0)
        sim.run(15)
        before = len(sim.ledger)
        sim.run(50)
        return len(sim.ledger) - before

    assert steps(2) >= 0.97 * steps(0)


def test_row_58_far_hosts_help_where_steps_are_long() -> None:
    """Reference: three equal hosts, whose steps take 0.2 s more than a third of what one takes."""
    sim = Simulation(config_of(population=2400))
    sim.fate = lambda way, host, message: [0.1 if host.startswith("far") else DELAY]
    for name in ("near", "far 1", "far 2"):
        sim.add(name, speed=100.0)
    sim.run_steps(25)
    before = sim.now
    sim.run_steps(10)
    assert (sim.now - before) / 10 < 1200 / 300 + 0.2 + 0.2
    check_updates(sim.updates, sim.config)


@both_exchanges
def test_row_59_an_idle_host_has_the_pairs_of_dead_ones_within_two_seconds(sums: bool) -> None:
    sim = Simulation(config_of(population=4 * QUANTUM, sums=sums))  # two quanta for three hosts
    for name in ("a", "b", "c"):
        sim.add(name, speed=4.0)
    sim.run_steps(4)
    sim.run(0.2)
    step = sim.server.step
    leased = {slot for message in sim.messages(wire.Step, "a") if message.step == step for slot, _, _ in message.leases}
    names = {host.slot: host.name for host in sim.server.status(sim.now).hosts}
    dying = [sim.kill_host(names[slot]) for slot in leased]
    (idle,) = sim.hosts.values()
    assert not [pair for at, pair in idle.device.scored if at == step]
    sim.disconnect(*dying)
    before = sim.now
    sim.run(10, lambda: any(at == step for at, _ in idle.device.scored))
    assert sim.now - before < 2.0
    sim.run_steps(2)
    check_updates(sim.updates, sim.config)


def test_row_59_a_host_whose_connection_closed_is_back_with_its_next_beat() -> None:
    sim = Simulation(config_of())
    for name in ("a", "b"):
        sim.add(name)
    sim.run_steps(3)
    sim.disconnect(sim.hosts["b"])
    assert [host.state for host in sim.server.status(sim.now).hosts] == ["ready", "lost"]
    sim.run(4)
    assert [host.state for host in sim.server.status(sim.now).hosts] == ["ready", "ready"]
    sim.run_steps(5)
    assert shares(sim, 3)["b"] > 0.2
    check_updates(sim.updates, sim.config)


# Settings.


@pytest.mark.parametrize("most", [0, -1])
def test_a_quota_must_be_positive(most: int) -> None:
    with pytest.raises(EsjaxError, match="hosts_per_token"):
        HostsConfig(hosts_per_token=most)


# Real processes.


def test_row_59_in_processes_a_killed_host_is_replaced_before_it_would_count_as_silent(
    fleet: Fleet,
) -> None:
    """There is one lease quantum, so the host that is killed has all pairs."""
    fleet.serve("--es.population-size", "64", "--es.chunk-pairs", "32", "--evaluate-time", "1000")
    hosts = {name: fleet.join(name) for name in ("one", "two")}

    def status() -> wire.Status:
        return fetch_status(fleet.address)

    def at_work() -> list[str]:
        return [host.name for host in status().hosts if host.share == 1.0 and host.state == "ready"]

    wait_until(lambda: [host.state for host in status().hosts].count("ready") == 2)
    wait_until(lambda: bool(at_work()))
    (busy,) = at_work()
    hosts.pop(busy).send(signal.SIGKILL)
    since = time.monotonic()
    wait_until(lambda: bool(set(at_work()) - {busy}))
    assert time.monotonic() - since < SILENT / 2
