"""The registry of all hosts: phase, speed, and when each was last heard."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from esjax.averages import SHORTEST, running_speed
from esjax.hosts.coordination.hold_ups import HoldUps
from esjax.hosts.protocol import wire
from esjax.texts import legible

SILENT = 20.0
"""Seconds without a message after which a host counts as lost."""

FORGET = 120.0
"""Seconds without a message after which a lost host is removed and its session ends."""

PROBE, PROBE_LONGEST = 10.0, 300.0
"""Seconds after which a host that was too slow gets work again: at first, and at most; doubled each time."""

GROWTH = 2.0
"""Most times as fast that one measurement makes a host, so that a single fast answer brings it no large share."""

MISSED = 2.0
"""Time for which a host that missed its deadline is taken to need for its pairs, as a multiple of the time so far."""

STRIKES = 3
"""Messages that no correct host sends, or wrong states in a row, after which a host is put aside."""

MAX_HOSTS = 1024
"""Most hosts at a time."""


class Host:
    """What the coordinator knows about one host. Times are seconds of the coordinator's clock.

    Attributes:
        key: Public key that the host proved to own, or None.
        peer: Connection of its last message.
        instance: Random number that distinguishes it from another host of its name.
        attempt: Number of the request by which it joined.
        seen: Time of its last message.
        progress_at: Time of its last progress.
        speed: Pairs per second, from lease to arrival, by the coordinator's clock; 0 before its first values.
        leased_at: Time at which it got its pairs.
        answered: Pairs whose values came since then.
        slowness: Time of this step's pairs divided by that expected; None before they are finished.
        has_failed: Whether it lost its pairs in this step, or joined after a host of its owner did.
        late: Whether it took much longer than the others.
        probe_at: Time at which it gets work again after it was late or too slow for any.
        is_tried: Whether it has pairs as a trial, since its speed is too low for any.
        hung: Whether it sends messages but makes no progress.
        is_gone: Whether it is lost (until its next message), or its session has ended.
        resyncs: How often in a row its state differed from the right one.
        resync: Whether it must fetch the newest kept state, and has not reported since then that it is ready.
        has_fetched: Whether it has fetched a whole state since it was last ready.
        aside: Why it is put aside, or "".
        superseded: Whether a newer host has its name.
        dropped: Whether its session has ended; it stays in the registry while this step has values of it.
        share: Part of the last finished step's pairs that it scored, 0 to 1.
    """

    def __init__(self, join: wire.Join, session: int, slot: int, key: str | None, peer: bytes, now: float) -> None:
        """Register a host that joins."""
        self.name, self.device, self.kind = join.name, join.device, join.kind
        self.instance, self.attempt = join.instance, join.attempt
        self.session, self.slot, self.key, self.peer = session, slot, key, peer
        self.joined_at = self.seen = self.progress_at = self.leased_at = self.probe_at = now
        self.phase: wire.Phase = "joining"
        self.step = self.progress = self.strikes = self.resyncs = self.answered = 0
        self.speed = self._delay = 0.0
        self._leased_pairs = 0
        self._leased_speed: float | None = None
        self._most_speed = math.inf
        self.slowness: float | None = None
        self.probe_after = PROBE
        self.is_tried = self.has_failed = self.late = self.hung = self.is_gone = self.superseded = self.dropped = False
        self.resync = self.has_fetched = False
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
        speed = running_speed(self.speed, pairs, seconds)
        self.speed = min(speed, self._most_speed)

    def set_leased(
        self, pairs: int, speed: float | None, usual: float | None, delay: float, now: float, *, was_busy: bool
    ) -> None:
        """Note that it got pairs.

        Args:
            pairs: All its pairs without values; those that it had before are due as they were.
            speed: Pairs per second by which they were leased. None: no host's speed is known.
            usual: Pairs per second of the other hosts. None: no host's speed is known.
            delay: Seconds before it can begin.
            now: The time.
            was_busy: Whether it had pairs before.
        """
        if not was_busy:
            self.leased_at, self.answered, self.is_tried = now, 0, False
        self._leased_pairs, self._leased_speed, self._delay = self.answered + pairs, speed, delay
        self._most_speed = GROWTH * max(speed, self.speed or usual) if speed and usual else math.inf
        self.slowness = None

    def expected(self, usual_speed: float | None) -> float:
        """Return the seconds that its pairs should take, from `leased_at` on; 0 if no host's speed is known."""
        speed = self._leased_speed or usual_speed
        return max(self._delay + self._leased_pairs / speed, SHORTEST) if speed else 0.0

    def set_answered(self, pairs: int, now: float, *, is_finished: bool) -> None:
        """Note the values of some of its pairs; `is_finished`: no pairs are left, so it is not late any more."""
        self.answered += pairs
        if not is_finished:
            return
        seconds, expected = now - self.leased_at, self.expected(None)
        self.slowness = seconds / expected if expected else None
        self.late = False
        if self.answered:  # else they were of a check
            self.took(self.answered, seconds)
            if self.slowness is not None and self.slowness < MISSED and not self.is_tried:
                self.probe_after = PROBE

    def set_late(self, open_pairs: int, now: float) -> None:
        """Note that it is late with some pairs: it loses speed, and gets no pairs for a while."""
        self.late = True
        if open_pairs:
            slower = (self.answered + open_pairs) / max(MISSED * (now - self.leased_at), SHORTEST)
            self.speed = min(self.speed or slower, slower)
        self.put_off_trial(now)

    def is_due(self, now: float) -> bool:
        """Return whether it got no pairs for so long that it should be tried again."""
        return now >= max(self.probe_at, self.leased_at + PROBE)

    def put_off_trial(self, now: float) -> None:
        """Wait before the next trial, each time twice as long."""
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
    """All hosts by session, in the order in which they joined.

    Attributes:
        now: Time of the request or tick that is being processed.
        hold_ups: The account of their owners' hold-ups.
    """

    def __init__(self, now: float) -> None:
        """Set up without hosts."""
        self.now, self.hold_ups = now, HoldUps(now)
        self._hosts: dict[int, Host] = {}
        self._by_slot: dict[int, Host] = {}

    def __iter__(self) -> Iterator[Host]:
        """Iterate over a copy, so that hosts may be removed meanwhile."""
        return iter(list(self._hosts.values()))

    def get(self, session: int) -> Host | None:
        """Return the host of a session, or None."""
        return self._hosts.get(session)

    @property
    def has_one_owner(self) -> bool:
        """Whether all hosts that are there have one owner."""
        return len({host.owner for host in self._hosts.values() if not host.is_gone}) <= 1

    def has_others(self, owner: str) -> bool:
        """Return whether a host of another owner can work."""
        return any(host.owner != owner and host.can_work(self.now) for host in self._hosts.values())

    def called(self, name: str) -> Host | None:
        """Return the host of a name that is not superseded or dropped, or None."""
        hosts = self._hosts.values()
        return next((host for host in hosts if host.name == name and not (host.superseded or host.dropped)), None)

    def of(self, owner: str) -> list[Host]:
        """List the hosts of an owner that are not superseded or dropped."""
        hosts = self._hosts.values()
        return [host for host in hosts if host.owner == owner and not (host.superseded or host.dropped)]

    def add(self, join: wire.Join, session: int, key: str | None, peer: bytes, now: float) -> Host:
        """Register a host in the first free slot."""
        slot = next(slot for slot in itertools.count() if slot not in self._by_slot)
        host = self._hosts[session] = self._by_slot[slot] = Host(join, session, slot, key, peer, now)
        host.has_failed = self.hold_ups.has_failed(host.owner)
        return host

    def remove(self, host: Host) -> None:
        """Remove a host and free its slot."""
        if self._hosts.pop(host.session, None):
            del self._by_slot[host.slot]

    def in_slot(self, slot: int) -> Host | None:
        """Return the host in a slot, or None."""
        return self._by_slot.get(slot)

    def workers(self, now: float) -> list[Host]:
        """List the hosts that get pairs, in the order in which they joined.

        Late hosts, those that lost pairs in this step, and those whose owners held up steps again and again, only if
        there are no others.
        """
        able = [host for host in self._hosts.values() if host.can_work(now)]
        trusty = [host for host in able if not self.hold_ups.rests(host.owner, now)] or able
        return [host for host in trusty if host.in_time(now) and not host.has_failed] or trusty

    def has_worker(self, now: float) -> bool:
        """Return whether any host gets pairs."""
        return any(host.can_work(now) for host in self._hosts.values())

    def usual_slowness(self, judged: Host) -> float | None:
        """Return the median slowness of other owners in this step, or else of the host's own owner; None: unknown."""
        found = _by_owner((host.owner, host.slowness) for host in self._hosts.values() if host.slowness is not None)
        own = found.pop(judged.owner, None)
        return median(list(found.values())) if found else own


def usual_speed(hosts: Sequence[Host]) -> float | None:
    """Return the median speed in pairs per second, one vote for each owner; None: no speed is known."""
    return median(list(_by_owner((host.owner, host.speed) for host in hosts if host.speed).values()))


def median(values: Sequence[float]) -> float | None:
    """Return the upper median; None if there are no values."""
    return sorted(values)[len(values) // 2] if values else None


def _by_owner(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the median of each owner's values."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for owner, value in values:
        found[owner].append(value)
    return {owner: sorted(some)[len(some) // 2] for owner, some in found.items()}
