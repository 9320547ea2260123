"""Leases: which host scores which pairs, and that the result does not depend on it."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storms import volume

from esjax.exchange.gradient_sums import TAIL
from esjax.exchange.update_record import Span, pairs_of
from esjax.exchange.values import AGREE, AGREE_STEPS, AGREE_SUMS, SLOT_PAIRS, LossExchange, SumExchange
from esjax.hosts.coordination.leases import FixedPopulation, Lease, Leases, Queue
from esjax.hosts.coordination.time_budget import TimeBudget

QUANTUM = 4


def losses_of(spans: list[Span], error: float = 0.0) -> np.ndarray:
    """Make up the losses of pairs: a number of each, and twice that."""
    pairs = pairs_of(spans).astype(np.float32) % 1000
    return np.stack([pairs + np.float32(error), 2 * pairs], axis=1)


def spans_of(leases: list[Lease], slot: int) -> list[Span]:
    return [(lease.first, lease.pairs) for lease in leases if lease.slot == slot]


def quanta_of(leases: list[Lease], quantum: int = QUANTUM) -> Counter[int]:
    """Count the units that each host was given."""
    counts: Counter[int] = Counter()
    for lease in leases:
        counts[lease.slot] += -(-lease.pairs // quantum)
    return counts


def hand_in(work: Leases, slot: int, spans: list[Span], error: float = 0.0, final: bool = True) -> str:
    return work.accept(slot, spans, losses_of(spans, error), final)


def hand_in_all(work: Leases, leases: list[Lease], errors: Mapping[int, float] = {}) -> None:
    for slot in {lease.slot for lease in leases}:
        assert not hand_in(work, slot, spans_of(leases, slot), errors.get(slot, 0.0))


# A fixed population.


@pytest.mark.parametrize(
    ("speeds", "shares"),
    [
        ({0: 1.0}, {0: 12}),
        ({0: 1.0, 1: 1.0}, {0: 6, 1: 6}),
        ({0: 1.0, 1: 2.0, 2: 3.0}, {0: 2, 1: 4, 2: 6}),
        ({0: 100.0, 1: 1.0}, {0: 12}),
        ({0: 11.0, 1: 1.0}, {0: 11, 1: 1}),
    ],
    ids=["one", "equal", "1:2:3", "100:1", "11:1"],
)
def test_leases_are_in_proportion_to_speed(speeds: dict[int, float], shares: dict[int, int]) -> None:
    assert quanta_of(FixedPopulation(12 * QUANTUM, QUANTUM, LossExchange()).lease(speeds)) == shares


def test_while_a_host_is_idle_no_other_holds_more_than_half_of_a_step() -> None:
    """Reference: counts by hand. The step takes the fast host 40 s, and a quantum takes the slow one 80 s."""
    speeds = {0: 2.0, 1: 0.05}
    work = FixedPopulation(20 * QUANTUM, QUANTUM, LossExchange())
    first = work.lease(speeds)
    assert quanta_of(first) == {0: 10}
    assert work.waits
    assert work.lease(speeds) == []  # the slow one does not get what was held back
    ((start, _),) = spans_of(first, 0)
    assert not hand_in(work, 0, [(start, 3 * QUANTUM)], final=False)
    assert quanta_of(work.lease(speeds)) == {0: 3}
    while not work.complete:
        held = work.open_spans(0)
        assert sum(count for _, count in held) <= 10 * QUANTUM
        assert not hand_in(work, 0, held)
        assert quanta_of(work.lease(speeds))[1] == 0
    assert work.count(0) == 20 * QUANTUM


def test_while_nothing_changes_what_is_held_back_is_not_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may have thousands of quanta, and messages come all the time."""
    queues = []

    class CountedQueue(Queue):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            queues.append(self)

    monkeypatch.setattr("esjax.hosts.coordination.leases.Queue", CountedQueue)
    work = FixedPopulation(20 * QUANTUM, QUANTUM, LossExchange())
    ((start, _),) = spans_of(work.lease({0: 2.0, 1: 0.05}), 0)
    assert work.lease({0: 2.0, 1: 0.05}) == []
    before = len(queues)
    assert work.lease({0: 2.0, 1: 0.05}) == []
    assert len(queues) == before
    assert quanta_of(work.lease({0: 2.0, 1: 2.0}))[1] > 0
    work.release(1)
    work.lease({0: 2.0, 1: 0.05})
    assert not hand_in(work, 0, [(start, 3 * QUANTUM)], final=False)
    assert quanta_of(work.lease({0: 2.0, 1: 0.05})) == {0: 3}


def test_a_host_ten_times_as_fast_gets_ten_times_the_pairs() -> None:
    """None is idle, so none waits; and steps of a second are leased at once also while one is."""
    assert quanta_of(FixedPopulation(44 * QUANTUM, QUANTUM, LossExchange()).lease({0: 1.0, 1: 0.1})) == {0: 40, 1: 4}
    speeds = {0: 20.0 * QUANTUM, 1: 0.1}
    assert quanta_of(FixedPopulation(20 * QUANTUM, QUANTUM, LossExchange()).lease(speeds)) == {0: 20}


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """List the ways to write a number as a sum."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = [-1, *bars, total + parts - 1]
        yield tuple(end - start - 1 for start, end in itertools.pairwise(edges))


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_no_other_shares_are_done_sooner(quanta: int, speeds: list[int]) -> None:
    leases = FixedPopulation(quanta * QUANTUM, QUANTUM, LossExchange(), most_held=1).lease(
        {slot: float(speed) for slot, speed in enumerate(speeds)}
    )
    counts = quanta_of(leases)
    took = max(count / speeds[slot] for slot, count in counts.items())
    best = min(
        max(count / speed for count, speed in zip(shares, speeds, strict=True))
        for shares in compositions(quanta, len(speeds))
    )
    assert took == best


@settings(deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 9),
    st.dictionaries(st.integers(0, 20), st.floats(0.01, 100), min_size=1, max_size=6),
)
def test_every_pair_is_leased_once(pairs: int, quantum: int, speeds: dict[int, float]) -> None:
    work = FixedPopulation(pairs, quantum, LossExchange(), most_held=1)
    leases = work.lease(speeds)
    leased = [pair for lease in leases for pair in range(lease.first, lease.first + lease.pairs)]
    assert sorted(leased) == list(range(pairs))
    assert all(lease.first % quantum == 0 for lease in leases)
    for slot in speeds:
        assert len(spans_of(leases, slot)) <= 1  # neighbours, so that messages are short
        assert work.open_spans(slot) == spans_of(leases, slot)
        assert work.busy(slot) == bool(spans_of(leases, slot))
    assert work.lease(speeds) == []
    assert not work.waits


def test_who_comes_later_takes_over_what_others_come_to_last() -> None:
    work = FixedPopulation(12 * QUANTUM, QUANTUM, LossExchange())
    work.lease({0: 1.0})
    assert work.lease({0: 1.0}) == []
    assert work.lease({0: 1.0, 1: 1.0}) == [Lease(1, 6 * QUANTUM, 6 * QUANTUM)]
    assert work.open_spans(0) == [(0, 6 * QUANTUM)]
    assert not hand_in(work, 0, [(0, QUANTUM)])
    leases = work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    assert quanta_of(leases) == {2: 3}
    assert [len(pairs_of(work.open_spans(slot))) // QUANTUM for slot in range(3)] == [4, 4, 3]
    assert work.lease({0: 1.0, 1: 1.0, 2: 1.0}) == []


def test_who_comes_back_takes_its_share_again() -> None:
    work = FixedPopulation(12 * QUANTUM, QUANTUM, LossExchange())
    work.lease({0: 1.0, 1: 3.0})
    work.release(1)
    assert quanta_of(work.lease({0: 1.0})) == {0: 9}
    assert quanta_of(work.lease({0: 1.0, 1: 3.0})) == {1: 9}
    assert work.open_spans(0) == [(0, 3 * QUANTUM)]


def test_who_is_too_slow_to_help_is_given_nothing() -> None:
    work = FixedPopulation(3 * QUANTUM, QUANTUM, LossExchange(), most_held=1)
    leases = work.lease({0: 1.0, 1: 0.3})
    assert quanta_of(leases) == {0: 3}
    assert work.lease({0: 1.0, 1: 0.3}) == []
    assert work.lease({0: 1.0, 1: 0.3, 2: 0.3}) == []


def test_a_host_that_is_busy_first_is_given_less() -> None:
    work = FixedPopulation(12 * QUANTUM, QUANTUM, LossExchange())
    assert quanta_of(work.lease({0: 1.0, 1: 1.0}, {0: 4.0 * QUANTUM})) == {0: 4, 1: 8}


def test_without_hosts_nothing_is_leased() -> None:
    work = FixedPopulation(8, QUANTUM, LossExchange())
    assert work.lease({}) == []
    assert work.waits


def test_what_is_released_goes_to_others() -> None:
    work = FixedPopulation(12 * QUANTUM, QUANTUM, LossExchange())
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    theirs = work.open_spans(1)
    work.release(1)
    assert work.waits
    assert not work.busy(1)
    again = work.lease({0: 1.0, 2: 1.0})
    assert quanta_of(again) == {0: 2, 2: 2}
    assert sorted(pairs_of([(lease.first, lease.pairs) for lease in again])) == list(pairs_of(theirs))
    assert not work.waits


def test_a_host_that_was_too_slow_gets_pairs_again_only_if_there_is_no_other() -> None:
    work = FixedPopulation(QUANTUM, QUANTUM, LossExchange())
    assert quanta_of(work.lease({0: 100.0, 1: 1.0})) == {0: 1}
    work.release(0)
    assert quanta_of(work.lease({0: 100.0, 1: 1.0})) == {1: 1}
    work.release(1)
    assert quanta_of(work.lease({0: 100.0})) == {0: 1}


def test_the_first_answer_counts() -> None:
    work = FixedPopulation(2 * QUANTUM, QUANTUM, LossExchange())
    work.lease({0: 1.0})
    work.release(0)
    work.lease({1: 1.0})
    assert not hand_in(work, 0, [(0, QUANTUM)], error=1.0)
    assert work.open_spans(1) == [(QUANTUM, QUANTUM)]
    assert not hand_in(work, 1, [(0, 2 * QUANTUM)], error=5.0)
    assert work.complete
    spans, losses = work.result()
    assert spans == [(0, 2 * QUANTUM)]
    np.testing.assert_array_equal(losses[:QUANTUM], losses_of([(0, QUANTUM)], 1.0))
    np.testing.assert_array_equal(losses[QUANTUM:], losses_of([(QUANTUM, QUANTUM)], 5.0))
    assert (work.count(0), work.count(1)) == (QUANTUM, QUANTUM)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(1, QUANTUM)], "not whole lease quanta"),
        ([(0, 1)], "not whole lease quanta"),
        ([(0, 3 * QUANTUM)], "not whole lease quanta"),
        ([(8, 3)], "not whole lease quanta"),
        ([(0, QUANTUM), (0, QUANTUM)], "listed twice"),
        ([(4, QUANTUM)], "never leased"),
        ([(2**31 - QUANTUM, QUANTUM)], "not whole lease quanta"),
    ],
)
def test_what_was_not_asked_for_is_not_taken(spans: list[Span], reason: str) -> None:
    work = FixedPopulation(10, QUANTUM, LossExchange())  # units of 4, 4 and 2
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    mine = work.open_spans(0)
    assert mine == [(0, 4)]
    assert reason in hand_in(work, 0, spans)
    assert work.open_spans(0) == mine
    assert work.count(0) == 0
    assert not hand_in(work, 0, mine)


def test_the_last_quantum_may_be_smaller() -> None:
    work = FixedPopulation(10, QUANTUM, LossExchange())
    hand_in_all(work, work.lease({0: 1.0}))
    assert work.complete
    np.testing.assert_array_equal(work.result()[1], losses_of([(0, 10)]))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["lease", "release", "hand in", "hand in late", "revoke"]),
        st.integers(0, 4),
        st.floats(0.1, 10),
        st.integers(1, 5),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS, st.integers(1, 30), st.integers(1, 5))
def test_the_result_does_not_depend_on_who_scored_what(
    steps: list[tuple[str, int, float, int]], pairs: int, quantum: int
) -> None:
    """Hosts come, go, are slow, and hand in late; all of them are honest."""
    work = FixedPopulation(pairs, quantum, LossExchange())
    given_to: dict[int, list[Span]] = {slot: [] for slot in range(5)}
    for action, slot, speed, count in steps:
        if action == "lease":
            for lease in work.lease({slot: speed, (slot + 1) % 5: 1.0}):
                given_to[lease.slot].append((lease.first, lease.pairs))
        elif action == "release":
            work.release(slot)
        elif action == "revoke":
            work.revoke(slot)
        elif action == "hand in":
            assert not hand_in(work, slot, work.open_spans(slot)[:count])
        elif given_to[slot]:
            assert not hand_in(work, slot, [given_to[slot][count % len(given_to[slot])]])
        assert 0 <= work.count(slot) <= pairs
    while not work.complete:
        hand_in_all(work, work.lease(dict.fromkeys(range(5), 1.0)))
        for slot in range(5):
            assert not hand_in(work, slot, work.open_spans(slot))
    spans, losses = work.result()
    assert spans == [(0, pairs)]
    np.testing.assert_array_equal(losses, losses_of([(0, pairs)]))


@pytest.mark.parametrize(("error", "is_lie"), [(AGREE / 2, False), (AGREE * 2, True), (np.nan, True), (np.inf, True)])
def test_losses_of_other_hardware_are_no_lies(error: float, is_lie: bool) -> None:
    honest = losses_of([(0, QUANTUM)])
    changed = honest.copy()
    changed[-1, 1] += error
    assert LossExchange().agree(honest, changed) is not is_lie
    assert LossExchange().agree(changed, changed)


# A time budget.


def test_every_host_has_a_range_of_its_own() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    leases = work.lease({3: 1.0, 0: 5.0})
    assert leases == [Lease(0, 0, SLOT_PAIRS), Lease(3, 3 * SLOT_PAIRS, SLOT_PAIRS)]
    assert work.lease({3: 1.0, 0: 5.0}) == []
    assert not hand_in(work, 3, [(3 * SLOT_PAIRS, 5)], final=False)
    assert work.open_spans(3) == [(3 * SLOT_PAIRS + 5, SLOT_PAIRS - 5)]
    assert not hand_in(work, 0, [(0, 2)])
    assert not work.complete
    assert not hand_in(work, 3, [(3 * SLOT_PAIRS + 5, 1)])
    assert work.complete
    spans, losses = work.result()
    assert spans == [(0, 2), (3 * SLOT_PAIRS, 6)]
    np.testing.assert_array_equal(losses, losses_of(spans))
    assert (work.count(0), work.count(3), work.count(7)) == (2, 6, 0)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(SLOT_PAIRS + 11, 2)], "missing"),
        ([(SLOT_PAIRS + 10, 2), (SLOT_PAIRS + 13, 1)], "missing"),
        ([(SLOT_PAIRS - 1, 2)], "never leased"),
        ([(2 * SLOT_PAIRS - 1, 2)], "never leased"),
        ([(0, 2)], "never leased"),
    ],
)
def test_a_range_has_no_gaps(spans: list[Span], reason: str) -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    work.lease({1: 1.0})
    assert not hand_in(work, 1, [(SLOT_PAIRS, 10)], final=False)
    assert reason in hand_in(work, 1, spans)
    assert work.count(1) == 10
    assert work.busy(1)


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 10), (10, 4)],
        [(0, 4), (4, 6), (10, 4)],
        [(0, 14)],
        [(8, 6)],
        [(10, 4)],
        [(10, 1), (11, 3)],
        [(10, 4), (0, 10)],
    ],
)
def test_what_is_there_already_is_taken_as_read(spans: list[Span]) -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    work.lease({0: 1.0})
    assert not hand_in(work, 0, [(0, 10)], final=False)
    assert not hand_in(work, 0, spans)
    assert work.complete
    assert work.result()[0] == [(0, 14)]
    np.testing.assert_array_equal(work.result()[1], losses_of([(0, 14)]))


def test_who_comes_late_waits_for_the_next_step() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    assert work.waits
    work.lease({0: 1.0})
    assert not work.waits
    assert work.lease({0: 1.0, 1: 1.0}) == []


def test_who_would_hold_up_the_others_waits_for_the_next_step() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    assert [lease.slot for lease in work.lease({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.6, 1: 0.4})] == [1, 2]
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    assert [lease.slot for lease in work.lease({0: 1.0}, {0: 0.6})] == [0]


def test_a_step_is_closed_without_who_is_released() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    assert not hand_in(work, 0, [(0, 5)])
    assert not hand_in(work, 1, [(SLOT_PAIRS, 5)], final=False)
    work.release(1)
    work.release(2)
    assert work.complete
    assert not hand_in(work, 2, [(2 * SLOT_PAIRS, 3)])  # still in time, and not a fault of the host
    assert work.result()[0] == [(0, 5), (SLOT_PAIRS, 5), (2 * SLOT_PAIRS, 3)]


def test_a_step_that_no_host_has_finished_is_leased_again() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    work.lease({0: 1.0})
    work.release(0)
    assert work.waits
    assert not work.complete
    assert work.lease({0: 1.0, 1: 1.0}) == [Lease(0, 0, SLOT_PAIRS), Lease(1, SLOT_PAIRS, SLOT_PAIRS)]


def test_who_hands_in_nothing_ends_no_step() -> None:
    work = TimeBudget(1.0, QUANTUM, LossExchange())
    work.lease({0: 1.0})
    assert not hand_in(work, 0, [])
    assert not work.complete
    assert work.waits
    assert work.lease({0: 1.0})


def test_a_slot_that_took_part_is_known() -> None:
    for work in (TimeBudget(1.0, QUANTUM, LossExchange()), FixedPopulation(8, QUANTUM, LossExchange())):
        assert not work.took_part(0)
        work.lease({0: 1.0})
        work.release(0)
        assert work.took_part(0)
        assert not work.took_part(1)


# Sums.

SUMS = SumExchange(2 + TAIL)


def sum_of(spans: list[Span], error: int = 0) -> np.ndarray:
    """Return the gradient sum of some pairs: two numbers of a gradient that are unlikely by chance, and the tail."""
    pairs = pairs_of(spans).astype(np.int64)
    columns = [pairs * 7919 % 10007 - 5000, pairs * 104729 % 9973 - 5000, np.ones_like(pairs), pairs % 97, pairs % 89]
    total = np.stack(columns).sum(axis=1)
    total[0] += error
    return total.astype(np.int32)


def sums_of(spans: list[Span], error: int = 0) -> np.ndarray:
    return np.array([sum_of([span], error) for span in spans], np.int32).reshape(len(spans), 2 + TAIL)


def add(work: Leases, slot: int, spans: list[Span], error: int = 0, final: bool = True) -> str:
    return work.accept(slot, spans, sums_of(spans, error), final)


def add_all(work: Leases, leases: list[Lease], errors: Mapping[int, int] = {}) -> None:
    for slot in {lease.slot for lease in leases}:
        assert not add(work, slot, spans_of(leases, slot), errors.get(slot, 0))


def check_total(work: Leases) -> None:
    """See that every pair of the result counts once."""
    assert work.complete
    spans, totals = work.result()
    np.testing.assert_array_equal(totals.sum(axis=0), sum_of(spans))


@settings(deadline=None)
@given(STEPS, st.integers(1, 30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_pair_is_in_the_sum_once_however_leases_were_divided(
    steps: list[tuple[str, int, float, int]], pairs: int, quantum: int, random: Random
) -> None:
    """Hosts come, go, are slow, and hand in late, twice, and parts of what they were given; all of them are honest."""
    work = FixedPopulation(pairs, quantum, SUMS)
    given_to: dict[int, list[Span]] = {slot: [] for slot in range(5)}
    for action, slot, speed, count in steps:
        if action == "lease":
            for lease in work.lease({slot: speed, (slot + 1) % 5: 1.0}):
                given_to[lease.slot].append((lease.first, lease.pairs))
        elif action == "release":
            work.release(slot)
        elif action == "revoke":
            work.revoke(slot)
            assert work.count(slot) == 0
        elif action == "hand in":
            assert not add(work, slot, work.open_spans(slot)[:count])
        elif given_to[slot]:
            first, size = random.choice(given_to[slot])
            quanta = -(-size // quantum)
            begin = random.randrange(quanta)
            end = random.randint(begin + 1, quanta)
            span = (first + begin * quantum, min(size, end * quantum) - begin * quantum)
            before = work.count(slot)
            assert not add(work, slot, [span])
            assert work.count(slot) in (before, before + span[1])  # as a whole, or not at all
    while not work.complete:
        for lease in work.lease(dict.fromkeys(range(5), 1.0)):
            assert not add(work, lease.slot, [(lease.first, lease.pairs)])
        for slot in range(5):
            assert not add(work, slot, work.open_spans(slot))
    check_total(work)
    assert work.result()[0] == [(0, pairs)]
    assert sum(map(work.count, range(5))) == pairs


def test_a_sum_over_what_is_in_does_not_count_and_the_rest_is_given_out_again() -> None:
    work = FixedPopulation(4 * QUANTUM, QUANTUM, SUMS)
    work.lease({0: 1.0})
    assert work.lease({0: 1.0, 1: 1.0}) == [Lease(1, 2 * QUANTUM, 2 * QUANTUM)]
    assert not add(work, 1, [(2 * QUANTUM, 2 * QUANTUM)])
    assert not work.waits
    assert not add(work, 0, [(0, 3 * QUANTUM)])  # it had begun before the others were taken from it
    assert work.count(0) == 0
    assert not work.busy(0)
    assert work.waits
    again = work.lease({0: 1.0, 1: 1.0})
    assert sorted(pairs_of([(lease.first, lease.pairs) for lease in again])) == list(range(2 * QUANTUM))
    add_all(work, again)
    check_total(work)


def test_a_sum_over_what_another_one_is_at_counts_if_it_comes_first() -> None:
    work = FixedPopulation(4 * QUANTUM, QUANTUM, SUMS)
    work.lease({0: 1.0})
    work.lease({0: 1.0, 1: 1.0})
    assert not add(work, 0, [(0, 3 * QUANTUM)])
    assert work.open_spans(1) == [(3 * QUANTUM, QUANTUM)]
    assert not add(work, 1, [(2 * QUANTUM, 2 * QUANTUM)])
    assert (work.count(0), work.count(1)) == (3 * QUANTUM, 0)
    add_all(work, work.lease({1: 1.0}))
    check_total(work)


def test_what_a_host_added_is_forgotten_alone() -> None:
    work = FixedPopulation(8 * QUANTUM, QUANTUM, SUMS)
    leases = work.lease({0: 1.0, 1: 1.0})
    add_all(work, leases, {1: 1000})
    assert work.complete
    work.revoke(1)
    assert not work.complete
    again = work.lease({0: 1.0})
    theirs = pairs_of(spans_of(leases, 1))
    assert set(pairs_of(spans_of(again, 0))) == set(theirs)
    add_all(work, again)
    check_total(work)
    assert (work.count(0), work.count(1)) == (8 * QUANTUM, 0)


def test_a_fast_host_adds_up_in_parts_that_a_usual_host_can_score_again() -> None:
    """Twelve quanta for speeds of 4, 1 and 1: the usual host has two, and a part 1.5 times as many."""
    work = FixedPopulation(12 * QUANTUM, QUANTUM, SUMS)
    leases = work.lease({0: 4.0, 1: 1.0, 2: 1.0})
    parts = [(0, 3), (3, 3), (6, 2), (8, 2), (10, 2)]
    assert [(lease.first // QUANTUM, lease.pairs // QUANTUM) for lease in leases] == parts
    assert [lease.slot for lease in leases] == [0, 0, 0, 1, 2]
    assert work.open_spans(0) == spans_of(leases, 0)
    assert "more pairs than a lease" in add(work, 0, [(0, 4 * QUANTUM)])
    assert (work.count(0), work.busy(0)) == (0, True)
    add_all(work, leases)
    check_total(work)


def test_units_of_sums_are_as_large_as_leases_however_they_were_sent() -> None:
    work = FixedPopulation(8 * QUANTUM, QUANTUM, SUMS)
    work.lease({0: 1.0, 1: 1.0})
    assert not add(work, 0, [(first * QUANTUM, QUANTUM) for first in (2, 0, 1, 3)])
    (unit,) = work.units(0)
    assert unit.spans == [(0, 4 * QUANTUM)]
    np.testing.assert_array_equal(unit.values, [sum_of(unit.spans)])
    assert work.units(1) == []


def test_units_of_losses_are_quanta() -> None:
    fixed, budget = FixedPopulation(3 * QUANTUM - 1, QUANTUM, LossExchange()), TimeBudget(1.0, QUANTUM, LossExchange())
    for work, at in ((fixed, 0), (budget, 2 * SLOT_PAIRS)):
        work.lease({2: 1.0})
        assert not hand_in(work, 2, [(at, QUANTUM), (at + QUANTUM, 2 * QUANTUM - 1)])
        units = work.units(2)
        assert [unit.spans for unit in units] == [
            [(at, QUANTUM)],
            [(at + QUANTUM, QUANTUM)],
            [(at + 2 * QUANTUM, QUANTUM - 1)],
        ]
        for unit in units:
            np.testing.assert_array_equal(unit.values, losses_of(unit.spans))


@pytest.mark.parametrize(
    ("change", "is_lie"),
    [
        pytest.param([AGREE_SUMS / 2 * 1000, 0, 0, 0, 0], False, id="a little"),
        pytest.param([AGREE_SUMS * 2 * 1000, 0, 0, 0, 0], True, id="more"),
        pytest.param([0, AGREE_STEPS, 0, 0, 0], False, id="rounding"),
        pytest.param([0, AGREE_SUMS * 2 * 1000, 0, 0, 0], True, id="more than the largest says"),
        pytest.param([-1000, -10, 0, 0, 0], True, id="no gradient"),
        pytest.param([0, 0, 2 + AGREE_SUMS * 300, 0, 0], True, id="pairs"),
        pytest.param([0, 0, 0, AGREE_SUMS / 2 * 10**9, 0], False, id="losses, a little"),
        pytest.param([0, 0, 0, AGREE_SUMS * 2 * 10**9, 0], True, id="losses"),
        pytest.param([0, 0, 0, 0, 1000], True, id="differences"),
        pytest.param([-(2**31) - 1000, 0, 0, 0, 0], True, id="the smallest number"),
    ],
)
def test_sums_of_other_hardware_are_no_lies(change: list[float], is_lie: bool) -> None:
    honest = np.array([1000, 10, 128, 10**9, 5000], np.int64)
    changed = honest + np.array(change).astype(np.int64)
    assert SUMS.agree(honest.astype(np.int32)[None], changed.astype(np.int32)[None]) is not is_lie


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans()), max_size=12
    )
)
def test_every_pair_of_a_time_budget_is_in_the_sum_once(messages: list[tuple[int, list[int], bool]]) -> None:
    """Hosts hand in what comes next, some of it with everything that they handed in before."""
    work = TimeBudget(1.0, QUANTUM, SUMS)
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    done: dict[int, list[Span]] = {slot: [] for slot in range(3)}
    for slot, counts, again in messages:
        new: list[Span] = []
        for count in counts:
            at = sum(([*done[slot], *new] or [(slot * SLOT_PAIRS, 0)])[-1])
            new.append((at, count))
        assert not add(work, slot, done[slot] + new if again else new, final=False)
        done[slot] += new
        assert work.count(slot) == sum(count for _, count in done[slot])
    for slot in range(3):
        work.release(slot)
    if any(done.values()):
        check_total(work)
        assert set(pairs_of(work.result()[0])) == {int(pair) for slot in range(3) for pair in pairs_of(done[slot])}


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(SLOT_PAIRS, 12)], "summed twice"),
        ([(SLOT_PAIRS + 8, 4)], "summed twice"),
        ([(SLOT_PAIRS + 10, 2), (SLOT_PAIRS + 11, 2)], "summed twice"),
        ([(SLOT_PAIRS + 11, 2)], "missing"),
        ([(SLOT_PAIRS - 1, 2)], "never leased"),
    ],
)
def test_a_sum_of_a_range_has_no_gap_and_no_overlap(spans: list[Span], reason: str) -> None:
    work = TimeBudget(1.0, QUANTUM, SUMS)
    work.lease({1: 1.0})
    assert not add(work, 1, [(SLOT_PAIRS, 4), (SLOT_PAIRS + 4, 6)], final=False)
    assert reason in add(work, 1, spans)
    assert work.count(1) == 10
    assert not add(work, 1, [(SLOT_PAIRS + 10, 1)])
    check_total(work)


def test_a_range_that_is_revoked_is_in_no_sum() -> None:
    work = TimeBudget(1.0, QUANTUM, SUMS)
    work.lease({0: 1.0, 1: 1.0})
    assert not add(work, 0, [(0, 5)])
    assert not add(work, 1, [(SLOT_PAIRS, 3)], error=1000)
    work.revoke(1)
    check_total(work)
    assert work.result()[0] == [(0, 5)]


@pytest.mark.parametrize(
    "work", [FixedPopulation(400, 1, SUMS), TimeBudget(1.0, QUANTUM, SUMS)], ids=["fixed", "budget"]
)
def test_the_sums_of_a_host_take_the_room_of_one(work: Leases) -> None:
    numbers = 10_000
    work.lease({0: 1.0})
    before = volume(work)
    for pair in range(300):
        assert not work.accept(0, [(pair, 1)], np.ones((1, numbers), np.int32), False)
    assert volume(work) - before < 2 * 8 * numbers
