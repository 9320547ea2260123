"""Rewards in Python over hosts, in simulated time: they are slow and may be random, and honest hosts stay."""

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from bench.lies import LyingWorker
from hosts_simulation import DELAY, QUANTUM, Simulation, Twist, check_updates, config_of

from esjax.config.reward import RewardConfig
from esjax.config.settings import Config
from esjax.exchange.update_record import pairs_of
from esjax.exchange.values import make_exchange
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.transfers import FAR
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import Worker

COMPLAINTS = ("is late", "is hung", "held up", "is lost", "in time", "is put aside")
"""What is said of hosts that do not do their work."""


def with_reward(seconds: float = 10.0, tolerance: float = 0.0, population: int = 64, spot_check: float = 0.0) -> Config:
    reward = RewardConfig(prompts="prompts.txt", seconds=seconds, tolerance=tolerance)
    return config_of(population=population, spot_check=spot_check, reward=reward)


def complaints(sim: Simulation) -> list[str]:
    return [line for line in sim.lines if any(words in line for words in COMPLAINTS)]


def check_nothing_twice(sim: Simulation) -> None:
    """Check that no pair was scored twice, or leased twice after the step in which the hosts joined."""
    scored = Counter(pair for host in sim.hosts.values() for pair in host.device.scored)
    assert set(scored.values()) == {1}
    leased = Counter[tuple[int, int]]()
    some = next(iter(sim.hosts))  # every host hears every broadcast
    for message in [*sim.messages(wire.Step, some), *sim.messages(wire.Extra, some)]:
        if message.step:
            pairs = pairs_of([(first, count) for _, first, count in message.leases])
            leased.update((message.step, int(pair)) for pair in pairs)
    assert set(leased.values()) == {1}


def states_of(sim: Simulation) -> dict[str, str]:
    return {host.name: host.state for host in sim.server.status(sim.now).hosts}


def test_no_pair_of_a_slow_reward_is_given_twice() -> None:
    """A call takes two seconds: a task, of four pairs, takes eight."""
    for hosts in (1, 2, 3, 11):  # of eight quanta: also more hosts than quanta
        sim = Simulation(with_reward())
        for number in range(hosts):
            sim.add(f"host {number}", speed=0.5)
        sim.run_steps(5, limit=2000)
        assert not complaints(sim)
        check_nothing_twice(sim)
        check_updates(sim.updates, sim.config)


@pytest.mark.parametrize("hosts", [2, 9])
@pytest.mark.parametrize(("limit", "call"), [(30.0, 25.0), (120.0, 100.0), (1.0, 50.0)])
def test_long_tasks_make_no_host_late(hosts: int, limit: float, call: float) -> None:
    """A task is four calls, near their time limit, whose ends are in the host's beats; or a large model writes."""
    sim = Simulation(with_reward(seconds=limit))
    for number in range(hosts):
        sim.add(f"host {number}", speed=1 / call)
    sim.run_steps(3, limit=100_000)
    assert not complaints(sim)
    check_nothing_twice(sim)


def seconds_with_a_tail(seed: int) -> Callable[[int], float]:
    """Most calls take a tenth of a second, one of fifty takes nine."""
    draws = random.Random(seed)
    return lambda pairs: sum(9.0 if draws.random() < 0.02 else 0.1 for _ in range(pairs))


def test_a_rare_long_call_makes_no_host_late_and_none_rests() -> None:
    sim = Simulation(with_reward(population=256))
    for number in range(3):
        sim.add(f"host {number}", seconds_of=seconds_with_a_tail(number))
    sim.run_steps(40, limit=10_000)
    assert not complaints(sim)


def test_a_host_that_hangs_in_a_reward_is_noticed_and_its_pairs_go_to_others() -> None:
    sim = Simulation(with_reward())
    for name in ("a", "b"):
        sim.add(name, speed=0.5)
    sim.run_steps(2, limit=1000)
    sim.hosts["b"].device.hung = True
    began = sim.now
    sim.run_steps(3, limit=1000)
    assert sim.now - began < 500
    check_updates(sim.updates, sim.config)


def test_a_long_first_measurement_holds_up_one_step_and_is_no_fault() -> None:
    """How long the rewards of held-out prompts take is not known, so the reference host gets pairs once, then none."""
    sim = Simulation(with_reward())
    sim.add("a", speed=2.0, measure_seconds=1000.0)
    for name in ("b", "c"):
        sim.add(name, speed=2.0)
    sim.run(900)
    assert sim.server.audits.measured.held_out is None
    steps = np.diff([at for at, _, name, sent in sim.log if name == "b" and isinstance(sent, wire.Step)])
    assert sorted(steps)[-2] < 40
    assert not complaints(sim)
    sim.run(300)
    assert sim.server.audits.measured.held_out is not None
    assert states_of(sim) == {"a": "ready", "b": "ready", "c": "ready"}
    assert sim.hosts["a"].device.scored[-1][0] > 10


def noisy(size: float, seed: int) -> Twist:
    """A random reward: another number for the same text each time."""
    draws = np.random.default_rng(seed)
    return lambda losses, pairs: (losses + draws.uniform(-size / 2, size / 2, losses.shape)).astype(np.float32)


def failing(share: float, seed: int) -> Twist:
    """A reward that exceeds its time limit now and then."""
    draws = np.random.default_rng(seed)

    def twist(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        return np.where(draws.random((len(losses), 1)) < share, np.float32(np.nan), losses)

    return twist


def adds(more: float) -> Twist:
    """A host that claims more reward for one member of each pair."""
    return lambda losses, pairs: losses - np.array([more, 0.0], np.float32)


@pytest.mark.parametrize("twist", [partial(noisy, 0.1), partial(failing, 0.1)], ids=["noisy", "failing"])
def test_spot_checks_find_the_host_that_adds_to_its_rewards_and_no_honest_one(twist: Callable[[int], Twist]) -> None:
    """All steps are checked; the noise reaches the tolerance, and calls fail at one host alone."""
    sim = Simulation(with_reward(tolerance=0.1, spot_check=1.0, population=128))
    for number, name in enumerate("abc"):
        sim.add(name, twist=twist(number))
    sim.run_steps(40)
    assert set(states_of(sim).values()) == {"ready"}
    sim.add("liar", twist=adds(0.5))
    sim.run(3000, until=lambda: states_of(sim).get("liar") == "put aside")
    sim.run_steps(10)
    assert states_of(sim) == {"a": "ready", "b": "ready", "c": "ready", "liar": "put aside"}


@pytest.mark.parametrize("seed", range(3))
def test_a_host_whose_calls_all_fail_does_not_decide_for_a_liar(seed: int) -> None:
    """Its answers agree with any others: a fourth host decides between the liar and an honest one."""
    sim = Simulation(with_reward(spot_check=1.0, population=128), seed=seed)
    sim.add("liar", make_worker=partial(LyingWorker, "honest when watched"))
    sim.add("overloaded", twist=failing(1.0, 0))
    for name in "ab":
        sim.add(name)
    sim.run(3000, until=lambda: "put aside" in states_of(sim).values())
    sim.run_steps(10)
    assert states_of(sim) == {"liar": "put aside", "overloaded": "ready", "a": "ready", "b": "ready"}


def test_a_deterministic_reward_is_compared_exactly() -> None:
    """A thousandth is far less than what devices may differ by in a loss of several nats, but no reward."""
    sim = Simulation(with_reward(spot_check=1.0, population=128))
    for name in "abc":
        sim.add(name)
    sim.add("liar", twist=adds(1e-5))
    sim.run(3000, until=lambda: states_of(sim).get("liar") == "put aside")
    assert states_of(sim) == {"a": "ready", "b": "ready", "c": "ready", "liar": "put aside"}


def test_rewards_agree_within_their_tolerance() -> None:
    """Reference: by hand."""
    one = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], np.float32)
    exact, tolerant = make_exchange(0, tolerance=0.0), make_exchange(0, tolerance=0.5)
    one = np.concatenate([one] * 10)
    some, half, most = one.copy(), one.copy(), one.copy()
    some[0, 1] += 0.4
    half[::2, 0] = np.nan
    most[:21] = np.nan
    assert exact.agree(one, np.nextafter(one, np.float32(9)))
    assert (exact.agree(one, some), tolerant.agree(one, some)) == (False, True)
    assert not tolerant.agree(one, one + np.float32(0.6))
    assert exact.agree(one, half)  # its calls took too long
    assert exact.agree(half, one)
    assert not exact.agree(one, most)
    assert exact.agree(most, most.copy())


@pytest.mark.parametrize("steps", [3, FAR + 10])
def test_a_host_that_has_the_start_gets_the_updates_alone(steps: int) -> None:
    """However far behind it is: a state would be larger than all updates."""
    sim = Simulation(config_of(population=2 * QUANTUM, init="base", spot_check=0.0, checkpoint_time=0.5))
    sim.fate = lambda direction, host, message: [DELAY / 10]
    first = sim.add("first", has_start=True, speed=1e6)
    sim.run_steps(steps, limit=10_000)
    assert sim.server.audits.snapshots[-1].step > 0
    late = sim.add("late", has_start=True)
    sim.run(300, until=lambda: late.worker.phase == "ready")
    assert late.device.step >= steps
    assert first.device.loaded == late.device.loaded == []
    assert not [message for message in sim.messages(wire.Fetch) if message.what == "state"]
    assert all(two == one + 1 for one, two in pairwise(late.device.made))


def test_a_host_without_the_start_fetches_a_state() -> None:
    sim = Simulation(config_of(init="base", spot_check=0.0))
    host = sim.add("one")
    sim.run_steps(2)
    assert host.device.loaded == [0]


def right(losses: np.ndarray) -> dict[str, float]:
    return {"right": -float(losses.mean())}


def test_rewards_that_have_names_are_known_by_their_means_over_the_population() -> None:
    """Reference: this reward is minus the loss, and so is its mean. Messages get lost and come again, or are checks."""
    draws = random.Random(1)
    sim = Simulation(with_reward(spot_check=0.5))
    sim.fate = lambda direction, host, message: [] if draws.random() < 0.1 else [DELAY]
    for number in range(3):
        sim.add(f"host {number}", rewards=right, speed=5.0 * (1 + number))
    sim.run_steps(40, limit=10_000)
    assert sim.server.inspector.checks > 0
    repeated = Counter(sent.step for _, _, _, sent in sim.log if isinstance(sent, wire.Losses))
    assert max(repeated.values()) > 3
    assert [closed.rewards.keys() for closed in sim.closed] == [{"right"}] * len(sim.closed)
    wrong = np.abs([closed.rewards["right"] + closed.loss for closed in sim.closed])
    # A mean of a message that came late counts for those of its pairs that no other host had scored by then.
    assert np.quantile(wrong, 0.9) < 3e-5
    assert wrong.max() < 0.02
    assert sim.server.status(sim.now).rewards == sim.closed[-1].rewards


def test_few_hosts_invent_no_name_and_no_mean_that_is_not_finite() -> None:
    """The names of a liar would be columns of the metrics for ever."""
    sim = Simulation(with_reward())
    for number in range(2):
        sim.add(f"host {number}", rewards=right)
    sim.add("liar", rewards=lambda losses: {"invented": 1.0, "right": np.nan, "no name": 1.0, "a" * 64: 1e308})
    sim.run_steps(10, limit=1000)
    assert all(host.share > 0 for host in sim.server.status(sim.now).hosts)
    assert [closed.rewards.keys() for closed in sim.closed[2:]] == [{"right"}] * (len(sim.closed) - 2)
    alone = Simulation(with_reward())
    alone.add("liar", rewards=lambda losses: {"no name": 1.0, "of\nlines": 1.0, "inf": np.inf, "sound": 1.0})
    alone.run_steps(3, limit=1000)
    assert alone.closed[-1].rewards == {"sound": 1.0}


class Repeating(Worker):
    """A liar that names each reward sixteen times in a message, as its message alone, and another one in each step."""

    def request(self, now: float) -> Envelope | None:
        """See `Worker.request`."""
        envelope = super().request(now)
        if envelope is None or not isinstance(envelope.message, wire.Losses):
            return envelope
        pairs = sum(count for _, count in envelope.message.spans)
        means = [(f"junk_{envelope.message.step}", 1e6, pairs)] * 8 + [("right", 1e6, pairs)] * 8
        return envelope._replace(message=msgspec.structs.replace(envelope.message, rewards=means))


def test_a_host_counts_for_the_pairs_that_it_scored_however_often_it_names_a_reward() -> None:
    """Reference: the mean over honest hosts is near -2, and the liar's million weighs as much as its pairs."""
    sim = Simulation(with_reward())
    for number in range(3):
        sim.add(f"host {number}", rewards=right)
    sim.add("liar", make_worker=Repeating)
    sim.run_steps(10, limit=1000)
    for closed in sim.closed[2:]:
        assert closed.rewards.keys() == {"right"}
        assert 0 < closed.rewards["right"] < 0.5e6
    plain = Simulation(config_of())
    plain.add("liar", make_worker=Repeating)
    plain.run_steps(3)
    assert not any(closed.rewards for closed in plain.closed)


def test_names_beyond_those_of_a_message_are_left_out() -> None:
    """A reward may name another task in each call; a message with more names would be dropped, again and again."""
    sim = Simulation(with_reward())
    sim.add("host", rewards=lambda losses: {f"task_{number:02}": 1.0 for number in range(40)})
    sim.run_steps(3, limit=1000)
    assert [*sim.closed[-1].rewards] == [f"task_{number:02}" for number in range(16)]
