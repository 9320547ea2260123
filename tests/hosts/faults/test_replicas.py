"""Replicas that differ, and snapshots on their way.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import msgspec
import pytest
from fault_runs import FIXED, all_modes, both_exchanges, check_checkpoints, check_run, run_with, status_of
from hosts_simulation import (
    DELAY,
    FIRST_STATE,
    QUANTUM,
    STATE_BYTES,
    Device,
    Simulation,
    check_updates,
    config_of,
    next_state,
)

from esjax.config.settings import Config
from esjax.hosts.protocol import wire


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
