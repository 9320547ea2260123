"""Now and then, beside the steps: states are compared and one is kept, and the held-out loss is measured.

All of it is done by hosts, at the opening of a step. One of them is the anchor: its state is the one that is kept and
that the others are compared with.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from esjax.config import Config
from esjax.hosts import wire
from esjax.hosts.effects import Effect, RecordDigest, Snapshot, Store, Tell, hash_bytes
from esjax.hosts.roster import STRIKES, Host, Roster

GRACE = 30.0
"""Seconds to wait for digests, for the next part of a snapshot, or for an evaluation."""


class Plan(NamedTuple):
    """What a step asks of the hosts beside losses, see `wire.Step`."""

    digest: bool = False
    upload: int | None = None
    measure: int | None = None


NOTHING_ELSE = Plan()


class _Upload:
    """A snapshot on its way in."""

    def __init__(self, step: int, session: int, now: float) -> None:
        self.step, self.session, self.heard_at = step, session, now
        self.data = bytearray()
        self.digest = ""


class Rounds:
    """State machine of what happens beside the steps.

    Attributes:
        held_out: Loss of the last evaluation, in nats per token, or None.
        snapshots: The newest states, for hosts that join; at most two.
    """

    def __init__(
        self,
        config: Config,
        roster: Roster,
        state_bytes: int,
        snapshot: Snapshot | None,
        emit: Callable[[Effect], None],
        put_aside: Callable[[Host, str, float], None],
        now: float,
    ) -> None:
        """Begin; `emit` and `put_aside` act on the coordinator."""
        self.held_out: float | None = None
        self.snapshots = [snapshot] if snapshot else []
        self._config, self._roster, self._state_bytes = config, roster, state_bytes
        self._emit, self._put_aside = emit, put_aside
        self._anchor: int | None = None
        self._checkpoint_at = now + config.checkpoint_time
        self._measure_at = now
        self._upload: _Upload | None = None
        self._measuring: tuple[int, float] | None = None  # session, and since when
        self._awaited: dict[int, str | None] = {}  # digests by session
        self._digest_step = snapshot.step if snapshot else 0
        self._digest_at = now

    @property
    def anchor(self) -> Host | None:
        """The host whose state is kept."""
        return None if self._anchor is None else self._roster.get(self._anchor)

    @property
    def under_way(self) -> bool:
        """Whether something is still to come in."""
        return self._upload is not None or self._measuring is not None or bool(self._awaited)

    def plan(self, step: int, now: float, last: bool = False) -> Plan:
        """Decide what a step asks of the hosts.

        Args:
            step: The step.
            now: The time.
            last: Whether everything is due, since training ends.
        """
        hosts = self._roster.workers(now)
        if self._anchor not in {host.session for host in hosts}:
            self._anchor = hosts[0].session if hosts else None
        anchor = self.anchor
        if anchor is None:
            return NOTHING_ELSE
        upload = measure = None
        if last or (self._upload is None and now >= self._checkpoint_at):
            self._upload = _Upload(step, anchor.session, now)
            self._checkpoint_at = now + self._config.checkpoint_time
            upload = anchor.slot
        if last or (self._measuring is None and now >= self._measure_at):
            self._measuring = (anchor.session, now)
            self._measure_at = now + self._config.evaluate_time
            measure = anchor.slot
        due = step - self._digest_step >= self._config.hosts.digest_interval
        digest = last or (not self._awaited and (due or upload is not None))
        if digest:
            self._digest_step, self._digest_at = step, now
            self._awaited = {host.session: None for host in hosts}
        return Plan(digest, upload, measure)

    def let_go(self, host: Host) -> None:
        """Expect nothing more of a host."""
        self._awaited.pop(host.session, None)
        if self._measuring and self._measuring[0] == host.session:
            self._measuring = None
            self._measure_at = -math.inf
        if self._upload and self._upload.session == host.session:
            self._upload = None
            self._checkpoint_at = -math.inf
        if self._anchor == host.session:
            self._anchor = None

    def take_digest(self, host: Host, message: wire.Digest) -> None:
        """Take in the digest of a host's state."""
        if message.step == self._digest_step and host.session in self._awaited:
            self._awaited[host.session] = host.digest = message.digest

    def take_measure(self, host: Host, message: wire.Measured) -> None:
        """Take in a held-out loss."""
        if self._measuring and self._measuring[0] == host.session:
            self._measuring = None
            if math.isfinite(message.held_out):
                self.held_out = message.held_out

    def take_part(self, host: Host, message: wire.Upload, body: bytes, now: float) -> str:
        """Take in a part of a snapshot; return why not, or ""."""
        upload = self._upload
        if upload is None or upload.session != host.session or message.step != upload.step:
            return "nobody asked for this snapshot"
        if message.size != self._state_bytes:
            return f"a snapshot of {message.size} bytes, not {self._state_bytes}"
        if message.offset == 0:
            upload.data.clear()
            upload.digest = message.digest
        if message.digest != upload.digest or message.offset > len(upload.data):
            return "the parts of this snapshot do not fit together"
        if not body or len(body) > wire.PART or message.offset + len(body) > message.size:
            return "a part of a snapshot of the wrong size"
        if message.offset < len(upload.data):  # handed in before
            return ""
        upload.heard_at = now
        upload.data += body
        if len(upload.data) == message.size:
            data = bytes(upload.data)
            self._upload = None
            if hash_bytes(data) == message.digest:
                self._emit(Store(Snapshot(message.step, data, message.digest)))
            else:
                self._emit(Tell(f"the snapshot of {host.name} came in damaged; another one is taken"))
                self._checkpoint_at = now
        return ""

    def stored(self, snapshot: Snapshot) -> None:
        """Hear that a snapshot was kept, so that hosts may have it."""
        self.snapshots = [*self.snapshots[-1:], snapshot]

    def check(self, now: float) -> None:
        """Judge digests when all are in, and give up on what does not come."""
        if self._upload and now - self._upload.heard_at > GRACE:
            self._upload = None
            self._checkpoint_at = now
        if self._measuring and now - self._measuring[1] > GRACE:
            self._measuring = None
        uploading = self._upload is not None and self._upload.step == self._digest_step
        answered = all(digest is not None for digest in self._awaited.values())
        if self._awaited and not uploading and (answered or now - self._digest_at > GRACE):
            self._judge(now)

    def _judge(self, now: float) -> None:
        """Compare states: hosts that differ from the anchor fetch its state."""
        found = ((self._roster.get(session), digest) for session, digest in self._awaited.items())
        digests = {host: digest for host, digest in found if host is not None and digest is not None}
        self._awaited = {}
        anchor = self.anchor
        if anchor not in digests:
            return
        alike = {host: digest for host, digest in digests.items() if host.kind == anchor.kind}
        votes = Counter(alike.values())
        right = max(votes, key=lambda digest: (votes[digest], digest == digests[anchor]))
        if digests[anchor] != right:
            self._anchor = next(host.session for host, digest in alike.items() if digest == right)
            self._checkpoint_at = -math.inf  # the newest snapshot is to be a right one
        self._emit(RecordDigest(self._digest_step, right))
        kept = bool(self.snapshots) and self.snapshots[-1].step == self._digest_step
        for host, digest in digests.items():
            if digest == right:
                host.resyncs = 0
            elif host.kind != anchor.kind:
                # Other hardware rounds differently, which is no fault; so it never drifts far.
                host.resync = kept
            else:
                host.resyncs += 1
                if host.resyncs >= STRIKES:
                    self._put_aside(host, "its state differs from the others' again and again", now)
                else:
                    step = self._digest_step
                    self._emit(Tell(f"the state of {host.name} differs at step {step}; it fetches the anchor's"))
                    host.resync = True
