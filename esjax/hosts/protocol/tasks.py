"""What a host's devices are asked to do, and what comes of it.

Tasks are messages too, since a host may be several processes that all do the same, see `esjax.hosts.executor`.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from esjax.exchange.update_record import Span
from esjax.exchange.values import Values
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.transfers import Sending
from esjax.hosts.protocol.wire import Envelope, Message, SideTask


class Build(msgspec.Struct, frozen=True, tag=True):
    """Make the replica, and compile.

    Attributes:
        config: Settings, as YAML.
        vocab_size: Number of token ids.
        text: The text as it was sent.
        text_digest: Hash of its plain bytes.
        text_bytes: Their number.
    """

    config: str
    vocab_size: int
    text: bytes
    text_digest: str
    text_bytes: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """Take over a snapshot."""

    snapshot: bytes


class UseBlock(msgspec.Struct, frozen=True, tag=True):
    """Score on a block of tokens from now on."""

    block: int
    tokens: bytes


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Make consecutive updates, each as it is recorded."""

    updates: list[bytes]


class Score(msgspec.Struct, frozen=True, tag=True):
    """Score pairs with the present parameters."""

    spans: list[Span]


class TakeDigest(msgspec.Struct, frozen=True, tag=True):
    """Hash the state."""


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Turn the state into bytes."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Score the held-out documents."""


Task = Build | Load | UseBlock | Apply | Score | TakeDigest | TakeSnapshot | Measure


class Built(msgspec.Struct, frozen=True):
    """Of `Build`: pairs that the devices like to score at a time."""

    device_batch: int


class Done(msgspec.Struct, frozen=True):
    """Of `Load`, `UseBlock` and `Apply`: step of the parameters, and norms of the last update, if one was made."""

    step: int
    gradient_norm: float | None = None
    update_norm: float | None = None


class Scored(msgspec.Struct, frozen=True):
    """Of `Score`: the values of the spans, see `esjax.exchange.values`, and the seconds that they took."""

    values: Values
    seconds: float


class Value(msgspec.Struct, frozen=True):
    """Of the others: a digest, a snapshot's bytes, or a loss (None: there is nothing to measure)."""

    value: Any


class Failed(msgspec.Struct, frozen=True):
    """Of any task that cannot be done."""

    reason: str


Result = Built | Done | Scored | Value | Failed


_TASKS: dict[SideTask, type[TakeDigest | TakeSnapshot | Measure]] = {
    "digest": TakeDigest,
    "upload": TakeSnapshot,
    "measure": Measure,
}


class SideTasks:
    """What is asked for, each with the step whose parameters it is due at, and what came of it."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._due: dict[SideTask, int] = {}
        self._doing: SideTask | None = None
        self._digest: tuple[int, str] | None = None  # with its step
        self._held_out: tuple[int, float] | None = None
        self._sending: Sending | None = None

    def add(self, side_tasks: Sequence[SideTask], step: int) -> None:
        """Note what is asked for at a step, but for what is under way."""
        under_way = {"digest": self._digest, "measure": self._held_out, "upload": self._sending}
        for side_task in side_tasks:
            if side_task != self._doing and under_way[side_task] is None:
                self._due[side_task] = step

    def next(self, step: int) -> Task | None:
        """Return what the devices should do at a step, or None."""
        self._due = {side_task: due for side_task, due in self._due.items() if due >= step}
        for side_task, due in self._due.items():
            if due == step:
                del self._due[side_task]
                self._doing = side_task
                return _TASKS[side_task]()
        return None

    def first_due(self, before: int) -> int:
        """Return the step at which something is due next, if it is before another one; else that one."""
        return min([before, *self._due.values()])

    def done(self, step: int, value: object) -> None:
        """Hear what came of it."""
        side_task, self._doing = self._doing, None
        if side_task == "digest" and isinstance(value, str):
            self._digest = (step, value)
        elif side_task == "measure":
            self._held_out = (step, value if isinstance(value, float) else math.nan)
        elif side_task == "upload" and isinstance(value, bytes):
            self._sending = Sending(step, value)

    def report(self, session: int) -> Envelope | None:
        """Hand in what is found out, or None."""
        if self._digest:
            return Envelope(wire.Digest(session, *self._digest))
        return Envelope(wire.Measured(session, *self._held_out)) if self._held_out else None

    def part(self, session: int) -> Envelope | None:
        """Hand in the next part of the state, or None."""
        return self._sending.request(session) if self._sending else None

    def answered(self, request: Message, is_taken: bool) -> None:
        """Hear that a request was answered, and whether what it handed in was taken."""
        if isinstance(request, wire.Digest):
            self._digest = None
        elif isinstance(request, wire.Measured):
            self._held_out = None
        elif isinstance(request, wire.Upload) and self._sending and (not is_taken or self._sending.arrived()):
            self._sending = None

    def clear(self) -> None:
        """Forget all but what the devices are at."""
        self._due.clear()
        self._digest = self._held_out = self._sending = None
