"""Spot checks: what a host answered is scored again by another owner's host, and liars are found; honest hosts stay."""

from functools import partial

import numpy as np
import pytest
from bench.lies import LIES, LyingWorker
from hosts_simulation import DELAY, FIRST_STATE, Simulation, check_updates, config_of, next_state

from esjax.exchange.update_record import pairs_of
from esjax.hosts.coordination.registry import PROBE_LONGEST
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.worker import Worker

STEPS = 200
"""Steps within which a liar is found."""

both_exchanges = pytest.mark.parametrize("sums", [False, True], ids=["losses", "sums"])


def states_of(sim: Simulation) -> dict[str, str]:
    return {host.name: host.state for host in sim.server.status(sim.now).hosts}


def run_until_aside(sim: Simulation, liars: set[str], limit: int = STEPS) -> int:
    """Run until all liars are put aside; return the number of the step in which the last one was."""

    def are_aside() -> bool:
        return all(states_of(sim).get(name) == "put aside" for name in liars)

    sim.run(10_000, until=lambda: len(sim.ledger) >= limit or are_aside())
    assert are_aside(), f"{states_of(sim)} after {len(sim.ledger)} steps"
    return max(step for line, step in sim.printed_at.items() if "is put aside" in line)


def check_later_updates(sim: Simulation, first: int) -> None:
    """Check that the updates from `first` on follow from honest losses alone."""
    state = FIRST_STATE
    for update in sim.updates[:first]:
        state = next_state(state, update)
    check_updates(sim.updates[first:], sim.config, state=state)


@both_exchanges
@pytest.mark.parametrize("budget", [None, 0.5], ids=["fixed", "budget"])
@pytest.mark.parametrize("kind", LIES)
def test_rows_47_to_49_every_kind_of_liar_is_found(kind: str, budget: float | None, sums: bool) -> None:
    if kind == "claimed speed" and budget and sums:
        pytest.skip("nobody can score again in time what the host claims to have scored")
    sim = Simulation(config_of(population=128, sums=sums, budget=budget))
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    liars = {"e", "f"} if kind == "two of one token" else {"e"}
    for name in liars:
        sim.add(name, key="token", make_worker=partial(LyingWorker, kind))
    found = run_until_aside(sim, liars)
    if kind == "claimed speed" and sums:  # so small that honest sums seem too large for a while
        found += 30
    sim.run_steps(found + 10 - len(sim.updates))
    assert {name for name, state in states_of(sim).items() if state != "ready"} == liars
    check_later_updates(sim, found)


def test_hosts_pass_first_checks_whatever_the_share_and_again_when_they_are_faster() -> None:
    """A share of a millionth: all further checks would come after some million steps."""
    sim = Simulation(config_of(population=128, spot_check=1e-6))
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    sim.run_steps(60)
    passed = sim.server.inspector.checks
    assert 3 * 4 <= passed <= 5 * 4
    sim.run_steps(30)
    assert sim.server.inspector.checks == passed
    sim.hosts["a"].device.speed *= 4
    sim.run_steps(90)
    assert passed + 3 * 4 <= sim.server.inspector.checks
    sim.add("late", make_worker=partial(LyingWorker, "claimed speed"))
    assert run_until_aside(sim, {"late"}, limit=180 + 80)


@both_exchanges
@pytest.mark.parametrize("share", [0.03, 1.0])
def test_row_50_an_honest_host_is_never_put_aside_for_a_liars_answer(share: float, sums: bool) -> None:
    for seed in range(3):
        sim = Simulation(config_of(population=128, sums=sums, spot_check=share), seed=seed)
        for name in ("a", "b", "c"):
            sim.add(name)
        sim.add("liar", make_worker=partial(LyingWorker, "lying as a checker"))
        found = run_until_aside(sim, {"liar"})
        sim.run_steps(5)
        assert [name for name, state in states_of(sim).items() if state == "put aside"] == ["liar"]
        check_later_updates(sim, found)


@both_exchanges
def test_of_two_owners_nobody_is_put_aside_until_a_third_one_decides(sums: bool) -> None:
    sim = Simulation(config_of(sums=sums, spot_check=1.0))
    sim.add("a")
    sim.add("b", key="token", make_worker=partial(LyingWorker, "swapped signs"))
    sim.run_steps(5)
    sim.add("c", key="token")  # evaluations of one owner count once
    sim.run_steps(20)
    assert set(states_of(sim).values()) == {"ready"}
    what = "gradient sums" if sums else "losses"
    assert sum(f"the {what} of" in line and "nobody is put aside" in line for line in sim.lines) == 1
    sim.add("d")
    sim.run_steps(10)
    assert states_of(sim) == {"a": "ready", "b": "put aside", "c": "put aside", "d": "ready"}
    assert sim.printed(f"b is put aside: its {what} differ from those of other hosts")
    assert "it has the token of b" in next(host.note for host in sim.server.status(sim.now).hosts if host.name == "c")


def test_of_two_owners_the_trusted_one_is_right() -> None:
    for trusted, liar in (("a", "b"), ("b", "a")):
        sim = Simulation(config_of(spot_check=1.0))
        sim.server.inspector._trusted = trusted
        sim.add(trusted)
        sim.add(liar, make_worker=partial(LyingWorker, "swapped signs"))
        run_until_aside(sim, {liar})
        assert states_of(sim)[trusted] == "ready"


@both_exchanges
def test_with_one_token_for_all_each_host_is_checked_by_the_others(sums: bool) -> None:
    sim = Simulation(config_of(sums=sums))
    for name in ("a", "b", "c"):
        sim.add(name, key="token", make_worker=partial(LyingWorker, "scaled") if name == "b" else Worker)
    run_until_aside(sim, {"b"})
    sim.run_steps(10)
    assert states_of(sim) == {"a": "ready", "b": "put aside", "c": "ready"}
    sim.add("d", key="token")
    sim.run_steps(10)
    assert states_of(sim)["d"] == "ready"


def test_a_host_that_only_joins_does_not_make_a_liar_bar_the_one_token_that_works() -> None:
    sim = Simulation(config_of(spot_check=1.0))
    for name in ("a", "b", "c"):
        sim.add(name, key="token", make_worker=partial(LyingWorker, "scaled") if name == "b" else Worker)
    sim.add("stranger", key="other", compile_seconds=1e6)
    run_until_aside(sim, {"b"})
    sim.add("d", key="token")
    sim.run_steps(10)
    assert states_of(sim)["d"] == "ready"


def test_a_token_of_a_liar_does_not_come_back() -> None:
    sim = Simulation(config_of(spot_check=1.0))
    for name in ("a", "b"):
        sim.add(name, key=name)
    sim.add("liar", key="token", make_worker=partial(LyingWorker, "swapped signs"))
    run_until_aside(sim, {"liar"})
    again = sim.add("another name", key="token")
    sim.run_steps(10)
    assert again.worker.refused == (
        "liar, a host with this token, was put aside; hosts with this token may join again after a restart of the "
        "coordinator: its losses differ from those of other hosts"
    )
    assert sim.add("c", key="c")
    sim.run_steps(10)
    assert states_of(sim)["c"] == "ready"


@both_exchanges
def test_checks_take_their_share_of_the_time(sums: bool) -> None:
    """Of simulated time. A share of 0.2, so that chance matters less: 0.2 / 1.2 of the time, and the first checks."""
    sim = Simulation(config_of(population=128, sums=sums, spot_check=0.2))
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    sim.run_steps(150, limit=3000)
    assert 0.1 < sim.server.inspector.seconds / sim.now < 0.24
    assert sim.server.inspector.checks > 4 * 0.1 * 150
    assert set(states_of(sim).values()) == {"ready"}
    check_later_updates(sim, 0)


@both_exchanges
def test_row_48_a_check_comes_after_all_answers_and_looks_like_a_lease(sums: bool) -> None:
    """Each pair is leased once before all values of its step are in, and in most steps never again."""
    sim = Simulation(config_of(population=128, sums=sums))
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    sim.run_steps(5)
    start, first = sim.server.step, len(sim.log)
    sim.run_steps(100)
    answered: dict[int, set[int]] = {}
    leased: dict[int, list[int]] = {}
    checked: set[int] = set()
    for _, _, name, message in sim.log[first:]:
        if isinstance(message, wire.Losses):
            answered.setdefault(message.step, set()).update(pairs_of(message.spans).tolist())
        elif isinstance(message, wire.Step | wire.Extra) and name == "a" and message.step > start:
            pairs = [pair for _, first_pair, count in message.leases for pair in range(first_pair, first_pair + count)]
            if isinstance(message, wire.Extra):
                assert answered[message.step] == set(range(64))
                checked.add(message.step)
            else:
                leased[message.step] = pairs
    assert all(sorted(pairs) == list(range(64)) for pairs in leased.values())
    assert 2 <= len(checked) <= 50


def test_a_check_may_take_longer_than_the_time_budget() -> None:
    """All pairs of the fast host are one sum: 2.5 times as long as a slower host scores in the budget."""
    sim = Simulation(config_of(budget=4.0, sums=True, spot_check=1.0))
    for name in ("a", "b", "c"):
        sim.add(name, speed=20.0)
    fast = sim.add("fast", speed=50.0)
    sim.run_steps(10)
    assert sim.server._registry.called("fast") in sim.server.inspector._proofs
    assert set(states_of(sim).values()) == {"ready"}
    assert not [line for line in sim.lines if "late" in line or "held up" in line]
    fast.device.twist = lambda losses, pairs: losses[:, ::-1]
    run_until_aside(sim, {"fast"})


def test_a_host_too_slow_for_pairs_is_tried_more_rarely_though_it_answers_checks() -> None:
    sim = Simulation(config_of(spot_check=1.0))
    sim.add("a")
    sim.add("slow", speed=1.0)
    sim.run(600)
    slow = sim.server._registry.called("slow")
    assert slow
    assert sim.server.inspector.checks > 20
    assert slow.probe_after == PROBE_LONGEST


@both_exchanges
def test_late_and_doubled_answers_of_checks_are_no_faults(sums: bool) -> None:
    sim = Simulation(config_of(population=128, sums=sums, spot_check=1.0))

    def fate(direction: str, host: str, message: wire.Message) -> list[float]:
        copies = sim.random.choices([0, 1, 2], [0.1, 0.8, 0.1])[0]
        return [sim.random.choices([DELAY, sim.random.random(), 5.0], [0.8, 0.15, 0.05])[0] for _ in range(copies)]

    sim.fate = fate
    for name in ("a", "b", "c", "d"):
        sim.add(name)
    sim.run_steps(40, limit=3000)
    assert sim.server.counters["messages no honest host sends"] == 0
    assert not any(state == "put aside" for state in states_of(sim).values())
    check_later_updates(sim, 0)


def test_a_step_closes_without_a_checker_that_is_killed() -> None:
    sim = Simulation(config_of(spot_check=1.0))
    sim.add("a")
    sim.add("b")
    sim.run_steps(2)
    sim.run(60, until=lambda: sim.server._steps.leases._open.get(1, []) != [])
    sim.kill_host("b")
    sim.run_steps(5)
    check_later_updates(sim, 0)


def test_the_draws_are_of_no_generator_whose_numbers_are_sent() -> None:
    """Session numbers come from the generator that the coordinator is given; the checks come from another one."""
    numbers = np.random.default_rng([0, 1]).integers(1, 2**63 - 1, 3)
    sim = Simulation(config_of(spot_check=1.0))
    for name in ("a", "b"):
        sim.add(name)
    sim.run_steps(10)
    sim.add("c")
    sim.run_steps(2)
    sessions = [sim.hosts[name].worker.joined.session for name in ("a", "b", "c")]  # type: ignore[union-attr]
    assert sessions == numbers.tolist()


def test_hosts_of_one_kind_check_each_other() -> None:
    """Of two kinds with three hosts each: each checks one of its kind; a single host takes any."""
    sim = Simulation(config_of(population=128, spot_check=1.0))
    for name, kind in zip("abcdef", "xyxyxy", strict=True):
        sim.add(name, kind=kind)
    sim.run_steps(5)
    first = len(sim.log)
    sim.run_steps(10)
    scored: dict[int, list[int]] = {}
    for _, _, name, message in sim.log[first:]:
        if name == "a" and isinstance(message, wire.Step):
            scored = {slot: list(range(at, at + count)) for slot, at, count in message.leases}
        elif name == "a" and isinstance(message, wire.Extra) and scored:
            for slot, at, _ in message.leases:
                assert any(at in scored[other] for other in scored.keys() - {slot} if other % 2 == slot % 2)
    assert sim.server.inspector.checks > 20
    lone = sim.add("lone", kind="z", make_worker=partial(LyingWorker, "scaled"))
    sim.run_steps(10)
    assert "put aside" in lone.worker.refused


def test_two_owners_that_invent_a_kind_are_checked_by_others() -> None:
    """Both send the same false losses, so that each would confirm the other."""
    sim = Simulation(config_of(population=128, spot_check=1.0))
    liars = [
        sim.add(name, kind="invented", make_worker=partial(LyingWorker, "two of one token")) for name in ("l", "m")
    ]
    for name in "abcd":
        sim.add(name, kind="x")
    sim.run_steps(20)
    assert ["put aside" in host.worker.refused for host in liars] == [True, True]
