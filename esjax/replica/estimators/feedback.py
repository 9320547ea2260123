"""Learned feedback: a linear guess of the error of a layer from the error of the next one, as a control variate.

The noise of node perturbation estimates what is left of the error after the guess. The sum of both is unbiased whatever
the guess, since the feedback was fitted in earlier steps, on other draws; the better the guess, the smaller the
variance (control variates: Owen 2013, section 8.9; feedback weights learned from perturbations: Lansdell, Prakash &
Kording 2020). The feedback converges towards the transposed weights of the next layer, as weight mirrors do (Akrout et
al. 2019): with it, training approaches backpropagation within a token, though the feedback is learned and not computed
from the weights.
"""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from esjax.core.rules import HIGHEST

RATE = 0.03
"""First step size of the feedback, which Adam fits; it falls as 1 / sqrt(1 + step / 100)."""


@struct.dataclass
class Feedback:
    """The feedback of a run, a part of its state.

    Attributes:
        matrices: For each layer but the last, [entries of the next tap, entries of this tap].
        opt_state: State of its optimizer.
    """

    matrices: PyTree
    opt_state: PyTree


def _rule() -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_adam(0.9, 0.99), optax.scale_by_schedule(lambda count: RATE * (1 + count / 100) ** -0.5)
    )


def shapes_of(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the shapes of the feedback's matrices.

    Args:
        widths: Number of entries of each tap, from the first layer to the last.
    """
    return [(after, before) for before, after in pairwise(widths)]


def first_feedback(shapes: Sequence[tuple[int, int]]) -> Feedback:
    """Make feedback that guesses 0 everywhere."""
    matrices = [jnp.zeros(shape) for shape in shapes]
    return Feedback(matrices, _rule().init(matrices))


def guess(error: Float[Array, "rows after"], matrix: Float[Array, "after before"]) -> Float[Array, "rows before"]:
    """Guess the errors of a layer's outputs from those of the next tap."""
    return jnp.matmul(error, matrix, precision=HIGHEST)


def learn(feedback: Feedback, correlation: Int[Array, " numbers"]) -> Feedback:
    """Take a step along the correlation of the next tap's guesses with what this tap's guesses missed.

    Args:
        feedback: The feedback.
        correlation: The correlation summed over tokens, in any unit: the numbers of all matrices.
    """
    _, unravel = ravel_pytree(feedback.matrices)
    given = unravel(correlation.astype(jnp.float32))
    changes, opt_state = _rule().update(given, feedback.opt_state)
    return Feedback(optax.apply_updates(feedback.matrices, changes), opt_state)
