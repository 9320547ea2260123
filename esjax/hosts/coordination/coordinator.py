"""The coordinator as a state machine: it takes requests and the time, and returns replies and actions.

It answers hosts and tracks them; `steps.py` and `audits.py` hold its other parts. It holds no parameters, and uses no
clock, socket or file: the caller passes `now`, in seconds of a monotonic clock, and carries out the actions in their
order, so that an update is in the ledger before any host receives it.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import numpy as np

from esjax.config.settings import Config, to_yaml
from esjax.data.delivery import PackedText
from esjax.exchange import update_record
from esjax.exchange.update_record import pair_count
from esjax.hosts.coordination.admission import Admission
from esjax.hosts.coordination.audits import GRACE, NOTHING_ELSE, Audits
from esjax.hosts.coordination.inspector import Inspector
from esjax.hosts.coordination.registry import FORGET, SILENT, STRIKES, Host, Registry
from esjax.hosts.coordination.steps import Steps
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Action, History, Outbox, Snapshot, Terms
from esjax.hosts.protocol.transfers import Downloads
from esjax.hosts.protocol.wire import Envelope, Message

PULSE = 2.0
"""Seconds between pulses, the coordinator's signs of life."""

LAST_ROUND = 2 * GRACE
"""Seconds that hosts have for the last checkpoint and the last held-out loss; if it took long before, twice that."""


class Coordinator:
    """The state machine of the coordinator.

    Attributes:
        terms: What is fixed for all hosts of the run.
        counters: Number of rejected requests, by reason.
        gradient_norm: Norm of the last estimate, as the reference host reported it, or NaN.
        update_norm: Norm of the last update, as the reference host reported it, or NaN.
        audits: Checkpoints, digests and held-out losses.
        finished: Whether the goodbye was sent after `stop`.
    """

    def __init__(
        self,
        config: Config,
        terms: Terms,
        *,
        step: int,  # updates made so far
        now: float,
        rng: np.random.Generator,  # draws session numbers, and by a generator of its own the spot checks
        text: PackedText,
        snapshot: Snapshot | None = None,  # the newest state, for hosts that join
        history: History | None = None,  # the recorded updates, for hosts that missed some
        last_update: bytes = b"",  # published again: the coordinator may have died before it did so
        block: Callable[[int], bytes] | None = None,  # token blocks by number. None: the text holds all tokens
        with_audits: bool = True,  # whether hosts get side tasks
        measured: bool = False,  # whether the run has a held-out loss already
        trusted: str | None = None,  # public key of the token `hosts.trusted_token`
    ) -> None:
        """Start at a step of a new or resumed run."""
        self.config, self.terms = config, terms
        self.counters: Counter[str] = Counter()
        self.gradient_norm = self.update_norm = math.nan
        self.finished = False
        self._rng = rng
        self._settings = to_yaml(config)
        starts_from_disk = config.init is not None and not config.hosts.send_init
        self._downloads = Downloads(text, block, config.data.new_tokens_interval, history, starts_from_disk)
        self._out = Outbox()
        self._registry = registry = Registry(now)
        self.audits = Audits(
            config,
            registry,
            terms.state_bytes,
            snapshot,
            self._out,
            self._put_aside,
            self._resync,
            now=now,
            is_on=with_audits,
            measured=measured,
            trusted=trusted,
        )
        self._steps = Steps(
            config, terms, step, last_update, rng, registry, self.audits, self._out, self._put_aside, trusted
        )
        self._admission = Admission(config, terms, registry, self._make_room)
        self._pulse_at = now
        self.paused = True
        self._first = step
        self._stopping: bool | None = None  # whether training has ended
        self._stop_at = now  # until then the last audits may take

    # What the server loop calls.

    @property
    def step(self) -> int:
        """Step that is being scored, which is the number of updates made."""
        return self._steps.step

    @property
    def inspector(self) -> Inspector:
        """The spot checks."""
        return self._steps.inspector

    def receive(self, envelope: Envelope, now: float, key: str | None = None, peer: bytes = b"") -> Envelope:
        """Return the reply to a request.

        Args:
            envelope: The request.
            now: The time.
            key: Public key of the sender. None: no encryption.
            peer: The sender's connection, see `disconnected`.
        """
        self._registry.now, message = now, envelope.message
        if isinstance(message, wire.AskStatus):
            return Envelope(self.status(now))
        if isinstance(message, wire.Join):
            return Envelope(self._join(message, key, peer, now))
        host = self._registry.get(getattr(message, "session", -1))
        if host is None or host.dropped or host.key != key:
            return Envelope(self._rejected("the session has ended", rejoin=True))
        if host.superseded:
            return self._refused(f"another host joined as {host.name!r}; give each host a different --name")
        if host.aside:
            return self._refused(f"put aside: {host.aside}")
        host.seen, host.peer = now, peer
        reply = _HANDLERS[type(message)](self, host, message, envelope.body, now)
        return reply if isinstance(reply, Envelope) else Envelope(reply)

    def refuse_version(self, version: int) -> Envelope:
        """Answer a host of another version of the protocol."""
        self.counters["other protocol version"] += 1
        return self._refused(
            f"this host speaks version {version} of the protocol, the coordinator {wire.VERSION}; install the same "
            "esjax on both"
        )

    def refuse_key(self, key: str | None, now: float) -> Envelope:
        """Answer a host whose key was revoked, and drop all hosts with this key."""
        self.counters["revoked key"] += 1
        self._registry.now = now
        for host in self._registry:
            if host.key == key and not host.dropped:
                self._out.tell(f"{host.name} is dropped: its key was revoked")
                self._drop(host)
        return self._refused("the key of this host was revoked; ask for a new token")

    def disconnected(self, peers: Collection[bytes], now: float) -> None:
        """Give the pairs of hosts whose connections were closed to others; a host is back with its next beat."""
        self._registry.now = now
        for host in self._registry if peers else ():
            if host.peer in peers and not host.is_gone:
                self._out.tell(f"{host.name} is lost: its connection was closed")
                self._let_go(host)
        self._steps.go_on(now)

    def tick(self, now: float) -> None:
        """Do what is due at this time: find silent, hung and late hosts, check audits, send a pulse."""
        self._registry.now = now
        for host in self._registry:
            if host.dropped or now - host.seen >= FORGET:
                self._drop(host)
            elif now - host.seen >= SILENT and not host.is_gone:
                self._out.tell(f"{host.name} is lost: no word from it for {SILENT:.0f} s")
                self._let_go(host)
        self._notice_pause(now)
        self._steps.check(now)
        self._steps.go_on(now)
        self.audits.check(now)
        if self._stopping is not None and not self.finished:
            self._try_to_finish(now)
        if now >= self._pulse_at:
            self._pulse_at = now + PULSE
            self._out.publish(wire.Pulse(self.terms.run, self.terms.incarnation, self.step))

    def drain(self) -> list[Action]:
        """Return the actions since the last call, in the order in which to carry them out."""
        return self._out.drain()

    def stop(self, now: float, done: bool) -> None:
        """Begin to stop: a last checkpoint and a last held-out loss, if any step was done, and a goodbye.

        The open step is dropped; a resumed run scores it again. Unless training is done, hosts wait for a restart.
        """
        self._stopping = done
        self._steps.stop()
        if self.step > self._first:
            self._stop_at = now + max(LAST_ROUND, 2 * self.audits.measure_seconds)
            self._steps.announce(self.audits.plan(self.step, now, last=True))

    def status(self, now: float) -> wire.Status:
        """Return the status of the run and its hosts."""
        members = self.config.es.members_per_pair
        hosts = [
            host.status(now, 3 * PULSE, members) for host in self._registry if not (host.superseded or host.dropped)
        ]
        reference = self.audits.reference
        return wire.Status(
            run=self.terms.run,
            incarnation=self.terms.incarnation,
            step=self.step,
            loss=self._steps.loss,
            held_out=self.audits.measured.held_out,
            greedy_reward=self.audits.measured.greedy_reward,
            pass_at_k=self.audits.measured.pass_at_k,
            rewards=dict(self._steps.rewards),
            member_tokens_per_second=0.0 if self.paused else self._steps.rate,
            paused=self.paused,
            reference=None if reference is None else reference.slot,
            hosts=sorted(hosts, key=lambda host: host.slot),
            counters=dict(+self.counters),
        )

    # Requests.

    def _join(self, message: wire.Join, key: str | None, peer: bytes, now: float) -> Message:
        former = self._registry.called(message.name)
        if former and former.key == key and former.instance == message.instance:
            if message.attempt <= former.attempt:
                return self._rejected("an old request")
            self._drop(former)
            former = None
        objection = self._admission.objection(message, former, key, now)
        if objection:
            self.counters[objection.counter] += 1
            if not objection.wait:
                return self._refused(objection.reason).message
            return self._rejected(objection.reason, wait=objection.wait)
        if former:
            self._supersede(former, message)
        host = self._registry.add(message, int(self._rng.integers(1, 2**63 - 1)), key, peer, now)
        self._out.tell(f"{host.name} joins: {host.device}")
        terms, text = self.terms, self._downloads.text
        return wire.Welcome(
            run=terms.run,
            incarnation=terms.incarnation,
            session=host.session,
            slot=host.slot,
            config=self._settings,
            vocab_size=terms.vocab_size,
            text_digest=text.digest,
            text_bytes=text.size,
            state_bytes=terms.state_bytes,
            block_bytes=self._downloads.block_bytes(self.step),
            publish_port=terms.publish_port,
            step=self.step,
            quantum=terms.quantum,
            block_interval=self.config.data.new_tokens_interval,
            budget=self.config.es.time_per_step,
            vector_length=terms.exchange.vector_length,
        )

    def _fetch(self, host: Host, message: wire.Fetch, body: bytes, now: float) -> Envelope | Message:
        host.made_progress(now)
        part = self._downloads.part(message, self.step, self.audits.snapshots)
        if isinstance(part, str):
            return self._rejected(part)
        copy = len(self._downloads.text.data) + self.terms.state_bytes
        wait = (
            self._admission.ask(host, now)
            if message.what == "block"
            else self._admission.fetch(host, len(part.body), copy, now)
        )
        if wait:
            return self._above_quota(wait)
        if message.what == "state" and message.offset + len(part.body) == self.terms.state_bytes:
            host.has_fetched = True
        return part

    def _catch_up(self, host: Host, message: wire.CatchUp, body: bytes, now: float) -> Envelope | Message:
        host.made_progress(now)
        wait = self._admission.ask(host, now)
        if wait:
            return self._above_quota(wait)
        updates = self._downloads.updates(message.step, self.step, self.audits.snapshots)
        return updates or wire.Ok(self.terms.incarnation, self.step, [], resync=True)

    def _above_quota(self, wait: float) -> Message:
        self.counters["downloads above the quota of a token"] += 1
        return self._rejected("the hosts of this token fetch too much", wait=wait)

    def _beat(self, host: Host, message: wire.Beat, body: bytes, now: float) -> Message:
        if message.incarnation != self.terms.incarnation:
            return self._rejected("a message to an earlier start of the coordinator", rejoin=True)
        is_new = host.is_gone or message.phase != host.phase
        if message.progress > host.progress or is_new:
            host.made_progress(now)
        if message.phase != "ready":
            self._steps.release(host)
        host.progress, host.phase, host.step = message.progress, message.phase, min(message.step, self.step)
        host.is_gone = False
        if host.has_fetched and message.phase == "ready":
            host.resync = host.has_fetched = False
        if message.note and message.note != host.note:
            self._out.tell(f"{host.name}: {message.note}")
        host.note = message.note
        self._steps.go_on(now, is_new)
        return self._ok(host)

    def _losses(self, host: Host, message: wire.Losses, body: bytes, now: float) -> Message:
        if message.incarnation != self.terms.incarnation:
            return self._rejected("a message to an earlier start of the coordinator", rejoin=True)
        if message.step > self.step:
            return self._strike(host, f"losses for step {message.step}, which has not begun")
        pairs = pair_count(message.spans)
        values = self.terms.exchange.unpack(message.spans, message.dtype, body)
        if values is None:
            return self._strike(
                host, f"{len(body)} bytes of {message.dtype!r} for {pairs} pairs, or impossible numbers"
            )
        host.made_progress(now)
        if message.step < self.step:
            self.counters["losses for an old step"] += 1
            return self._rejected(f"step {message.step} is closed")
        if host.resync:
            return self._rejected("the state of this host is wrong; it must fetch the newest kept one first")
        is_new = not host.speed
        fault = self._steps.take(host, message, values, now)
        if fault:
            return self._strike(host, fault)
        host.step = self.step
        if host is self.audits.reference and message.gradient_norm is not None and message.update_norm is not None:
            self.gradient_norm, self.update_norm = message.gradient_norm, message.update_norm
        self._steps.go_on(now, is_new and host.speed > 0)  # it gets its share once its speed is known
        return self._ok(host)

    def _digest(self, host: Host, message: wire.Digest, body: bytes, now: float) -> Message:
        host.made_progress(now)
        self.audits.take_digest(host, message, now)
        self.audits.check(now)  # a host sends its digest before its losses, so a wrong state is found in time
        return self._ok(host)

    def _measured(self, host: Host, message: wire.Measured, body: bytes, now: float) -> Message:
        host.made_progress(now)
        if self.audits.is_measuring(host):
            host.leased_at = now  # the host begins to score only now
        self.audits.take_measure(host, message, now)
        return self._ok(host)

    def _uploaded(self, host: Host, message: wire.Upload, body: bytes, now: float) -> Message:
        host.made_progress(now)
        fault = self.audits.take_part(host, message, body, now)
        return self._rejected(fault) if fault else self._ok(host)

    def _leave(self, host: Host, message: wire.Leave, body: bytes, now: float) -> Message:
        self._out.tell(f"{host.name} leaves" + (f": {message.reason}" if message.reason else ""))
        self._drop(host)
        self._steps.go_on(now)
        return self._ok(host)

    def _ok(self, host: Host) -> wire.Ok:
        spans = self._steps.leases.open_spans(host.slot)[: update_record.SPAN_LIMIT]
        must_fetch = host.resync and not host.has_fetched
        return wire.Ok(self.terms.incarnation, self.step, spans, self.audits.owed(host, self.step), must_fetch)

    def _rejected(self, reason: str, rejoin: bool = False, wait: float = 0.0) -> wire.Rejected:
        return wire.Rejected(reason[:1000], self.terms.incarnation, self.step, rejoin, wait)

    def _refused(self, reason: str) -> Envelope:
        return Envelope(wire.Refused(reason[:1000]))

    def _strike(self, host: Host, reason: str) -> wire.Rejected:
        self.counters["messages no honest host sends"] += 1
        host.strikes += 1
        if host.strikes >= STRIKES:
            self._put_aside(host, reason)
        return self._rejected(reason)

    # Hosts.

    def _make_room(self, hosts: Sequence[Host]) -> bool:
        """End the session of the host that was lost first, so that another may join; return False if none is lost."""
        lost = [host for host in hosts if host.is_gone and not self._steps.leases.took_part(host.slot)]
        if lost:
            self._drop(min(lost, key=lambda host: host.seen))
        return bool(lost)

    def _supersede(self, former: Host, message: wire.Join) -> None:
        """Replace a former host by a newer one of the same name."""
        for host in self._registry:
            if host.superseded and host.name == former.name:
                self._drop(host)
        if former.seen > former.joined_at and not former.is_gone:
            self._out.tell(f"two hosts are called {former.name}; the newer one counts")
        former.superseded = True
        self._let_go(former)

    def _let_go(self, host: Host) -> None:
        """Take all work from a host; it stays listed until its session ends."""
        host.is_gone = True
        self._steps.release(host)
        self.audits.let_go(host)

    def _drop(self, host: Host) -> None:
        """End a host's session."""
        host.dropped = True
        self._let_go(host)
        # The slot must stay taken while values of this step came from it.
        if not self._steps.leases.took_part(host.slot):
            self._registry.remove(host)

    def _put_aside(self, host: Host, reason: str) -> None:
        host.aside = reason
        if self._registry.has_others(host.owner):  # else no host could take its place
            self._admission.exclude(host, reason)
        self._out.tell(f"{host.name} is put aside: {reason}")
        if not host.dropped:  # its slot may be another's by now
            self._let_go(host)

    def _resync(self, host: Host, is_wrong: bool) -> None:
        """Let a host fetch the newest snapshot, and take its pairs; if it is wrong, its past losses do not count."""
        host.resync, host.has_fetched = True, False
        if is_wrong:
            self._steps.leases.revoke(host.slot)
        else:
            self._steps.leases.release(host.slot)

    def _notice_pause(self, now: float) -> None:
        before, self.paused = self.paused, not self._registry.has_worker(now)
        if self.paused and not before:
            self._out.tell("no host is ready; training is paused until one joins, and nothing is lost")

    # The end.

    def _try_to_finish(self, now: float) -> None:
        """Send the goodbye when the last audit is done; repeat its requests to another host if one was lost."""
        if now < self._stop_at:
            if self.audits.under_way:
                return
            plan = self.audits.plan(self.step, now, last=True)
            if plan != NOTHING_ELSE:
                self._steps.announce(plan)
                return
        self.finished = True
        self._out.publish(wire.Bye(self.terms.run, self.terms.incarnation, bool(self._stopping)))


_HANDLERS: dict[type[Message], Callable[..., Envelope | Message]] = {
    wire.Fetch: Coordinator._fetch,
    wire.CatchUp: Coordinator._catch_up,
    wire.Beat: Coordinator._beat,
    wire.Losses: Coordinator._losses,
    wire.Digest: Coordinator._digest,
    wire.Measured: Coordinator._measured,
    wire.Upload: Coordinator._uploaded,
    wire.Leave: Coordinator._leave,
}
