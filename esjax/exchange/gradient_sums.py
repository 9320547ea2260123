"""What hosts send in place of losses: their part of the gradient, as integers, which add up the same in any order.

A vector of int32: the part of the sum for each parameter, then three numbers of `TAIL`. What a step's vectors add up to
does not depend on who computed which of them, as long as each is of the same whole chunks of pairs.
"""

import math
from typing import NamedTuple

from jaxtyping import Int
from numpy import ndarray

TAIL = 3
"""Numbers after the gradient: pairs that count, their losses, and the sizes of their differences."""

LARGEST = 2**31 - 1
"""Largest sum; no part is larger either."""

LOSS_STEPS = 2**10
"""Resolution of a pair's loss: steps a nat."""

DIFFERENCE_STEPS = 2**13
"""Resolution of the size of a pair's difference: steps a nat."""

FINEST = 64.0
"""Steps a nat at most: the cosine with the exact gradient falls by a ten-thousandth, and sums fit into 16 bits."""

HEADROOM = 64
"""How large a token's part of a gradient may be, in nats a unit, before sums are cut off."""


class Concluded(NamedTuple):
    """What comes of a step's sum.

    Attributes:
        scale: Factor that makes the sum the estimate of the gradient.
        loss: Mean loss of the pairs that count, or None.
        void_pairs: Pairs that do not count, since a loss of theirs is not finite.
        trouble: Why the step must not be applied, or "".
    """

    scale: float
    loss: float | None
    void_pairs: int
    trouble: str = ""


def steps_per_nat(tokens: int) -> float:
    """Choose the resolution of a gradient: a power of two, as fine as is of use, with room for so many tokens."""
    room = LARGEST * (1 - 2.0**-20)  # the bounds of parts are rounded to float32
    return min(FINEST, 2.0 ** math.floor(math.log2(room / (HEADROOM * tokens))))


def may_be(total: Int[ndarray, " vector_length"], pairs: int) -> bool:
    """Tell whether a sum over so many pairs is one that an honest host may come to, as far as its tail shows it."""
    counted, _, differences = map(int, total[-TAIL:])  # losses may be below 0: a reward's are
    return 0 <= counted <= pairs and differences >= 0


def conclude(total: Int[ndarray, " vector_length"], pairs: int, scale: float) -> Concluded:
    """Read what a step's sum says.

    Args:
        total: The sum of the vectors of all its pairs.
        pairs: Number of its pairs.
        scale: Factor that makes the sum the estimate, times the number of pairs that count.
    """
    counted, losses = int(total[-TAIL]), int(total[-TAIL + 1])
    void_pairs = pairs - counted
    loss = losses / LOSS_STEPS / counted if counted else None
    if 2 * void_pairs > pairs:
        return Concluded(0.0, loss, void_pairs, f"{void_pairs} of {pairs} pairs have a loss that is not finite")
    if not total[:-TAIL].any():
        return Concluded(0.0, loss, void_pairs, "the two losses of every pair are equal")
    return Concluded(scale / counted, loss, void_pairs)
