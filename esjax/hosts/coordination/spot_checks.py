"""Spot checks: leases under which a second host scores again what another one answered.

To a host a check is a lease like any other, and it comes after the answer: which answers are checked is drawn only when
all values of the step are in. `inspector.py` draws the checks and judges what comes back.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from esjax.exchange.update_record import Span, pair_count, without
from esjax.exchange.values import Exchange, Values, cut
from esjax.hosts.coordination.leases import NO_DELAYS, Lease, Leases, Unit


class Check:
    """A unit that a second host scores again.

    Attributes:
        missing: Pairs whose values are not in; if the host was released, they never will be.
    """

    def __init__(self, unit: Unit, exchange: Exchange) -> None:
        """Begin without values."""
        self.missing = list(unit.spans)
        self._exchange = exchange
        self._parts: dict[int, Values] = {}  # by first pair

    def take(self, span: Span, values: Values) -> bool:
        """Store the values of a span; return False if it is not one of the missing ones."""
        if without([span], self.missing):
            return False
        self.missing = without(self.missing, [span])
        self._parts[span[0]] = values
        return True

    def values(self) -> Values:
        """Return the values of all pairs, in the form of `Unit.values`."""
        return self._exchange.merge([self._parts[first] for first in sorted(self._parts)])


class CheckedLeases(Leases):
    """The leases of one step, and those of its checks, which neither count nor enter the result."""

    def __init__(self, leases: Leases, exchange: Exchange) -> None:
        """Set up without checks."""
        super().__init__(exchange)
        self._leases = leases
        self._open: dict[int, list[Check]] = {}  # by slot of the second host
        self._checked: dict[int, list[Span]] = {}  # by slot: pairs of all its checks

    def begin_check(self, slot: int, unit: Unit) -> Check:
        """Lease a unit to a second host."""
        check = Check(unit, self._exchange)
        self._open.setdefault(slot, []).append(check)
        self._checked.setdefault(slot, []).extend(unit.spans)
        return check

    def is_checking(self, slot: int) -> bool:
        """Return whether all open pairs of a host are of checks."""
        return bool(self._open.get(slot)) and not self._leases.busy(slot)

    def lease(self, speeds: Mapping[int, float], delays: Mapping[int, float] = NO_DELAYS) -> list[Lease]:
        """See `Leases.lease`."""
        return self._leases.lease(speeds, delays)

    def accept(self, slot: int, spans: Sequence[Span], values: Values, final: bool) -> str:
        """See `Leases.accept`: values of pairs that the host checks are kept apart."""
        checked = self._checked.get(slot)
        if not checked:
            return self._leases.accept(slot, spans, values, final)
        checks, own = self._open.pop(slot, []), self._leases.open_spans(slot)
        rest: list[tuple[Span, Values]] = []
        for span, found in zip(spans, cut(values, self._exchange.rows(spans)), strict=True):
            is_late = not without([span], checked) and without([span], own)  # of a check that has ended
            if not any(check.take(span, found) for check in checks) and not is_late:
                rest.append((span, found))
        self._open[slot] = [check for check in checks if check.missing]
        if not rest:
            return ""
        return self._leases.accept(
            slot, [span for span, _ in rest], np.concatenate([found for _, found in rest]), final
        )

    def release(self, slot: int) -> None:
        """See `Leases.release`."""
        self._leases.release(slot)
        self._open.pop(slot, None)

    def revoke(self, slot: int) -> None:
        """See `Leases.revoke`."""
        self._leases.revoke(slot)
        self._open.pop(slot, None)

    def busy(self, slot: int) -> bool:
        """See `Leases.busy`."""
        return bool(self._open.get(slot)) or self._leases.busy(slot)

    def open_spans(self, slot: int) -> list[Span]:
        """See `Leases.open_spans`."""
        return self._leases.open_spans(slot) + [span for check in self._open.get(slot, ()) for span in check.missing]

    def open_pairs(self, slot: int) -> int:
        """Return the number of a host's open pairs."""
        return pair_count(self.open_spans(slot))

    def count(self, slot: int) -> int:
        """See `Leases.count`."""
        return self._leases.count(slot)

    def took_part(self, slot: int) -> bool:
        """See `Leases.took_part`."""
        return slot in self._checked or self._leases.took_part(slot)

    @property
    def waits(self) -> bool:
        """See `Leases.waits`."""
        return self._leases.waits

    @property
    def complete(self) -> bool:
        """See `Leases.complete`; checks that are open must end first."""
        return self._leases.complete and not any(self._open.values())

    def result(self) -> tuple[list[Span], Values]:
        """See `Leases.result`."""
        return self._leases.result()

    def units(self, slot: int) -> list[Unit]:
        """See `Leases.units`."""
        return self._leases.units(slot)

    def fill(self, slot: int, unit: Unit) -> None:
        """See `Leases.fill`."""
        self._leases.fill(slot, unit)
