"""The coordinator as a state machine: requests and the time in; replies and effects out.

It leases pairs, takes in losses, shapes them into an update, and keeps account of the hosts. It touches no weight, and
knows no clock, socket or file: the caller hands in `now` in seconds of a clock that never jumps, and carries out the
effects in their order, so that an update is in the ledger before anybody hears of it.
"""

import math
from collections import Counter
from collections.abc import Callable

import numpy as np

from esjax.config import Config, to_yaml
from esjax.data.delivery import PackedText
from esjax.fitness import shape
from esjax.hosts import wire
from esjax.hosts.effects import Closed, Effect, History, Publish, Record, Snapshot, Tell, Terms, hash_bytes
from esjax.hosts.roster import FORGET, MAX_HOSTS, SILENT, STRIKES, Host, Roster
from esjax.hosts.rounds import GRACE, NOTHING_ELSE, Plan, Rounds
from esjax.hosts.wire import Envelope, Message
from esjax.hosts.work import FixedPopulation, TimeBudget, Work

PULSE = 2.0
"""Seconds between signs of life."""

STUCK = 30.0
"""Seconds with work and without progress after which a host counts as hung, unless the others are as slow."""

DEADLINE_FLOOR = 1.0
"""Seconds that every host gets for its pairs at least."""

DEADLINE_FACTOR = 3.0
"""How many times as long as the others a host may take."""


class Coordinator:
    """The state machine.

    Attributes:
        step: Step that is being scored: so many updates were made.
        terms: What the run asks of every host.
        counters: How often something was turned down, by reason.
        gradient_norm: Norm of the last estimate that the anchor told, or NaN.
        update_norm: Norm of the last update that the anchor told, or NaN.
        rounds: Checkpoints, digests and evaluations.
        finished: Whether everything was said and done after `stop`.
    """

    def __init__(
        self,
        config: Config,
        terms: Terms,
        *,
        step: int,
        now: float,
        rng: np.random.Generator,
        text: PackedText,
        snapshot: Snapshot | None = None,
        history: History | None = None,
        last_update: bytes = b"",
        block: Callable[[int], bytes] | None = None,
        with_rounds: bool = True,
    ) -> None:
        """Begin, or begin again, at a step.

        Args:
            config: Settings.
            terms: What the run asks of every host.
            step: Updates made so far.
            now: Seconds of a clock that never jumps.
            rng: Draws session numbers, and which pairs are scored twice.
            text: The text as it is sent.
            snapshot: Newest state, for hosts that join.
            history: The updates so far, for hosts that missed some.
            last_update: The last one, to be published once more: it may never have left the coordinator before.
            block: Gives a block of tokens as bytes, if the text is sent in blocks.
            with_rounds: Whether to ask hosts for checkpoints, digests and evaluations.
        """
        self.config, self.terms, self.step = config, terms, step
        self.counters: Counter[str] = Counter()
        self.gradient_norm = self.update_norm = math.nan
        self.finished = False
        self._rng = rng
        self._text = text
        self._history = history
        self._block = block
        self._last_update = last_update
        self._with_rounds = with_rounds
        self._effects: list[Effect] = []
        self._roster = Roster()
        self.rounds = Rounds(config, self._roster, terms.state_bytes, snapshot, self._emit, self._put_aside, now)
        self._work: Work = self._new_work()
        self._pulse_at = now
        self._closed_at: float | None = None
        self._rate = 0.0
        self._loss: float | None = None
        self._paused = True
        self._stopping: bool | None = None  # whether training has ended
        self._stop_at = math.inf

    # What the shell calls.

    def receive(self, envelope: Envelope, now: float, key: str | None = None) -> Envelope:
        """Take in a request.

        Args:
            envelope: The request.
            now: The time.
            key: Public key that the sender proved to have, if connections are encrypted.

        Returns:
            The one reply.
        """
        message = envelope.message
        if isinstance(message, wire.AskStatus):
            return Envelope(self.status(now))
        if isinstance(message, wire.Join):
            return Envelope(self._join(message, key, now))
        host = self._roster.get(getattr(message, "session", -1))
        if host is None or host.key != key:
            return Envelope(self._rejected("the session has ended", rejoin=True))
        if host.superseded:
            return Envelope(wire.Refused(f"another host joined as {host.name!r}; give each host a --name of its own"))
        if host.aside:
            return Envelope(wire.Refused(f"put aside: {host.aside}"))
        host.seen = now
        reply = _HANDLERS[type(message)](self, host, message, envelope.body, now)
        return reply if isinstance(reply, Envelope) else Envelope(reply)

    def refuse_version(self, version: int) -> Envelope:
        """Answer a host of another version of the protocol."""
        self.counters["other protocol version"] += 1
        return Envelope(
            wire.Refused(
                f"this host speaks version {version} of the protocol, the coordinator {wire.VERSION}; install the "
                "same esjax on both"
            )
        )

    def refuse_key(self, key: str | None, now: float) -> Envelope:
        """Answer a host whose key was revoked, and drop every host that has it."""
        self.counters["revoked key"] += 1
        for host in self._roster:
            if host.key == key:
                self._tell(f"{host.name} is dropped: its key was revoked")
                self._let_go(host)
                self._forget(host)
        return Envelope(wire.Refused("the key of this host was revoked; ask for a new token"))

    def tick(self, now: float) -> None:
        """Let time pass: notice who is silent, hung or late."""
        for host in self._roster:
            if now - host.seen >= FORGET:
                self._forget(host)
            elif now - host.seen >= SILENT and host.phase != "leaving":
                self._tell(f"{host.name} is lost: no word from it for {SILENT:.0f} s")
                self._let_go(host)
            elif self._work.busy(host.slot):
                self._check_deadline(host, now)
        self._give_out(now)
        self._close_if_complete(now)
        self.rounds.check(now)
        if self._stopping is not None and (not self.rounds.under_way or now >= self._stop_at):
            self._finish()
        if now >= self._pulse_at:
            self._pulse_at = now + PULSE
            self._publish(wire.Pulse(self.terms.run, self.terms.epoch, self.step))

    def drain(self) -> list[Effect]:
        """Return what is to be done, in this order, since the last call."""
        effects, self._effects = self._effects, []
        return effects

    def stop(self, now: float, done: bool) -> None:
        """End: with a last checkpoint, a last evaluation and a goodbye.

        The step under way is given up; it is done again by whoever resumes the run.

        Args:
            now: The time.
            done: Whether training has ended; if not, hosts wait for the coordinator to come back.
        """
        self._stopping, self._stop_at = done, now + 2 * GRACE
        for host in self._roster:
            self._work.release(host.slot)
        plan = self.rounds.plan(self.step, now, last=True) if self._with_rounds else NOTHING_ELSE
        self._publish(self._step_message([], plan))

    def status(self, now: float) -> wire.Status:
        """Say how things stand."""
        hosts = [host.status(now, 3 * PULSE) for host in self._roster if not host.superseded]
        anchor = self.rounds.anchor
        return wire.Status(
            run=self.terms.run,
            epoch=self.terms.epoch,
            step=self.step,
            loss=self._loss,
            held_out=self.rounds.held_out,
            member_tokens_per_second=self._rate,
            paused=self._paused,
            anchor=None if anchor is None else anchor.slot,
            hosts=sorted(hosts, key=lambda host: host.slot),
            counters=dict(self.counters),
        )

    # Requests.

    def _join(self, message: wire.Join, key: str | None, now: float) -> Message:
        terms = self.terms
        if message.run not in ("", terms.run):
            return wire.Refused(f"this is run {terms.run}, not {message.run}; start the host anew")
        noise = self.config.es.noise
        theirs, ours = dict(message.answers).get(noise), terms.answers.get(noise)
        if theirs != ours:
            self.counters["other noise"] += 1
            return wire.Refused(
                f"the {noise} noise of this host is {theirs}, the coordinator's is {ours}: another version or setting "
                "of JAX; install the same one, or use es.noise rademacher"
            )
        if dict(message.own) != terms.own:
            needed = ", ".join(f"{kind} {name}" for kind, name in sorted(terms.own.items())) or "no part of its own"
            return wire.Refused(f"the run has {needed}; join with the same")
        taken = self._roster.add(message, int(self._rng.integers(1, 2**63 - 1)), key, now)
        if taken is None:
            self.counters["too many hosts"] += 1
            return wire.Refused(f"{MAX_HOSTS} hosts are here already")
        former, host = taken.former, taken.host
        if former:
            if now - former.seen < SILENT and former.phase != "leaving":
                self._tell(f"two hosts are called {former.name}; the newer one counts")
            former.superseded = True
            self._let_go(former)
        self._tell(f"{host.name} joins: {host.device}")
        return wire.Welcome(
            run=terms.run,
            epoch=terms.epoch,
            session=host.session,
            slot=host.slot,
            config=to_yaml(self.config),
            vocab_size=terms.vocab_size,
            text_digest=self._text.digest,
            text_bytes=self._text.size,
            publish_port=terms.publish_port,
            step=self.step,
            unit=terms.unit,
            block_interval=self.config.data.new_tokens_interval if self._block else 0,
        )

    def _fetch(self, host: Host, message: wire.Fetch, body: bytes, now: float) -> Envelope | Message:
        host.made_progress(now)
        if message.what == "text":
            if message.digest != self._text.digest:
                return self._rejected("this run has another text")
            return _part(self._text.data, self._text.digest, message.offset)
        if message.what == "block":
            interval = self.config.data.new_tokens_interval
            if self._block is None or abs(message.block - self.step // interval) > 1:
                return self._rejected(f"there is no block {message.block} now")
            data = self._block(message.block)
            return _part(data, hash_bytes(data), message.offset, message.block)
        host.resync = False
        for snapshot in reversed(self.rounds.snapshots):
            if message.digest in ("", snapshot.digest):
                return _part(snapshot.data, snapshot.digest, message.offset, snapshot.step)
        return self._rejected("this snapshot is gone; take the newest")

    def _catch_up(self, host: Host, message: wire.CatchUp, body: bytes, now: float) -> Envelope | Message:
        host.made_progress(now)
        if self._history is None or not self._history.first <= message.step <= self.step:
            return wire.Ok(self.terms.epoch, self.step, [], "resync")
        updates = self._history.updates(message.step, wire.PART)
        return Envelope(wire.Updates(message.step, [len(update) for update in updates]), b"".join(updates))

    def _beat(self, host: Host, message: wire.Beat, body: bytes, now: float) -> Message:
        if message.epoch != self.terms.epoch:
            return self._rejected("an old epoch", rejoin=True)
        if message.progress > host.progress or message.phase != host.phase:
            host.made_progress(now)
        if message.phase != "ready":
            self._work.release(host.slot)
        host.progress, host.phase, host.step = message.progress, message.phase, min(message.step, self.step)
        if message.note and message.note != host.note:
            self._tell(f"{host.name}: {message.note}")
        host.note = message.note
        self._give_out(now)
        return self._ok(host)

    def _losses(self, host: Host, message: wire.Losses, body: bytes, now: float) -> Message:
        if message.epoch != self.terms.epoch:
            return self._rejected("an old epoch", rejoin=True)
        if message.step < self.step:
            self.counters["losses for an old step"] += 1
            return self._rejected(f"step {message.step} is closed")
        if message.step > self.step:
            return self._strike(host, f"losses for step {message.step}, which has not begun", now)
        pairs = sum(count for _, count in message.spans)
        losses = wire.losses_of(body, pairs) if message.dtype == "<f4" else None
        if losses is None:
            return self._strike(host, f"{len(body)} bytes of {message.dtype!r} for {pairs} pairs", now)
        if not 0 <= message.seconds < math.inf:
            return self._strike(host, f"losses after {message.seconds} s", now)
        was_busy = self._work.busy(host.slot)
        fault = self._work.accept(host.slot, message.spans, losses, message.final)
        if fault:
            return self._strike(host, fault, now)
        host.made_progress(now)
        host.step = self.step
        if pairs and message.seconds > 0:
            speed = pairs / message.seconds
            host.speed = speed if host.speed is None else 0.7 * host.speed + 0.3 * speed
        if was_busy and not self._work.busy(host.slot):
            host.finished_after = now - host.leased_at
            host.set_in_time()
        if host is self.rounds.anchor and message.gradient_norm is not None and message.update_norm is not None:
            self.gradient_norm, self.update_norm = message.gradient_norm, message.update_norm
        self._close_if_complete(now)
        return self._ok(host)

    def _digest(self, host: Host, message: wire.Digest, body: bytes, now: float) -> Message:
        host.made_progress(now)
        self.rounds.take_digest(host, message)
        return self._ok(host)

    def _measured(self, host: Host, message: wire.Measured, body: bytes, now: float) -> Message:
        host.made_progress(now)
        self.rounds.take_measure(host, message)
        return self._ok(host)

    def _uploaded(self, host: Host, message: wire.Upload, body: bytes, now: float) -> Message:
        host.made_progress(now)
        fault = self.rounds.take_part(host, message, body, now)
        return self._rejected(fault) if fault else self._ok(host)

    def _leave(self, host: Host, message: wire.Leave, body: bytes, now: float) -> Message:
        self._tell(f"{host.name} leaves" + (f": {message.reason}" if message.reason else ""))
        self._let_go(host)
        self._give_out(now)
        self._close_if_complete(now)
        return self._ok(host)

    def _ok(self, host: Host) -> wire.Ok:
        spans = self._work.open_spans(host.slot)[: wire.SPAN_LIMIT]
        return wire.Ok(self.terms.epoch, self.step, spans, "resync" if host.resync else "")

    def _rejected(self, reason: str, rejoin: bool = False) -> wire.Rejected:
        return wire.Rejected(reason[:1000], self.terms.epoch, self.step, rejoin)

    def _strike(self, host: Host, reason: str, now: float) -> wire.Rejected:
        self.counters["messages no honest host sends"] += 1
        host.strikes += 1
        if host.strikes >= STRIKES:
            self._put_aside(host, reason, now)
        return self._rejected(reason)

    # Hosts.

    def _check_deadline(self, host: Host, now: float) -> None:
        """Take its pairs from a host that is hung, or takes much longer than the others."""
        usual = self._roster.usual_time()
        idle = now - max(host.progress_at, host.leased_at)
        if idle > max(STUCK, DEADLINE_FACTOR * (usual or 0.0)):
            host.hung = True
            self._tell(f"{host.name} is hung: no progress for {idle:.0f} s")
            self._work.release(host.slot)
            return
        if usual is None:
            return
        budget = self.config.es.time_per_step
        if budget is None:
            allowed = max(DEADLINE_FLOOR, DEADLINE_FACTOR * usual)
        else:
            allowed = budget + max(budget, DEADLINE_FLOOR) / 2
        if now - host.leased_at > allowed:
            host.set_late(now)
            self._work.release(host.slot)

    def _let_go(self, host: Host) -> None:
        """Take a host's work from it; its name stays listed for a while."""
        host.phase = "leaving"
        self._work.release(host.slot)
        self.rounds.let_go(host)

    def _forget(self, host: Host) -> None:
        # A slot may go to another host only when nothing in this step came from the old one.
        if not self._work.count(host.slot):
            self._roster.remove(host)

    def _put_aside(self, host: Host, reason: str, now: float) -> None:
        host.aside = reason
        self._tell(f"{host.name} is put aside: {reason}")
        self._let_go(host)

    # The step.

    def _new_work(self) -> Work:
        es = self.config.es
        if es.time_per_step is not None:
            return TimeBudget()
        pairs = es.population_size // 2
        units = -(-pairs // self.terms.unit)
        share = self.config.hosts.spot_check
        checked = np.flatnonzero(self._rng.random(units) < share).tolist() if share else []
        return FixedPopulation(pairs, self.terms.unit, checked)

    def _give_out(self, now: float) -> None:
        """Give out pairs that nobody is at, to whoever is there."""
        if self._stopping is not None:
            return
        speeds = self._roster.speeds(now)
        paused, self._paused = self._paused, not speeds
        if self._paused and not paused:
            self._tell("no host is ready; everything is kept, and training goes on when one joins")
        leases = self._lease(speeds, now) if self._work.waits else []
        if leases and self._last_update:
            self._publish(self._step_message(leases), self._last_update)
            self._last_update = b""
        elif leases:
            self._publish(wire.Extra(self.terms.run, self.terms.epoch, self.step, leases))

    def _lease(self, speeds: dict[int, float], now: float) -> list[tuple[int, int, int]]:
        leases = self._work.lease(speeds)
        for slot in {lease.slot for lease in leases}:
            host = self._roster.in_slot(slot)
            assert host is not None
            host.leased_at, host.finished_after = now, None
        return [(lease.slot, lease.first, lease.pairs) for lease in leases]

    def _close_if_complete(self, now: float) -> None:
        if not self._work.complete or self._stopping is not None:
            return
        anchor = self.rounds.anchor
        for slot in self._work.liars(anchor.slot if anchor else None):
            liar = self._roster.in_slot(slot)
            if liar and not liar.aside:
                self._put_aside(liar, "its losses differ from those of other hosts", now)
        spans, losses = self._work.result()
        for host in self._roster:
            host.share = self._work.count(host.slot) / len(losses)
        es, data = self.config.es, self.config.data
        if self._closed_at is not None:
            rate = losses.size * data.batch_size * data.window / max(now - self._closed_at, 1e-9)
            self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        self._closed_at = now
        shaped = shape(losses, es.shaping, es.sigma)
        finite = losses[np.isfinite(losses)]
        self._loss = float(finite.mean()) if finite.size else None
        weights = shaped.weights[:0] if shaped.trouble else shaped.weights
        header = wire.UpdateHeader(self.step, spans, shaped.scale, not shaped.trouble, self._loss, shaped.void_pairs)
        payload = wire.pack_update(wire.Update(header, weights))
        self._emit(Record(self.step, payload))
        self.step += 1
        self._work = self._new_work()
        plan = self.rounds.plan(self.step, now) if self._with_rounds else NOTHING_ELSE
        self._publish(self._step_message(self._lease(self._roster.speeds(now), now), plan), payload)
        loss = math.nan if self._loss is None else self._loss
        self._emit(Closed(self.step, loss, losses.size, shaped.void_pairs, shaped.trouble))

    def _step_message(self, leases: list[tuple[int, int, int]], plan: Plan = NOTHING_ELSE) -> wire.Step:
        budget = self.config.es.time_per_step
        return wire.Step(self.terms.run, self.terms.epoch, self.step, leases, budget, *plan)

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._publish(wire.Bye(self.terms.run, self.terms.epoch, bool(self._stopping)))

    def _publish(self, message: Message, body: bytes = b"") -> None:
        self._emit(Publish(Envelope(message, body)))

    def _tell(self, line: str) -> None:
        self._emit(Tell(line))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)


def _part(data: bytes, digest: str, offset: int, step: int = 0) -> Envelope:
    return Envelope(wire.Part(digest, len(data), offset, step), data[offset : offset + wire.PART])


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
