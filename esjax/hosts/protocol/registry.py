"""Who takes part, and how each host does."""

from collections.abc import Iterator, Sequence

from esjax.hosts.protocol import wire

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

SHORTEST = 1e-6
"""Seconds that scoring takes at least: a speed is finite."""


class Host:
    """What the coordinator knows of one host.

    Attributes:
        key: Public key that it proved to have, or None.
        instance: Tells it from another host of its name.
        attempt: Which of its requests to join took it in.
        seen: When it last said something.
        progress_at: When it last got anything done.
        speed: Pairs a second, or None.
        leased_at: When it was given its pairs.
        expected: Seconds that they should take, by its speed.
        slowness: How many times as long those of this step took, or None while it has none or is at them.
        late: Whether it took much longer than the others; `probe_at` says when it gets work again.
        hung: Whether it lives and gets nothing done; until it does.
        is_gone: Whether it counts as lost, until its next sign of life, or its session has ended.
        resyncs: How often in a row its state differed from the anchor's.
        resync: Whether it has yet to be told to fetch the anchor's state.
        aside: Why it gets no more work, or "".
        superseded: Whether another host came under its name.
        dropped: Whether it is only listed because something in this step came from it.
        share: Part of the last finished step's pairs that it scored.
    """

    def __init__(self, join: wire.Join, session: int, slot: int, key: str | None, now: float) -> None:
        """Take in a host that has just joined."""
        self.name, self.device, self.kind = join.name, join.device, join.kind
        self.instance, self.attempt = join.instance, join.attempt
        self.session, self.slot, self.key = session, slot, key
        self.joined_at = self.seen = self.progress_at = self.leased_at = self.probe_at = now
        self.phase: wire.Phase = "joining"
        self.step = self.progress = self.strikes = self.resyncs = 0
        self.speed: float | None = None
        self.expected = 0.0
        self.slowness: float | None = None
        self.probe_after = PROBE
        self.late = self.hung = self.is_gone = self.resync = self.superseded = self.dropped = False
        self.note = self.aside = self.digest = ""
        self.share = 0.0

    def can_work(self, now: float) -> bool:
        """Tell whether it may be given pairs, if need be."""
        usable = self.phase == "ready" and not (
            self.is_gone or self.aside or self.superseded or self.resync or self.hung
        )
        return usable and now - self.seen < SILENT

    def in_time(self, now: float) -> bool:
        """Tell whether it is worth being given pairs."""
        return not self.late or now >= self.probe_at

    def made_progress(self, now: float) -> None:
        """Hear that it got something done."""
        self.progress_at, self.hung = now, False

    def took(self, pairs: int, seconds: float) -> None:
        """Hear how fast it was."""
        if pairs:
            speed = pairs / max(seconds, SHORTEST)
            self.speed = speed if self.speed is None else 0.7 * self.speed + 0.3 * speed

    def set_leased(self, expected: float, now: float) -> None:
        """Give it pairs."""
        self.leased_at, self.expected, self.slowness = now, max(expected, SHORTEST), None

    def set_finished(self, now: float) -> None:
        """Hear that it is done with its pairs, so that its speed is trusted again."""
        self.slowness = (now - self.leased_at) / self.expected
        self.late, self.probe_after = False, PROBE

    def set_late(self, now: float) -> None:
        """Give it no pairs for a while, each time longer."""
        self.late = True
        self.probe_at, self.probe_after = now + self.probe_after, min(2 * self.probe_after, PROBE_LONGEST)

    def status(self, now: float, quiet: float, members: int) -> wire.HostStatus:
        """Describe it to a person.

        Args:
            now: The time.
            quiet: Seconds without a word after which it is called silent.
            members: Of a pair.
        """
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
            members_per_second=0.0 if self.is_gone else members * (self.speed or 0.0),
            last_seen=now - self.seen,
            digest=self.digest,
            share=self.share,
            note=(self.aside or self.note)[: wire.NOTE],
        )


class Registry:
    """All hosts, by session, the longest here first."""

    def __init__(self) -> None:
        """Begin with nobody."""
        self._hosts: dict[int, Host] = {}
        self._by_slot: dict[int, Host] = {}

    def __iter__(self) -> Iterator[Host]:
        """Go through a copy, so that hosts may be removed."""
        return iter(list(self._hosts.values()))

    def get(self, session: int) -> Host | None:
        """Find a host by its session."""
        return self._hosts.get(session)

    def called(self, name: str) -> Host | None:
        """Find the host that counts of those of a name."""
        hosts = self._hosts.values()
        return next((host for host in hosts if host.name == name and not (host.superseded or host.dropped)), None)

    def add(self, join: wire.Join, session: int, key: str | None, now: float) -> Host | None:
        """Take in a host; None: there is no room."""
        slot = next((slot for slot in range(MAX_HOSTS) if slot not in self._by_slot), None)
        if slot is None:
            return None
        host = self._hosts[session] = self._by_slot[slot] = Host(join, session, slot, key, now)
        return host

    def remove(self, host: Host) -> None:
        """Forget a host; its slot is free."""
        if self._hosts.pop(host.session, None):
            del self._by_slot[host.slot]

    def in_slot(self, slot: int) -> Host | None:
        """Find a host by its slot."""
        return self._by_slot.get(slot)

    def workers(self, now: float) -> list[Host]:
        """List the hosts to give pairs to, the longest here first; who was late only if there is nobody else."""
        usable = [host for host in self._hosts.values() if host.can_work(now)]
        return [host for host in usable if host.in_time(now)] or usable

    def usual_slowness(self) -> float | None:
        """Return the median slowness of the hosts that are done with their pairs of this step, or None."""
        return median([host.slowness for host in self._hosts.values() if host.slowness is not None])


def speeds_of(hosts: Sequence[Host]) -> dict[int, float]:
    """Return the speed of hosts by slot; who has none yet gets the median of the others'."""
    usual = median([host.speed for host in hosts if host.speed]) or 1.0
    return {host.slot: host.speed or usual for host in hosts}


def median(values: Sequence[float]) -> float | None:
    """Return the upper median, or None of nothing."""
    return sorted(values)[len(values) // 2] if values else None
