"""A coordinator that ends and starts anew, and hosts and coordinators that are stopped.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import time

import pytest
from fault_runs import FIXED, all_modes, both_exchanges, both_modes, check_checkpoints, check_run, run_with
from hosts_simulation import Simulation, config_of

from esjax.config.settings import Config
from esjax.exchange import update_record
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Publish


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
