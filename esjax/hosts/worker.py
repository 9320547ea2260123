"""A host as a state machine: replies, broadcasts, results of its devices and the time in; requests and tasks out.

It knows no clock, socket or device: the caller hands in `now` in seconds of a clock that never jumps, sends what
`request` gives (one at a time), and has the devices do what `task` gives (one at a time).
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from esjax.hosts import wire
from esjax.hosts.effects import hash_bytes
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
from esjax.hosts.wire import Envelope, Message, Span

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

SLICE = 0.25
"""Seconds of work that the devices are given at a time, so that progress shows and work can be given up."""

PENDING = 64
"""Updates kept for later at most; what is beyond comes from the ledger."""

MOST_PAIRS = wire.MAX_REQUEST // 8
"""Pairs whose losses are handed in at a time at most."""

BATCH = 64
"""Updates made in one task at most."""


class Joined:
    """What a host knows since it was taken in."""

    def __init__(self, welcome: wire.Welcome) -> None:
        """Take it from the coordinator's word."""
        self.run, self.epoch, self.session, self.slot = welcome.run, welcome.epoch, welcome.session, welcome.slot
        self.config, self.vocab_size, self.unit = welcome.config, welcome.vocab_size, welcome.unit
        self.text_digest, self.text_bytes = welcome.text_digest, welcome.text_bytes
        self.publish_port, self.block_interval = welcome.publish_port, welcome.block_interval


class _Download:
    """Something large on its way in."""

    def __init__(self, what: Literal["text", "state", "block"], digest: str = "", block: int = 0) -> None:
        self.what, self.digest, self.block = what, digest, block
        self.data = bytearray()


class Worker:
    """The state machine.

    Attributes:
        name: What the host calls itself.
        phase: joining, compiling, ready or leaving.
        step: Step of the parameters, or -1 before there are any.
        joined: What is known of the run, or None.
        refused: Why the coordinator turned the host away for good, or "".
        failed: Why the devices cannot go on, or "".
        left: Whether everything is handed in and said after `leave`.
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
        self.joined: Joined | None = None
        self.refused = ""
        self.failed = ""
        self.left = self.reconnect = False
        self._device, self._kind, self._answers, self._own = device, kind, answers, own
        self._jitter = jitter
        self._built, self._granule, self._text = built, granule, text
        self._block: int | None = None
        self._note = ""
        self._progress = 0
        self._leaving: str | None = None
        self._run = ""
        # The step that is being scored.
        self._newest = step
        self._newest_at = now
        self._updates: dict[int, bytes] = {}
        self._spans: list[Span] = []  # to be scored
        self._budget: float | None = None
        self._spent = 0.0
        self._speed: float | None = None
        self._scored: list[tuple[list[Span], np.ndarray, float]] = []
        self._scored_at = now
        self._final = False  # nothing more comes from here for this step
        self._chores: list[tuple[int, Task]] = []  # with the step at whose parameters they are due
        self._reports: list[Callable[[int], Envelope]] = []
        self._norms: tuple[float | None, float | None] = (None, None)
        self._upload: tuple[int, bytes, str, int] | None = None
        # Large things on their way in, and what they became.
        self._download: _Download | None = None
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
        self._attempts = 0

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
            self._leaving = reason

    def request(self, now: float) -> Envelope | None:
        """Return the next request, or None; it takes the place of one that was not answered."""
        if self.refused or self.left:
            return None
        if self._sent is not None:
            if now - self._sent_at < TIMEOUT:
                return None
            self._attempts += 1
            if now - self._reply_at > DEAF:
                self.reconnect, self._reply_at = True, now
            if isinstance(self._sent.message, wire.Join):
                self._sent, self._join_at = None, now + self._back_off()
        message = self._sent or self._next_request(now)
        if message is not None:
            self._sent, self._sent_at = message, now
        return message

    def receive(self, envelope: Envelope, now: float) -> None:
        """Take in a reply or a broadcast."""
        message = envelope.message
        if isinstance(message, wire.Step | wire.Extra | wire.Pulse | wire.Bye):
            self._hear(message, envelope.body, now)
            return
        sent, self._sent = self._sent, None
        if sent is None:
            return
        self._reply_at = now
        self._attempts = 0
        if isinstance(message, wire.Refused):
            self.refused = message.reason
        elif isinstance(message, wire.Welcome):
            if isinstance(sent.message, wire.Join):
                self._welcome(message, now)
        elif isinstance(message, wire.Rejected):
            self._rejected(message, sent.message, now)
        elif isinstance(message, wire.Part):
            self._take_part(message, envelope.body, sent.message)
        elif isinstance(message, wire.Updates):
            self._take_updates(message, envelope.body, sent.message)
        elif isinstance(message, wire.Ok):
            self._acknowledged(message, sent.message, now)

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
        elif isinstance(task, Score) and isinstance(result, Scored):
            self._take_losses(task, result, now)
        elif isinstance(result, Done):
            self.step = result.step
            if isinstance(task, Load):
                self._snapshot = None
                self._newest = max(self._newest, self.step)
            elif isinstance(task, UseBlock):
                self._block, self._block_tokens = task.block, None
            else:
                self._norms = (result.gradient_norm, result.update_norm)
            self._updates = {step: update for step, update in self._updates.items() if step >= self.step}
            self._chores = [chore for chore in self._chores if chore[0] >= self.step]
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
        if self._chores and self._chores[0][0] == self.step and not self._spans:
            return self._chores.pop(0)[1]
        if self.step in self._updates:
            batch: list[bytes] = []
            while len(batch) < BATCH and self.step + len(batch) in self._updates:
                batch.append(self._updates[self.step + len(batch)])
            return Apply(batch)
        if self._block_tokens is not None:
            return UseBlock(*self._block_tokens)
        if self.step == self._newest and self._spans and self._block == self._wanted_block():
            return Score(self._slice())
        return None

    def _slice(self) -> list[Span]:
        """Take as many pairs as fill a slice of time, whole granules."""
        seconds = SLICE if self._budget is None else min(SLICE, self._budget - self._spent)
        granules = int(seconds * (self._speed or 0.0) / self._granule)
        left = min(max(1, granules) * self._granule, max(self._granule, MOST_PAIRS))
        taken = []
        for first, count in self._spans:
            if left > 0:
                taken.append((first, min(left, count)))
                left -= count
        return taken

    def _take_losses(self, task: Score, result: Scored, now: float) -> None:
        pairs = sum(count for _, count in task.spans)
        if result.seconds > 0:
            speed = pairs / result.seconds
            self._speed = speed if self._speed is None else 0.7 * self._speed + 0.3 * speed
        if self.step != self._newest:  # the step was closed meanwhile
            return
        left = _without(self._spans, task.spans)
        if left == self._spans and task.spans:  # given to somebody else meanwhile
            return
        if not self._scored:
            self._scored_at = now
        self._scored.append((task.spans, result.losses, result.seconds))
        self._spans = left
        self._spent += result.seconds
        if self._budget is not None and self._spent + self._granule / (self._speed or math.inf) > self._budget:
            self._spans = []
        self._final = not self._spans

    def _take_value(self, task: Task | None, value: object) -> None:
        step = self.step
        if isinstance(task, TakeDigest) and isinstance(value, str):
            self._reports.append(lambda session: Envelope(wire.Digest(session, step, value)))
        elif isinstance(task, Measure):
            held_out = value if isinstance(value, float) else math.nan
            self._reports.append(lambda session: Envelope(wire.Measured(session, step, held_out)))
        elif isinstance(task, TakeSnapshot) and isinstance(value, bytes):
            self._upload = (step, value, hash_bytes(value), 0)

    # Requests.

    def _next_request(self, now: float) -> Envelope | None:
        joined = self.joined
        if joined is None:
            if self._leaving is not None:
                self.left = True
                return None
            return self._join(now)
        session = joined.session
        if self._scored and (self._final or self._leaving is not None or now - self._scored_at > 1.0):
            return self._losses(joined)
        if self._reports:
            return self._reports[0](session)
        if self._leaving is not None:
            return None if self._task else Envelope(wire.Leave(session, self._leaving))
        if now >= self._beat_at:
            return self._beat(now)
        if self._download is None:
            self._download = self._next_download()
        if self._download is not None:
            download = self._download
            fetch = wire.Fetch(session, download.what, download.digest, len(download.data), download.block)
            return Envelope(fetch)
        if self._upload is not None:
            step, data, digest, offset = self._upload
            part = data[offset : offset + wire.PART]
            return Envelope(wire.Upload(session, step, digest, len(data), offset), part)
        behind = 0 <= self.step < self._newest and self.step not in self._updates
        if behind and self._built and (self.phase == "joining" or now - self._newest_at > MISSED):
            return Envelope(wire.CatchUp(session, self.step))
        return None

    def _join(self, now: float) -> Envelope | None:
        if now < self._join_at:
            return None
        self._join_at = now + self._back_off()
        answers, own = list(self._answers.items()), list(self._own.items())
        return Envelope(wire.Join(self.name, self._device, self._kind, answers, own, self._run))

    def _losses(self, joined: Joined) -> Envelope:
        parts: list[tuple[list[Span], np.ndarray, float]] = []
        room = MOST_PAIRS
        for part in self._scored:
            room -= len(part[1])
            if parts and room < 0:
                break
            parts.append(part)
        spans = [span for spans, _, _ in parts for span in spans]
        body = np.concatenate([losses for _, losses, _ in parts]).astype("<f4").tobytes()
        seconds = sum(seconds for _, _, seconds in parts)
        final = self._final and len(parts) == len(self._scored)
        message = wire.Losses(joined.session, joined.epoch, self.step, spans, seconds, final, "<f4", *self._norms)
        return Envelope(message, body)

    def _beat(self, now: float) -> Envelope:
        self._beat_at = now + BEAT
        assert self.joined is not None
        phase = self.phase if self._leaving is None else "leaving"
        step = max(self.step, 0)
        return Envelope(wire.Beat(self.joined.session, self.joined.epoch, step, phase, self._progress, self._note))

    def _back_off(self) -> float:
        longest = min(BACK_OFF * 2 ** min(self._attempts, 10), BACK_OFF_LONGEST)
        return longest * (0.5 + self._jitter())

    # What comes in.

    def _welcome(self, welcome: wire.Welcome, now: float) -> None:
        if self._built and welcome.text_digest != self._text:
            self.refused = f"the run {welcome.run} now has another text; start the host anew"
            return
        self.joined = Joined(welcome)
        self._run = welcome.run
        self._newest, self._newest_at = welcome.step, now
        self._updates.clear()
        self._chores.clear()
        self._clear_step()
        if self.step > welcome.step:  # it lost what it never recorded; so must we
            self.step = -1
        self._broadcast_at = self._beat_at = now
        self._settle()

    def _hear(self, message: wire.Step | wire.Extra | wire.Pulse | wire.Bye, body: bytes, now: float) -> None:
        joined = self.joined
        if joined is None or message.run != joined.run or message.epoch < joined.epoch:
            return
        self._broadcast_at = now
        if message.epoch > joined.epoch:  # the coordinator has begun anew
            self._rejoin(now)
            return
        if isinstance(message, wire.Bye):
            if message.done:
                self.leave("training has ended")
            return
        if message.step < self._newest:
            return
        if message.step > self._newest:
            self._newest, self._newest_at = message.step, now
            self._clear_step()
        if isinstance(message, wire.Pulse):
            return
        spans = [(first, count) for slot, first, count in message.leases if slot == joined.slot]
        if isinstance(message, wire.Extra):
            self._add_spans(spans)
            return
        if body and message.step > 0 and len(self._updates) < PENDING:
            self._updates[message.step - 1] = body
        self._clear_step()
        self._add_spans(spans)
        self._budget = message.budget
        chores: list[tuple[bool, Task]] = [
            (message.digest, TakeDigest()),
            (message.upload == joined.slot, TakeSnapshot()),
            (message.measure == joined.slot, Measure()),
        ]
        self._chores = [chore for chore in self._chores if chore[0] == self.step < message.step]
        self._chores += [(message.step, chore) for asked, chore in chores if asked]
        self._settle()

    def _clear_step(self) -> None:
        """Drop what belongs to the step before."""
        self._spans, self._scored = [], []
        self._budget, self._spent, self._final = None, 0.0, False

    def _add_spans(self, spans: list[Span]) -> None:
        have = [*self._spans, *(span for done, _, _ in self._scored for span in done)]
        new = _without(spans, have)
        self._spans = (self._spans + new)[: wire.SPAN_LIMIT]
        self._final = self._final and not new

    def _acknowledged(self, message: wire.Ok, request: Message, now: float) -> None:
        if self.joined is None:
            return
        if isinstance(request, wire.Losses) and request.step == self.step:
            handed_in = {tuple(span) for span in request.spans}
            self._scored = [part for part in self._scored if not {tuple(span) for span in part[0]} <= handed_in]
        elif isinstance(request, wire.Digest | wire.Measured):
            self._reports = self._reports[1:]
        elif isinstance(request, wire.Upload) and self._upload is not None:
            step, data, digest, offset = self._upload
            offset += wire.PART
            self._upload = (step, data, digest, offset) if offset < len(data) else None
        elif isinstance(request, wire.Leave):
            self.left = True
        if message.order == "resync" and self._built and self._snapshot is None:
            self.step = -1
            self._settle()
        if message.step > self._newest:
            self._newest, self._newest_at = message.step, now
            self._clear_step()
        elif message.step == self._newest and isinstance(request, wire.Beat):
            self._add_spans(message.spans)  # the broadcast that said so may have been lost

    def _rejected(self, message: wire.Rejected, request: Message, now: float) -> None:
        if message.rejoin:
            self._rejoin(now)
        elif isinstance(request, wire.Losses):
            self._scored = []
        elif isinstance(request, wire.Upload):
            self._upload = None
        elif isinstance(request, wire.Digest | wire.Measured):
            self._reports = self._reports[1:]
        elif isinstance(request, wire.Fetch):
            self._download = None

    def _rejoin(self, now: float) -> None:
        """Begin anew with the coordinator; what the replica holds is kept."""
        self.joined = None
        self._sent = None
        self._join_at = now + self._back_off()
        self._updates.clear()
        self._chores.clear()
        self._clear_step()
        self._reports, self._upload, self._download = [], None, None
        self._snapshot = self._block_tokens = None
        self._settle()

    def _next_download(self) -> _Download | None:
        joined = self.joined
        assert joined is not None
        if not self._built:
            if self._packed_text is not None:
                return None
            return _Download("text", joined.text_digest)
        if self._wants_state():
            return _Download("state")
        block = self._wanted_block()
        if block != self._block and self._block_tokens is None:
            return _Download("block", block=block or 0)
        return None

    def _wants_state(self) -> bool:
        return self._built and self.step < 0 and self._snapshot is None

    def _wanted_block(self) -> int | None:
        interval = self.joined.block_interval if self.joined else 0
        return self._newest // interval if interval else None

    def _take_part(self, part: wire.Part, data: bytes, request: Message) -> None:
        download = self._download
        if download is None or not isinstance(request, wire.Fetch) or request.offset != len(download.data):
            return
        download.digest = download.digest or part.digest
        fits = part.digest == download.digest and part.offset == request.offset and len(data) <= wire.PART
        if not (fits and data and part.offset + len(data) <= part.size):
            self._download = None  # from the beginning, or the newest
            return
        download.data += data
        if len(download.data) < part.size:
            return
        whole, self._download = bytes(download.data), None
        # The text's hash is that of its plain bytes, and checked by whoever unpacks it.
        if download.what != "text" and hash_bytes(whole) != part.digest:
            return
        if download.what == "text":
            self._packed_text = whole
        elif download.what == "state":
            self._snapshot = whole
        else:
            self._block_tokens = (part.step, whole)
        self._settle()

    def _take_updates(self, message: wire.Updates, body: bytes, request: Message) -> None:
        if not isinstance(request, wire.CatchUp) or message.step != request.step or sum(message.sizes) != len(body):
            return
        at = 0
        for step, size in enumerate(message.sizes, message.step):
            if step >= self.step:
                self._updates[step] = body[at : at + size]
            at += size

    def _settle(self) -> None:
        """See which phase this is."""
        before = self.phase
        if self.joined is None:
            self.phase = "joining"
        elif not self._built:
            self.phase = "joining" if self._packed_text is None else "compiling"
        elif self.step < 0 or (self.phase != "ready" and self.step < self._newest):
            self.phase = "joining"
        else:
            self.phase = "ready"
        if self.phase != before:
            self._beat_at = -math.inf


def _without(spans: list[Span], taken: list[Span]) -> list[Span]:
    """Return what is left of spans."""
    left = list(spans)
    for first, count in taken:
        end = first + count
        left = [
            piece
            for one, size in left
            for piece in ((one, min(one + size, first) - one), (max(one, end), one + size - max(one, end)))
            if piece[1] > 0
        ]
    return left
