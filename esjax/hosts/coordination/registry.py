"""The registry of all hosts: phase, speed, and when each was last heard."""

from collections.abc import Iterator, Sequence

from esjax.averages import SHORTEST, running_speed
from esjax.hosts.protocol import wire
from esjax.texts import legible

SILENT = 20.0
"""Seconds without a message after which a host counts as lost."""

FORGET = 120.0
"""Seconds without a message after which a lost host is removed and its session ends."""

PROBE, PROBE_LONGEST = 10.0, 300.0
"""Seconds after which a host that was too slow gets work again: at first, and at most; doubled each time."""

STRIKES = 3
"""Messages that no correct host sends, or wrong states in a row, after which a host is put aside."""

MAX_HOSTS = 1024
"""Most hosts at a time."""


class Host:
    """What the coordinator knows about one host. Times are seconds of the coordinator's clock.

    Attributes:
        key: Public key that the host proved to own, or None.
        instance: Random number that distinguishes it from another host of its name.
        attempt: Number of the request by which it joined.
        seen: Time of its last message.
        progress_at: Time of its last progress.
        speed: Pairs per second; 0 before its first values.
        leased_at: Time at which it got its pairs.
        expected: Seconds that these pairs should take at its speed.
        slowness: Time of this step's pairs divided by `expected`; None before they are finished.
        late: Whether it took much longer than the others; it gets work again at `probe_at`.
        hung: Whether it sends messages but makes no progress.
        is_gone: Whether it is lost (until its next message), or its session has ended.
        resyncs: How often in a row its state differed from the right one.
        resync: Whether it must fetch the anchor's state.
        aside: Why it is put aside, or "".
        superseded: Whether a newer host has its name.
        dropped: Whether its session has ended; it stays in the registry while this step has values of it.
        share: Part of the last finished step's pairs that it scored, 0 to 1.
    """

    def __init__(self, join: wire.Join, session: int, slot: int, key: str | None, now: float) -> None:
        """Register a host that joins."""
        self.name, self.device, self.kind = join.name, join.device, join.kind
        self.instance, self.attempt = join.instance, join.attempt
        self.session, self.slot, self.key = session, slot, key
        self.joined_at = self.seen = self.progress_at = self.leased_at = self.probe_at = now
        self.phase: wire.Phase = "joining"
        self.step = self.progress = self.strikes = self.resyncs = 0
        self.speed = self.expected = 0.0
        self.slowness: float | None = None
        self.probe_after = PROBE
        self.late = self.hung = self.is_gone = self.resync = self.superseded = self.dropped = False
        self.note = self.aside = self.digest = ""
        self.share = 0.0

    @property
    def owner(self) -> str:
        """Who answers for it: its key, which several hosts may share; without keys its name."""
        return self.key or self.name

    def can_work(self, now: float) -> bool:
        """Return whether it can score pairs."""
        is_excluded = self.is_gone or self.aside or self.superseded or self.resync or self.hung
        return self.phase == "ready" and not is_excluded and now - self.seen < SILENT

    def in_time(self, now: float) -> bool:
        """Return whether it was in time, or is due for another try."""
        return not self.late or now >= self.probe_at

    def made_progress(self, now: float) -> None:
        """Note progress."""
        self.progress_at, self.hung = now, False

    def took(self, pairs: int, seconds: float) -> None:
        """Update the speed: it scored `pairs` pairs in `seconds`."""
        if pairs:
            self.speed = running_speed(self.speed, pairs, seconds)

    def set_leased(self, expected: float, now: float) -> None:
        """Note that it got pairs, which should take `expected` seconds."""
        self.leased_at, self.expected, self.slowness = now, max(expected, SHORTEST), None

    def set_finished(self, now: float) -> None:
        """Note that it finished its pairs; it is not late any more."""
        self.slowness = (now - self.leased_at) / self.expected
        self.late, self.probe_after = False, PROBE

    def set_late(self, now: float) -> None:
        """Note that it is late: it gets no pairs for a while, each time twice as long."""
        self.late = True
        self.probe_at, self.probe_after = now + self.probe_after, min(2 * self.probe_after, PROBE_LONGEST)

    def status(self, now: float, quiet: float, members: int) -> wire.HostStatus:
        """Return its row of the status; it is "silent" after `quiet` seconds without a message."""
        state: str = self.phase
        if self.aside:
            state = "put aside"
        elif self.is_gone:
            state = "lost"
        elif now - self.seen > quiet:
            state = "silent"
        elif self.phase == "ready" and (self.late or self.hung):
            state = "straggling"
        return wire.HostStatus(
            name=self.name,
            slot=self.slot,
            state=state,
            device=self.device,
            step=self.step,
            members_per_second=0.0 if self.is_gone else members * self.speed,
            last_seen=now - self.seen,
            digest=self.digest,
            share=self.share,
            note=legible(self.aside or self.note)[: wire.NOTE],
        )


class Registry:
    """All hosts by session, in the order in which they joined."""

    def __init__(self) -> None:
        """Set up without hosts."""
        self._hosts: dict[int, Host] = {}
        self._by_slot: dict[int, Host] = {}

    def __iter__(self) -> Iterator[Host]:
        """Iterate over a copy, so that hosts may be removed meanwhile."""
        return iter(list(self._hosts.values()))

    def get(self, session: int) -> Host | None:
        """Return the host of a session, or None."""
        return self._hosts.get(session)

    def called(self, name: str) -> Host | None:
        """Return the host of a name that is not superseded or dropped, or None."""
        hosts = self._hosts.values()
        return next((host for host in hosts if host.name == name and not (host.superseded or host.dropped)), None)

    def add(self, join: wire.Join, session: int, key: str | None, now: float) -> Host | None:
        """Register a host in a free slot; None if there is no free slot."""
        slot = next((slot for slot in range(MAX_HOSTS) if slot not in self._by_slot), None)
        if slot is None:
            return None
        host = self._hosts[session] = self._by_slot[slot] = Host(join, session, slot, key, now)
        return host

    def remove(self, host: Host) -> None:
        """Remove a host and free its slot."""
        if self._hosts.pop(host.session, None):
            del self._by_slot[host.slot]

    def in_slot(self, slot: int) -> Host | None:
        """Return the host in a slot, or None."""
        return self._by_slot.get(slot)

    def workers(self, now: float) -> list[Host]:
        """List the hosts that get pairs, in the order in which they joined; late ones only if there are no others."""
        able = [host for host in self._hosts.values() if host.can_work(now)]
        return [host for host in able if host.in_time(now)] or able

    def usual_slowness(self) -> float | None:
        """Return the median slowness of the hosts that finished their pairs of this step, or None."""
        return median([host.slowness for host in self._hosts.values() if host.slowness is not None])


def speeds_of(hosts: Sequence[Host]) -> dict[int, float]:
    """Return the speeds of hosts by slot, in pairs per second; a new host gets the median of the others."""
    usual = median([host.speed for host in hosts if host.speed]) or 1.0
    return {host.slot: host.speed or usual for host in hosts}


def median(values: Sequence[float]) -> float | None:
    """Return the upper median; None if there are no values."""
    return sorted(values)[len(values) // 2] if values else None
