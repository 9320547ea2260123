"""Who scores which pairs of one step, and what has come of it.

A fixed population is cut into units, as many pairs as a device evaluates at a time, and units are leased to hosts in
proportion to their speed; it does not matter to the result who scored what. With a time budget every host has a range
of pairs of its own, and the population is what came back.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from esjax.hosts.wire import Span

SLOT_PAIRS = 2**20
"""Pairs of a host's own range in a step with a time budget."""

AGREE = 1e-4
"""Nats by which two hosts' losses of one pair may differ: different hardware differs by far less."""

Losses = Float32[ndarray, "pairs 2"]


class Lease(NamedTuple):
    """Pairs that a host is to score."""

    slot: int
    first: int
    pairs: int


@runtime_checkable
class Work(Protocol):
    """One step's pairs."""

    def lease(self, speeds: Mapping[int, float]) -> list[Lease]:
        """Give out what nobody is at, to hosts by slot and speed in pairs a second."""

    def accept(self, slot: int, spans: Sequence[Span], losses: Losses, final: bool) -> str:
        """Take in losses; return why not, or ""."""

    def release(self, slot: int) -> bool:
        """Take a host's open pairs from it, and tell whether there were any; what it still hands in may count."""

    def busy(self, slot: int) -> bool:
        """Tell whether a host still has pairs to hand in."""

    def open_spans(self, slot: int) -> list[Span]:
        """List the pairs that a host still has to hand in."""

    def count(self, slot: int) -> int:
        """Count the pairs whose losses came from a host."""

    @property
    def waits(self) -> bool:
        """Whether there are pairs to give out in the middle of a step."""

    @property
    def complete(self) -> bool:
        """Whether nothing more is to be waited for."""

    def result(self) -> tuple[list[Span], Losses]:
        """Return the pairs and their losses, in an order that does not depend on who scored what."""

    def liars(self, trusted: int | None) -> set[int]:
        """List the hosts whose losses of a pair that was scored twice were wrong."""


class _Unit:
    """Pairs that stay together."""

    def __init__(self, rows: slice) -> None:
        """Begin with nobody at work."""
        self.rows = rows
        self.opinions = 1
        self.given: set[int] = set()
        self.holders: set[int] = set()
        self.answers: dict[int, Losses] = {}

    def verdict(self) -> Losses | None:
        """Return the answer that two hosts agree on, or None."""
        answers = list(self.answers.values())
        pairs = ((one, two) for i, one in enumerate(answers) for two in answers[i + 1 :])
        return next((one for one, two in pairs if _agree(one, two)), None)


class FixedPopulation:
    """Pairs 0 to `pairs - 1`, in units."""

    def __init__(self, pairs: int, unit: int, checked: Sequence[int] = ()) -> None:
        """Begin with nobody at work.

        Args:
            pairs: Pairs of the population.
            unit: Pairs of a unit; the last one may be smaller.
            checked: Units that two hosts are to score, and a third one where they disagree.
        """
        self._pairs, self._unit = pairs, unit
        self._units = [_Unit(slice(first, min(first + unit, pairs))) for first in range(0, pairs, unit)]
        self._missing = len(self._units)
        self._held: dict[int, set[int]] = {}
        self._counts: Counter[int] = Counter()
        self._checked = [self._units[i] for i in checked]
        for checked_unit in self._checked:
            checked_unit.opinions = 2

    def lease(self, speeds: Mapping[int, float]) -> list[Lease]:
        """See `Work.lease`: each unit to the host that would be done with it first."""
        open_units = [i for i, unit in enumerate(self._units) if self._wanted(unit, len(speeds)) > len(unit.holders)]
        if not speeds or not open_units:
            return []
        load = {slot: len(self._held.get(slot, ())) for slot in speeds}
        queue = [((load[slot] + 1) / speed, slot) for slot, speed in speeds.items()]
        heapq.heapify(queue)
        taken: dict[int, list[int]] = {}

        def take(barred: set[int]) -> int | None:
            """Find the host that would be done first, and count a unit more for it."""
            passed = []
            slot = None
            while queue and slot is None:
                entry = heapq.heappop(queue)
                if entry[1] in barred:
                    passed.append(entry)
                else:
                    slot = entry[1]
                    load[slot] += 1
                    passed.append(((load[slot] + 1) / speeds[slot], slot))
            for entry in passed:
                heapq.heappush(queue, entry)
            return slot

        fresh = [i for i in open_units if not self._units[i].given]
        shares = Counter(slot for slot in (take(set()) for _ in fresh) if slot is not None)
        runs = (slot for slot in sorted(speeds) for _ in range(shares[slot]))  # neighbours to one host
        for i, neighbour in zip(fresh, runs, strict=True):
            taken.setdefault(neighbour, []).append(i)
            self._give(i, neighbour)
        for i in open_units:
            unit = self._units[i]
            while self._wanted(unit, len(speeds)) > len(unit.holders):
                busy = unit.holders | unit.answers.keys()
                slot = take(busy | unit.given)
                if slot is None:  # nobody else is there: ask again one who was too slow
                    slot = take(busy)
                if slot is None:
                    break
                taken.setdefault(slot, []).append(i)
                self._give(i, slot)
        return [Lease(slot, *span) for slot in sorted(taken) for span in self._spans(sorted(taken[slot]))]

    def accept(self, slot: int, spans: Sequence[Span], losses: Losses, final: bool) -> str:
        """See `Work.accept`: whole units that the host was given; a unit that is there already is taken as read."""
        numbers: list[int] = []
        for first, count in spans:
            end = first + count
            if not count or first % self._unit or end > self._pairs or (end % self._unit and end != self._pairs):
                return f"pairs {first} to {end - 1} are no whole units"
            numbers += range(first // self._unit, -(-end // self._unit))
        if len(numbers) != len(set(numbers)):
            return "a pair is named twice"
        if any(slot not in self._units[i].given for i in numbers):
            return "these pairs were never assigned to this host"
        at = 0
        for i in numbers:
            unit = self._units[i]
            size = unit.rows.stop - unit.rows.start
            self._drop(i, slot)
            if slot not in unit.answers and len(unit.answers) < unit.opinions:
                if not unit.answers:
                    self._missing -= 1
                    self._counts[slot] += size
                unit.answers[slot] = losses[at : at + size]
                if unit.opinions == len(unit.answers) == 2 and unit.verdict() is None:
                    unit.opinions = 3
                if len(unit.answers) >= unit.opinions:
                    for other in list(unit.holders):
                        self._drop(i, other)
            at += size
        return ""

    def release(self, slot: int) -> bool:
        """See `Work.release`."""
        held = list(self._held.get(slot, ()))
        for i in held:
            self._drop(i, slot)
        return bool(held)

    def busy(self, slot: int) -> bool:
        """See `Work.busy`."""
        return bool(self._held.get(slot))

    def open_spans(self, slot: int) -> list[Span]:
        """See `Work.open_spans`."""
        return self._spans(sorted(self._held.get(slot, ())))

    def count(self, slot: int) -> int:
        """See `Work.count`."""
        return self._counts[slot]

    @property
    def waits(self) -> bool:
        """See `Work.waits`."""
        return not self.complete

    @property
    def complete(self) -> bool:
        """See `Work.complete`: every unit is in, and no second opinion is under way."""
        return not self._missing and not any(unit.holders for unit in self._checked)

    def result(self) -> tuple[list[Span], Losses]:
        """See `Work.result`."""
        losses = np.empty((self._pairs, 2), np.float32)
        for unit in self._units:
            verdict = unit.verdict() if len(unit.answers) > 1 else None
            losses[unit.rows] = next(iter(unit.answers.values())) if verdict is None else verdict
        return [(0, self._pairs)], losses

    def liars(self, trusted: int | None) -> set[int]:
        """See `Work.liars`: the odd one of three; of two that disagree, the one beside the trusted host.

        The trusted host's answer then counts.
        """
        found: set[int] = set()
        for unit in self._checked:
            agreed = unit.verdict()
            if agreed is None and trusted in unit.answers and len(unit.answers) > 1:
                agreed = unit.answers[trusted]
                unit.answers = {trusted: agreed, **unit.answers}
            if agreed is not None:
                found |= {slot for slot, answer in unit.answers.items() if not _agree(answer, agreed)}
        return found

    def _wanted(self, unit: _Unit, hosts: int) -> int:
        """Count the hosts that should be at a unit now."""
        missing = unit.opinions - len(unit.answers)
        return min(missing, hosts - len(unit.answers)) if unit.answers else min(missing, hosts)

    def _give(self, i: int, slot: int) -> None:
        self._units[i].given.add(slot)
        self._units[i].holders.add(slot)
        self._held.setdefault(slot, set()).add(i)

    def _drop(self, i: int, slot: int) -> None:
        self._units[i].holders.discard(slot)
        self._held.get(slot, set()).discard(i)

    def _spans(self, numbers: Sequence[int]) -> list[Span]:
        """Join neighbouring units."""
        spans: list[Span] = []
        for i in numbers:
            rows = self._units[i].rows
            if spans and sum(spans[-1]) == rows.start:
                spans[-1] = (spans[-1][0], rows.stop - spans[-1][0])
            else:
                spans.append((rows.start, rows.stop - rows.start))
        return spans


class TimeBudget:
    """Every host's own range, from `slot * SLOT_PAIRS` on, as far as it comes."""

    def __init__(self) -> None:
        """Begin with nobody at work."""
        self._parts: dict[int, list[Losses]] = {}
        self._open: set[int] = set()

    def lease(self, speeds: Mapping[int, float]) -> list[Lease]:
        """See `Work.lease`."""
        new = sorted(speeds.keys() - self._parts.keys())
        for slot in new:
            self._parts[slot] = []
            self._open.add(slot)
        return [Lease(slot, slot * SLOT_PAIRS, SLOT_PAIRS) for slot in new]

    def accept(self, slot: int, spans: Sequence[Span], losses: Losses, final: bool) -> str:
        """See `Work.accept`: the host's own range without gaps; what is there already is taken as read."""
        if slot not in self._parts:
            return "these pairs were never assigned to this host"
        have = slot * SLOT_PAIRS + self.count(slot)
        at, new = have, 0
        for first, count in spans:
            if first < slot * SLOT_PAIRS or first + count > (slot + 1) * SLOT_PAIRS:
                return "these pairs were never assigned to this host"
            if new == 0 and first + count <= have:  # handed in before
                losses = losses[count:]
                continue
            if first != at:
                return f"pair {at} is missing before pair {first}"
            at, new = at + count, new + count
        if new:
            self._parts[slot].append(losses)
        if final:
            self._open.discard(slot)
        return ""

    def release(self, slot: int) -> bool:
        """See `Work.release`."""
        if slot not in self._open:
            return False
        self._open.discard(slot)
        if not self.count(slot):  # it may begin anew, should it come back before the step is closed
            self._parts.pop(slot)
        return True

    def busy(self, slot: int) -> bool:
        """See `Work.busy`."""
        return slot in self._open

    def open_spans(self, slot: int) -> list[Span]:
        """See `Work.open_spans`."""
        if slot not in self._open:
            return []
        done = self.count(slot)
        return [(slot * SLOT_PAIRS + done, SLOT_PAIRS - done)]

    def count(self, slot: int) -> int:
        """See `Work.count`."""
        return sum(map(len, self._parts.get(slot, ())))

    @property
    def waits(self) -> bool:
        """See `Work.waits`: only if nobody is at it, since who starts late would hold up the others."""
        return not self._open and not self.complete

    @property
    def complete(self) -> bool:
        """See `Work.complete`."""
        return not self._open and any(self._parts.values())

    def result(self) -> tuple[list[Span], Losses]:
        """See `Work.result`: range by range."""
        slots = [slot for slot in sorted(self._parts) if self._parts[slot]]
        spans = [(slot * SLOT_PAIRS, self.count(slot)) for slot in slots]
        return spans, np.concatenate([part for slot in slots for part in self._parts[slot]])

    def liars(self, trusted: int | None) -> set[int]:
        """See `Work.liars`: nothing is scored twice."""
        return set()


def _agree(one: Losses, two: Losses) -> bool:
    return bool(np.allclose(one, two, rtol=0, atol=AGREE, equal_nan=True))
