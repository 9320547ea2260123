"""Audits: the side tasks that hosts do beside the steps (digests, checkpoints, held-out loss), and their judgement.

Hosts do side tasks when a step opens. One of them, the reference host, sends its state. It is kept as the checkpoint if
its digest is the one for which the most owners vote.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from esjax.config.reward import MOST_HELD_OUT
from esjax.config.settings import Config
from esjax.data.delivery import hash_bytes
from esjax.hosts.coordination.registry import STRIKES, Host, Registry
from esjax.hosts.coordination.votes import choose_reference, decide
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Outbox, RecordDigest, Snapshot, Store

GRACE = 30.0
"""Seconds to wait for the next digest, or the next part of a snapshot."""

PATIENCE = 300.0
"""Seconds to wait for a held-out loss, beside the time limits of a reward on all held-out prompts."""


class Plan(NamedTuple):
    """The side tasks of a step, see `wire.Step`."""

    digest: bool = False
    upload: int | None = None
    measure: int | None = None


NOTHING_ELSE = Plan()


class Measurement(NamedTuple):
    """What a host measured last; None: not known.

    Attributes:
        held_out: Held-out loss, in nats per token if the loss is not custom.
        greedy_reward: See `esjax.rewards.held_out.HeldOutRewards`.
        pass_at_k: See there.
    """

    held_out: float | None = None
    greedy_reward: float | None = None
    pass_at_k: float | None = None


class _Audit:
    """The digests of all hosts at one step, and the state of one of them, while they arrive."""

    def __init__(self, step: int, hosts: list[Host], uploader: Host | None, now: float) -> None:
        self.step, self.heard_at = step, now
        self.digests: dict[Host, str | None] = dict.fromkeys(hosts)
        self.uploader = uploader
        self.data = bytearray()
        self.digest = ""
        self.snapshot: Snapshot | None = None

    @property
    def awaits_state(self) -> bool:
        return self.uploader is not None and self.snapshot is None


class _Measuring(NamedTuple):
    """A measurement of the held-out loss that is not finished."""

    host: Host
    step: int
    since: float


class Audits:
    """State machine of the audits.

    Attributes:
        measured: The last measurement.
        measure_seconds: Time that this measurement took.
        reference: The reference host, or None.
        snapshots: The newest states for hosts that join, the newest last; at most two.
    """

    def __init__(
        self,
        config: Config,
        registry: Registry,
        state_bytes: int,
        snapshot: Snapshot | None,
        out: Outbox,
        put_aside: Callable[[Host, str], None],
        resync: Callable[[Host, bool], None],
        *,
        now: float,
        is_on: bool,
        measured: bool,
        trusted: str | None,
    ) -> None:
        """Set up with the newest state, if there is one; for `measured` and `trusted` see `Coordinator`.

        `put_aside` gives a host no more work; it is called with the host and the reason. `resync` lets a host fetch the
        newest state; it is called with the host and whether its state is wrong. Hosts get side tasks only if `is_on`.
        """
        self.measured = Measurement()
        self.measure_seconds = 0.0
        self.reference: Host | None = None
        self.snapshots = [snapshot] if snapshot else []
        self._config, self._registry, self._state_bytes, self._is_on = config, registry, state_bytes, is_on
        self._trusted = trusted
        self._out, self._put_aside, self._resync = out, put_aside, resync
        self._round: _Audit | None = None
        self._compared_step = self._kept_step = snapshot.step if snapshot else 0
        self._checkpoint_at = now + config.checkpoint_time
        self._storing: Host | None = None  # uploader of the state that is being stored
        self._failed_step = -1  # of the last state that could not be stored
        self._drifted: list[Host] = []  # hosts that fetch the state once it is stored
        self._disputing: set[Host] = set()  # hosts that fetched the state because of a tie
        self._is_unconfirmed = self._is_said = False  # the last state that was to be stored, and whether that is known
        self._measuring: _Measuring | None = None
        self._reward_seconds = MOST_HELD_OUT * config.reward_seconds
        self._measured_step = -1
        self._measure_at = now + config.evaluate_time if measured else now

    @property
    def under_way(self) -> bool:
        """Whether an answer is still missing, or a state is being stored."""
        return any(one is not None for one in (self._round, self._measuring, self._storing))

    def is_measuring(self, host: Host) -> bool:
        """Return whether a host is measuring the held-out loss."""
        return self._measuring is not None and self._measuring.host is host

    def delay(self, now: float) -> float:
        """Return the seconds of a measurement: those of the last one, or with rewards of this one so far if longer."""
        so_far = now - self._measuring.since if self._measuring and self._reward_seconds else 0.0
        return max(self.measure_seconds, so_far)

    def plan(self, step: int, now: float, last: bool = False) -> Plan:
        """Choose the side tasks of a step; in the `last` one, checkpoint and held-out loss are due."""
        hosts = self._registry.workers(now)
        reference = self.reference = choose_reference(self.reference, hosts, self._trusted)
        if reference is None or not self._is_on:
            return NOTHING_ELSE
        digest, upload, measure = False, False, False
        if last:
            upload = self._storing is None and step not in (self._kept_step, self._failed_step)
            measure = self._measured_step != step
        else:
            measure = self._measuring is None and now >= self._measure_at
            if self._round is None:
                upload = now >= self._checkpoint_at and self._storing is None
                digest = step - self._compared_step >= self._config.hosts.digest_interval
        if digest or upload:
            self._round = _Audit(step, hosts, reference if upload else None, now)
            self._compared_step = step
        if upload:
            self._checkpoint_at = now + self._config.checkpoint_time
        if measure:
            self._measuring = _Measuring(reference, step, now)
        return Plan(digest or upload, reference.slot if upload else None, reference.slot if measure else None)

    def owed(self, host: Host, step: int) -> list[wire.SideTask]:
        """List the side tasks that a host has not finished at this step."""
        owed: list[wire.SideTask] = []
        if self._round and self._round.step == step:
            if self._round.digests.get(host, "") is None:
                owed.append("digest")
            if self._round.uploader is host and self._round.awaits_state:
                owed.append("upload")
        if self.is_measuring(host):
            owed.append("measure")
        return owed

    def let_go(self, host: Host) -> None:
        """Wait no longer for answers of a host."""
        self._disputing.discard(host)
        if self.reference is host:
            self.reference = None
        if self.is_measuring(host):
            self._measuring = None
            self._measure_at = -math.inf
        if self._round and (host.aside or self._round.digests.get(host, "") is None):
            self._round.digests.pop(host, None)
        if self._round and self._round.uploader is host and self._round.awaits_state:
            self._give_up_state(self._round)

    def take_digest(self, host: Host, message: wire.Digest, now: float) -> None:
        """Store the digest of a host's state."""
        if self._round and message.step == self._round.step and host in self._round.digests:
            self._round.digests[host] = host.digest = message.digest
            self._round.heard_at = now

    def take_measure(self, host: Host, message: wire.Measured, now: float) -> None:
        """Store a measurement; it is of a later step if the request for it reached the host late."""
        if self._measuring and self.is_measuring(host) and message.step >= self._measuring.step:
            self.measure_seconds = now - self._measuring.since
            self._measuring = None
            self._measured_step = message.step
            self._measure_at = now + self._config.evaluate_time
            found = (message.held_out, message.greedy_reward, message.pass_at_k)
            self.measured = Measurement(*(one if one is not None and math.isfinite(one) else None for one in found))

    def take_part(self, host: Host, message: wire.Upload, body: bytes, now: float) -> str:
        """Store a part of a snapshot; return why it is rejected, or ""."""
        round = self._round
        if round is None or round.uploader is not host or message.step != round.step:
            return "this snapshot was not asked for"
        if message.size != self._state_bytes:
            return f"a snapshot of {message.size} bytes, not {self._state_bytes}"
        if not 0 < len(body) <= min(wire.PART, message.size - message.offset):
            return "a part of a snapshot of the wrong size"
        if message.digest != round.digest and message.offset == 0 and round.awaits_state:
            round.data.clear()
            round.digest = message.digest
        if message.digest != round.digest or message.offset > len(round.data):
            return "the parts of this snapshot do not fit together"
        if message.offset < len(round.data) or not round.awaits_state:  # received before
            return ""
        round.heard_at = now
        round.data += body
        if len(round.data) == message.size:
            data = bytes(round.data)
            round.data.clear()
            if hash_bytes(data) == message.digest:
                round.snapshot = Snapshot(message.step, data, message.digest)
            else:
                self._out.tell(f"the snapshot of {host.name} arrived damaged; another one is requested")
                self._give_up_state(round)
        return ""

    def stored(self, snapshot: Snapshot) -> None:
        """Offer a snapshot to hosts; called when it is written as a checkpoint."""
        self.snapshots = [*self.snapshots[-1:], snapshot]
        self._storing, self._kept_step = None, snapshot.step
        for host in self._drifted:
            if not host.dropped:  # its slot may be another's by now
                self._resync(host, False)
        self._drifted = []

    def not_stored(self, snapshot: Snapshot) -> None:
        """Note that a snapshot could not be written: the next one is asked for when it is due."""
        self._storing, self._failed_step = None, snapshot.step

    def is_false(self, snapshot: Snapshot) -> None:
        """Put the host aside that sent a snapshot, which is not the state of its digest, and ask for another one."""
        liar, self._storing = self._storing, None
        self._checkpoint_at = -math.inf
        if liar:
            self._put_aside(liar, f"it sent another state of step {snapshot.step} than its digest names")

    def check(self, now: float) -> None:
        """Judge the states when all answers are in, and stop waiting for late ones."""
        if self._measuring and now - self._measuring.since > PATIENCE + self._reward_seconds:
            self._give_up_on(self._measuring.host, "held-out loss")
            self._measuring = None
        round = self._round
        if round is None:
            return
        is_late = now - round.heard_at > GRACE
        if is_late and round.uploader and round.awaits_state:
            self._give_up_on(round.uploader, "state")
            self._give_up_state(round)
        if is_late or not (round.awaits_state or None in round.digests.values()):
            self._round = None
            self._judge(round)

    def _give_up_state(self, round: _Audit) -> None:
        round.uploader = None
        self._checkpoint_at = -math.inf

    def _give_up_on(self, host: Host, what: str) -> None:
        """Choose another reference host, until this host makes progress again."""
        host.hung = True
        self._out.tell(f"{host.name} sent no {what} in time; another host is asked")

    def _judge(self, round: _Audit) -> None:
        """Compare the digests: keep the right state, and let hosts with another state fetch it."""
        digests = {host: digest for host, digest in round.digests.items() if digest is not None}
        if not digests:
            if round.snapshot:
                self._checkpoint_at = -math.inf
            return
        reference = self.reference if self.reference in digests else next(iter(digests))
        preferred = {reference: digests[reference], **digests}
        is_alone = self._registry.has_one_owner
        right, is_confirmed = decide(preferred, reference.kind, self._trusted, is_alone=is_alone)
        if is_confirmed:
            self._out.add(RecordDigest(round.step, right))
        kept = round.uploader is not None and digests.get(round.uploader) == right
        if round.snapshot and kept:
            self._store(round, round.snapshot, right, is_confirmed)
        elif round.snapshot:
            self._checkpoint_at = -math.inf if right else self._checkpoint_at
        if not right:
            self._settle_dispute([host for host in digests if host.kind == reference.kind], round.step)
            return
        self._disputing.clear()
        for host, digest in digests.items():
            if digest == right:
                host.resyncs = 0
            elif host.kind == reference.kind:
                self._astray(host, round.step)
            elif kept:
                # Other hardware rounds differently, which is not a fault; a new state now and then limits the drift.
                self._drifted.append(host)

    def _store(self, round: _Audit, snapshot: Snapshot, right: str, is_confirmed: bool) -> None:
        self._storing, self._drifted = round.uploader, []
        was_unconfirmed, self._is_unconfirmed = self._is_unconfirmed, not is_confirmed
        if is_confirmed:
            self._is_said = False
        # If all hosts of other tokens are still joining, the next state may be confirmed.
        elif not self._is_said and (was_unconfirmed or len({host.owner for host in round.digests}) > 1):
            self._is_said = True
            self._out.tell(
                f"the state of step {round.step} is kept unconfirmed: no host of another token has the same kind of "
                "hardware"
            )
        self._out.add(Store(snapshot, right, is_confirmed))

    def _settle_dispute(self, hosts: list[Host], step: int) -> None:
        """Let hosts whose owners disagree, as many for one digest as for another, fetch the newest kept state, once."""
        new = [host for host in hosts if host not in self._disputing]
        if not self._disputing:
            names = ", ".join(host.name for host in hosts)
            self._out.tell(
                f"the states of {names} differ at step {step}, and as many tokens have one as another: none is kept; "
                "see hosts.trusted_token"
            )
        for host in new:
            self._disputing.add(host)
            self._resync(host, True)

    def _astray(self, host: Host, step: int) -> None:
        """Let a host fetch the right state, or put it aside after `STRIKES` wrong states in a row."""
        host.resyncs += 1
        if host.resyncs >= STRIKES:
            self._put_aside(host, "its state differs from the others' again and again")
            return
        self._out.tell(f"the state of {host.name} differs at step {step}; it fetches the newest kept state")
        if self.reference is host:
            self.reference = None
        self._resync(host, True)
