"""Who scores which pairs of one step, and what has come of it.

A fixed population is cut into units, as many pairs as a device evaluates at a time, and units are leased to hosts in
proportion to their speed; it does not matter to the result who scored what. With a time budget every host has a range
of pairs of its own, and the population is what came back.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from esjax.exchange.update_record import Span
from esjax.exchange.values import SLOT_PAIRS, Exchange, Values, cut

IN_TOTAL: Values = np.zeros((0, 0), np.int32)
"""Stands for the answer of a unit that is in its host's total."""

NO_DELAYS: Mapping[int, float] = {}


class Lease(NamedTuple):
    """Pairs that a host is to score."""

    slot: int
    first: int
    pairs: int


@runtime_checkable
class Leases(Protocol):
    """One step's pairs."""

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """Give out what nobody is at, and what idle hosts would be done with sooner than those who are at it.

        Args:
            speeds: Pairs a second of the hosts to give it to, by slot.
            delays: Seconds before some of them can begin.
        """

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """Take in values of spans, see `Exchange`; return why not, or ""."""

    def release(self, slot: int) -> None:
        """Take a host's open pairs from it; what it still hands in may count."""

    def revoke(self, slot: int) -> None:
        """Take a host's open pairs from it, and forget what it handed in."""

    def busy(self, slot: int) -> bool:
        """Tell whether a host still has pairs to hand in."""

    def open_spans(self, slot: int) -> list[Span]:
        """List the pairs that a host still has to hand in."""

    def count(self, slot: int) -> int:
        """Count the pairs whose losses a host handed in."""

    def took_part(self, slot: int) -> bool:
        """Tell whether a host was ever given pairs."""

    @property
    def waits(self) -> bool:
        """Whether there are pairs to give out in the middle of a step."""

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be waited for."""

    def result(self) -> tuple[list[Span], Values]:
        """Return the pairs and what they come to, which does not depend on who scored what."""

    def liars(self, trusted: int | None) -> set[int]:
        """List the hosts whose losses of a pair that was scored twice were wrong."""


class _Quantum:
    """Pairs that stay together."""

    def __init__(self, rows: slice) -> None:
        """Begin with nobody at work."""
        self.rows = rows
        self.opinions = 1
        self.is_checked = False
        self.given: set[int] = set()
        self.holders: set[int] = set()
        self.answers: dict[int, Values] = {}  # `IN_TOTAL` where it was added to others

    @property
    def size(self) -> int:
        """Number of pairs."""
        return self.rows.stop - self.rows.start

    @property
    def lacking(self) -> int:
        """How many hosts more should be at it."""
        return self.opinions - len(self.answers) - len(self.holders)

    @property
    def is_settled(self) -> bool:
        """Whether no more answers are wanted."""
        return len(self.answers) >= self.opinions

    def verdict(self, exchange: Exchange) -> Values | None:
        """Return the answer that two hosts agree on, or None."""
        answers = list(self.answers.values())
        pairs = ((one, two) for i, one in enumerate(answers) for two in answers[i + 1 :])
        return next((one for one, two in pairs if exchange.agree(one, two)), None)


class FixedPopulation:
    """Pairs 0 to `pairs - 1`, in units."""

    def __init__(self, pairs: int, quantum: int, exchange: Exchange, checked: Sequence[int] = ()) -> None:
        """Begin with nobody at work.

        Args:
            pairs: Pairs of the population.
            quantum: Pairs of a unit; the last one may be smaller.
            exchange: What is handed in.
            checked: Units that two hosts are to score, and a third one where they disagree.
        """
        self._pairs, self._quantum, self._exchange = pairs, quantum, exchange
        self._quanta = [_Quantum(slice(first, min(first + quantum, pairs))) for first in range(0, pairs, quantum)]
        self._missing = len(self._quanta)
        self._lacking = set(range(len(self._quanta)))
        self._held: dict[int, set[int]] = {}
        self._counts: Counter[int] = Counter()
        self._totals: dict[int, Values] = {}  # what a host's sums over units that are not checked come to
        self._checked = [self._quanta[i] for i in checked]
        for checked_quantum in self._checked:
            checked_quantum.opinions, checked_quantum.is_checked = 2, True

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`: each unit to the host that would be done with it first."""
        if not speeds:
            return []
        self._make_room(speeds, delays)
        load = {slot: len(self._held.get(slot, ())) for slot in speeds}
        queue = _Queue(load, self._seconds(speeds), delays)
        taken: dict[int, list[int]] = {slot: [] for slot in sorted(speeds)}
        fresh = sorted(i for i in self._lacking if not self._quanta[i].given)
        shares = Counter(queue.take(()) for _ in fresh)
        neighbours = (slot for slot in taken for _ in range(shares[slot]))  # they go to one host
        for i, slot in zip(fresh, neighbours, strict=True):
            taken[slot].append(i)
            self._give(i, slot)
        for i in sorted(self._lacking):
            quantum = self._quanta[i]
            while quantum.lacking > 0:
                at_it = quantum.holders | quantum.answers.keys()
                found = queue.take(at_it | quantum.given)
                if found is None:  # nobody else is there: ask again one who was too slow
                    found = queue.take(at_it)
                if found is None:
                    break
                taken[found].append(i)
                self._give(i, found)
        return [Lease(slot, *span) for slot, numbers in taken.items() for span in self._spans(sorted(numbers))]

    def _make_room(self, speeds: Mapping[int, float], delays: Mapping[int, float]) -> None:
        """Take from hosts what is more than their share now that others are idle."""
        if all(self._held.get(slot) for slot in speeds):
            return
        queue = _Queue(dict.fromkeys(speeds, 0), self._seconds(speeds), delays)
        shares = Counter(queue.take(()) for numbers in self._held.values() for _ in numbers)
        for slot, numbers in self._held.items():
            for i in sorted(numbers)[shares[slot] :]:  # those that it comes to last
                self._drop(i, slot)

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """See `Leases.accept`: whole units that the host was given; a unit that is there already is taken as read."""
        groups: list[range] = []
        for first, count in spans:
            end = first + count
            if first % self._quantum or end > self._pairs or (end % self._quantum and end != self._pairs):
                return f"pairs {first} to {end - 1} are no whole units"
            groups.append(range(first // self._quantum, -(-end // self._quantum)))
        numbers = [i for group in groups for i in group]
        if len(numbers) != len(set(numbers)):
            return "a pair is named twice"
        if any(slot not in self._quanta[i].given for i in numbers):
            return "these pairs were never assigned to this host"
        sizes = [[self._quanta[i].size for i in group] for group in groups]
        portions = [([numbers[i] for i in at], part) for at, part in self._exchange.portions(sizes, values)]
        if any(self._quanta[i].is_checked for together, _ in portions if len(together) > 1 for i in together):
            return "pairs that are scored twice are summed with others"
        for together, part in portions:
            self._answer_together(together, slot, part)
        return ""

    def _answer_together(self, numbers: Sequence[int], slot: int, values: Values) -> None:
        """Take in what a host found of some units: as a whole, or not at all if one of them is in already."""
        quanta = [self._quanta[i] for i in numbers]
        if any(quantum.is_settled or slot in quantum.answers for quantum in quanta):
            for i in numbers:
                self._drop(i, slot)
        elif quanta[0].is_checked or not self._exchange.adds_up:
            self._answer(numbers[0], slot, values)
        else:
            for i in numbers:
                self._answer(i, slot, IN_TOTAL)
            before = [self._totals[slot]] if slot in self._totals else []
            self._totals[slot] = self._exchange.merge([*before, values])

    def release(self, slot: int) -> None:
        """See `Leases.release`."""
        for i in list(self._held.get(slot, ())):
            self._drop(i, slot)

    def revoke(self, slot: int) -> None:
        """See `Leases.revoke`."""
        self.release(slot)
        self._counts.pop(slot, None)
        self._totals.pop(slot, None)
        for i, quantum in enumerate(self._quanta):
            if quantum.answers.pop(slot, None) is not None:
                quantum.opinions = max(1, len(quantum.answers))
                if not quantum.answers:
                    self._missing += 1
                self._see(i)

    def busy(self, slot: int) -> bool:
        """See `Leases.busy`."""
        return bool(self._held.get(slot))

    def open_spans(self, slot: int) -> list[Span]:
        """See `Leases.open_spans`."""
        return self._spans(sorted(self._held.get(slot, ())))

    def count(self, slot: int) -> int:
        """See `Leases.count`."""
        return self._counts[slot]

    def took_part(self, slot: int) -> bool:
        """See `Leases.took_part`."""
        return slot in self._held

    @property
    def waits(self) -> bool:
        """See `Leases.waits`."""
        return bool(self._lacking)

    @property
    def complete(self) -> bool:
        """See `Leases.complete`: every unit is in, and no second opinion is under way."""
        return not self._missing and not any(quantum.holders for quantum in self._checked)

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`."""
        agreed = [quantum.verdict(self._exchange) if len(quantum.answers) > 1 else None for quantum in self._quanta]
        chosen = (
            next(iter(quantum.answers.values())) if answer is None else answer
            for quantum, answer in zip(self._quanta, agreed, strict=True)
        )
        alone = (answer for answer in chosen if answer is not IN_TOTAL)
        return [(0, self._pairs)], self._exchange.merge([*self._totals.values(), *alone])

    def liars(self, trusted: int | None) -> set[int]:
        """See `Leases.liars`: the odd one of three; of those that all disagree, whoever is not trusted."""
        found: set[int] = set()
        for quantum in self._checked:
            right = quantum.verdict(self._exchange)
            if right is None and trusted is not None:
                right = quantum.answers.get(trusted)
            if right is not None:
                found |= {slot for slot, answer in quantum.answers.items() if not self._exchange.agree(answer, right)}
        return found

    def _answer(self, i: int, slot: int, answer: Values) -> None:
        """Take in what a host found of a unit."""
        quantum = self._quanta[i]
        self._drop(i, slot)
        if slot in quantum.answers or quantum.is_settled:
            return
        if not quantum.answers:
            self._missing -= 1
        self._counts[slot] += quantum.size
        quantum.answers[slot] = answer
        if quantum.opinions == len(quantum.answers) == 2 and quantum.verdict(self._exchange) is None:
            quantum.opinions = 3
        if len(quantum.answers) == quantum.opinions:
            for other in list(quantum.holders):
                self._drop(i, other)
        self._see(i)

    def _give(self, i: int, slot: int) -> None:
        self._quanta[i].given.add(slot)
        self._quanta[i].holders.add(slot)
        self._held.setdefault(slot, set()).add(i)
        self._see(i)

    def _drop(self, i: int, slot: int) -> None:
        self._quanta[i].holders.discard(slot)
        self._held.get(slot, set()).discard(i)
        self._see(i)

    def _see(self, i: int) -> None:
        """Note whether more hosts should be at a unit."""
        if self._quanta[i].lacking > 0:
            self._lacking.add(i)
        else:
            self._lacking.discard(i)

    def _seconds(self, speeds: Mapping[int, float]) -> dict[int, float]:
        """Return how long each host takes for a unit."""
        return {slot: self._quantum / speed for slot, speed in speeds.items()}

    def _spans(self, numbers: Sequence[int]) -> list[Span]:
        """Join neighbouring units; but those whose sums are to be compared stay alone."""
        spans: list[Span] = []
        alone = True
        for i in numbers:
            rows, was_alone = self._quanta[i].rows, alone
            alone = self._exchange.adds_up and self._quanta[i].is_checked
            if spans and sum(spans[-1]) == rows.start and not (alone or was_alone):
                spans[-1] = (spans[-1][0], rows.stop - spans[-1][0])
            else:
                spans.append((rows.start, rows.stop - rows.start))
        return spans


class _Queue:
    """Hosts, by when they would be done with one unit more."""

    def __init__(self, load: dict[int, int], seconds: Mapping[int, float], delays: Mapping[int, float]) -> None:
        """Begin with the units that each host is at, and the seconds of a unit."""
        self._load, self._seconds, self._delays = load, seconds, delays
        self._heap = [self._entry(slot) for slot in load]
        heapq.heapify(self._heap)

    def take(self, barred: Collection[int]) -> int | None:
        """Find the host that would be done first, and count a unit more for it; None: all are barred."""
        passed = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            if entry[1] in barred:
                passed.append(entry)
            else:
                found = entry[1]
                self._load[found] += 1
                passed.append(self._entry(found))
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def _entry(self, slot: int) -> tuple[float, int]:
        return self._delays.get(slot, 0.0) + (self._load[slot] + 1) * self._seconds[slot], slot


class TimeBudget:
    """Every host's own range, from `slot * SLOT_PAIRS` on, as far as it comes."""

    def __init__(self, budget: float, exchange: Exchange) -> None:
        """Begin with nobody at work; `budget` are the seconds of evaluation, `exchange` is what is handed in."""
        self._budget, self._exchange = budget, exchange
        self._parts: dict[int, list[Values]] = {}
        self._counts: Counter[int] = Counter()
        self._open: set[int] = set()

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`: to every host that would not hold up the others; the rest wait for the next step."""
        if not self.waits:
            return []
        prompt = [slot for slot in sorted(speeds) if delays.get(slot, 0.0) <= self._budget / 2] or sorted(speeds)
        for slot in prompt:
            self._parts.setdefault(slot, [])
            self._open.add(slot)
        return [Lease(slot, slot * SLOT_PAIRS, SLOT_PAIRS) for slot in prompt]

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """See `Leases.accept`: the host's own range without gaps; what is there already is taken as read."""
        if slot not in self._parts:
            return "these pairs were never assigned to this host"
        start = slot * SLOT_PAIRS
        at = start + self._counts[slot]
        new: list[Values] = []
        for (first, count), found in zip(spans, cut(values, self._exchange.rows(spans)), strict=True):
            if first < start or first + count > start + SLOT_PAIRS:
                return "these pairs were never assigned to this host"
            if first > at:
                return f"pair {at} is missing before pair {first}"
            if first + count > at:
                rest = self._exchange.without_first(found, at - first)
                if rest is None:
                    return f"pair {first} is summed twice"
                new.append(rest)
                at = first + count
        self._parts[slot] += new
        if self._exchange.adds_up and new:  # so that they take no more room, however many they are
            self._parts[slot] = [self._exchange.merge(self._parts[slot])]
        self._counts[slot] = at - start
        if final:
            self._open.discard(slot)
        return ""

    def release(self, slot: int) -> None:
        """See `Leases.release`."""
        self._open.discard(slot)

    def revoke(self, slot: int) -> None:
        """See `Leases.revoke`."""
        self.release(slot)
        if slot in self._parts:
            self._parts[slot] = []
        self._counts.pop(slot, None)

    def busy(self, slot: int) -> bool:
        """See `Leases.busy`."""
        return slot in self._open

    def open_spans(self, slot: int) -> list[Span]:
        """See `Leases.open_spans`."""
        done = self._counts[slot]
        return [(slot * SLOT_PAIRS + done, SLOT_PAIRS - done)] if slot in self._open and done < SLOT_PAIRS else []

    def count(self, slot: int) -> int:
        """See `Leases.count`."""
        return self._counts[slot]

    def took_part(self, slot: int) -> bool:
        """See `Leases.took_part`."""
        return slot in self._parts

    @property
    def waits(self) -> bool:
        """See `Leases.waits`: only if nobody is at it, since who starts late would hold up the others."""
        return not self._open and not self.complete

    @property
    def complete(self) -> bool:
        """See `Leases.complete`."""
        return not self._open and any(self._counts.values())

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`: range by range."""
        slots = [slot for slot in sorted(self._parts) if self._parts[slot]]
        spans = [(slot * SLOT_PAIRS, self._counts[slot]) for slot in slots]
        return spans, self._exchange.merge([part for slot in slots for part in self._parts[slot]])

    def liars(self, trusted: int | None) -> set[int]:
        """See `Leases.liars`: nothing is scored twice."""
        return set()
