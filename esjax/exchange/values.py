"""What hosts send for the pairs that they scored: losses or gradient sums, as two classes of one protocol."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32
from numpy import ndarray

from esjax.config.settings import MOST_SUMMED_PAIRS, EsConfig
from esjax.core.shaping import LARGEST_LOSS, shape
from esjax.exchange.gradient_sums import ANYTHING, LARGEST, LOSS_STEPS, TAIL, Bounds, SumBounds
from esjax.exchange.update_record import (
    SPAN_LIMIT,
    Span,
    Update,
    UpdateHeader,
    pack_sums,
    pack_update,
    pair_count,
    pairs_of,
    sums_of,
)
from esjax.exchange.usual_sums import UsualSums

MAX_REQUEST = 2**22
"""Most bytes of one frame of a request; an unknown sender can occupy memory for a few of them."""

SLOT_PAIRS = 2**20
"""Pairs in the range of one host, in a step with a time budget."""

AGREE = 1e-4
"""Largest difference in nats between two hosts' losses of one pair; different hardware differs by far less."""

AGREE_REWARDS = 1e-6
"""Largest relative difference between two hosts' mean rewards of one member, beside the declared tolerance: floats of
32 bits."""

MOST_FAILED, FEW_FAILED = 0.5, 16
"""Most pairs whose reward may have failed at one of two hosts alone, since a slow host exceeds the time limit: so large
a part, or so many in any case."""

AGREE_SUMS = 0.05
"""Largest relative difference between two hosts' gradient sums of a lease quantum. A weight near the middle between two
integers may be rounded to either. Gradients are compared relative to their largest number, each number of the tail
relative to itself."""

AGREE_STEPS = 2
"""Difference that two numbers of a gradient sum may have in any case: rounding changes small numbers by as much."""

Losses = Float32[ndarray, "_ 2"]
Sums = Int[ndarray, "_ _"]
Values = Losses | Sums
"""The losses of pairs, [pairs, 2], or a gradient sum for each span of them, [spans, vector_length]."""


class Conclusion(NamedTuple):
    """What the update of a step is made from.

    Attributes:
        weights: Integer weights of the pairs, or the gradient sum; empty for a void step.
        scale: Factor of the weighted sum, see `esjax.core.Shaped`.
        loss: Mean of the finite losses, in nats per token if the loss is not custom; None: none is finite.
        void_pairs: Number of pairs of weight 0: with a loss that is not finite, or in a sum that is left out.
        trouble: Why the step is void, or "".
        slope: Shaped value for each unit of difference, see `esjax.core.Shaped`; 0 with gradient sums.
        outliers: Number of pairs that are no measure of others: their weights are clipped, see `esjax.core.Shaped`, or
            their gradient sums are left out, see `esjax.exchange.usual_sums`.
        note: What is wrong with some pairs, or "".
    """

    weights: Int[ndarray, " vector_length *halves"]
    scale: float
    loss: float | None
    void_pairs: int
    trouble: str
    slope: float = 0.0
    outliers: int = 0
    note: str = ""


@runtime_checkable
class Exchange(Protocol):
    """What losses and gradient sums do differently.

    Attributes:
        vector_length: Length of a gradient sum; 0: hosts send losses.
        most_pairs: Most pairs that a host scores and sends at a time.
        most_spans: Most spans that a host scores and sends at a time.
        adds_up: Whether a span has one row of values, which can be added to the rows of other spans.
    """

    vector_length: int
    most_pairs: int
    most_spans: int
    adds_up: bool

    def pack(self, values: Values) -> tuple[str, bytes]:
        """Turn values into bytes.

        Returns:
            The type, for `Losses.dtype` in `esjax.hosts.protocol.wire`, and the bytes.
        """

    def unpack(self, spans: Sequence[Span], dtype: str, body: bytes) -> Values | None:
        """Read the values of some spans; None if the bytes have another size or type, or hold impossible values."""

    def rows(self, spans: Sequence[Span]) -> list[int]:
        """Return how many rows of the values belong to each span."""

    def portions(self, quanta: Sequence[Sequence[int]], values: Values) -> list[tuple[list[int], Values]]:
        """Split the values of some spans into the smallest parts that can be separated.

        Args:
            quanta: Number of pairs of each lease quantum, span by span.
            values: Values of these spans.

        Returns:
            For each part, the indices of its quanta in the list of all quanta, and its values.
        """

    def without_first(self, values: Values, pairs: int) -> Values | None:
        """Leave out the first pairs of a span's values; None if they cannot be separated."""

    def joined(self, span: Span, values: Values, next_span: Span, next_values: Values) -> Values | None:
        """Join the values of two consecutive spans to those of one span; None if they stay separate."""

    def merge(self, parts: Sequence[Values]) -> Values:
        """Combine the values of several spans, in this order."""

    def agree(self, one: Values, two: Values) -> bool:
        """Return whether two hosts' values of the same pairs are equal up to rounding on different hardware."""

    def conclude(self, values: Values, spans: Sequence[Span], es: EsConfig) -> Conclusion:
        """Compute what the update needs from all values of a step: losses in the order of the pairs, or all sums."""


class LossExchange:
    """Hosts send two losses for each pair, and the coordinator shapes them."""

    vector_length = 0
    most_pairs = MAX_REQUEST // 8
    most_spans = SPAN_LIMIT
    adds_up = False

    def __init__(self, bounds: Bounds = ANYTHING, tolerance: float | None = None) -> None:
        """Set up.

        Args:
            bounds: A loss out of bounds counts as not finite.
            tolerance: For a reward in Python: largest difference between two hosts' losses of a member. None: losses
                that devices compute.
        """
        self._bounds, self._tolerance = bounds, tolerance

    def pack(self, values: Losses) -> tuple[str, bytes]:
        """See `Exchange.pack`."""
        return "<f4", values.astype("<f4").tobytes()

    def unpack(self, spans: Sequence[Span], dtype: str, body: bytes) -> Losses | None:
        """See `Exchange.unpack`."""
        pairs = pair_count(spans)
        if dtype != "<f4" or len(body) != 8 * pairs:
            return None
        return np.frombuffer(body, "<f4").reshape(pairs, 2)

    def rows(self, spans: Sequence[Span]) -> list[int]:
        """See `Exchange.rows`."""
        return [count for _, count in spans]

    def portions(self, quanta: Sequence[Sequence[int]], values: Losses) -> list[tuple[list[int], Losses]]:
        """See `Exchange.portions`: one part for each quantum."""
        sizes = [size for span in quanta for size in span]
        return [([i], part) for i, part in enumerate(cut(values, sizes))]

    def without_first(self, values: Losses, pairs: int) -> Losses:
        """See `Exchange.without_first`."""
        return values[pairs:]

    def joined(self, span: Span, values: Losses, next_span: Span, next_values: Losses) -> None:
        """See `Exchange.joined`."""

    def merge(self, parts: Sequence[Losses]) -> Losses:
        """See `Exchange.merge`."""
        return np.concatenate(parts)

    def agree(self, one: Losses, two: Losses) -> bool:
        """See `Exchange.agree`."""
        # Mostly the bytes are equal, and comparing bytes is much faster.
        if one.tobytes() == two.tobytes():
            return True
        if self._tolerance is None:
            return bool(np.allclose(one, two, rtol=0, atol=AGREE, equal_nan=True))
        failed = np.isnan(one).any(axis=1), np.isnan(two).any(axis=1)
        at_one, scored = failed[0] != failed[1], ~(failed[0] | failed[1])
        are_close = np.isclose(one[scored], two[scored], rtol=AGREE_REWARDS, atol=self._tolerance)
        return bool(are_close.all() and at_one.sum() <= max(MOST_FAILED * len(one), FEW_FAILED))

    def conclude(self, values: Losses, spans: Sequence[Span], es: EsConfig) -> Conclusion:
        """See `Exchange.conclude`."""
        possible = (self._bounds.lowest_loss < values) & (values < self._bounds.highest_loss)
        if not possible.all():
            values = np.where(possible, values, np.float32(np.nan))
        windows = pairs_of(spans) // es.pairs_a_window if es.pairing == "split" else None
        shaped = shape(values, es.shaping, sigma=es.deviation, examples=windows)
        finite = values[np.abs(values) < LARGEST_LOSS] if shaped.void_pairs else values
        loss = float(finite.mean()) if finite.size else None
        weights = shaped.weights[:0] if shaped.trouble else shaped.weights
        void_pairs, outliers = int(shaped.void_pairs), int(shaped.outliers)
        note = _not_finite(void_pairs, len(values)) if void_pairs else ""
        return Conclusion(
            weights, float(shaped.scale), loss, void_pairs, shaped.trouble, float(shaped.slope), outliers, note
        )


class SumExchange:
    """Hosts send a gradient sum for each span, see `esjax.exchange.gradient_sums`, and the coordinator adds them up."""

    most_pairs = MOST_SUMMED_PAIRS
    adds_up = True

    def __init__(self, vector_length: int, scale: float = 0.0, bounds: Bounds = ANYTHING) -> None:
        """Set up.

        Args:
            vector_length: Length of a gradient sum.
            scale: Factor that turns the sum over a step into the estimate, times the number of finite pairs.
            bounds: What sums can be; others are refused.
        """
        self.vector_length = vector_length
        self._bounds = SumBounds(bounds, vector_length)
        self._usual = UsualSums(bounds.compared(vector_length))
        self.most_spans = max(1, MAX_REQUEST // (4 * vector_length))
        self._scale = scale

    def pack(self, values: Sums) -> tuple[str, bytes]:
        """See `Exchange.pack`."""
        return pack_sums(values)

    def unpack(self, spans: Sequence[Span], dtype: str, body: bytes) -> Int32[ndarray, "spans vector_length"] | None:
        """See `Exchange.unpack`."""
        sums = sums_of(body, len(spans), self.vector_length, dtype)
        if sums is None or not all(self._bounds.allow(total, *span) for total, span in zip(sums, spans, strict=True)):
            return None
        return sums

    def rows(self, spans: Sequence[Span]) -> list[int]:
        """See `Exchange.rows`."""
        return [1] * len(spans)

    def portions(self, quanta: Sequence[Sequence[int]], values: Sums) -> list[tuple[list[int], Sums]]:
        """See `Exchange.portions`: one part for each span."""
        ends = accumulate(len(span) for span in quanta)
        return [
            (list(range(end - len(span), end)), values[row : row + 1])
            for row, (span, end) in enumerate(zip(quanta, ends, strict=True))
        ]

    def without_first(self, values: Sums, pairs: int) -> Sums | None:
        """See `Exchange.without_first`."""
        return None if pairs else values

    def joined(self, span: Span, values: Sums, next_span: Span, next_values: Sums) -> Sums | None:
        """See `Exchange.joined`: up to `most_pairs`, so that the sum fits into 32 bits."""
        return values + next_values if span[1] + next_span[1] <= self.most_pairs else None

    def merge(self, parts: Sequence[Sums]) -> Int[ndarray, "1 vector_length"]:
        """See `Exchange.merge`."""
        if len(parts) == len(parts[0]) == 1:
            return parts[0]
        return np.concatenate(parts).sum(axis=0, dtype=np.int64, keepdims=True)

    def agree(self, one: Sums, two: Sums) -> bool:
        """See `Exchange.agree`."""
        if one.tobytes() == two.tobytes():
            return True
        size = np.abs(one.astype(np.int64))
        size[:, :-TAIL] = size[:, :-TAIL].max(initial=0)
        return bool((np.abs(one - two.astype(np.int64)) <= AGREE_SUMS * size + AGREE_STEPS).all())

    def conclude(self, values: Sums, spans: Sequence[Span], es: EsConfig) -> Conclusion:
        """See `Exchange.conclude`."""
        usual = self._usual.take(values)
        kept = values if usual.all() else values[usual]
        total = np.clip(kept.sum(axis=0, dtype=np.int64), -LARGEST, LARGEST)
        pairs, outliers = pair_count(spans), int(values[~usual, -TAIL].sum())
        counted, losses = int(total[-TAIL]), int(total[-TAIL + 1])
        loss = losses / LOSS_STEPS / counted if counted else None
        void_pairs = pairs - counted
        left_out = f"{outliers} of {pairs} pairs are in gradient sums far larger than usual" if outliers else ""
        note = left_out or (_not_finite(void_pairs, pairs) if void_pairs else "")
        trouble = ""
        if 2 * void_pairs > pairs:
            trouble = note
        elif not total[:-TAIL].any():
            trouble = "the gradient sum is 0"
        if trouble:
            return Conclusion(total[:0], 0.0, loss, void_pairs, trouble, 0.0, outliers, note)
        return Conclusion(total, self._scale / counted, loss, void_pairs, "", 0.0, outliers, note)


def _not_finite(void_pairs: int, pairs: int) -> str:
    return f"{void_pairs} of {pairs} pairs have a loss that is not finite"


def pack_conclusion(
    step: int, spans: list[Span], concluded: Conclusion, vector_length: int, halves: Literal[1, 2]
) -> bytes:
    """Turn the conclusion of a step into the bytes of its update.

    Args:
        step: Number of the step.
        spans: Pairs that were scored, in the order of their weights.
        concluded: The conclusion.
        vector_length: Length of a gradient sum; 0: the update has a weight for each pair.
        halves: Weights of each pair: 2 for split pairs, else 1.
    """
    header = UpdateHeader(
        step,
        spans,
        concluded.scale,
        not concluded.trouble,
        concluded.loss,
        concluded.void_pairs,
        vector_length,
        halves=halves,
        slope=concluded.slope,
    )
    return pack_update(Update(header, concluded.weights))


def make_exchange(
    vector_length: int, scale: float = 0.0, bounds: Bounds = ANYTHING, tolerance: float | None = None
) -> Exchange:
    """Return `SumExchange` for gradient sums of this length, `LossExchange` for 0; the rest as for these."""
    return SumExchange(vector_length, scale, bounds) if vector_length else LossExchange(bounds, tolerance)


def cut(values: Values, rows: Sequence[int]) -> list[Values]:
    """Split values into consecutive parts of the given numbers of rows."""
    return [values[end - count : end] for count, end in zip(rows, accumulate(rows), strict=True)]
