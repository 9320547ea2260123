"""Layers that several models share, in plain jax.numpy."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.core.rules import HIGHEST
from esjax.core.units import VECTOR_UNIT
from esjax.data.tokens import STOP
from esjax.models.model import Logits, Tap

FIRST_LOGITS = 0.1
"""Size of the initial logits: small, so that a run starts near the uniform distribution."""


class Affine(NamedTuple):
    """The weights of x ↦ x `matrix` + `bias`, or their units: two numbers."""

    matrix: Any
    bias: Any


class Norm(NamedTuple):
    """The weights of an RMS norm, or their unit."""

    scale: Any
    """g, [width]."""


def matmul(x: Float[Array, " rows"], matrix: Float[Array, "rows columns"]) -> Float[Array, " columns"]:
    """Multiply a row vector by a matrix, with all digits of float32."""
    return jnp.matmul(x, matrix, precision=HIGHEST)


def affine(x: Float[Array, " rows"], layer: Affine) -> Float[Array, " columns"]:
    """Multiply a row vector by a layer's matrix and add its bias."""
    return matmul(x, layer.matrix) + layer.bias


def embed_tokens(tables: tuple[Float[Array, "vocabulary width"], ...], tokens: Int[Array, " last"]) -> Array:
    """Add up the rows of the last tokens, each from a table of its own; returns [width]."""
    rows = [table[tokens[i]] for i, table in enumerate(tables)]
    total: Array = sum(rows[1:], rows[0])
    return total


def head_units(width: int, head_size: int) -> tuple[Affine, Affine]:
    """Return the units of a head with one hidden layer, see `predict_by_head`."""
    return Affine(width**-0.5, VECTOR_UNIT), Affine(head_size**-0.5, VECTOR_UNIT)


def init_head(
    hidden_key: Key[Array, ""], output_key: Key[Array, ""], width: int, head_size: int, vocab_size: int
) -> tuple[Affine, Affine]:
    """Draw the initial weights of a head with one hidden layer, see `predict_by_head`."""
    hidden = math.sqrt(2 / width) * jax.random.normal(hidden_key, (width, head_size))
    output = FIRST_LOGITS * head_size**-0.5 * jax.random.normal(output_key, (head_size, vocab_size))
    return Affine(hidden, jnp.zeros(head_size)), Affine(output, jnp.zeros(vocab_size))


def predict_by_head(x: Float[Array, " width"], head_hidden: Affine, head_output: Affine, tap: Tap) -> Logits:
    """Return relu(x W1 + b1) W2 + b2, with taps "hidden" and "logits"."""
    hidden = tap("hidden", affine(x, head_hidden), jax.nn.relu)
    return tap("logits", affine(hidden, head_output))


def rms_norm(x: Float[Array, " width"], norm: Norm, eps: float) -> Float[Array, " width"]:
    """Divide by the root mean square and multiply by the scale (Zhang & Sennrich 2019, section 4)."""
    return norm.scale * (x * jax.lax.rsqrt(jnp.mean(x * x) + eps))


def linear_recurrence(
    keep: Float[Array, "length width"], added: Float[Array, "length width"], first: Float[Array, " width"]
) -> Float[Array, "length width"]:
    """Compute h <- keep_t * h + added_t for all t in parallel (Blelloch 1990, section 1.4), beginning with `first`."""

    def join(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * two[0], two[0] * one[1] + two[1]

    return jax.lax.associative_scan(join, (keep, added.at[0].add(keep[0] * first)))[1]


def last_tokens(tokens: Int[Array, " length"], before: Int[Array, " older"]) -> Int[Array, "length older+1"]:
    """Return each token and as many older ones of its document as `before` holds, the newest first.

    STOP stands for tokens before the document. The row of a STOP is that of a new document.

    Args:
        tokens: Ids, at least one.
        before: Those before the first token, the newest first.
    """
    columns = [tokens]
    for age in range(1, len(before) + 1):
        older = jnp.concatenate([before[:age][::-1], tokens])[: len(tokens)]
        columns.append(jnp.where(columns[-1] == STOP, STOP, older))
    return jnp.stack(columns, axis=1)
