"""The usual size of gradient sums: a sum far beyond it is left out of its step.

The bounds of `SumBounds` leave room for the largest gradient of every token, far more than honest sums have. So a sum
is also compared with those of recent steps. The norm of a sum over n pairs grows like √n as long as noise dominates,
and like n if the pairs agree; both are allowed.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from esjax.exchange.gradient_sums import TAIL

LARGEST_RATIO = 3.4
"""Norm of a sum, as a multiple of the usual norm, from which on it is left out."""

FEW_PAIRS, FEW_NUMBERS = 6.0, 4.0
"""The multiple is larger by `FEW_PAIRS` / √n, and this by the factor 1 + `FEW_NUMBERS` / √length, since the norms of a
few pairs and of a few numbers vary more."""

MEMORY = 0.7
"""Weight of a step in the usual norm, relative to the step after it. Short, since a gradient may grow step by step."""

LARGEST_GROWTH = 10.0
"""A step counts in the usual norm with at most this multiple of it."""

ROWS_TO_COMPARE = 3
"""Sums that a step needs so that they are compared with each other, if there was no step before."""

BLOCK = 2**22
"""Numbers whose norms are computed at a time."""


class UsualSums:
    """Finds sums that are far larger than usual, and remembers how large they are."""

    def __init__(self, parts: Sequence[slice]) -> None:
        """Set up without a memory; `parts` of the vectors are compared one by one, each by its Euclidean norm."""
        self._parts = [*parts, slice(-1, None)]  # the last number is the summed differences
        self._slack = np.array([*(1 + FEW_NUMBERS / np.sqrt(part.stop - part.start) for part in parts), 1.0])
        self._usual: Float[ndarray, " parts"] | None = None  # norm of a part, over √n
        self._pairs = 0.0

    def take(self, sums: Int[ndarray, "rows vector_length"]) -> Bool[ndarray, " rows"]:
        """Return which sums of a step are as large as usual, and remember how large its sums are."""
        pairs = np.maximum(sums[:, -TAIL], 1).astype(np.float64)
        sizes = self._norms(sums) / np.sqrt(pairs)[:, None]
        sizes[:, -1] /= np.sqrt(pairs)  # differences have one sign: their sum grows like n
        # The median pair: hosts that hold less than half of the pairs cannot move it far.
        order = np.argsort(sizes, axis=0)
        middle = (np.cumsum(pairs[order], axis=0) < pairs.sum() / 2).sum(axis=0)
        found = np.take_along_axis(sizes, order, axis=0)[middle, np.arange(sizes.shape[1])]
        found_pairs = float((pairs**2).sum() / pairs.sum())  # pairs in the sum of a pair, on average
        if self._usual is None and len(sums) < ROWS_TO_COMPARE:
            self._usual, self._pairs = found, found_pairs
            return np.ones(len(sums), bool)
        usual, usual_pairs = (found, found_pairs) if self._usual is None else (self._usual, self._pairs)
        usual = np.where(usual > 0, usual, found)
        ratio = (LARGEST_RATIO + FEW_PAIRS / np.sqrt(pairs))[:, None] * self._slack
        ratio[:, :-1] *= np.sqrt(np.maximum(pairs / usual_pairs, 1))[:, None]
        # Clipped, so that one step cannot make anything usual; yet what stays larger becomes usual within a few steps.
        self._usual = MEMORY * usual + (1 - MEMORY) * np.minimum(found, LARGEST_GROWTH * usual)
        self._pairs = MEMORY * usual_pairs + (1 - MEMORY) * found_pairs
        return ((sizes <= ratio * usual) | (usual == 0)).all(axis=1)

    def _norms(self, sums: Int[ndarray, "rows vector_length"]) -> Float[ndarray, "rows parts"]:
        rows = max(1, BLOCK // sums.shape[1])
        blocks = []
        for first in range(0, len(sums), rows):
            block = sums[first : first + rows].astype(np.float32)
            blocks.append([np.sqrt(np.einsum("ij,ij->i", block[:, part], block[:, part])) for part in self._parts])
        return np.concatenate([np.stack(block, axis=1) for block in blocks])
