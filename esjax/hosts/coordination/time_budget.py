"""Leases with a time budget: each host scores its own range of pairs, and the population is what came back in time."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from esjax.exchange.update_record import Span
from esjax.exchange.values import SLOT_PAIRS, Exchange, Values, cut
from esjax.hosts.coordination.leases import NO_DELAYS, Lease, Leases, Unit

LONGEST = 3.0
"""Most pairs that are added up and can be scored again, as a multiple of the median host's pairs."""


class TimeBudget(Leases):
    """Leases with a time budget: each host scores from pair `slot * SLOT_PAIRS` on until its time is over."""

    def __init__(self, budget: float, quantum: int, exchange: Exchange) -> None:
        """Set up without leases; `budget` is the time to score in seconds, the others as in `FixedPopulation`."""
        super().__init__(exchange)
        self._budget, self._quantum = budget, quantum
        self._parts: dict[int, list[Values]] = {}
        self._open: set[int] = set()

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`: to every host that would not delay the others; the rest wait for the next step."""
        if not self.waits:
            return []
        prompt = [slot for slot in sorted(speeds) if delays.get(slot, 0.0) <= self._budget / 2] or sorted(speeds)
        for slot in prompt:
            self._parts.setdefault(slot, [])
            self._open.add(slot)
        return [Lease(slot, slot * SLOT_PAIRS, SLOT_PAIRS) for slot in prompt]

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """See `Leases.accept`: the host's range without gaps; pairs that have values already are ignored."""
        if slot not in self._parts:
            return "these pairs were never leased to this host"
        start = slot * SLOT_PAIRS
        at = start + self._counts[slot]
        new: list[Values] = []
        for (first, count), found in zip(spans, cut(values, self._exchange.rows(spans)), strict=True):
            if first < start or first + count > start + SLOT_PAIRS:
                return "these pairs were never leased to this host"
            if first > at:
                return f"pair {at} is missing before pair {first}"
            if first + count > at:
                rest = self._exchange.without_first(found, at - first)
                if rest is None:
                    return f"pair {first} is summed twice"
                new.append(rest)
                at = first + count
        self._parts[slot] += new
        if self._exchange.adds_up and new:  # added up at once, so that memory does not grow
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

    def took_part(self, slot: int) -> bool:
        """See `Leases.took_part`."""
        return slot in self._parts

    @property
    def waits(self) -> bool:
        """See `Leases.waits`: only while no host scores, since a late start would delay the others."""
        return not self._open and not self.complete

    @property
    def complete(self) -> bool:
        """See `Leases.complete`."""
        return not self._open and any(self._counts.values())

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`: in the order of the slots."""
        slots = [slot for slot in sorted(self._parts) if self._parts[slot]]
        spans = [(slot * SLOT_PAIRS, self._counts[slot]) for slot in slots]
        return spans, np.concatenate([part for slot in slots for part in self._parts[slot]])

    def units(self, slot: int) -> list[Unit]:
        """See `Leases.units`: lease quanta, or all pairs of the host if they are added up.

        None if these are so many that a usual host could not score them again within a few steps' time.
        """
        first, pairs, parts = slot * SLOT_PAIRS, self._counts[slot], self._parts.get(slot)
        if not parts:
            return []
        values = self._exchange.merge(parts)
        if self._exchange.adds_up:
            usual = sorted(self._counts.values())[(len(self._counts) - 1) // 2]
            return [Unit([(first, pairs)], values)] if pairs <= LONGEST * usual else []
        sizes = [min(self._quantum, pairs - at) for at in range(0, pairs, self._quantum)]
        starts = accumulate(sizes, initial=first)
        return [Unit([(at, size)], part) for at, size, part in zip(starts, sizes, cut(values, sizes), strict=False)]

    def fill(self, slot: int, unit: Unit) -> None:
        """See `Leases.fill`: without effect, since the population is what hosts scored in their own ranges."""
