"""(params, seeds, windows) -> one vector of integers: a chunk's part of the gradient, see `esjax.sums`."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from esjax.activation import EstimateChunk
from esjax.config import MOST_SUMMED_PAIRS
from esjax.evaluate import Evaluate
from esjax.fitness import LARGEST_LOSS, LIMIT, STEPS_PER_DEVIATION
from esjax.models.model import Params
from esjax.noise import Space, fold
from esjax.sums import DIFFERENCE_STEPS, HEADROOM, LARGEST, LOSS_STEPS

SumChunk = Callable[
    [
        Params,
        Float[Array, ""],
        UInt32[Array, "pairs 2"],
        Int[Array, "pairs sequences length"],
        Bool[Array, " pairs"],
    ],
    Int[Array, " numbers"],
]
"""`(params, spread, seeds, windows, are_there) -> vector`; the spread is `TrainState.spread`, and a pair that is not
there counts for nothing."""


def make_sum_of_activations(estimate_chunk: EstimateChunk, units: PyTree, steps: float) -> SumChunk:
    """Make the function for noise on activations.

    Args:
        estimate_chunk: See `esjax.activation`.
        units: Size of a typical entry of each leaf, see `Model.units`; the sum is in these units.
        steps: Resolution, see `esjax.sums.steps_per_nat`.
    """

    def sum_chunk(
        params: Params,
        spread: Float[Array, ""],
        seeds: UInt32[Array, "pairs 2"],
        windows: Int[Array, "pairs sequences length"],
        are_there: Bool[Array, " pairs"],
    ) -> Int[Array, " numbers"]:
        pairs, sequences, length = windows.shape
        of_sequences = fold(seeds[:, None], jnp.arange(sequences, dtype=jnp.uint32)[None]).reshape(-1, 2)
        are_all_there = jnp.repeat(are_there, sequences)
        found = estimate_chunk(params, of_sequences, windows.reshape(-1, length), are_all_there)
        most = min(steps * HEADROOM * pairs * sequences * length, LARGEST / 2)  # float32 rounds LARGEST itself up
        whole = jax.tree.map(
            lambda leaf, unit: jnp.clip(jnp.rint(leaf * (unit * steps)), -most, most), found.gradient, units
        )
        finite, losses = found.finite.reshape(pairs, sequences), found.losses.reshape(pairs, sequences)
        return _join(whole, finite.all(axis=1), losses.mean(axis=1), jnp.zeros(pairs))

    return sum_chunk


def make_sum_of_weights(space: Space, evaluate_chunk: Evaluate, shaping: Literal["zscore", "sign"]) -> SumChunk:
    """Make the function for noise on weights.

    No host knows the differences of all pairs here, so a z-score is over their spread in the step before; in a first
    step only signs count.
    """

    def sum_chunk(
        params: Params,
        spread: Float[Array, ""],
        seeds: UInt32[Array, "pairs 2"],
        windows: Int[Array, "pairs sequences length"],
        are_there: Bool[Array, " pairs"],
    ) -> Int[Array, " numbers"]:
        losses = evaluate_chunk(params, seeds, windows)
        finite = jnp.all(jnp.abs(losses) < LARGEST_LOSS, axis=1) & are_there
        difference = jnp.where(finite, losses[:, 0] - losses[:, 1], 0.0)
        if shaping == "sign":
            weights = jnp.sign(difference)
        else:
            deviations = jnp.where(spread > 0, difference / jnp.maximum(spread, 1e-30), jnp.sign(difference))
            weights = jnp.clip(jnp.rint(deviations * STEPS_PER_DEVIATION), -LIMIT, LIMIT)
        total = space.weigh(space.sample(seeds), weights)
        return _join(total, finite, losses.mean(axis=1), jnp.abs(difference))

    return sum_chunk


def _join(
    total: PyTree, finite: Bool[Array, " pairs"], losses: Float[Array, " pairs"], differences: Float[Array, " pairs"]
) -> Int[Array, " numbers"]:
    def sum_up(values: Float[Array, " pairs"], steps: int) -> Int[Array, ""]:
        most = LARGEST / MOST_SUMMED_PAIRS / steps  # nats: so no sum over a step overflows
        return jnp.sum(jnp.rint(jnp.clip(jnp.where(finite, values, 0.0), -most, most) * steps).astype(jnp.int32))

    gradient, _ = ravel_pytree(total)
    tail = jnp.stack(
        [jnp.sum(finite, dtype=jnp.int32), sum_up(losses, LOSS_STEPS), sum_up(differences, DIFFERENCE_STEPS)]
    )
    return jnp.concatenate([gradient.astype(jnp.int32), tail])
