"""What one address may take of what all share: bytes that wait for replies, and handshakes a second."""


class Pool:
    """Room for bytes, of which one group gets at most a half, and a stranger none beyond a quarter."""

    def __init__(self, most: int) -> None:
        """Set up with room for `most` bytes."""
        self._most, self._taken = most, 0
        self._groups: dict[str, int] = {}

    def take(self, group: str, size: int, is_stranger: bool) -> bool:
        """Take room, if there is enough."""
        mine = self._groups.get(group, 0) + size
        if mine > self._most // (4 if is_stranger else 2) or self._taken + size > self._most:
            return False
        self._groups[group] = mine
        self._taken += size
        return True

    def give_back(self, group: str, size: int) -> None:
        """Give back room that was taken."""
        self._taken -= size
        self._groups[group] -= size
        if not self._groups[group]:
            del self._groups[group]


class Rates:
    """Events of each group: a number a second over a while, and a number at once."""

    def __init__(self, rate: float, burst: float) -> None:
        """Set up; the rate is in events a second."""
        self._rate, self._burst = rate, burst
        self._left: dict[str, tuple[float, float]] = {}  # by group: events that it may have at a time in seconds

    def take(self, group: str, now: float) -> bool:
        """Return whether a group may have one more event now."""
        left = self._now(group, now)
        self._left[group] = (left - (left >= 1), now)
        return left >= 1

    def tidy(self, now: float) -> None:
        """Forget groups without recent events."""
        self._left = {group: left for group, left in self._left.items() if self._now(group, now) < self._burst}

    def _now(self, group: str, now: float) -> float:
        left, since = self._left.get(group, (self._burst, now))
        return min(left + self._rate * (now - since), self._burst)
