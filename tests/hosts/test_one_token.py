"""One token of five cannot slow the others: their step rate stays at least half of what it is without it.

Reference: the same honest hosts, in the same time, without the token.
"""

from collections.abc import Callable, Sequence
from functools import cache

import pytest
from hosts_simulation import Simulation, config_of
from hypothesis import given, settings
from hypothesis import strategies as st
from token_holder import TokenHolder

from esjax.config.reward import RewardConfig
from esjax.hosts.protocol import wire

Act = tuple[int, str, float | None, bool, list[wire.Phase], str, float]
"""Which host, what, seconds to its answers, whether these are whole, phases, digests, seconds to the next act."""

CONFIGS = {
    "losses": config_of(population=256),
    "sums": config_of(population=256, sums=True),
    "rewards": config_of(population=256, reward=RewardConfig(prompts="prompts.txt", seconds=30.0)),
}
"""What hosts exchange; rewards are losses of members that write, and a call may take 30 s."""

HONEST = 4
SECONDS = 30.0
SPEEDS = [30.0, 300.0]
"""Pairs per second of an honest host: steps of 1 s and of 0.1 s."""


def honest(speed: float, exchanged: str) -> Simulation:
    """Start a run of hosts with a token each."""
    sim = Simulation(CONFIGS[exchanged])
    for number in range(HONEST):
        sim.add(f"honest {number}", key=f"key {number}", speed=speed)
    sim.run(5)
    return sim


@cache
def undisturbed(speed: float, exchanged: str) -> int:
    """Count the steps that honest hosts make alone."""
    sim = honest(speed, exchanged)
    before = len(sim.ledger)
    sim.run(SECONDS)
    return len(sim.ledger) - before


DIGESTS: dict[str, Callable[[str], str] | None] = {
    "true": lambda digest: digest,
    "false": lambda digest: "0" * 16,
    "none": None,
}
DELAYS = st.none() | st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.95, 1.2, 2.0, 2.9, 4.0, 9.0])
PHASES = st.sampled_from([["ready"], ["ready", "joining"], ["compiling"], ["ready"] * 7 + ["joining"]])
ACTS = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["go on", "leave", "vanish"]),
    DELAYS,
    st.booleans(),
    PHASES,
    st.sampled_from(["true", "false", "none"]),
    st.sampled_from([0.1, 0.3, 1.0, 3.0, 10.0]),
)


def steps_beside(acts: Sequence[Act], speed: float, exchanged: str) -> int:
    """Count the steps of honest hosts while hosts of one more token do the acts, again and again."""
    sim = honest(speed, exchanged)
    holders = [TokenHolder(sim, f"bad {number}", "bad") for number in range(3)]
    before, end = len(sim.ledger), sim.now + SECONDS
    while sim.now < end - 1e-6:
        for number, act, delay, is_whole, phases, digest, seconds in acts:
            holder = holders[number]
            holder.answer_after, holder.is_whole, holder.phases = delay, is_whole, list(phases)
            holder.digest = DIGESTS[digest]
            if act == "leave":
                holder.leave()
            elif act == "vanish":
                holder.vanish()
            sim.run(min(seconds, end - sim.now))
    return len(sim.ledger) - before


def check(acts: Sequence[Act], speed: float, exchanged: str) -> None:
    assert steps_beside(acts, speed, exchanged) >= undisturbed(speed, exchanged) / 2


both_exchanges = pytest.mark.parametrize("exchanged", ["losses", "sums"])
both_at_both_speeds = pytest.mark.parametrize(
    ("exchanged", "speed"),
    [
        ("losses", 30.0),
        ("sums", 300.0),
        pytest.param("losses", 300.0, marks=pytest.mark.nightly),
        pytest.param("sums", 30.0, marks=pytest.mark.nightly),
    ],
)


@both_exchanges
@settings(max_examples=2, deadline=None)
@given(st.lists(ACTS, min_size=1, max_size=6), st.sampled_from(SPEEDS))
def test_one_token_of_five_does_not_halve_the_step_rate(exchanged: str, acts: list[Act], speed: float) -> None:
    check(acts, speed, exchanged)


@pytest.mark.nightly
@both_exchanges
@settings(max_examples=300, deadline=None)
@given(st.lists(ACTS, min_size=1, max_size=12), st.sampled_from(SPEEDS))
def test_one_token_of_five_does_not_halve_the_step_rate_in_long(exchanged: str, acts: list[Act], speed: float) -> None:
    check(acts, speed, exchanged)


@both_at_both_speeds
@pytest.mark.parametrize("delay", [None, 0.95], ids=str)
def test_a_token_that_always_answers_late_costs_little(delay: float | None, speed: float, exchanged: str) -> None:
    acts: list[Act] = [(number, "go on", delay, True, ["ready"], "true", 1.0) for number in range(3)]
    check(acts, speed, exchanged)


@pytest.mark.parametrize(("exchanged", "act"), [("losses", "leave"), ("sums", "vanish")])
def test_a_token_whose_hosts_come_back_under_new_names_costs_little(act: str, exchanged: str) -> None:
    acts: list[Act] = [(number, act, None, True, ["ready"], "true", 0.3) for number in range(3)]
    check(acts, SPEEDS[-1], exchanged)


@pytest.mark.parametrize(
    ("exchanged", "delay"), [("losses", 0.05), ("sums", None), ("rewards", None), ("rewards", 0.05)]
)
def test_a_token_that_gives_its_pairs_back_again_and_again_costs_little(delay: float | None, exchanged: str) -> None:
    """Each time the others would have to share out the pairs anew."""
    acts: list[Act] = [(number, "go on", delay, True, ["ready", "joining"], "true", 1.0) for number in range(3)]
    check(acts, SPEEDS[-1], exchanged)


def test_a_token_whose_pairs_go_round_costs_little() -> None:
    """Pairs are leased, given back and leased to others, so values come for closed steps when the next has begun."""
    acts: list[Act] = [
        (1, "go on", None, True, ["compiling"], "true", 0.3),
        (1, "go on", None, True, ["compiling"], "none", 0.1),
        (1, "go on", 2.9, True, ["ready", "ready", "ready", "joining"], "none", 0.3),
        (1, "leave", None, False, ["ready"], "none", 0.3),
        (2, "go on", None, False, ["ready", "joining"], "false", 1.0),
        (0, "leave", None, False, ["compiling"], "false", 10.0),
    ]
    check(acts, SPEEDS[-1], "losses")


@both_at_both_speeds
def test_a_token_that_is_fast_and_then_stalls_costs_little(speed: float, exchanged: str) -> None:
    acts: list[Act] = [
        act
        for number in range(3)
        for act in (
            (number, "go on", 0.0, True, ["ready"], "true", 1.0),
            (number, "go on", None, True, ["ready"], "true", 0.3),
        )
    ]
    check(acts, speed, exchanged)
