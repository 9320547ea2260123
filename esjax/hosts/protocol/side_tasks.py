"""What a host is asked for beside losses: the digest of its state, its state, its held-out loss."""

import math
from collections.abc import Sequence

from esjax.hosts.protocol import wire
from esjax.hosts.protocol.tasks import Measure, TakeDigest, TakeSnapshot, Task
from esjax.hosts.protocol.transfers import Sending
from esjax.hosts.protocol.wire import Chore, Envelope, Message

_TASKS: dict[Chore, type[TakeDigest | TakeSnapshot | Measure]] = {
    "digest": TakeDigest,
    "upload": TakeSnapshot,
    "measure": Measure,
}


class Chores:
    """What is asked for, each with the step whose parameters it is due at, and what came of it."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._due: dict[Chore, int] = {}
        self._doing: Chore | None = None
        self._digest: tuple[int, str] | None = None  # with its step
        self._held_out: tuple[int, float] | None = None
        self._sending: Sending | None = None

    def add(self, chores: Sequence[Chore], step: int) -> None:
        """Note what is asked for at a step, but for what is under way."""
        under_way = {"digest": self._digest, "measure": self._held_out, "upload": self._sending}
        for chore in chores:
            if chore != self._doing and under_way[chore] is None:
                self._due[chore] = step

    def next(self, step: int) -> Task | None:
        """Return what the devices should do at a step, or None."""
        self._due = {chore: due for chore, due in self._due.items() if due >= step}
        for chore, due in self._due.items():
            if due == step:
                del self._due[chore]
                self._doing = chore
                return _TASKS[chore]()
        return None

    def first_due(self, before: int) -> int:
        """Return the step at which something is due next, if it is before another one; else that one."""
        return min([before, *self._due.values()])

    def done(self, step: int, value: object) -> None:
        """Hear what came of it."""
        chore, self._doing = self._doing, None
        if chore == "digest" and isinstance(value, str):
            self._digest = (step, value)
        elif chore == "measure":
            self._held_out = (step, value if isinstance(value, float) else math.nan)
        elif chore == "upload" and isinstance(value, bytes):
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
