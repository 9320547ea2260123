"""Hosts that lie: a host's real state machine, which changes what its devices found before it is sent."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from esjax.exchange.gradient_sums import LARGEST, LOSS_STEPS, TAIL
from esjax.exchange.update_record import Span
from esjax.exchange.values import Values
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.tasks import Result, Score, Scored, Task
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import Worker

INVENTED = 10_000.0
"""Pairs per second of a host that does not evaluate them."""

Lie = Callable[[Values], Values]
"""Changes losses, float32 [pairs, 2], or gradient sums, integers [spans, vector_length]."""


def swapped(values: Values) -> Values:
    """Swap the signs: the run goes uphill."""
    if values.dtype == np.float32:
        return np.ascontiguousarray(values[:, ::-1])
    return np.concatenate([-values[:, :-TAIL], values[:, -TAIL:]], axis=1)


def scaled(values: Values) -> Values:
    """Make all differences ten times as large."""
    if values.dtype == np.float32:
        mean = values.mean(axis=1, keepdims=True)
        return (mean + 10 * (values - mean)).astype(np.float32)
    large = np.clip(10 * values[:, :-TAIL].astype(np.int64), -LARGEST, LARGEST).astype(np.int32)
    return np.concatenate([large, values[:, -TAIL:]], axis=1)


def outlier(values: Values) -> Values:
    """Give one pair, or one number of a sum, an enormous value."""
    changed = values.astype(np.float32 if values.dtype == np.float32 else np.int32)
    changed[0, 0] = 9e8
    if values.dtype == np.float32:
        changed[0, 1] = -9e8
    return changed


def half_void(values: Values) -> Values:
    """Turn half of the pairs into pairs without finite losses."""
    changed = values.copy()
    if values.dtype == np.float32:
        changed[::2] = np.nan
        return changed
    return changed // 2


LIES: dict[str, Lie] = {
    "swapped signs": swapped,
    "scaled": scaled,
    "one outlier": outlier,
    "half NaN": half_void,
    "honest when watched": swapped,
    "claimed speed": swapped,
    "two of one token": swapped,
    "lying as a checker": swapped,
}
"""Lies by kind of liar; these kinds do not lie always:

- *one outlier*: once a step;
- *honest when watched*: only about pairs that no other host was leased in the step;
- *lying as a checker*: only about pairs that another host was leased before.

*Claimed speed* invents its values and sends them at once. *Two of one token* confirm each other.
"""


class LyingWorker(Worker):
    """The state machine of a host that lies."""

    def __init__(self, lie: str, *arguments: Any, **settings: Any) -> None:
        """Set up with a key of `LIES`, and the arguments of `Worker`."""
        super().__init__(*arguments, **settings)
        self._lie = lie
        self._others: list[Span] = []  # leased to other hosts in this step
        self._scores: list[Span] = []
        self._seen = self._lied_in = -1
        self._now = 0.0

    def receive(self, envelope: Envelope, now: float) -> None:
        """See `Worker.receive`; watch who is leased what."""
        message, self._now = envelope.message, now
        if isinstance(message, wire.Step | wire.Extra) and self.joined:
            if message.step != self._seen:
                self._seen, self._others = message.step, []
            self._others += [(first, count) for slot, first, count in message.leases if slot != self.joined.slot]
        super().receive(envelope, now)

    def task(self) -> Task | None:
        """See `Worker.task`."""
        task = super().task()
        while isinstance(task, Score) and self._lie == "claimed speed":
            super().finished(self._invent(task.spans), self._now)
            task = super().task()
        if isinstance(task, Score):
            self._scores = task.spans
        return task

    def _invent(self, spans: Sequence[Span]) -> Scored:
        """Make up values in no time."""
        assert self.joined
        pairs, rng = sum(count for _, count in spans), np.random.default_rng()
        length = self.joined.vector_length
        values: Values = rng.normal(3.0, 0.1, (pairs, 2)).astype(np.float32)
        if length:
            values = rng.integers(-1000, 1000, (len(spans), length), np.int32)
            values[:, -TAIL:] = [[count, 3 * LOSS_STEPS * count, LOSS_STEPS * count] for _, count in spans]
        return Scored(values, pairs / INVENTED)

    def finished(self, result: Result, now: float) -> None:
        """See `Worker.finished`; change the values."""
        if isinstance(result, Scored):
            values = LIES[self._lie](result.values) if self._lies(self._scores) else result.values
            result = Scored(values, result.seconds)
        super().finished(result, now)

    def _lies(self, spans: Sequence[Span]) -> bool:
        if self._lie == "one outlier":
            is_first, self._lied_in = self._lied_in != self._newest, self._newest
            return is_first
        is_watched = any(
            first < other + size and other < first + count for first, count in spans for other, size in self._others
        )
        if self._lie == "honest when watched":
            return not is_watched
        return is_watched or self._lie != "lying as a checker"
