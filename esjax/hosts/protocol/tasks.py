"""Device tasks of a host, and their results.

Tasks are messages: a host may be several processes, which all run the same tasks, see `esjax.hosts.executor`.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from esjax.averages import NamedMean
from esjax.exchange.update_record import Span
from esjax.exchange.values import Values
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.transfers import Sending
from esjax.hosts.protocol.wire import Envelope, Message, SideTask


class Build(msgspec.Struct, frozen=True, tag=True):
    """Build the replica and compile its programs."""

    config: str  # settings as YAML
    vocab_size: int  # number of token ids
    text: bytes  # the packed text
    text_digest: str  # hash of the unpacked bytes
    text_bytes: int  # number of unpacked bytes


class Load(msgspec.Struct, frozen=True, tag=True):
    """Replace the replica's state by a snapshot."""

    snapshot: bytes


class UseBlock(msgspec.Struct, frozen=True, tag=True):
    """Use a block of tokens from now on."""

    block: int
    tokens: bytes


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Apply consecutive updates, as recorded."""

    updates: list[bytes]


class Score(msgspec.Struct, frozen=True, tag=True):
    """Score pairs with the current parameters."""

    spans: list[Span]


class TakeDigest(msgspec.Struct, frozen=True, tag=True):
    """Hash the state."""


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Turn the state into bytes."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Score the held-out documents, and what the model writes after the held-out prompts."""


Task = Build | Load | UseBlock | Apply | Score | TakeDigest | TakeSnapshot | Measure


class Built(msgspec.Struct, frozen=True):
    """Result of `Build`: the pairs that the devices score at a time, and the step of the parameters, -1 without."""

    device_batch: int
    step: int = -1


class Done(msgspec.Struct, frozen=True):
    """Result of `Load`, `UseBlock` and `Apply`: the step of the parameters, and the norms of the last update if any."""

    step: int
    gradient_norm: float | None = None
    update_norm: float | None = None


class Scored(msgspec.Struct, frozen=True):
    """Result of `Score`: the values of the spans, see `esjax.exchange.values`, and the seconds of scoring."""

    values: Values
    seconds: float
    means: Sequence[NamedMean] = ()  # of rewards that have names


class Value(msgspec.Struct, frozen=True):
    """Result of a side task: a digest, or the bytes of a snapshot."""

    value: Any


class Measured(msgspec.Struct, frozen=True):
    """Result of `Measure`; None: there is nothing to measure it on."""

    held_out: float | None = None
    greedy_reward: float | None = None
    pass_at_k: float | None = None


class Failed(msgspec.Struct, frozen=True):
    """Result of a task that failed, with the reason."""

    reason: str


Result = Built | Done | Scored | Value | Measured | Failed


_TASKS: dict[SideTask, type[TakeDigest | TakeSnapshot | Measure]] = {
    "digest": TakeDigest,
    "upload": TakeSnapshot,
    "measure": Measure,
}


class SideTasks:
    """A host's side tasks, each with the step whose parameters it needs, and their results until they are sent."""

    def __init__(self) -> None:
        """Set up without tasks."""
        self._due: dict[SideTask, int] = {}
        self._doing: SideTask | None = None
        self._digest: tuple[int, str] | None = None  # with its step
        self._measured: tuple[int, Measured] | None = None
        self._sending: Sending | None = None

    def add(self, side_tasks: Sequence[SideTask], step: int) -> None:
        """Add side tasks that are due at a step, except those that are running or have a result to send."""
        under_way = {"digest": self._digest, "measure": self._measured, "upload": self._sending}
        for side_task in side_tasks:
            if side_task != self._doing and under_way[side_task] is None:
                self._due[side_task] = step

    def next(self, step: int) -> Task | None:
        """Return the device task that is due at a step, or None."""
        self._due = {side_task: due for side_task, due in self._due.items() if due >= step}
        for side_task, due in self._due.items():
            if due == step:
                del self._due[side_task]
                self._doing = side_task
                return _TASKS[side_task]()
        return None

    def first_due(self, before: int) -> int:
        """Return the first step at which a side task is due, but at most `before`."""
        return min([before, *self._due.values()])

    def done(self, step: int, value: object) -> None:
        """Store the result of the running side task."""
        side_task, self._doing = self._doing, None
        if side_task == "digest" and isinstance(value, str):
            self._digest = (step, value)
        elif side_task == "measure" and isinstance(value, Measured):
            self._measured = (step, value)
        elif side_task == "upload" and isinstance(value, bytes):
            self._sending = Sending(step, value)

    def report(self, session: int) -> Envelope | None:
        """Return a message with a digest or a measurement to send, or None."""
        if self._digest:
            return Envelope(wire.Digest(session, *self._digest))
        if self._measured is None:
            return None
        step, found = self._measured
        return Envelope(wire.Measured(session, step, found.held_out, found.greedy_reward, found.pass_at_k))

    def part(self, session: int) -> Envelope | None:
        """Return a message with the next part of the state, or None."""
        return self._sending.request(session) if self._sending else None

    def answered(self, request: Message, is_taken: bool) -> None:
        """Drop a result that was sent: the coordinator answered, and accepted it or not."""
        if isinstance(request, wire.Digest):
            self._digest = None
        elif isinstance(request, wire.Measured):
            self._measured = None
        elif isinstance(request, wire.Upload) and self._sending and (not is_taken or self._sending.arrived()):
            self._sending = None

    def clear(self) -> None:
        """Drop all side tasks except the running one."""
        self._due.clear()
        self._digest = self._measured = self._sending = None
