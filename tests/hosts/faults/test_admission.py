"""Who is let in: keys, names, versions, settings, known answers and texts.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import pytest
from fault_runs import FIXED, ask, both_modes, check_run, losses_message, run_with, status_of
from hosts_simulation import DELAY, QUANTUM, RUN, TEXT, Simulation

from esjax.config.settings import Config
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Terms
from esjax.hosts.protocol.worker import BEAT


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
