"""Hosts that are killed, cut off, slow or hung, and come back: no step waits for them for long, and nothing is lost.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import pytest
from fault_runs import BUDGET, FIXED, PAIRS, all_modes, both_exchanges, both_modes, check_run, run_with, status_of
from hosts_simulation import QUANTUM, Simulation, config_of

from esjax.config.settings import Config
from esjax.hosts.coordination.registry import FORGET, SILENT
from esjax.hosts.coordination.steps import STUCK
from esjax.hosts.protocol import transfers, wire
from esjax.hosts.protocol.request_channel import DEAF
from esjax.hosts.protocol.worker import BEAT

STEP = 2.0
"""Seconds in which any step here is done, by one host of the usual speed."""


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
