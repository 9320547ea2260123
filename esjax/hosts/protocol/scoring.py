"""One host's pairs of one step: those to score, and those scored but not yet sent."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esjax.averages import NamedMean, join_means
from esjax.exchange.update_record import SPAN_LIMIT, Span, without
from esjax.exchange.values import MAX_REQUEST, Exchange, Values
from esjax.rewards.calls import MOST_NAMES

SLICE = 0.25
"""Seconds of work in one device task, so that progress is visible and work can be dropped."""

HAND_IN = 1.0
"""Seconds after which losses are sent although pairs are left to score."""


class Scored(NamedTuple):
    """Losses of pairs, or a gradient sum for each span, and the seconds of scoring."""

    spans: list[Span]
    values: Values
    seconds: float
    means: Sequence[NamedMean] = ()  # of rewards that have names


class HandIn(NamedTuple):
    """The content of one message of losses or gradient sums."""

    spans: list[Span]  # the pairs
    body: bytes  # losses, two float32 for each pair, or a gradient sum for each span
    dtype: str  # type of the numbers in the body
    final: bool  # whether this is the last message of the step
    means: list[NamedMean]  # of rewards that have names, over these pairs


class Scoring:
    """The pairs of one host in one step.

    Attributes:
        step: The step.
    """

    def __init__(self, step: int, quantum: int, device_batch: int, budget: float | None, exchange: Exchange) -> None:
        """Set up without pairs; for `quantum`, `budget` and `device_batch` see `wire.Welcome` and `Worker`."""
        self.step = step
        self._exchange = exchange
        self._most_pairs = max(quantum, exchange.most_pairs // quantum * quantum)
        self._quantum, self._device_batch, self._budget = quantum, device_batch, budget
        self._spans: list[Span] = []
        self._parts: list[Scored] = []
        self._offered = 0  # parts in the open request
        self._since = 0.0  # when the first of the parts was begun
        self._spent = 0.0
        self._is_over = False  # the budget is spent
        self._budgeted: list[Span] = []  # pairs that are scored within the budget
        self._cut_at: int | None = None  # where the last slice ends, if it ends within a span

    @property
    def has_work(self) -> bool:
        """Whether pairs are left to score."""
        return bool(self._spans)

    def add(self, spans: Sequence[Span]) -> None:
        """Add leased pairs; pairs that were added before are ignored.

        Once the budget is spent, other pairs than those leased before are all scored, however long it takes.
        """
        have = [*self._spans, *(span for part in self._parts for span in part.spans)]
        new = without(spans, have)
        if self._is_over:
            new = without(new, self._budgeted)
        elif self._budget is not None:
            self._budgeted += new
        self._spans = (self._spans + new)[:SPAN_LIMIT]

    def drop(self, spans: Sequence[Span]) -> None:
        """Drop pairs that another host was leased; if they are being scored, their values are sent all the same."""
        self._spans = without(self._spans, spans)

    def next_slice(self, speed: float) -> list[Span]:
        """Choose the pairs of the next device task: whole device batches for about `SLICE` seconds.

        `speed` is in pairs a second, 0 if it is not known yet.
        """
        budget = None if self._is_over else self._budget
        seconds = SLICE if budget is None else min(SLICE, budget - self._spent)
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
        """Store the values of a slice; `speed` as in `next_slice`."""
        if not self._parts:
            self._since = now - scored.seconds
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
        if (
            self._budget is not None
            and not self._is_over
            and speed
            and self._spent + self._device_batch / speed > self._budget
        ):
            self._spans, self._is_over = [], True

    def _joined(self, one: Scored, next_one: Scored) -> Scored | None:
        """Join a slice with the one that continues its last span; None if the exchange keeps them separate."""
        (*spans, last), (rest,) = one.spans, next_one.spans
        row = len(one.values) - self._exchange.rows([last])[0]
        both = self._exchange.joined(last, one.values[row:], rest, next_one.values)
        if both is None:
            return None
        span = (last[0], last[1] + rest[1])
        values = np.concatenate([one.values[:row], both])
        means = join_means([*one.means, *next_one.means])
        return Scored([*spans, span], values, one.seconds + next_one.seconds, means)

    def hand_in(self, now: float, everything: bool) -> HandIn | None:
        """Return what to send now, or None; with `everything`, also if more will come."""
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
            final and len(parts) == len(self._parts),
            join_means(mean for part in parts for mean in part.means)[:MOST_NAMES],
        )

    def handed_in(self) -> None:
        """Drop the values that the coordinator has received."""
        self._parts = self._parts[self._offered :]
        self._offered = 0
