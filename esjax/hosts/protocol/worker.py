"""A host as a state machine: it takes messages, results of its devices and the time; it returns requests and tasks.

It uses no clock, socket or device: the caller passes `now`, in seconds of a monotonic clock, sends what `request`
returns, and lets the devices run what `task` returns; one of each at a time.
"""

import math
from collections.abc import Callable

from esjax.averages import running_speed
from esjax.exchange.update_record import pair_count
from esjax.exchange.values import make_exchange
from esjax.hosts.protocol import scoring, tasks, wire
from esjax.hosts.protocol.request_channel import Joining, RequestChannel
from esjax.hosts.protocol.scoring import Scoring
from esjax.hosts.protocol.transfers import Backlog, Download, Supplies, longest_text
from esjax.hosts.protocol.wire import Envelope, Message, SideTask
from esjax.texts import legible

BEAT = 2.0
"""Seconds between beats, a host's signs of life."""

MISSED = 0.3
"""Seconds to wait for a broadcast update before asking for it."""

BATCH = 64
"""Most updates in one device task."""


class Worker:
    """The state machine of a host.

    Attributes:
        name: Name of the host.
        phase: joining, compiling or ready.
        step: Step of the parameters; -1 without parameters.
        joined: The coordinator's reply that let the host join, or None.
        waiting: Why the coordinator lets the host wait before it joins, or "".
        refused: Why the coordinator refused the host for good, or "".
        failed: Why the devices failed, or "".
        leaving: Why the host is about to leave, or "".
        left: Whether the host has left after `leave`, or training has ended.
        run_ended: Whether training has ended for all hosts.
        coordinator_stopped: Whether the coordinator stopped and announced that it will restart.
        calls: Calls of a reward that have ended; the caller sets it. They are progress, also within a task.
    """

    _scoring: Scoring
    _knows_leases: bool

    def __init__(
        self,
        name: str,
        device: str,
        kind: str,
        known_answers: dict[str, str],
        custom: dict[str, str],
        *,
        now: float,
        jitter: Callable[[], float],
        built: bool = False,
        step: int = -1,
        text: str = "",
        device_batch: int = 1,
        flags: str = "",
    ) -> None:
        """Start as a host that has not joined. The arguments up to `custom` are those of `wire.Join`.

        `jitter` returns random numbers in [0, 1). If the replica is built already, `step` is that of its parameters,
        `text` the digest of its text, and `device_batch` the number of pairs that its devices score at a time. `flags`
        names the flags of JAX that the process sets.
        """
        self.name = name
        self.phase: wire.Phase = "joining"
        self.step = step
        self.joined: wire.Welcome | None = None
        self.waiting = self.refused = self.failed = self.leaving = ""
        self.left = self.run_ended = self.coordinator_stopped = False
        self.calls = 0
        hello = wire.Join(name[:128], device, kind, [*known_answers.items()], [*custom.items()], "", 0, 0, flags[:1000])
        self._joining = Joining(hello, jitter, now)
        self._built, self._device_batch, self._text = built, device_batch, text
        self._is_astray = False  # the coordinator reported that the state is wrong
        self._block: int | None = None
        self._note = ""
        self._progress = 0
        self._incarnation = 0  # the highest seen
        # The step that is being scored.
        self._newest, self._newest_at = step, now
        self._backlog = Backlog()
        self._begin_step()
        self._scored_for = self._scoring
        self._speed = 0.0
        self._norms: tuple[float | None, float | None] = (None, None)
        self._side_tasks = tasks.SideTasks()
        self._supplies = Supplies()
        # What is running, and when something is due.
        self._task: tasks.Task | None = None
        self._channel = RequestChannel(now)
        self._beat_at = self._fetch_at = now

    # What the caller uses.

    @property
    def silent_since(self) -> float:
        """Time of the coordinator's last message."""
        return self._channel.heard_at

    @property
    def reconnect(self) -> bool:
        """Whether the caller should reconnect, and then call `reconnected`."""
        return self._channel.is_dead

    def leave(self, reason: str) -> None:
        """Begin to leave: send what is scored, then a goodbye."""
        self.leaving = self.leaving or reason[:1000]

    def request(self, now: float) -> Envelope | None:
        """Return the next request, or None; it replaces one that got no reply."""
        if self.joined is None and self.leaving:
            self.left = True
        if self.refused or self.left or self._channel.is_waiting(now):
            return None
        request = self._channel.give_up(now)
        if request and self.joined is None:
            self._joining.put_off(now, self._channel.failures)
            request = None
        request = request or self._next_request(now)
        return self._channel.send(request, now) if request else None

    def receive(self, envelope: Envelope, now: float) -> None:
        """Process a reply or a broadcast."""
        message = envelope.message
        if isinstance(message, wire.Step | wire.Extra | wire.Pulse | wire.Bye):
            self._hear(message, envelope.body, now)
            return
        if getattr(message, "incarnation", self._incarnation) < self._incarnation:
            return  # from an earlier start of the coordinator
        sent = self._channel.take_reply(now)
        if sent is None:
            return
        self.coordinator_stopped = False
        if isinstance(message, wire.Refused):
            self.refused = legible(message.reason)
        elif isinstance(message, wire.Welcome):
            if isinstance(sent, wire.Join):
                self._welcome(message, now)
        elif isinstance(message, wire.Rejected):
            self._rejected(message, sent, now)
        elif isinstance(message, wire.Part):
            self._supplies.take(message, envelope.body, sent)
            self._settle()
        elif isinstance(message, wire.Updates):
            self._take_updates(message, envelope.body, sent, now)
        elif isinstance(message, wire.Ok):
            self._acknowledged(message, sent, now)

    def task(self) -> tasks.Task | None:
        """Return the next device task, or None; the caller passes its result to `finished`."""
        if self._task is not None or self.refused or self.left:
            return None
        self._task = self._next_task()
        return self._task

    def finished(self, result: tasks.Result, now: float) -> None:
        """Process the result of the device task."""
        task, self._task = self._task, None
        self._progress += 1
        if isinstance(result, tasks.Failed):
            self.failed = self._note = result.reason[:1000]
            self.leave(self.failed)
        elif isinstance(task, tasks.Build) and isinstance(result, tasks.Built):
            self._built, self._device_batch, self.step = True, max(1, result.device_batch), result.step
            self._text, self._supplies.text = task.text_digest, None
            self._begin_step()
        elif isinstance(task, tasks.Score) and isinstance(result, tasks.Scored):
            self._take_losses(task, result, now)
        elif isinstance(task, tasks.Load | tasks.Apply | tasks.UseBlock) and isinstance(result, tasks.Done):
            self._done(task, result)
        elif isinstance(result, tasks.Value):
            self._side_tasks.done(self.step, result.value)
        elif isinstance(result, tasks.Measured):
            self._side_tasks.done(self.step, result)
        self._settle()

    def reconnected(self, now: float) -> None:
        """Note that the caller has reconnected; the open request is made again."""
        self._channel.mended()

    def tick(self, now: float) -> None:
        """Do what is due at this time: check whether the broadcasts have stopped."""
        if self.joined:
            self._channel.listen(now)

    # Tasks.

    def _next_task(self) -> tasks.Task | None:
        joined, supplies = self.joined, self._supplies
        if joined is None or self.leaving:
            return None
        if not self._built:
            if supplies.text is None:
                return None
            return tasks.Build(joined.config, joined.vocab_size, supplies.text, joined.text_digest, joined.text_bytes)
        if supplies.snapshot is not None:
            return tasks.Load(supplies.snapshot)
        if self._wants_state:
            return None
        side_task = self._side_tasks.next(self.step)
        if side_task is not None:
            return side_task
        updates = self._backlog.run(self.step, self._side_tasks.first_due(self.step + BATCH))
        if updates:
            return tasks.Apply(updates)
        if supplies.block is not None:
            return tasks.UseBlock(*supplies.block)
        if self.step == self._scoring.step and self._scoring.has_work and self._block == self._wanted_block:
            self._scored_for = self._scoring
            return tasks.Score(self._scoring.next_slice(self._speed))
        return None

    def _done(self, task: tasks.Load | tasks.Apply | tasks.UseBlock, result: tasks.Done) -> None:
        self.step = result.step
        if isinstance(task, tasks.Load):
            self._supplies.snapshot, self._is_astray = None, False
            self._newest = max(self._newest, self.step)
        elif isinstance(task, tasks.UseBlock):
            self._block, self._supplies.block = task.block, None
        else:
            self._norms = (result.gradient_norm, result.update_norm)
        self._backlog.drop_before(self.step)

    def _take_losses(self, task: tasks.Score, result: tasks.Scored, now: float) -> None:
        self._speed = running_speed(self._speed, pair_count(task.spans), result.seconds)
        if self._scored_for is self._scoring:  # else the step was closed in the meantime
            scored = scoring.Scored(task.spans, result.values, result.seconds, result.means)
            self._scoring.take(scored, self._speed, now)

    # Requests.

    def _next_request(self, now: float) -> Envelope | None:
        if self.joined is None:
            return self._joining.request(now, self._channel.failures)
        session = self.joined.session
        report = self._side_tasks.report(session)
        if report is not None:
            return report
        hand_in = self._scoring.hand_in(now, bool(self.leaving))
        if hand_in is not None:
            spans, body, dtype, final, means = hand_in
            step, incarnation = self._scoring.step, self.joined.incarnation
            rewards = [(name, mean, pairs) for name, mean, pairs in means]
            losses = wire.Losses(session, incarnation, step, spans, final, dtype, *self._norms, rewards)
            return Envelope(losses, body)
        if self.leaving:
            return None if isinstance(self._task, tasks.Score) else Envelope(wire.Leave(session, self.leaving))
        if now >= self._beat_at:
            return self._beat(self.joined, now)
        may_fetch = now >= self._fetch_at
        fetch = self._supplies.request(session, self._wanted(self.joined)) if may_fetch else None
        part = fetch or self._side_tasks.part(session)
        if part is None and may_fetch and self._misses_update(now):
            return Envelope(wire.CatchUp(session, self.step))
        return part

    def _misses_update(self, now: float) -> bool:
        """Return whether the broadcast of the next update was probably lost."""
        if not self._built or self._wants_state or self._supplies.snapshot or self.step in self._backlog:
            return False
        missed = self.phase == "joining" or self.step + 1 < self._newest or now - self._newest_at > MISSED
        return missed and self.step < self._newest

    def _beat(self, joined: wire.Welcome, now: float) -> Envelope:
        self._beat_at = now + BEAT
        step = max(self.step, 0)
        progress = self._progress + self.calls
        return Envelope(wire.Beat(joined.session, joined.incarnation, step, self.phase, progress, self._note))

    def _wanted(self, joined: wire.Welcome) -> Download | None:
        """Return the download that the host needs next, or None."""
        if not self._built:
            if self._supplies.text is not None:
                return None
            return Download("text", longest_text(joined.text_bytes), joined.text_digest)
        if self._wants_state:
            return Download("state", joined.state_bytes)
        block = self._wanted_block
        if block is not None and block != self._block and self._supplies.block is None:
            return Download("block", joined.block_bytes, block=block)
        return None

    # Messages from the coordinator.

    def _welcome(self, welcome: wire.Welcome, now: float) -> None:
        if self._built and welcome.text_digest != self._text:
            self.refused = f"the run {welcome.run} now has another text; start the host anew"
            return
        self.joined, self.waiting = welcome, ""
        self._joining.run = welcome.run
        self._incarnation = welcome.incarnation
        self._newest = -1
        self._learn(welcome.step, now)
        self._beat_at = now
        self._channel.take_broadcast(now)
        self._settle()

    def _hear(self, message: wire.Step | wire.Extra | wire.Pulse | wire.Bye, body: bytes, now: float) -> None:
        joined = self.joined
        if joined is None or message.run != joined.run or message.incarnation < joined.incarnation:
            return
        self._channel.take_broadcast(now)
        self.coordinator_stopped = isinstance(message, wire.Bye) and not message.done
        if message.incarnation > joined.incarnation:  # the coordinator has restarted
            self._rejoin(now)
        elif isinstance(message, wire.Bye):
            if message.done:
                self.run_ended = True
                self.leave("training has ended")
                self.left = True
        elif message.step >= self._newest:
            self._learn(message.step, now)
            if isinstance(message, wire.Step):
                self._open_step(joined, message, body)
            elif isinstance(message, wire.Extra):
                self._take_leases(joined, message)

    def _open_step(self, joined: wire.Welcome, message: wire.Step, body: bytes) -> None:
        if message.step > self.step:
            self._backlog.hear(message.step - 1, body)
        if not self._knows_leases:
            self._knows_leases = True
            self._take_leases(joined, message)
        asked: dict[SideTask, bool] = {
            "digest": message.digest,
            "upload": message.upload == joined.slot,
            "measure": message.measure == joined.slot,
        }
        self._side_tasks.add([side_task for side_task, is_asked in asked.items() if is_asked], message.step)

    def _take_leases(self, joined: wire.Welcome, message: wire.Step | wire.Extra) -> None:
        self._scoring.drop([(first, count) for slot, first, count in message.leases if slot != joined.slot])
        self._scoring.add([(first, count) for slot, first, count in message.leases if slot == joined.slot])

    def _learn(self, step: int, now: float) -> None:
        """Note the step that is being scored."""
        if step > self._newest:
            self._set_newest(step, now)

    def _learn_from_reply(self, step: int, now: float) -> None:
        """Note the step that a reply names; it corrects a higher step that came before the request was sent."""
        if step > self._newest or self._newest_at < self._channel.sent_at:
            self._set_newest(step, now)

    def _set_newest(self, step: int, now: float) -> None:
        if step != self._newest:
            self._newest, self._newest_at = step, now
            self._begin_step()

    def _begin_step(self) -> None:
        """Drop what belongs to the step before."""
        self._knows_leases = False  # the leases of this step have arrived
        joined = self.joined
        quantum, budget, length = (joined.quantum, joined.budget, joined.vector_length) if joined else (1, None, 0)
        self._scoring = Scoring(self._newest, quantum, self._device_batch, budget, make_exchange(length))

    def _acknowledged(self, message: wire.Ok, request: Message, now: float) -> None:
        if isinstance(request, wire.Losses):
            if request.step == self._scoring.step:
                self._scoring.handed_in()
        elif isinstance(request, wire.Leave):
            self.left = True
        self._side_tasks.answered(request, is_taken=True)
        if message.resync and self._built:
            self._is_astray = True
            self._begin_step()
        self._learn_from_reply(message.step, now)
        if isinstance(request, wire.Beat) and message.step == self._newest:
            # The broadcasts with these leases and side tasks may have been lost.
            self._knows_leases = True
            self._scoring.add(message.spans)
            self._side_tasks.add(message.side_tasks, message.step)
        self._settle()

    def _rejected(self, message: wire.Rejected, request: Message, now: float) -> None:
        if message.rejoin:
            self._rejoin(now)
            return
        if isinstance(request, wire.Losses):
            if request.step == self._scoring.step:  # else the leases of the next step are here already
                self._begin_step()
        elif isinstance(request, wire.Join) and message.wait:
            self.waiting = legible(message.reason)
            self._joining.wait(now, message.wait)
        elif isinstance(request, wire.Fetch | wire.CatchUp) and message.wait:
            self._fetch_at = now + message.wait
        elif isinstance(request, wire.Fetch):
            self._supplies.give_up()
        self._side_tasks.answered(request, is_taken=False)
        self._learn_from_reply(message.step, now)

    def _rejoin(self, now: float) -> None:
        """Join again; the replica and the running download are kept."""
        self.joined = None
        self._channel.request = None
        self._joining.put_off(now, self._channel.failures)
        self._backlog.clear()
        self._side_tasks.clear()
        self._supplies.snapshot = None
        self._begin_step()
        self._settle()

    @property
    def _wants_state(self) -> bool:
        """Whether the state is missing, wrong, or ahead of the run."""
        is_wrong = self._is_astray or self.step < 0 or self.step > self._newest
        return self._built and is_wrong and self._supplies.snapshot is None

    @property
    def _wanted_block(self) -> int | None:
        """Number of the block of tokens for the step that is being scored; None: the text holds all tokens."""
        return self._newest // self.joined.block_interval if self.joined and self.joined.block_bytes else None

    def _take_updates(self, message: wire.Updates, body: bytes, request: Message, now: float) -> None:
        asked = isinstance(request, wire.CatchUp) and request.step == message.step
        if asked and sum(message.sizes) == len(body):
            step = self._backlog.fill(message.step, message.sizes, body)
            if message.sizes:
                self._learn(step, now)
            else:
                self._learn_from_reply(step, now)

    def _settle(self) -> None:
        """Update the phase."""
        before = self.phase
        if self.joined is None:
            self.phase = "joining"
        elif not self._built:
            self.phase = "joining" if self._supplies.text is None else "compiling"
        elif self._wants_state or self._supplies.snapshot or (before != "ready" and self.step < self._newest):
            self.phase = "joining"
        else:
            self.phase = "ready"
        if self.phase != before:
            self._beat_at = -math.inf
