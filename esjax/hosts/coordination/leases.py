"""Leases: which host scores which pairs of one step, and the values that came back.

A fixed population is divided into lease quanta, the pairs that one device evaluates at a time, which are never split
between hosts. Each host gets quanta in proportion to its speed; the result does not depend on which host scored which.
`time_budget.py` has the leases of steps with a time budget.
"""

import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from esjax.exchange.update_record import Span
from esjax.exchange.values import Exchange, Values

IN_TOTAL: Values = np.zeros((0, 0), np.int32)
"""Marks the answer of a quantum whose values are part of its host's total."""

NO_DELAYS: Mapping[int, float] = {}


class Lease(NamedTuple):
    """Consecutive pairs that one host scores."""

    slot: int
    first: int
    pairs: int


@runtime_checkable
class Leases(Protocol):
    """The leases of one step; hosts are named by their slots."""

    _exchange: Exchange
    _counts: Counter[int]  # pairs whose values a host sent, by slot

    def __init__(self, exchange: Exchange) -> None:
        """Set up without leases."""
        self._exchange, self._counts = exchange, Counter()

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """Lease pairs that no host has, and move pairs from busy hosts to idle ones that finish them sooner.

        Args:
            speeds: Pairs per second of the hosts that may get leases, by slot.
            delays: Seconds before a host can begin, by slot; a missing slot has none.
        """

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """Store the values of spans, see `Exchange`; return why they are rejected, or ""."""

    def release(self, slot: int) -> None:
        """Take the open pairs from a host; values that it still sends may count."""

    def revoke(self, slot: int) -> None:
        """Take the open pairs from a host, and drop the values that it sent."""

    def busy(self, slot: int) -> bool:
        """Return whether a host has open pairs."""

    def open_spans(self, slot: int) -> list[Span]:
        """List a host's open pairs: leased, without values."""

    def count(self, slot: int) -> int:
        """Return the number of pairs whose values a host sent."""
        return self._counts[slot]

    def took_part(self, slot: int) -> bool:
        """Return whether a host had a lease in this step."""

    @property
    def waits(self) -> bool:
        """Whether pairs wait for a host in the middle of the step."""

    @property
    def complete(self) -> bool:
        """Whether all values are in."""

    def result(self) -> tuple[list[Span], Values]:
        """Return the pairs and their values, which do not depend on which host scored which."""

    def wrong_hosts(self, trusted: int | None) -> set[int]:
        """Return the slots with wrong values of a pair that several hosts scored; `trusted` is the anchor's slot."""
        return set()


class _Quantum:
    """A lease quantum: pairs that stay together."""

    def __init__(self, rows: slice) -> None:
        """Set up without a host."""
        self.rows = rows
        self.wanted_answers = 1
        self.is_checked = False
        self.given: set[int] = set()
        self.holders: set[int] = set()
        self.answers: dict[int, Values] = {}  # by slot; `IN_TOTAL` if the values were added to the host's total

    @property
    def size(self) -> int:
        """Number of pairs."""
        return self.rows.stop - self.rows.start

    @property
    def lacking(self) -> int:
        """How many more hosts should score it."""
        return self.wanted_answers - len(self.answers) - len(self.holders)

    @property
    def is_settled(self) -> bool:
        """Whether it has all wanted answers."""
        return len(self.answers) >= self.wanted_answers

    def verdict(self, exchange: Exchange) -> Values | None:
        """Return an answer that two hosts agree on, or None."""
        answers = list(self.answers.values())
        pairs = ((one, two) for i, one in enumerate(answers) for two in answers[i + 1 :])
        return next((one for one, two in pairs if exchange.agree(one, two)), None)


class FixedPopulation(Leases):
    """Leases of the pairs 0 to `pairs - 1`, in quanta."""

    def __init__(self, pairs: int, quantum: int, exchange: Exchange, checked: Sequence[int] = ()) -> None:
        """Set up without leases. The last quantum may be smaller; two hosts score the quanta in `checked`."""
        super().__init__(exchange)
        self._pairs, self._quantum = pairs, quantum
        self._quanta = [_Quantum(slice(first, min(first + quantum, pairs))) for first in range(0, pairs, quantum)]
        self._missing = len(self._quanta)
        self._lacking = set(range(len(self._quanta)))
        self._held: dict[int, set[int]] = {}
        self._totals: dict[int, Values] = {}  # by slot: total of a host's sums over quanta that are not checked
        self._checked = [self._quanta[i] for i in checked]
        for checked_quantum in self._checked:
            checked_quantum.wanted_answers, checked_quantum.is_checked = 2, True

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`: each quantum goes to the host that would finish it first."""
        if not speeds:
            return []
        self._make_room(speeds, delays)
        load = {slot: len(self._held.get(slot, ())) for slot in speeds}
        queue = _Queue(load, self._seconds(speeds), delays)
        taken: dict[int, list[int]] = {slot: [] for slot in sorted(speeds)}
        fresh = sorted(i for i in self._lacking if not self._quanta[i].given)
        shares = Counter(queue.take(()) for _ in fresh)
        neighbours = (slot for slot in taken for _ in range(shares[slot]))  # a host gets consecutive quanta
        for i, slot in zip(fresh, neighbours, strict=True):
            taken[slot].append(i)
            self._give(i, slot)
        for i in sorted(self._lacking):
            quantum = self._quanta[i]
            while quantum.lacking > 0:
                involved = quantum.holders | quantum.answers.keys()
                found = queue.take(involved | quantum.given)
                if found is None:  # no other host is left: a host that lost it for being slow gets it again
                    found = queue.take(involved)
                if found is None:
                    break
                taken[found].append(i)
                self._give(i, found)
        return [Lease(slot, *span) for slot, numbers in taken.items() for span in self._spans(sorted(numbers))]

    def _make_room(self, speeds: Mapping[int, float], delays: Mapping[int, float]) -> None:
        """Take from busy hosts what exceeds their share, if others are idle."""
        if all(self._held.get(slot) for slot in speeds):
            return
        queue = _Queue(dict.fromkeys(speeds, 0), self._seconds(speeds), delays)
        shares = Counter(queue.take(()) for numbers in self._held.values() for _ in numbers)
        for slot, numbers in self._held.items():
            for i in sorted(numbers)[shares[slot] :]:  # the host scores these last
                self._drop(i, slot)

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """See `Leases.accept`: whole quanta that were leased to the host; a quantum that has its values is ignored."""
        groups: list[range] = []
        for first, count in spans:
            end = first + count
            if first % self._quantum or end > self._pairs or (end % self._quantum and end != self._pairs):
                return f"pairs {first} to {end - 1} are not whole lease quanta"
            groups.append(range(first // self._quantum, -(-end // self._quantum)))
        numbers = [i for group in groups for i in group]
        if len(numbers) != len(set(numbers)):
            return "a pair is listed twice"
        if any(slot not in self._quanta[i].given for i in numbers):
            return "these pairs were never leased to this host"
        sizes = [[self._quanta[i].size for i in group] for group in groups]
        portions = [([numbers[i] for i in at], part) for at, part in self._exchange.portions(sizes, values)]
        if any(self._quanta[i].is_checked for together, _ in portions if len(together) > 1 for i in together):
            return "pairs of a spot check are summed with others"
        for together, part in portions:
            self._answer_together(together, slot, part)
        return ""

    def _answer_together(self, numbers: Sequence[int], slot: int, values: Values) -> None:
        """Store the values of some quanta: of all, or of none if one of them has its values already."""
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
                quantum.wanted_answers = max(1, len(quantum.answers))
                if not quantum.answers:
                    self._missing += 1
                self._see(i)

    def busy(self, slot: int) -> bool:
        """See `Leases.busy`."""
        return bool(self._held.get(slot))

    def open_spans(self, slot: int) -> list[Span]:
        """See `Leases.open_spans`."""
        return self._spans(sorted(self._held.get(slot, ())))

    def took_part(self, slot: int) -> bool:
        """See `Leases.took_part`."""
        return slot in self._held

    @property
    def waits(self) -> bool:
        """See `Leases.waits`."""
        return bool(self._lacking)

    @property
    def complete(self) -> bool:
        """See `Leases.complete`: every quantum has values, and no check is running."""
        return not self._missing and not any(quantum.holders for quantum in self._checked)

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`."""
        agreed = [quantum.verdict(self._exchange) if len(quantum.answers) > 1 else None for quantum in self._quanta]
        chosen = (
            next(iter(quantum.answers.values())) if answer is None else answer
            for quantum, answer in zip(self._quanta, agreed, strict=True)
        )
        separate = (answer for answer in chosen if answer is not IN_TOTAL)
        return [(0, self._pairs)], self._exchange.merge([*self._totals.values(), *separate])

    def wrong_hosts(self, trusted: int | None) -> set[int]:
        """See `Leases.wrong_hosts`: those that differ from what two agree on, else from the trusted host."""
        found: set[int] = set()
        for quantum in self._checked:
            right = quantum.verdict(self._exchange)
            if right is None and trusted is not None:
                right = quantum.answers.get(trusted)
            if right is not None:
                found |= {slot for slot, answer in quantum.answers.items() if not self._exchange.agree(answer, right)}
        return found

    def _answer(self, i: int, slot: int, answer: Values) -> None:
        """Store a host's values of a quantum."""
        quantum = self._quanta[i]
        self._drop(i, slot)
        if slot in quantum.answers or quantum.is_settled:
            return
        if not quantum.answers:
            self._missing -= 1
        self._counts[slot] += quantum.size
        quantum.answers[slot] = answer
        if quantum.wanted_answers == len(quantum.answers) == 2 and quantum.verdict(self._exchange) is None:
            quantum.wanted_answers = 3
        if len(quantum.answers) == quantum.wanted_answers:
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
        """Note whether more hosts should score a quantum."""
        if self._quanta[i].lacking > 0:
            self._lacking.add(i)
        else:
            self._lacking.discard(i)

    def _seconds(self, speeds: Mapping[int, float]) -> dict[int, float]:
        """Return the seconds that each host takes for a quantum."""
        return {slot: self._quantum / speed for slot, speed in speeds.items()}

    def _spans(self, numbers: Sequence[int]) -> list[Span]:
        """Join consecutive quanta to spans; those whose sums are compared stay separate."""
        spans: list[Span] = []
        separate = True
        for i in numbers:
            rows, was_separate = self._quanta[i].rows, separate
            separate = self._exchange.adds_up and self._quanta[i].is_checked
            if spans and sum(spans[-1]) == rows.start and not (separate or was_separate):
                spans[-1] = (spans[-1][0], rows.stop - spans[-1][0])
            else:
                spans.append((rows.start, rows.stop - rows.start))
        return spans


class _Queue:
    """Hosts in the order in which they would finish one more quantum."""

    def __init__(self, load: dict[int, int], seconds: Mapping[int, float], delays: Mapping[int, float]) -> None:
        """Set up with the number of quanta of each host, its seconds for one, and its delay; all by slot."""
        self._load, self._seconds, self._delays = load, seconds, delays
        self._heap = [self._entry(slot) for slot in load]
        heapq.heapify(self._heap)

    def take(self, barred: Collection[int]) -> int | None:
        """Return the host that would finish first, and count one more quantum for it; None: all are barred."""
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
