"""Leases: which host scores which pairs of one step, and the values that came back.

A fixed population is divided into lease quanta, the pairs that one device evaluates at a time, which are never split
between hosts. Each host gets quanta in proportion to its speed; the result does not depend on which host scored which.
`time_budget.py` has the leases of steps with a time budget.
"""

import heapq
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from esjax.exchange.update_record import Span, pair_count
from esjax.exchange.values import Exchange, Values

PART = 1.5
"""Most quanta whose gradients a host adds up, as a multiple of the median host's share of the quanta."""

MOST_HELD = 0.5
"""Part of a step's quanta that a host holds at most while another one is idle; it gets more as it answers."""

HELD_SECONDS = 1.0
"""Seconds of work that a host may hold in any case, so that short steps need no further messages."""

NO_DELAYS: Mapping[int, float] = {}


class Lease(NamedTuple):
    """Consecutive pairs that one host scores."""

    slot: int
    first: int
    pairs: int


class Unit(NamedTuple):
    """Pairs and their values, which another host can score again."""

    spans: list[Span]
    values: Values
    leased: frozenset[int] = frozenset()  # slots of hosts that had leases of some of them

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return pair_count(self.spans)


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
        """Return the pairs and their values, see `Exchange.conclude`; gradient sums that were added up stay so."""

    def units(self, slot: int) -> list[Unit]:
        """List the values that a host sent, in the smallest parts that can be compared with those of another host."""

    def fill(self, slot: int, unit: Unit) -> None:
        """Store a host's values of a unit whose values were dropped; it may have scored them without a lease."""


class _Quantum:
    """A lease quantum: pairs that stay together."""

    def __init__(self, rows: slice) -> None:
        """Set up without a host."""
        self.rows = rows
        self.given: set[int] = set()
        self.holders: set[int] = set()
        self.is_settled = False  # whether a host sent its values

    @property
    def size(self) -> int:
        """Number of pairs."""
        return self.rows.stop - self.rows.start


class _Part(NamedTuple):
    """Values that a host sent: of one quantum, or added up over some."""

    numbers: list[int]
    values: Values


class FixedPopulation(Leases):
    """Leases of the pairs 0 to `pairs - 1`, in quanta."""

    def __init__(self, pairs: int, quantum: int, exchange: Exchange, most_held: float = MOST_HELD) -> None:
        """Set up without leases; for `most_held` see `MOST_HELD`. The last quantum may be smaller."""
        super().__init__(exchange)
        self._most_held = most_held
        self._pairs, self._quantum = pairs, quantum
        self._quanta = [_Quantum(slice(first, min(first + quantum, pairs))) for first in range(0, pairs, quantum)]
        self._missing = len(self._quanta)
        self._lacking = set(range(len(self._quanta)))
        self._held: dict[int, set[int]] = {}
        self._parts: dict[int, list[_Part]] = {}  # by slot
        self._longest = 0  # most quanta that are added up; 0 before the first lease
        self._changes = 0  # of the holders and values of quanta
        self._tried: object = None  # what the last leases were made from

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`: each quantum goes to the host that would finish it first."""
        situation = self._changes, dict(speeds), dict(delays)
        if not speeds or situation == self._tried:  # many quanta may be held back while many messages come
            return []
        self._tried = situation
        self._longest = self._longest or self._choose_longest(speeds)
        self._make_room(speeds, delays)
        load = {slot: len(self._held.get(slot, ())) for slot in speeds}
        queue = Queue(load, self._seconds(speeds), delays)
        taken: dict[int, list[int]] = {slot: [] for slot in sorted(speeds)}
        fresh = sorted(i for i in self._lacking if not self._quanta[i].given)
        shares = Counter(queue.take(()) for _ in fresh)
        neighbours = (slot for slot in taken for _ in range(shares[slot]))  # a host gets consecutive quanta
        for i, slot in zip(fresh, neighbours, strict=True):
            taken[slot].append(i)
        for i in sorted(self._lacking.difference(fresh)):
            found = queue.take(self._quanta[i].given)
            if found is None:  # no other host is left: a host that lost it for being slow gets it again
                found = queue.take(())
            if found is not None:
                taken[found].append(i)
        self._hold_back(taken, speeds, delays)
        for slot, numbers in taken.items():
            for i in numbers:
                self._give(i, slot)
        return [Lease(slot, *span) for slot, numbers in taken.items() for span in self._spans(sorted(numbers))]

    def _make_room(self, speeds: Mapping[int, float], delays: Mapping[int, float]) -> None:
        """Take from busy hosts what exceeds their share, if others are idle."""
        if all(self._held.get(slot) for slot in speeds):
            return
        queue = Queue(dict.fromkeys(speeds, 0), self._seconds(speeds), delays)
        shares = Counter(queue.take(()) for numbers in self._held.values() for _ in numbers)
        for slot, numbers in self._held.items():
            for i in sorted(numbers)[max(shares[slot], 1) :]:  # the host scores these last, and has begun the first
                self._drop(i, slot)

    def _hold_back(
        self, taken: Mapping[int, list[int]], speeds: Mapping[int, float], delays: Mapping[int, float]
    ) -> None:
        """Leave quanta without a host that one would hold beyond `MOST_HELD` while another one would be idle."""
        held = {slot: len(self._held.get(slot, ())) for slot in taken}
        if all(numbers or held[slot] or delays.get(slot) for slot, numbers in taken.items()):
            return
        for slot, numbers in taken.items():
            most = max(self._most_held * len(self._quanta), HELD_SECONDS * speeds[slot] / self._quantum, 1)
            del numbers[max(int(most) - held[slot], 0) :]

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
        parts = [_Part([numbers[i] for i in at], part) for at, part in self._exchange.portions(sizes, values)]
        if any(len(part.numbers) > self._longest for part in parts):
            return "a sum over more pairs than a lease has"
        for part in parts:
            self._store(slot, part)
        return ""

    def _store(self, slot: int, part: _Part) -> None:
        """Store the values of some quanta: of all, or of none if one of them has its values already."""
        for i in part.numbers:
            self._drop(i, slot)
        quanta = [self._quanta[i] for i in part.numbers]
        if any(quantum.is_settled for quantum in quanta):
            return
        for i, quantum in zip(part.numbers, quanta, strict=True):
            quantum.is_settled = True
            self._counts[slot] += quantum.size
            for other in list(quantum.holders):
                self._drop(i, other)
            self._see(i)
        self._missing -= len(quanta)
        parts = self._parts.setdefault(slot, [])
        last = parts[-1] if parts and self._exchange.adds_up else None
        if last and len(last.numbers) + len(part.numbers) <= self._longest:  # so that memory does not grow
            values = self._exchange.merge([last.values, part.values])
            parts[-1] = _Part([*last.numbers, *part.numbers], values)
        else:
            parts.append(part)

    def release(self, slot: int) -> None:
        """See `Leases.release`."""
        for i in list(self._held.get(slot, ())):
            self._drop(i, slot)

    def revoke(self, slot: int) -> None:
        """See `Leases.revoke`."""
        self.release(slot)
        self._counts.pop(slot, None)
        for part in self._parts.pop(slot, []):
            self._missing += len(part.numbers)
            for i in part.numbers:
                self._quanta[i].is_settled = False
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
        """See `Leases.complete`: every quantum has values."""
        return not self._missing

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`."""
        parts = sorted((part for parts in self._parts.values() for part in parts), key=lambda part: part.numbers[0])
        return [(0, self._pairs)], np.concatenate([part.values for part in parts])

    def units(self, slot: int) -> list[Unit]:
        """See `Leases.units`: quanta, or those that were added up."""
        return [
            Unit(
                self._spans(sorted(part.numbers)),
                part.values,
                frozenset().union(*(self._quanta[i].given for i in part.numbers)),
            )
            for part in self._parts.get(slot, ())
        ]

    def fill(self, slot: int, unit: Unit) -> None:
        """See `Leases.fill`."""
        ranges = (range(first // self._quantum, -(-(first + count) // self._quantum)) for first, count in unit.spans)
        self._store(slot, _Part([i for numbers in ranges for i in numbers], unit.values))

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
        """Note whether a host should score a quantum, since its holders or values have changed."""
        self._changes += 1
        if self._quanta[i].is_settled or self._quanta[i].holders:
            self._lacking.discard(i)
        else:
            self._lacking.add(i)

    def _seconds(self, speeds: Mapping[int, float]) -> dict[int, float]:
        """Return the seconds that each host takes for a quantum."""
        return {slot: self._quantum / speed for slot, speed in speeds.items()}

    def _choose_longest(self, speeds: Mapping[int, float]) -> int:
        """Return how many quanta a host adds up, so that a usual host can score them again in the time of a step."""
        if not self._exchange.adds_up:
            return len(self._quanta)
        middle = sorted(speeds.values())[(len(speeds) - 1) // 2]
        return math.ceil(PART * len(self._quanta) * middle / sum(speeds.values()))

    def _spans(self, numbers: Sequence[int]) -> list[Span]:
        """Join consecutive quanta to spans of at most `_longest` quanta."""
        spans: list[Span] = []
        for i in numbers:
            rows = self._quanta[i].rows
            if spans and sum(spans[-1]) == rows.start and spans[-1][1] < self._longest * self._quantum:
                spans[-1] = (spans[-1][0], rows.stop - spans[-1][0])
            else:
                spans.append((rows.start, rows.stop - rows.start))
        return spans


class Queue:
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
