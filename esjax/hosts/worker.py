"""A host as a state machine: replies, broadcasts, results of its devices and the time in; requests and tasks out.

It knows no clock, socket or device: the caller hands in `now` in seconds of a clock that never jumps, sends what
`request` gives (one at a time), and has the devices do what `task` gives (one at a time).
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from esjax.hosts import scoring, wire
from esjax.hosts.scoring import Scoring
from esjax.hosts.tasks import (
    Apply,
    Build,
    Built,
    Done,
    Failed,
    Load,
    Measure,
    Result,
    Score,
    Scored,
    TakeDigest,
    TakeSnapshot,
    Task,
    UseBlock,
    Value,
)
from esjax.hosts.transfers import Backlog, Download, Sending
from esjax.hosts.wire import Chore, Envelope, Message

BEAT = 2.0
"""Seconds between signs of life."""

TIMEOUT = 10.0
"""Seconds after which a request that was not answered is made again."""

DEAF = 20.0
"""Seconds without a broadcast, or without a reply, after which the connections are made anew."""

BACK_OFF, BACK_OFF_LONGEST = 0.5, 10.0
"""Seconds between attempts to join, doubled each time, each times a random factor around 1."""

MISSED = 0.3
"""Seconds to wait for an update that is known to be published before asking for it."""

BATCH = 64
"""Updates made in one task at most."""

PACKING = 1024
"""Bytes by which a compressed text may be larger than the text."""

_CHORES: dict[Chore, type[TakeDigest | TakeSnapshot | Measure]] = {
    "digest": TakeDigest,
    "upload": TakeSnapshot,
    "measure": Measure,
}


class Worker:
    """The state machine.

    Attributes:
        name: What the host calls itself.
        phase: joining, compiling or ready.
        step: Step of the parameters, or -1 before there are any.
        joined: What the coordinator said when it took the host in, or None.
        refused: Why the coordinator turned the host away for good, or "".
        failed: Why the devices cannot go on, or "".
        left: Whether everything is handed in and said after `leave`, or training has ended.
        reconnect: Whether the connections should be made anew; the caller then calls `reconnected`.
    """

    def __init__(
        self,
        name: str,
        device: str,
        kind: str,
        answers: dict[str, str],
        own: dict[str, str],
        *,
        now: float,
        jitter: Callable[[], float],
        built: bool = False,
        step: int = -1,
        text: str = "",
        granule: int = 1,
    ) -> None:
        """Begin outside.

        Args:
            name: What the host calls itself.
            device: What it computes on, for people.
            kind: Hardware and software whose floats should agree to the last bit.
            answers: Hashes of known noise by kind of noise.
            own: Names of its own model, loss and optimizer.
            now: The time.
            jitter: Gives random numbers in [0, 1).
            built: Whether the replica is there already.
            step: Step of its parameters.
            text: Digest of the text that it has.
            granule: Pairs that its devices like to score at a time.
        """
        self.name = name
        self.phase: wire.Phase = "joining"
        self.step = step
        self.joined: wire.Welcome | None = None
        self.refused = ""
        self.failed = ""
        self.left = self.reconnect = False
        self._device, self._kind, self._answers, self._own = device, kind, answers, own
        self._jitter = jitter
        self._instance, self._attempt = int(jitter() * 2**53), 0
        self._built, self._granule, self._text = built, granule, text
        self._is_astray = False  # the state is not the right one
        self._block: int | None = None
        self._note = ""
        self._progress = 0
        self._leaving: str | None = None
        self._run, self._epoch = "", 0
        # The step that is being scored.
        self._newest = step
        self._newest_at = now
        self._backlog = Backlog()
        self._scoring = self._scored_for = Scoring(step, 1, granule, None)
        self._is_told = False  # which pairs of this step are ours
        self._speed = 0.0
        self._norms: tuple[float | None, float | None] = (None, None)
        # What is asked for beside losses, with the step that it is due at, and what came of it.
        self._chores: dict[Chore, int] = {}
        self._reports: dict[Chore, Callable[[int], Envelope]] = {}
        self._sending: Sending | None = None
        # Large things on their way in, and what they became.
        self._download: Download | None = None
        self._packed_text: bytes | None = None
        self._snapshot: bytes | None = None
        self._block_tokens: tuple[int, bytes] | None = None
        # The line.
        self._task: Task | None = None
        self._sent: Envelope | None = None
        self._sent_at = now
        self._reply_at = self._broadcast_at = now
        self._beat_at = now
        self._join_at = now
        self._failures = 0  # requests in a row that were not answered

    # What the shell calls.

    @property
    def leaving(self) -> str:
        """Why the host is about to leave, or ""."""
        return self._leaving or ""

    @property
    def silent_since(self) -> float:
        """When the coordinator last said anything to this host."""
        return max(self._reply_at, self._broadcast_at)

    def leave(self, reason: str) -> None:
        """Hand in what is scored, say goodbye and end."""
        if self._leaving is None:
            self._leaving = reason[:1000]

    def request(self, now: float) -> Envelope | None:
        """Return the next request, or None; it takes the place of one that was not answered."""
        if self.joined is None and self._leaving is not None:
            self.left = True
        if self.refused or self.left:
            return None
        if self._sent is not None:
            if now - self._sent_at < TIMEOUT:
                return None
            self._failures += 1
            if now - self._reply_at > DEAF:
                self.reconnect, self._reply_at = True, now
            if isinstance(self._sent.message, wire.Join):
                self._sent, self._join_at = None, now + self._back_off()
        request = self._sent or self._next_request(now)
        if request is not None:
            self._sent, self._sent_at = request, now
        return request

    def receive(self, envelope: Envelope, now: float) -> None:
        """Take in a reply or a broadcast."""
        message = envelope.message
        if isinstance(message, wire.Step | wire.Extra | wire.Pulse | wire.Bye):
            self._hear(message, envelope.body, now)
            return
        if self._sent is None or getattr(message, "epoch", self._epoch) < self._epoch:
            return  # an old coordinator is nobody
        sent, self._sent = self._sent.message, None
        self._reply_at = now
        self._failures = 0
        if isinstance(message, wire.Refused):
            self.refused = message.reason
        elif isinstance(message, wire.Welcome):
            if isinstance(sent, wire.Join):
                self._welcome(message, now)
        elif isinstance(message, wire.Rejected):
            self._rejected(message, sent, now)
        elif isinstance(message, wire.Part):
            self._take_part(message, envelope.body, sent)
        elif isinstance(message, wire.Updates):
            self._take_updates(message, envelope.body, sent, now)
        elif isinstance(message, wire.Ok):
            self._acknowledged(message, sent, now)

    def task(self) -> Task | None:
        """Return what the devices should do next, or None; `finished` is to be called with the result."""
        if self._task is not None or self.refused or self.left:
            return None
        self._task = self._next_task()
        return self._task

    def finished(self, result: Result, now: float) -> None:
        """Hear what came of the task."""
        task, self._task = self._task, None
        self._progress += 1
        if isinstance(result, Failed):
            self.failed = self._note = result.reason[:1000]
            self.leave(self.failed)
        elif isinstance(task, Build) and isinstance(result, Built):
            self._built, self._granule = True, max(1, result.granule)
            self._text, self._packed_text = task.text_digest, None
            self._begin_step()
        elif isinstance(task, Score) and isinstance(result, Scored):
            self._take_losses(task, result, now)
        elif isinstance(task, Load | Apply | UseBlock) and isinstance(result, Done):
            self._done(task, result)
        elif isinstance(result, Value):
            self._take_value(task, result.value)
        self._settle()

    def reconnected(self, now: float) -> None:
        """Hear that the connections were made anew: what was asked is asked again."""
        self.reconnect = False
        self._sent = None

    def tick(self, now: float) -> None:
        """Let time pass: notice that the broadcasts have stopped."""
        if self.joined and now - self._broadcast_at > DEAF:
            self.reconnect, self._broadcast_at = True, now

    # Tasks.

    def _next_task(self) -> Task | None:
        joined = self.joined
        if joined is None or self._leaving is not None:
            return None
        if not self._built:
            if self._packed_text is None:
                return None
            return Build(joined.config, joined.vocab_size, self._packed_text, joined.text_digest, joined.text_bytes)
        if self._snapshot is not None:
            return Load(self._snapshot)
        if self._wants_state:
            return None
        for chore, due in self._chores.items():
            if due == self.step:
                del self._chores[chore]
                return _CHORES[chore]()
        updates = self._backlog.run(self.step, min([self.step + BATCH, *self._chores.values()]))
        if updates:
            return Apply(updates)
        if self._block_tokens is not None:
            return UseBlock(*self._block_tokens)
        if self.step == self._scoring.step and self._scoring.has_work and self._block == self._wanted_block:
            self._scored_for = self._scoring
            return Score(self._scoring.next_slice(self._speed))
        return None

    def _done(self, task: Load | Apply | UseBlock, result: Done) -> None:
        self.step = result.step
        if isinstance(task, Load):
            self._snapshot, self._is_astray = None, False
            self._newest = max(self._newest, self.step)
        elif isinstance(task, UseBlock):
            self._block, self._block_tokens = task.block, None
        else:
            self._norms = (result.gradient_norm, result.update_norm)
        self._backlog.drop_before(self.step)
        self._chores = {chore: due for chore, due in self._chores.items() if due >= self.step}

    def _take_losses(self, task: Score, result: Scored, now: float) -> None:
        speed = sum(count for _, count in task.spans) / max(result.seconds, 1e-6)
        self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed
        if self._scored_for is self._scoring:  # else the step was closed meanwhile
            self._scoring.take(scoring.Scored(task.spans, result.losses, result.seconds), self._speed, now)

    def _take_value(self, task: Task | None, value: object) -> None:
        step = self.step
        if isinstance(task, TakeDigest) and isinstance(value, str):
            self._reports["digest"] = lambda session: Envelope(wire.Digest(session, step, value))
        elif isinstance(task, Measure):
            held_out = value if isinstance(value, float) else math.nan
            self._reports["measure"] = lambda session: Envelope(wire.Measured(session, step, held_out))
        elif isinstance(task, TakeSnapshot) and isinstance(value, bytes):
            self._sending = Sending(step, value)

    # Requests.

    def _next_request(self, now: float) -> Envelope | None:
        if self.joined is None:
            return self._join(now)
        session = self.joined.session
        for report in self._reports.values():
            return report(session)
        hand_in = self._scoring.hand_in(now, self._leaving is not None)
        if hand_in is not None:
            spans, body, seconds, final = hand_in
            step, epoch = self._scoring.step, self.joined.epoch
            return Envelope(wire.Losses(session, epoch, step, spans, seconds, final, "<f4", *self._norms), body)
        if self._leaving is not None:
            return None if isinstance(self._task, Score) else Envelope(wire.Leave(session, self._leaving))
        if now >= self._beat_at:
            return self._beat(self.joined, now)
        if self._download is None:
            self._download = self._next_download(self.joined)
        if self._download is not None:
            return self._download.request(session)
        if self._sending is not None:
            return self._sending.request(session)
        if self._misses_update(now):
            return Envelope(wire.CatchUp(session, self.step))
        return None

    def _misses_update(self, now: float) -> bool:
        """Tell whether the next update was published, and is not to be expected any more."""
        if not self._built or self._wants_state or self._snapshot is not None or self.step in self._backlog:
            return False
        missed = self.phase == "joining" or self.step + 1 < self._newest or now - self._newest_at > MISSED
        return missed and self.step < self._newest

    def _join(self, now: float) -> Envelope | None:
        if now < self._join_at:
            return None
        self._join_at = now + self._back_off()
        self._attempt += 1
        answers, own = list(self._answers.items()), list(self._own.items())
        return Envelope(
            wire.Join(self.name[:128], self._device, self._kind, answers, own, self._run, self._instance, self._attempt)
        )

    def _beat(self, joined: wire.Welcome, now: float) -> Envelope:
        self._beat_at = now + BEAT
        step = max(self.step, 0)
        return Envelope(wire.Beat(joined.session, joined.epoch, step, self.phase, self._progress, self._note))

    def _back_off(self) -> float:
        longest = min(BACK_OFF * 2 ** min(self._failures, 10), BACK_OFF_LONGEST)
        return longest * (0.5 + self._jitter())

    def _next_download(self, joined: wire.Welcome) -> Download | None:
        if not self._built:
            if self._packed_text is not None:
                return None
            limit = joined.text_bytes + joined.text_bytes // 64 + PACKING
            return Download("text", limit, joined.text_digest)
        if self._wants_state:
            return Download("state", joined.state_bytes)
        block = self._wanted_block
        if block is not None and block != self._block and self._block_tokens is None:
            return Download("block", joined.block_bytes, block=block)
        return None

    # What comes in.

    def _welcome(self, welcome: wire.Welcome, now: float) -> None:
        if self._built and welcome.text_digest != self._text:
            self.refused = f"the run {welcome.run} now has another text; start the host anew"
            return
        self.joined = welcome
        self._run, self._epoch = welcome.run, welcome.epoch
        self._newest = -1
        self._learn(welcome.step, now)
        self._broadcast_at = self._beat_at = now
        self._settle()

    def _hear(self, message: wire.Step | wire.Extra | wire.Pulse | wire.Bye, body: bytes, now: float) -> None:
        joined = self.joined
        if joined is None or message.run != joined.run or message.epoch < joined.epoch:
            return
        self._broadcast_at = now
        if message.epoch > joined.epoch:  # the coordinator has begun anew
            self._rejoin(now)
        elif isinstance(message, wire.Bye):
            if message.done:
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
        if not self._is_told:
            self._is_told = True
            self._take_leases(joined, message)
        asked: dict[Chore, bool] = {
            "digest": message.digest,
            "upload": message.upload == joined.slot,
            "measure": message.measure == joined.slot,
        }
        self._add_chores([chore for chore, is_asked in asked.items() if is_asked], message.step)

    def _take_leases(self, joined: wire.Welcome, message: wire.Step | wire.Extra) -> None:
        self._scoring.add([(first, count) for slot, first, count in message.leases if slot == joined.slot])

    def _add_chores(self, chores: Sequence[Chore], step: int) -> None:
        """Note what is asked for at a step, but for what is under way."""
        for chore in chores:
            is_done = chore in self._reports or (chore == "upload" and self._sending is not None)
            if step >= self.step and not is_done and not isinstance(self._task, _CHORES[chore]):
                self._chores[chore] = step

    def _learn(self, step: int, now: float) -> None:
        """Hear which step is being scored."""
        if step > self._newest:
            self._set_newest(step, now)

    def _learn_from_reply(self, step: int, now: float) -> None:
        """Hear it from a reply: what was heard before it was asked for, and goes beyond, was not true."""
        if step > self._newest or self._newest_at < self._sent_at:
            self._set_newest(step, now)

    def _set_newest(self, step: int, now: float) -> None:
        if step != self._newest:
            self._newest, self._newest_at = step, now
            self._begin_step()

    def _begin_step(self) -> None:
        """Drop what belongs to the step before."""
        self._is_told = False
        if self.joined:
            self._scoring = Scoring(self._newest, self.joined.unit, self._granule, self.joined.budget)
        else:
            self._scoring = Scoring(self._newest, 1, self._granule, None)

    def _acknowledged(self, message: wire.Ok, request: Message, now: float) -> None:
        if isinstance(request, wire.Losses):
            if request.step == self._scoring.step:
                self._scoring.handed_in()
        elif isinstance(request, wire.Upload):
            if self._sending and self._sending.arrived():
                self._sending = None
        elif isinstance(request, wire.Leave):
            self.left = True
        self._drop_report(request)
        if message.resync and self._built:
            self._is_astray = True
            self._begin_step()
        self._learn_from_reply(message.step, now)
        if isinstance(request, wire.Beat) and message.step == self._newest:
            # The broadcasts that said so may have been lost.
            self._is_told = True
            self._scoring.add(message.spans)
            self._add_chores(message.chores, message.step)
        self._settle()

    def _rejected(self, message: wire.Rejected, request: Message, now: float) -> None:
        if message.rejoin:
            self._rejoin(now)
            return
        if isinstance(request, wire.Losses):
            self._begin_step()
        elif isinstance(request, wire.Upload):
            self._sending = None
        elif isinstance(request, wire.Fetch):
            self._download = None
        self._drop_report(request)
        self._learn_from_reply(message.step, now)

    def _drop_report(self, request: Message) -> None:
        """Hear that a report was answered."""
        if isinstance(request, wire.Digest):
            self._reports.pop("digest", None)
        elif isinstance(request, wire.Measured):
            self._reports.pop("measure", None)

    def _rejoin(self, now: float) -> None:
        """Begin anew with the coordinator; what the replica holds, and what is on its way in, is kept."""
        self.joined = None
        self._sent = None
        self._join_at = now + self._back_off()
        self._backlog.clear()
        self._chores.clear()
        self._reports.clear()
        self._sending = self._snapshot = None
        self._begin_step()
        self._settle()

    @property
    def _wants_state(self) -> bool:
        """Whether the state is none that the run has been through."""
        is_wrong = self._is_astray or self.step < 0 or self.step > self._newest
        return self._built and is_wrong and self._snapshot is None

    @property
    def _wanted_block(self) -> int | None:
        """Number of the block of tokens of the step that is being scored; None: the text holds all of them."""
        return self._newest // self.joined.block_interval if self.joined and self.joined.block_bytes else None

    def _take_part(self, part: wire.Part, data: bytes, request: Message) -> None:
        download = self._download
        if download is None or download.request(getattr(request, "session", -1)).message != request:
            return
        if not download.take(part, data):
            self._download = None  # from the beginning, or the newest
        elif download.is_whole:
            self._download, whole = None, bytes(download.data)
            if download.what == "text":
                self._packed_text = whole
            elif download.what == "state":
                self._snapshot = whole
            else:
                self._block_tokens = (download.block, whole)
        self._settle()

    def _take_updates(self, message: wire.Updates, body: bytes, request: Message, now: float) -> None:
        asked = isinstance(request, wire.CatchUp) and request.step == message.step
        if asked and sum(message.sizes) == len(body):
            ends = list(accumulate(message.sizes))
            updates = [body[end - size : end] for end, size in zip(ends, message.sizes, strict=True)]
            step = self._backlog.fill(message.step, updates)
            if updates:
                self._learn(step, now)
            else:
                self._learn_from_reply(step, now)

    def _settle(self) -> None:
        """See which phase this is."""
        before = self.phase
        if self.joined is None:
            self.phase = "joining"
        elif not self._built:
            self.phase = "joining" if self._packed_text is None else "compiling"
        elif self._wants_state or self._snapshot or (before != "ready" and self.step < self._newest):
            self.phase = "joining"
        else:
            self.phase = "ready"
        if self.phase != before:
            self._beat_at = -math.inf
