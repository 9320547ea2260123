"""Partial sums: from a chunk of pairs to one vector of integers, its part of the gradient sum.

See `esjax.exchange.gradient_sums` for the layout of the vector.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from esjax.core.gradient import weigh
from esjax.core.noise import Noise, Rows
from esjax.core.population import Evaluate
from esjax.core.seeds import fold
from esjax.core.shaping import LIMIT, OUTLYING, STEPS_PER_DEVIATION, is_finite
from esjax.data.tokens import STOP
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, HEADROOM, LARGEST, LOSS_STEPS
from esjax.models.model import Model
from esjax.replica.estimators.carried_state import among_zeros, states_of
from esjax.replica.estimators.taps import EstimateChunk
from esjax.replica.update import TrainState


class Chunk(NamedTuple):
    """Pairs of a step that one device evaluates at a time.

    Attributes:
        pairs: Numbers of the pairs.
        seeds: Seeds of their noise.
        windows: Token ids that they are scored on.
        are_there: False for pairs that only pad the last chunk; they count for nothing.
    """

    pairs: UInt32[Array, " pairs"]
    seeds: UInt32[Array, "pairs 2"]
    windows: Int[Array, "pairs sequences length"]
    are_there: Bool[Array, " pairs"]


SumChunk = Callable[[TrainState, Chunk], Int[Array, " vector_length"]]
"""`(state, chunk) -> vector`, int32."""


def make_sum_of_activations(
    model: Model, estimate_chunk: EstimateChunk, units: PyTree, pairs: int, tokens: int, steps: float
) -> SumChunk:
    """Make the function for noise on activations.

    Args:
        model: The architecture.
        estimate_chunk: See `esjax.replica.estimators.discount`.
        units: Unit of each leaf, see `Model.units`; the sum is in these units.
        pairs: Most pairs of a step, for which sums must have room.
        tokens: Tokens that a pair is scored on.
        steps: Resolution of the sums, see `steps_per_nat`.
    """

    def sum_chunk(state: TrainState, chunk: Chunk) -> Int[Array, " vector_length"]:
        here, sequences, length = chunk.windows.shape
        of_sequences = fold(chunk.seeds[:, None], jnp.arange(sequences, dtype=jnp.uint32)[None]).reshape(-1, 2)
        are_all_there = jnp.repeat(chunk.are_there, sequences)
        begin = states_of(model, state.params, state.carried, chunk.pairs)
        found = estimate_chunk(
            state.params, state.feedback.matrices, of_sequences, chunk.windows.reshape(-1, length), are_all_there, begin
        )
        # Clipped at this size, the parts of all chunks add up to at most `LARGEST`.
        most = jnp.minimum(steps * HEADROOM * tokens * jnp.sum(chunk.are_there, dtype=jnp.float32), 2.0**30)

        def whole(leaf: Array, unit: float | Array) -> Array:
            return jnp.clip(jnp.rint(leaf * (unit * steps)), -most, most)

        total = jax.tree.map(whole, found.gradient, units), [whole(part, 1.0) for part in found.correlations]
        finite, losses = found.finite.reshape(here, sequences), found.losses.reshape(here, sequences)
        ends = among_zeros(found.end, found.finite, state.carried, chunk.pairs)
        return _join(total, ends, finite.all(axis=1), losses.mean(axis=1), jnp.zeros(here), pairs)

    return sum_chunk


def rows_read(embeddings: Sequence[str], windows: Int[Array, "pairs sequences length"]) -> Rows:
    """Return the tokens of each pair's windows, by path: the rows of the embeddings that its members read."""
    tokens = windows.reshape(len(windows), -1)
    # STOP is added: a model may read its row before the first token.
    return dict.fromkeys(embeddings, jnp.pad(tokens, [(0, 0), (0, 1)], constant_values=STOP))


def make_sum_of_weights(
    noise: Noise, evaluate_chunk: Evaluate, shaping: Literal["zscore", "sign"], pairs: int, embeddings: Sequence[str]
) -> SumChunk:
    """Make the function for noise on weights.

    A host does not know the differences of all pairs, so a z-score divides by their standard deviation in the step
    before; in the first step only signs count. A chunk has at most `Noise.exact_pairs` pairs.

    Args:
        noise: How members differ.
        evaluate_chunk: See `esjax.core.evaluate`.
        shaping: How a difference becomes a weight.
        pairs: Most pairs of a step, for which sums must have room.
        embeddings: Paths of parameters whose rows a pair reads by token, see `Model.embeddings`.
    """
    weigh_pairs = weigh(noise, chunk_pairs=noise.exact_pairs)

    def sum_chunk(state: TrainState, chunk: Chunk) -> Int[Array, " vector_length"]:
        assert len(chunk.pairs) <= noise.exact_pairs  # float32 holds every integer up to 2^24
        losses = evaluate_chunk(state.params, chunk.seeds, chunk.windows)
        finite = is_finite(losses) & chunk.are_there
        difference = jnp.where(finite, losses[:, 0] - losses[:, 1], 0.0)
        if shaping == "sign":
            weights = jnp.sign(difference)
        else:
            in_spreads = difference / jnp.maximum(state.spread, 1e-30)
            deviations = jnp.where(state.spread > 0, in_spreads, jnp.sign(difference))
            weights = jnp.clip(jnp.rint(deviations * STEPS_PER_DEVIATION), -LIMIT, LIMIT)
        rows = rows_read(embeddings, chunk.windows)
        total = weigh_pairs(state.params, chunk.seeds, weights.astype(jnp.int8), rows=rows)
        # An outlier must not make the differences of the next step small.
        most = jnp.where(state.spread > 0, OUTLYING * state.spread, jnp.inf)
        sizes = jnp.minimum(jnp.abs(difference), most)
        return _join(total, jnp.zeros(0, jnp.int32), finite, losses.mean(axis=1), sizes, pairs)

    return sum_chunk


def _join(
    total: PyTree,
    ends: Int[Array, " states"],
    finite: Bool[Array, " pairs"],
    losses: Float[Array, " pairs"],
    differences: Float[Array, " pairs"],
    room: int,
) -> Int[Array, " vector_length"]:
    def sum_up(values: Float[Array, " pairs"], steps: int) -> Int[Array, ""]:
        whole = jnp.rint(jnp.clip(jnp.where(finite, values, 0.0) * steps, -(2.0**30), 2.0**30)).astype(jnp.int32)
        most = LARGEST // room  # per pair, so that no sum over a step overflows
        return jnp.sum(jnp.clip(whole, -most, most))

    gradient, _ = ravel_pytree(total)
    tail = jnp.stack(
        [jnp.sum(finite, dtype=jnp.int32), sum_up(losses, LOSS_STEPS), sum_up(differences, DIFFERENCE_STEPS)]
    )
    return jnp.concatenate([gradient.astype(jnp.int32), ends, tail])
