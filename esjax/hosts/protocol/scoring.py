"""One host's pairs of one step: to be scored, and scored but not yet handed in."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esjax.exchange.update_record import SPAN_LIMIT, Span
from esjax.exchange.values import MAX_REQUEST, Exchange, Values

SLICE = 0.25
"""Seconds of work that the devices are given at a time, so that progress shows and work can be given up."""

HAND_IN = 1.0
"""Seconds after which losses are handed in though there are more to come."""


class Scored(NamedTuple):
    """Losses of pairs, or a sum for each span of them, and the seconds that they took."""

    spans: list[Span]
    values: Values
    seconds: float


class HandIn(NamedTuple):
    """What is handed in at a time.

    Attributes:
        spans: The pairs.
        body: Their losses, two float32 a pair, or their sums.
        dtype: Of the body.
        seconds: Time that scoring them took.
        final: Whether nothing more comes for this step.
    """

    spans: list[Span]
    body: bytes
    dtype: str
    seconds: float
    final: bool


class Scoring:
    """The pairs.

    Attributes:
        step: The step.
    """

    def __init__(self, step: int, quantum: int, device_batch: int, budget: float | None, exchange: Exchange) -> None:
        """Begin with nothing to do.

        Args:
            step: The step.
            quantum: Pairs that are never split.
            device_batch: Pairs that the devices like to score at a time.
            budget: Seconds to score for, or None: all pairs that come.
            exchange: What is handed in.
        """
        self.step = step
        self._exchange = exchange
        self._most_pairs = max(quantum, exchange.most_pairs // quantum * quantum)
        self._quantum, self._device_batch, self._budget = quantum, device_batch, budget
        self._spans: list[Span] = []
        self._parts: list[Scored] = []
        self._offered = 0  # parts in the request under way
        self._since = 0.0  # when the first of the parts was scored
        self._spent = 0.0
        self._is_over = False  # the budget is spent
        self._cut_at: int | None = None  # where the last slice ends, if it ends within a span

    @property
    def has_work(self) -> bool:
        """Whether there are pairs to be scored."""
        return bool(self._spans)

    def add(self, spans: Sequence[Span]) -> None:
        """Take pairs; those that are there already are not taken twice."""
        if not self._is_over:
            have = [*self._spans, *(span for part in self._parts for span in part.spans)]
            self._spans = (self._spans + without(spans, have))[:SPAN_LIMIT]

    def next_slice(self, speed: float) -> list[Span]:
        """Choose pairs to be scored next: as many as fill a slice of time.

        Args:
            speed: Pairs that the devices score a second; 0 if that is not known.
        """
        seconds = SLICE if self._budget is None else min(SLICE, self._budget - self._spent)
        device_batches = max(1, int(seconds * speed / self._device_batch))
        left = min(device_batches * self._device_batch, self._most_pairs)
        taken: list[Span] = []
        for first, count in self._spans:
            if left <= 0 or len(taken) == self._exchange.most_spans:
                break
            pairs = min(count, -(-left // self._quantum) * self._quantum)
            taken.append((first, pairs))
            left -= pairs
        return taken

    def take(self, scored: Scored, speed: float, now: float) -> None:
        """Take in losses of a slice; `speed` as above."""
        if not self._parts:
            self._since = now
        end = sum(scored.spans[-1])
        is_cut = any(first < end < first + count for first, count in self._spans)
        goes_on = self._cut_at == scored.spans[0][0] and len(scored.spans) == 1
        joined = self._joined(self._parts[-1], scored) if goes_on and self._parts[self._offered :] else None
        if joined:
            self._parts.pop()
        self._parts.append(joined or scored)
        self._cut_at = end if is_cut else None
        self._spans = without(self._spans, scored.spans)
        self._spent += scored.seconds
        if self._budget is not None and speed and self._spent + self._device_batch / speed > self._budget:
            self._spans, self._is_over = [], True

    def _joined(self, one: Scored, next_one: Scored) -> Scored | None:
        """Make one part of the last span of a slice and of the rest of that span, if the exchange can."""
        (*spans, last), (rest,) = one.spans, next_one.spans
        row = len(one.values) - self._exchange.rows([last])[0]
        both = self._exchange.joined(last, one.values[row:], rest, next_one.values)
        if both is None:
            return None
        span = (last[0], last[1] + rest[1])
        values = np.concatenate([one.values[:row], both])
        return Scored([*spans, span], values, one.seconds + next_one.seconds)

    def hand_in(self, now: float, everything: bool) -> HandIn | None:
        """Return what is to be handed in now, or None.

        Args:
            now: The time.
            everything: Whether to wait for nothing more.
        """
        final = not self._spans
        if not self._parts or not (final or everything or now - self._since > HAND_IN):
            return None
        size = spans = self._offered = 0
        for part in self._parts:
            size, spans = size + part.values.nbytes, spans + len(part.spans)
            if self._offered and (size > MAX_REQUEST or spans > SPAN_LIMIT):
                break
            self._offered += 1
        parts = self._parts[: self._offered]
        values = np.concatenate([part.values for part in parts])
        dtype, body = self._exchange.pack(values)
        return HandIn(
            [span for part in parts for span in part.spans],
            body,
            dtype,
            sum(part.seconds for part in parts),
            final and len(parts) == len(self._parts),
        )

    def handed_in(self) -> None:
        """Hear that what was handed in has arrived."""
        self._parts = self._parts[self._offered :]
        self._offered = 0


def without(spans: Sequence[Span], taken: Sequence[Span]) -> list[Span]:
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
