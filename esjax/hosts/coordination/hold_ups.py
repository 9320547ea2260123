"""Hold-ups: how long each owner's hosts held up steps beyond the others, and which owners get no pairs for a while.

A deadline ends one hold-up. The account ends repeated ones, also by hosts that join again under new names.
"""

TOLERANCE = 1.5
"""Time without a hold-up, as a multiple: of a step, of the other owners' time; of a host, of the expected time."""

REDONE = 2.0
"""Most that a host that loses its pairs holds up a step, as a multiple of the time for which it had them."""

PAID_OFF = 0.1
"""Seconds of hold-ups that are paid off in a second, so that an owner costs the run a tenth of its time at most."""

MOST, MOST_STEPS = 2.0, 3.0
"""Hold-ups above which an owner's hosts get no pairs until all are paid off: seconds, or steps if that is more."""


class HoldUps:
    """The account of every owner. Times are seconds of the coordinator's clock."""

    def __init__(self, now: float) -> None:
        """Set up with a step that opens now."""
        self._paid_off_at: dict[str, float] = {}  # by owner
        self._resting: set[str] = set()
        self._open(now)

    def _open(self, now: float) -> None:
        self._opened_at = now
        self._slots: set[int] = set()  # of hosts that finished pairs
        self._finished: dict[str, float] = {}  # by owner: most seconds in which a host first finished its pairs
        self._failed: dict[str, float] = {}  # by owner: most seconds of a hold-up by a host that lost its pairs
        self._last = ("", 0.0)  # owner of the host that finished last, and its seconds beyond those expected

    def finished(self, owner: str, slot: int, seconds: float, expected: float) -> None:
        """Note that the host in a slot scored all its pairs in some seconds; it should take `expected` at most."""
        self._last = owner, seconds - TOLERANCE * expected
        if slot not in self._slots:
            self._slots.add(slot)
            self._finished[owner] = max(self._finished.get(owner, 0.0), seconds)

    def failed(self, owner: str, seconds: float) -> None:
        """Note that a host lost pairs that it had for some seconds."""
        self._failed[owner] = max(self._failed.get(owner, 0.0), REDONE * seconds)

    def has_failed(self, owner: str) -> bool:
        """Return whether a host of an owner lost its pairs in this step."""
        return owner in self._failed

    def closed(self, now: float) -> dict[str, float]:
        """Close the step, and open the next one; return the seconds that owners begin to rest, by owner."""
        blamed = dict(self._failed)
        owner, seconds = self._last
        if seconds > blamed.get(owner, 0.0):
            blamed[owner] = seconds
        others = [seconds for owner, seconds in self._finished.items() if owner not in blamed]
        step = max(others, default=now - self._opened_at)
        held_up = now - self._opened_at - TOLERANCE * step
        most = max(MOST, MOST_STEPS * step) / PAID_OFF
        if held_up > 0:
            for owner, seconds in blamed.items():
                until = max(self._paid_off_at.get(owner, now), now)
                self._paid_off_at[owner] = until + min(held_up, seconds) / PAID_OFF
        self._paid_off_at = {owner: until for owner, until in self._paid_off_at.items() if until > now}
        before = self._resting & self._paid_off_at.keys()
        rests = {owner: until - now for owner, until in self._paid_off_at.items() if until - now > most}
        self._resting = before | rests.keys()
        self._open(now)
        return {owner: rest for owner, rest in rests.items() if owner not in before}

    def rests(self, owner: str, now: float) -> bool:
        """Return whether an owner's hosts should get no pairs."""
        return owner in self._resting and now < self._paid_off_at[owner]
