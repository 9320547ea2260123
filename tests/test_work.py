"""Who scores what, and that it does not matter."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax.hosts.wire import Span, pairs_of
from esjax.hosts.work import AGREE, SLOT_PAIRS, FixedPopulation, Lease, TimeBudget, Work

UNIT = 4


def losses_of(spans: list[Span], error: float = 0.0) -> np.ndarray:
    """Make up the losses of pairs: a number of each, and twice that."""
    pairs = pairs_of(spans).astype(np.float32) % 1000
    return np.stack([pairs + np.float32(error), 2 * pairs], axis=1)


def spans_of(leases: list[Lease], slot: int) -> list[Span]:
    return [(lease.first, lease.pairs) for lease in leases if lease.slot == slot]


def units_of(leases: list[Lease], unit: int = UNIT) -> Counter[int]:
    """Count the units that each host was given."""
    counts: Counter[int] = Counter()
    for lease in leases:
        counts[lease.slot] += -(-lease.pairs // unit)
    return counts


def hand_in(work: Work, slot: int, spans: list[Span], error: float = 0.0, final: bool = True) -> str:
    return work.accept(slot, spans, losses_of(spans, error), final)


def hand_in_all(work: Work, leases: list[Lease], errors: Mapping[int, float] = {}) -> None:
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
    assert units_of(FixedPopulation(12 * UNIT, UNIT).lease(speeds)) == shares


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """List the ways to write a number as a sum."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = [-1, *bars, total + parts - 1]
        yield tuple(end - start - 1 for start, end in itertools.pairwise(edges))


@settings(deadline=None)
@given(st.integers(1, 8), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_no_other_shares_are_done_sooner(units: int, speeds: list[int]) -> None:
    leases = FixedPopulation(units * UNIT, UNIT).lease({slot: float(speed) for slot, speed in enumerate(speeds)})
    counts = units_of(leases)
    took = max(count / speeds[slot] for slot, count in counts.items())
    best = min(
        max(count / speed for count, speed in zip(shares, speeds, strict=True))
        for shares in compositions(units, len(speeds))
    )
    assert took == best


@settings(deadline=None)
@given(
    st.integers(1, 100),
    st.integers(1, 9),
    st.dictionaries(st.integers(0, 20), st.floats(0.01, 100), min_size=1, max_size=6),
)
def test_every_pair_is_leased_once(pairs: int, unit: int, speeds: dict[int, float]) -> None:
    work = FixedPopulation(pairs, unit)
    leases = work.lease(speeds)
    leased = [pair for lease in leases for pair in range(lease.first, lease.first + lease.pairs)]
    assert sorted(leased) == list(range(pairs))
    assert all(lease.first % unit == 0 for lease in leases)
    for slot in speeds:
        assert len(spans_of(leases, slot)) <= 1  # neighbours, so that messages are short
        assert work.open_spans(slot) == spans_of(leases, slot)
        assert work.busy(slot) == bool(spans_of(leases, slot))
    assert work.lease(speeds) == []
    assert not work.waits


def test_who_comes_later_takes_over_what_others_come_to_last() -> None:
    work = FixedPopulation(12 * UNIT, UNIT)
    work.lease({0: 1.0})
    assert work.lease({0: 1.0}) == []
    assert work.lease({0: 1.0, 1: 1.0}) == [Lease(1, 6 * UNIT, 6 * UNIT)]
    assert work.open_spans(0) == [(0, 6 * UNIT)]
    assert not hand_in(work, 0, [(0, UNIT)])
    leases = work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    assert units_of(leases) == {2: 3}
    assert [len(pairs_of(work.open_spans(slot))) // UNIT for slot in range(3)] == [4, 4, 3]
    assert work.lease({0: 1.0, 1: 1.0, 2: 1.0}) == []


def test_who_comes_back_takes_its_share_again() -> None:
    work = FixedPopulation(12 * UNIT, UNIT)
    work.lease({0: 1.0, 1: 3.0})
    work.release(1)
    assert units_of(work.lease({0: 1.0})) == {0: 9}
    assert units_of(work.lease({0: 1.0, 1: 3.0})) == {1: 9}
    assert work.open_spans(0) == [(0, 3 * UNIT)]


def test_who_is_too_slow_to_help_is_given_nothing() -> None:
    work = FixedPopulation(3 * UNIT, UNIT)
    leases = work.lease({0: 1.0, 1: 0.3})
    assert units_of(leases) == {0: 3}
    assert work.lease({0: 1.0, 1: 0.3}) == []
    assert work.lease({0: 1.0, 1: 0.3, 2: 0.3}) == []


def test_a_host_that_is_busy_first_is_given_less() -> None:
    work = FixedPopulation(12 * UNIT, UNIT)
    assert units_of(work.lease({0: 1.0, 1: 1.0}, {0: 4.0 * UNIT})) == {0: 4, 1: 8}


def test_without_hosts_nothing_is_leased() -> None:
    work = FixedPopulation(8, UNIT)
    assert work.lease({}) == []
    assert work.waits


def test_what_is_released_goes_to_others() -> None:
    work = FixedPopulation(12 * UNIT, UNIT)
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    theirs = work.open_spans(1)
    work.release(1)
    assert work.waits
    assert not work.busy(1)
    again = work.lease({0: 1.0, 2: 1.0})
    assert units_of(again) == {0: 2, 2: 2}
    assert sorted(pairs_of([(lease.first, lease.pairs) for lease in again])) == list(pairs_of(theirs))
    assert not work.waits


def test_who_was_too_slow_is_asked_again_only_if_nobody_else_is_there() -> None:
    work = FixedPopulation(UNIT, UNIT)
    assert units_of(work.lease({0: 100.0, 1: 1.0})) == {0: 1}
    work.release(0)
    assert units_of(work.lease({0: 100.0, 1: 1.0})) == {1: 1}
    work.release(1)
    assert units_of(work.lease({0: 100.0})) == {0: 1}


def test_the_first_answer_counts() -> None:
    work = FixedPopulation(2 * UNIT, UNIT)
    work.lease({0: 1.0})
    work.release(0)
    work.lease({1: 1.0})
    assert not hand_in(work, 0, [(0, UNIT)], error=1.0)
    assert work.open_spans(1) == [(UNIT, UNIT)]
    assert not hand_in(work, 1, [(0, 2 * UNIT)], error=5.0)
    assert work.complete
    spans, losses = work.result()
    assert spans == [(0, 2 * UNIT)]
    np.testing.assert_array_equal(losses[:UNIT], losses_of([(0, UNIT)], 1.0))
    np.testing.assert_array_equal(losses[UNIT:], losses_of([(UNIT, UNIT)], 5.0))
    assert (work.count(0), work.count(1)) == (UNIT, UNIT)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([(1, UNIT)], "no whole units"),
        ([(0, 1)], "no whole units"),
        ([(0, 3 * UNIT)], "no whole units"),
        ([(8, 3)], "no whole units"),
        ([(0, UNIT), (0, UNIT)], "named twice"),
        ([(4, UNIT)], "never assigned"),
        ([(2**31 - UNIT, UNIT)], "no whole units"),
    ],
)
def test_what_was_not_asked_for_is_not_taken(spans: list[Span], reason: str) -> None:
    work = FixedPopulation(10, UNIT)  # units of 4, 4 and 2
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    mine = work.open_spans(0)
    assert mine == [(0, 4)]
    assert reason in hand_in(work, 0, spans)
    assert work.open_spans(0) == mine
    assert work.count(0) == 0
    assert not hand_in(work, 0, mine)


def test_the_last_unit_may_be_smaller() -> None:
    work = FixedPopulation(10, UNIT)
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
@given(STEPS, st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_the_result_does_not_depend_on_who_scored_what(
    steps: list[tuple[str, int, float, int]], pairs: int, unit: int, is_checked: bool
) -> None:
    """Hosts come, go, are slow, and hand in late; all of them are honest."""
    units = -(-pairs // unit)
    work = FixedPopulation(pairs, unit, range(units) if is_checked else ())
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
    assert not work.liars(None)
    spans, losses = work.result()
    assert spans == [(0, pairs)]
    np.testing.assert_array_equal(losses, losses_of([(0, pairs)]))


# Spot checks.


def checked(units: int = 6) -> FixedPopulation:
    return FixedPopulation(units * UNIT, UNIT, range(units))


def test_a_checked_unit_is_scored_by_two_hosts() -> None:
    work = checked()
    leases = work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    assert sum(units_of(leases).values()) == 12
    holders = Counter(pair for lease in leases for pair in range(lease.first, lease.first + lease.pairs))
    assert set(holders.values()) == {2}
    hand_in_all(work, leases)
    assert work.complete
    assert not work.liars(0)


def test_only_what_is_checked_is_scored_twice() -> None:
    work = FixedPopulation(6 * UNIT, UNIT, [2, 4])
    leases = work.lease({0: 1.0, 1: 1.0})
    holders = Counter(pair // UNIT for lease in leases for pair in range(lease.first, lease.first + lease.pairs, UNIT))
    assert holders == {0: 1, 1: 1, 2: 2, 3: 1, 4: 2, 5: 1}


def test_one_host_is_not_checked() -> None:
    work = checked()
    leases = work.lease({0: 1.0})
    assert sum(units_of(leases).values()) == 6
    hand_in_all(work, leases)
    assert work.complete


def test_a_step_waits_for_a_second_opinion_under_way() -> None:
    work = checked(1)
    work.lease({0: 1.0, 1: 1.0})
    assert not hand_in(work, 0, [(0, UNIT)])
    assert not work.complete
    work.release(1)
    assert work.complete


def test_the_odd_one_of_three_is_a_liar() -> None:
    for liar in range(3):
        work = checked(1)
        leases = work.lease({0: 1.0, 1: 1.0, 2: 1.0})
        first, second = (lease.slot for lease in leases)
        hand_in_all(work, leases, {liar: 1.0})
        if liar not in (first, second):
            assert work.complete
            continue
        assert work.waits
        hand_in_all(work, work.lease({0: 1.0, 1: 1.0, 2: 1.0}), {liar: 1.0})
        assert work.complete
        assert work.liars(None) == {liar}
        assert work.liars(liar) == {liar}  # two others outvote whoever is trusted
        work.revoke(liar)
        assert work.complete
        assert not work.waits
        assert work.count(liar) == 0
        np.testing.assert_array_equal(work.result()[1], losses_of([(0, UNIT)]))


def test_of_two_hosts_the_trusted_one_is_right() -> None:
    work = checked(2)
    hand_in_all(work, work.lease({0: 1.0, 1: 1.0}), {0: 1.0})
    assert work.liars(1) == {0}
    assert work.liars(0) == {1}
    assert work.liars(None) == set()
    assert work.liars(7) == set()
    work.revoke(0)
    assert work.complete
    assert not work.waits
    assert not work.liars(1)
    np.testing.assert_array_equal(work.result()[1], losses_of([(0, 2 * UNIT)]))


def test_what_only_a_liar_scored_is_scored_again() -> None:
    work = FixedPopulation(4 * UNIT, UNIT, [0])
    leases = work.lease({0: 1.0, 1: 1.0})
    hand_in_all(work, leases, {1: 1.0})
    assert work.liars(0) == {1}
    work.revoke(1)
    assert not work.complete
    hand_in_all(work, work.lease({0: 1.0}))
    assert work.complete
    np.testing.assert_array_equal(work.result()[1], losses_of([(0, 4 * UNIT)]))


@pytest.mark.parametrize(("error", "is_lie"), [(AGREE / 2, False), (AGREE * 2, True), (np.nan, True), (np.inf, True)])
def test_other_hardware_is_no_liar(error: float, is_lie: bool) -> None:
    work = checked(1)
    hand_in_all(work, work.lease({0: 1.0, 1: 1.0}), {1: error})
    assert work.liars(0) == ({1} if is_lie else set())


def test_losses_that_are_no_numbers_agree_with_each_other() -> None:
    work = checked(1)
    hand_in_all(work, work.lease({0: 1.0, 1: 1.0}), {0: np.nan, 1: np.nan})
    assert not work.liars(0)


# A time budget.


def test_every_host_has_a_range_of_its_own() -> None:
    work = TimeBudget(1.0)
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
        ([(SLOT_PAIRS - 1, 2)], "never assigned"),
        ([(2 * SLOT_PAIRS - 1, 2)], "never assigned"),
        ([(0, 2)], "never assigned"),
    ],
)
def test_a_range_has_no_gaps(spans: list[Span], reason: str) -> None:
    work = TimeBudget(1.0)
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
    work = TimeBudget(1.0)
    work.lease({0: 1.0})
    assert not hand_in(work, 0, [(0, 10)], final=False)
    assert not hand_in(work, 0, spans)
    assert work.complete
    assert work.result()[0] == [(0, 14)]
    np.testing.assert_array_equal(work.result()[1], losses_of([(0, 14)]))


def test_who_comes_late_waits_for_the_next_step() -> None:
    work = TimeBudget(1.0)
    assert work.waits
    work.lease({0: 1.0})
    assert not work.waits
    assert work.lease({0: 1.0, 1: 1.0}) == []


def test_who_would_hold_up_the_others_waits_for_the_next_step() -> None:
    work = TimeBudget(1.0)
    assert [lease.slot for lease in work.lease({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.6, 1: 0.4})] == [1, 2]
    work = TimeBudget(1.0)
    assert [lease.slot for lease in work.lease({0: 1.0}, {0: 0.6})] == [0]


def test_a_step_is_closed_without_who_is_released() -> None:
    work = TimeBudget(1.0)
    work.lease({0: 1.0, 1: 1.0, 2: 1.0})
    assert not hand_in(work, 0, [(0, 5)])
    assert not hand_in(work, 1, [(SLOT_PAIRS, 5)], final=False)
    work.release(1)
    work.release(2)
    assert work.complete
    assert not hand_in(work, 2, [(2 * SLOT_PAIRS, 3)])  # still in time, and no fault of its own
    assert work.result()[0] == [(0, 5), (SLOT_PAIRS, 5), (2 * SLOT_PAIRS, 3)]


def test_a_step_that_nobody_has_finished_is_leased_again() -> None:
    work = TimeBudget(1.0)
    work.lease({0: 1.0})
    work.release(0)
    assert work.waits
    assert not work.complete
    assert work.lease({0: 1.0, 1: 1.0}) == [Lease(0, 0, SLOT_PAIRS), Lease(1, SLOT_PAIRS, SLOT_PAIRS)]


def test_who_hands_in_nothing_ends_no_step() -> None:
    work = TimeBudget(1.0)
    work.lease({0: 1.0})
    assert not hand_in(work, 0, [])
    assert not work.complete
    assert work.waits
    assert work.lease({0: 1.0})


def test_a_slot_that_took_part_is_known() -> None:
    for work in (TimeBudget(1.0), FixedPopulation(8, UNIT)):
        assert not work.took_part(0)
        work.lease({0: 1.0})
        work.release(0)
        assert work.took_part(0)
        assert not work.took_part(1)
