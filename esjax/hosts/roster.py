"""Who takes part, and how each host does."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from esjax.hosts import wire

SILENT = 20.0
"""Seconds without a word after which a host counts as lost."""

FORGET = 120.0
"""Seconds after which a lost host is no longer listed."""

PROBE, PROBE_LONGEST = 10.0, 300.0
"""Seconds after which a host that was too slow gets work again, doubled each time."""

STRIKES = 3
"""Messages that an honest host never sends, or states that differ, after which a host is put aside."""

MAX_HOSTS = 1024
"""Hosts at a time at most."""


class Host:
    """What the coordinator knows of one host.

    Attributes:
        key: Public key that it proved to have, or None.
        seen: When it last said something.
        progress_at: When it last got anything done.
        speed: Pairs a second, or None.
        leased_at: When it was given its pairs.
        finished_after: Seconds that its last lease took, or None while it is open.
        late: Whether it took much longer than the others; `probe_at` says when it gets work again.
        hung: Whether it lives and gets nothing done; until it does.
        resyncs: How often in a row its state differed from the anchor's.
        resync: Whether it has yet to be told to fetch the anchor's state.
        aside: Why it gets no more work, or "".
        superseded: Whether another host came under its name.
        share: Part of the last finished step's pairs that it scored.
    """

    def __init__(self, join: wire.Join, session: int, slot: int, key: str | None, now: float) -> None:
        """Take in a host that has just joined."""
        self.name, self.device, self.kind = join.name, join.device, join.kind
        self.session, self.slot, self.key = session, slot, key
        self.joined_at = self.seen = self.progress_at = self.leased_at = self.probe_at = now
        self.phase: wire.Phase = "joining"
        self.step = self.progress = self.strikes = self.resyncs = 0
        self.speed: float | None = None
        self.finished_after: float | None = None
        self.probe_after = PROBE
        self.late = self.hung = self.resync = self.superseded = False
        self.note = self.aside = self.digest = ""
        self.share = 0.0

    def can_work(self, now: float) -> bool:
        """Tell whether it may be given pairs."""
        usable = self.phase == "ready" and not (self.aside or self.superseded or self.resync or self.hung)
        return usable and now - self.seen < SILENT and (not self.late or now >= self.probe_at)

    def made_progress(self, now: float) -> None:
        """Hear that it got something done."""
        self.progress_at, self.hung = now, False

    def set_late(self, now: float) -> None:
        """Give it no pairs for a while, each time longer."""
        self.late = True
        self.probe_at, self.probe_after = now + self.probe_after, min(2 * self.probe_after, PROBE_LONGEST)

    def set_in_time(self) -> None:
        """Trust its speed again."""
        self.late, self.probe_after = False, PROBE

    def status(self, now: float, quiet: float) -> wire.HostStatus:
        """Describe it to a person; `quiet` are the seconds after which it counts as straggling."""
        state: str = self.phase
        if self.aside:
            state = "put aside"
        elif self.phase == "ready" and (self.late or self.hung or now - self.seen > quiet):
            state = "straggling"
        return wire.HostStatus(
            name=self.name,
            slot=self.slot,
            state=state,
            device=self.device,
            step=self.step,
            members_per_second=2 * (self.speed or 0.0),
            last_seen=now - self.seen,
            digest=self.digest,
            share=self.share,
            note=self.aside or self.note,
        )


class Taken(NamedTuple):
    """A host that has joined, and the older one of its name, if it was still there."""

    host: Host
    former: Host | None


class Roster:
    """All hosts, by session."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._hosts: dict[int, Host] = {}

    def __iter__(self) -> Iterator[Host]:
        """Go through a copy, so that hosts may be removed."""
        return iter(list(self._hosts.values()))

    def get(self, session: int) -> Host | None:
        """Find a host by its session."""
        return self._hosts.get(session)

    def add(self, join: wire.Join, session: int, key: str | None, now: float) -> Taken | None:
        """Take in a host; None: there is no room."""
        taken = {host.slot for host in self._hosts.values()}
        slot = next((slot for slot in range(MAX_HOSTS) if slot not in taken), None)
        if slot is None:
            return None
        former = next((host for host in self if host.name == join.name and not host.superseded), None)
        host = self._hosts[session] = Host(join, session, slot, key, now)
        return Taken(host, former)

    def remove(self, host: Host) -> None:
        """Forget a host; its slot is free."""
        self._hosts.pop(host.session, None)

    def in_slot(self, slot: int) -> Host | None:
        """Find a host by its slot."""
        return next((host for host in self._hosts.values() if host.slot == slot), None)

    def workers(self, now: float) -> list[Host]:
        """List the hosts that may be given pairs, the longest here first."""
        return sorted((host for host in self if host.can_work(now)), key=lambda host: host.joined_at)

    def speeds(self, now: float) -> dict[int, float]:
        """Return the speed of those hosts by slot; who has none yet gets the median of the others'."""
        hosts = self.workers(now)
        usual = _median([host.speed for host in hosts if host.speed]) or 1.0
        return {host.slot: host.speed or usual for host in hosts}

    def usual_time(self) -> float | None:
        """Return the median time that finished leases took, or None."""
        return _median([host.finished_after for host in self if host.finished_after is not None])


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
