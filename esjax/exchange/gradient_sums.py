"""Gradient sums: the integer vectors that hosts send in place of losses.

A gradient sum is a vector of int32: one number for each parameter, for each entry of the learned feedback and for each
entry of the carried state, then the `TAIL`. Integers add up to the same total in any order, so the total of a step does
not depend on which host computed which vector, as long as each vector covers whole chunks of pairs.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from esjax.core.shaping import LARGEST_LOSS

TAIL = 3
"""Numbers after the gradient: the count of finite pairs, their summed losses, and their summed absolute differences."""

LARGEST = 2**31 - 1
"""Largest number in a gradient sum or in a part of one."""

LOSS_STEPS = 2**10
"""Resolution of a pair's loss, in steps per nat."""

DIFFERENCE_STEPS = 2**13
"""Resolution of a pair's absolute difference, in steps per nat."""

FINEST = 64.0
"""Most steps per nat: the cosine with the exact gradient falls by a ten-thousandth, and sums fit into 16 bits."""

HEADROOM = 64
"""Largest gradient of one token that fits, in nats per unit of its leaf; larger ones are clipped."""


def steps_per_nat(tokens: int) -> float:
    """Choose the resolution of a gradient over `tokens` tokens.

    Returns:
        Steps per nat, a power of two of at most `FINEST`, so that `HEADROOM` nats per token fit into 32 bits.
    """
    room = LARGEST * (1 - 2.0**-20)  # the bounds of the parts are rounded to float32
    return min(FINEST, 2.0 ** math.floor(math.log2(room / (HEADROOM * tokens))))


LARGEST_CROSS_ENTROPY = 1e3
"""A cross entropy of this many nats per token or more counts as not finite, and so does one below -1."""


class Section(NamedTuple):
    """Consecutive numbers of a gradient sum, and how large they can be.

    Attributes:
        kind: What they are: the gradient, the correlations that learned feedback follows, or carried states.
        length: How many numbers.
        most: Largest absolute value for each pair of the sum.
        per_pair: The section has so many numbers for each pair of the step, and a sum has zeros for all pairs but its
            own; `most` is then the largest absolute value. 0: every number is a sum over pairs.
    """

    kind: Literal["gradient", "feedback", "states"]
    length: int
    most: float
    per_pair: int = 0


class Bounds(NamedTuple):
    """What honest values can be.

    Attributes:
        lowest_loss: Losses are above this value.
        highest_loss: Losses are below this value.
        sections: Sections of a gradient sum, in their order, without the tail; none: numbers are not bounded.
        room: Most pairs of a step.
    """

    lowest_loss: float = -LARGEST_LOSS
    highest_loss: float = LARGEST_LOSS
    sections: tuple[Section, ...] = ()
    room: int = 1

    def places(self) -> list[slice]:
        """Return where each section is in a vector."""
        ends = np.cumsum([section.length for section in self.sections], dtype=int).tolist()
        return [slice(end - section.length, end) for end, section in zip(ends, self.sections, strict=True)]

    def compared(self, vector_length: int) -> list[slice]:
        """Return the parts of a vector whose norms have a usual size: all gradients, and the feedback if there is."""
        gradient, feedback = (
            sum(section.length for section in self.sections if section.kind == kind)
            for kind in ("gradient", "feedback")
        )
        gradient = gradient or vector_length - TAIL
        return [slice(0, gradient), slice(gradient, gradient + feedback)][: 1 + bool(feedback)]


ANYTHING = Bounds()
"""Bounds of the losses of a custom loss, and of sums of an unknown layout."""


class SumBounds:
    """Checks gradient sums against `Bounds`."""

    def __init__(self, bounds: Bounds, vector_length: int) -> None:
        """Set up for vectors of a length."""
        if bounds.sections and sum(section.length for section in bounds.sections) + TAIL != vector_length:
            raise ValueError(f"the sections do not fill a vector of {vector_length} numbers")
        self._sections = [*zip(bounds.places(), bounds.sections, strict=True)]
        self._most_of_pair = LARGEST // bounds.room if bounds.sections else LARGEST
        self._least_loss = -1 if bounds.lowest_loss > -LARGEST_LOSS else -self._most_of_pair

    def allow(self, total: Int[ndarray, " vector_length"], first: int, count: int) -> bool:
        """Return whether a vector can be the sum over the pairs from `first` to `first + count - 1`."""
        counted, losses, differences = map(int, total[-TAIL:])  # losses may be negative: those of a reward are
        if not 0 <= counted <= count or not 0 <= differences <= self._most_of_pair * counted:
            return False
        if not self._least_loss * counted <= losses <= self._most_of_pair * counted:
            return False
        return all(_allow(total[where], section, first, count) for where, section in self._sections)


def _allow(numbers: Int[ndarray, " length"], section: Section, first: int, count: int) -> bool:
    if not section.length:
        return True
    most = section.most
    if section.per_pair:
        begin, end = first * section.per_pair, (first + count) * section.per_pair
        if numbers[:begin].any() or numbers[end:].any():
            return False
    else:
        most *= count
    return bool(-most <= numbers.min() and numbers.max() <= most)
