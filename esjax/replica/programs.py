"""The compiled functions of a run: they score pairs, add up what follows from their losses, and make the update."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt32

from esjax.config.settings import Config
from esjax.core.gradient import estimate, weigh
from esjax.core.noise import Rows, Totals
from esjax.core.population import deal, evaluate
from esjax.core.seeds import pair_seeds
from esjax.core.shaping import Shaped
from esjax.core.units import in_units
from esjax.data.packing import draw_windows, follow_windows
from esjax.models.member import Loss
from esjax.models.model import Model, Params
from esjax.replica import chunking
from esjax.replica.estimators.carried_state import first_states
from esjax.replica.estimators.estimator import Estimator, LossEstimator, make_estimator
from esjax.replica.estimators.frozen import trained_of
from esjax.replica.estimators.output_layer import make_output_gradient
from esjax.replica.estimators.partial_sums import Chunk, SumChunk, rows_read
from esjax.replica.optimizer import make_optimizer
from esjax.replica.transformation import fit_optimizer
from esjax.replica.update import Apply, TrainState, UpdateInfo, init_state, make_apply, make_apply_sum

Tokens = Array | tuple[()]
"""The training text; () for an update that does not read it."""

Draw = Callable[..., Array]
"""`(tokens, streams, step, pairs) -> windows` of these pairs."""


class Streams(NamedTuple):
    """Seeds of the run's streams of random numbers."""

    perturbations: UInt32[Array, "2"]
    windows: UInt32[Array, "2"]


class LossPrograms(NamedTuple):
    """Functions of a step that exchanges losses.

    Attributes:
        score: `(params, tokens, streams, step, pairs, count) -> losses`.
        weigh: `(state, tokens, streams, totals, count, pairs, weights) -> totals`: the weighted noise is added.
        weigh_and_apply: `(state, tokens, streams, totals, scale, slope, loss, count, pairs, weights) -> (state, info)`,
            see `_or_skip`.
        weighed_at_once: Shape of the pairs of a call of these two, see `chunking.shape_of_call`.
    """

    score: Callable[..., Array]
    weigh: Callable[..., Totals]
    weigh_and_apply: Callable[..., tuple[TrainState, UpdateInfo]]
    weighed_at_once: tuple[int, int]


class SumPrograms(NamedTuple):
    """Functions of a step that exchanges gradient sums.

    Attributes:
        add: `(count, pairs, state, tokens, streams, left) -> vector`: the sum of `left` of these pairs.
        apply: `(state, total, scale, loss) -> (state, info)`, see `_or_skip`.
    """

    add: Callable[..., Array]
    apply: Callable[..., tuple[TrainState, UpdateInfo]]


@dataclass(frozen=True)
class Programs:
    """The functions of a run. They hold none of its state; JAX compiles each at its first call.

    Attributes:
        estimator: How the run estimates the gradient.
        units: Unit of each leaf.
        chunk_pairs: Pairs that a device evaluates at a time.
        scored_at_once: Shape of the pairs of a call that scores, see `chunking.shape_of_call`.
        first: `(params) -> state` of step 0; not jitted.
        skip: `(state) -> state` after a void step.
        exchanged: The functions for what the hosts exchange.
    """

    estimator: Estimator
    units: PyTree
    chunk_pairs: int
    scored_at_once: tuple[int, int]
    first: Callable[[Params], TrainState]
    skip: Callable[[TrainState], TrainState]
    exchanged: LossPrograms | SumPrograms


def make_programs(
    config: Config,
    model: Model,
    params: Params,
    mesh: Mesh,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Programs:
    """Make the functions; nothing is compiled yet. See `Replica` for the arguments and errors.

    `params` are the initial parameters; apart from their shapes, only units that the model does not name follow from
    them.
    """
    units = model.units(params)
    optimizer = make_optimizer(config.optim, config.steps) if optimizer is None else fit_optimizer(optimizer, params)
    estimator = make_estimator(config, model, params, units, loss, packed=not chunking.is_cpu(mesh))
    chunk_pairs = config.es.chunk_pairs or chunking.chunk_pairs(config, estimator, mesh)
    draw = _make_draw(config)
    apply = make_apply(optimizer, units, config.optim.average, trained_of(config.es.frozen, params))

    def first(params: Params) -> TrainState:
        feedback = () if isinstance(estimator, LossEstimator) else estimator.feedback
        return init_state(params, in_units(optimizer, units), first_states(config, model, params), feedback)

    def skip(state: TrainState) -> TrainState:
        return replace(state, step=state.step + 1, carried=first_states(config, model, state.params))

    if isinstance(estimator, LossEstimator):
        exchanged: LossPrograms | SumPrograms = _for_losses(
            config, model, units, estimator, draw, apply, skip, mesh, chunk_pairs
        )
    else:
        exchanged = SumPrograms(
            jax.jit(_make_add(estimator.sum_chunk, draw, estimator.vector_length, mesh)),
            _or_skip(make_apply_sum(apply, estimator.gradient, estimator.zeros), skip),
        )
    return Programs(
        estimator=estimator,
        units=units,
        chunk_pairs=chunk_pairs,
        scored_at_once=chunking.shape_of_call(chunking.call_pairs(config, chunking.CALL_PAIRS), chunk_pairs, mesh),
        first=first,
        skip=jax.jit(skip),
        exchanged=exchanged,
    )


def _make_draw(config: Config) -> Draw:
    """Make the function that draws the windows of some pairs."""
    data = config.data

    def draw(tokens: Array, streams: Streams, step: Array, pairs: UInt32[Array, " pairs"]) -> Array:
        if data.carry:
            places = pair_seeds(streams.windows, 0, pairs)
            return follow_windows(tokens, places, data.batch_size, data.window_length, step)
        groups = pairs // config.es.pairs_a_window
        window_seeds = pair_seeds(streams.windows, step // data.new_tokens_interval, groups)
        return draw_windows(tokens, window_seeds, data.batch_size, data.window_length)

    return draw


def _for_losses(
    config: Config,
    model: Model,
    units: PyTree,
    estimator: LossEstimator,
    draw: Draw,
    apply: Apply,
    skip: Callable[[TrainState], TrainState],
    mesh: Mesh,
    chunk_pairs: int,
) -> LossPrograms:
    """Make the functions of a step that exchanges losses."""
    weighed_pairs = chunking.weighed_pairs(config, estimator, mesh)
    weighed_at_once = chunking.shape_of_call(
        chunking.call_pairs(config, chunking.CALL_WEIGHED_PAIRS), weighed_pairs, mesh
    )
    es = config.es
    output_gradient = (
        make_output_gradient(model, units, draw, config.data, es.deviation, es.pairs_a_window, mesh)
        if estimator.is_output_exact
        else None
    )

    def pair_loss(params: Params, example: _Example, key: Array) -> Array:
        # Draw the windows of a pair here. Outside, every device would draw the windows of all pairs.
        tokens, streams, step, pair = example
        return estimator.loss(params, draw(tokens, streams, step, pair[None])[0], key)

    noise = estimator.noise
    losses = evaluate(
        pair_loss,
        noise,
        batch_axis=_Example(None, None, None, 0),
        mesh=mesh,
        chunk_pairs=chunk_pairs,
        precision=es.precision,
    )

    def score(params: Params, tokens: Array, streams: Streams, step: Array, pairs: Array, count: Array) -> Array:
        seeds = pair_seeds(streams.perturbations, step, pairs.reshape(-1))
        return losses(params, seeds, _Example(tokens, streams, step, pairs.reshape(-1)), count)

    def rows(tokens: Tokens, streams: Streams, step: Array, pairs: Array) -> Rows | None:
        if not estimator.embeddings:
            return None
        return rows_read(estimator.embeddings, draw(tokens, streams, step, pairs))

    sums = weigh(noise, mesh=mesh, chunk_pairs=weighed_pairs)
    gradient = estimate(noise, mesh=mesh, chunk_pairs=weighed_pairs)

    def weigh_pairs(
        state: TrainState,
        tokens: Tokens,
        streams: Streams,
        totals: Totals,
        count: Array,
        pairs: Array,
        weights: Array,
    ) -> Totals:
        pairs = pairs.reshape(-1)
        seeds, read = pair_seeds(streams.perturbations, state.step, pairs), rows(tokens, streams, state.step, pairs)
        return sums(state.params, seeds, weights.reshape(pairs.size, *weights.shape[2:]), count, totals, read)

    def weigh_and_apply(
        state: TrainState,
        tokens: Tokens,
        streams: Streams,
        totals: Totals,
        scale: Array,
        slope: Array,
        loss: Array,
        count: Array,
        pairs: Array,
        weights: Array,
    ) -> tuple[TrainState, UpdateInfo]:
        pairs = pairs.reshape(-1)
        seeds, read = pair_seeds(streams.perturbations, state.step, pairs), rows(tokens, streams, state.step, pairs)
        shaped = Shaped(weights.reshape(pairs.size, *weights.shape[2:]), scale, 0)
        found = gradient(state.params, seeds, shaped, count, totals, read)
        if output_gradient is not None:
            found = output_gradient(found, state.params, slope, tokens, streams, state.step)
        return apply(state, found, loss)

    return LossPrograms(jax.jit(score), jax.jit(weigh_pairs), _or_skip(weigh_and_apply, skip), weighed_at_once)


def _or_skip(
    apply: Callable[..., tuple[TrainState, UpdateInfo]], skip: Callable[[TrainState], TrainState]
) -> Callable[..., tuple[TrainState, UpdateInfo]]:
    """Jit an update that is skipped if it is not finite.

    The new state takes the place of the old one in memory, so the arrays of the old one are given up. Both come first,
    so that each array takes the place of the one of its name.
    """

    def apply_or_skip(state: TrainState, *arguments: Any) -> tuple[TrainState, UpdateInfo]:
        applied, info = apply(state, *arguments)
        is_finite = jnp.isfinite(info.update_norm)
        # A condition, not `where`, with which XLA would fuse the arithmetic of the update, and round it differently.
        return jax.lax.cond(is_finite, lambda new, old: new, lambda new, old: old, applied, skip(state)), info

    return jax.jit(apply_or_skip, donate_argnums=0, keep_unused=True)


def _make_add(sum_chunk: SumChunk, draw: Draw, vector_length: int, mesh: Mesh) -> Callable[..., Array]:
    """Make the function that adds up the gradient of some pairs."""

    def add(
        chunk: Array, total: Array, state: TrainState, tokens: Array, streams: Streams, pairs: Array, left: Array
    ) -> Array:
        ours, are_there = pairs[chunk], jnp.arange(pairs.shape[1]) < left - chunk * pairs.shape[1]
        seeds = pair_seeds(streams.perturbations, state.step, ours)
        windows = draw(tokens, streams, state.step, ours)
        return total + sum_chunk(state, Chunk(ours, seeds, windows, are_there))

    add_all = deal(mesh, add)

    def sum_pairs(count: Array, pairs: Array, state: TrainState, tokens: Array, streams: Streams, left: Array) -> Array:
        chunks = -(-count // pairs.shape[1])
        return add_all(chunks, jnp.zeros(vector_length, jnp.int32), state, tokens, streams, pairs, left)

    return sum_pairs


class _Example(NamedTuple):
    """The example of a pair: the text, the seeds and the step that draw windows from it, and the pair's number."""

    tokens: Any
    streams: Any
    step: Any
    pair: Any
