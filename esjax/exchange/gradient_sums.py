"""Gradient sums: the integer vectors that hosts send in place of losses.

A gradient sum is a vector of int32: one number for each parameter, for each entry of the learned feedback and for each
entry of the carried state, then the `TAIL`. Integers add up to the same total in any order, so the total of a step does
not depend on which host computed which vector, as long as each vector covers whole chunks of pairs.
"""

import math

from jaxtyping import Int
from numpy import ndarray

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


def may_be(total: Int[ndarray, " vector_length"], pairs: int) -> bool:
    """Return whether the tail of a sum over `pairs` pairs is possible: no more pairs than that, no negative sizes."""
    counted, _, differences = map(int, total[-TAIL:])  # losses may be negative: those of a reward are
    return 0 <= counted <= pairs and differences >= 0
