"""A host's copy of the run. It scores pairs and applies updates; it uses no clock, no file and no network."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Int32, Integer, UInt32

from esjax.config.settings import Config
from esjax.core.gradient import estimate, weigh
from esjax.core.noise import Rows, Totals
from esjax.core.population import deal, evaluate
from esjax.core.seeds import PERTURBATIONS, pair_seeds, stream_seed
from esjax.core.shaping import Shaped
from esjax.core.units import in_units
from esjax.data.packing import check_stream, draw_windows, follow_windows
from esjax.errors import EsjaxError
from esjax.exchange.update_record import Span, pairs_of, unpack_update
from esjax.flags import default_flags
from esjax.models.custom.check import check_float32
from esjax.models.member import Loss
from esjax.models.model import Model, Params
from esjax.replica import chunking
from esjax.replica.estimators.carried_state import first_states
from esjax.replica.estimators.estimator import LossEstimator, make_estimator
from esjax.replica.estimators.frozen import trained_of
from esjax.replica.estimators.output_layer import OutputGradient, make_output_gradient
from esjax.replica.estimators.partial_sums import Chunk, SumChunk, rows_read
from esjax.replica.optimizer import make_optimizer
from esjax.replica.streams import INIT, WINDOWS
from esjax.replica.texts import TextLosses, TextScorer
from esjax.replica.transformation import fit_optimizer
from esjax.replica.update import Apply, TrainState, UpdateInfo, init_state, make_apply, make_apply_sum

_Tokens = Array | tuple[()]
"""The training text; () for an update that does not read it."""


class Replica:
    """The training state and the compiled functions that score pairs and update it.

    Attributes:
        model: The architecture.
        units: Unit of each leaf.
        state: Everything that a later step depends on.
        chunk_pairs: Pairs that a device evaluates at a time. A pair has the same losses to the last bit on any devices
            and in any call, as long as its chunk holds the same pairs.
        device_batch: Pairs that all devices together evaluate at a time; with fewer, some devices are idle.
        vector_length: Length of the vectors of `sums`; 0 if the run exchanges losses.
        scale: The estimate is `scale` times the gradient sum, over the number of pairs that are not void.
        bounds: What honest losses or gradient sums can be.
        reads_tokens: Whether an update needs the text, see `use_tokens`.
        halves: (2,) for split pairs, which have two weights each; else ().
    """

    @default_flags()
    def __init__(
        self,
        config: Config,
        model: Model,
        stream: Integer[np.ndarray, " length"] | None,
        mesh: Mesh,
        loss: Loss | None = None,
        optimizer: optax.GradientTransformation | None = None,
        scorer: TextScorer | None = None,
    ) -> None:
        """Make the initial parameters and the functions; nothing is compiled yet.

        Args:
            config: Settings of the run.
            model: The architecture.
            stream: Packed training documents, see `use_tokens`. None: pairs cannot be scored before `use_tokens`.
            mesh: Devices that share the population, of this process or of several.
            loss: Loss of one member on one window, the burn-in included. None: cross entropy.
            optimizer: Any optax transformation. None: the one that the settings name.
            scorer: Scores text that members write, if the settings name prompts. None: pairs cannot be scored then.

        Raises:
            EsjaxError: The text is shorter than a window, a parameter is not float32, or the estimator or the optimizer
                cannot be used, see `make_estimator` and `fit_optimizer`.
        """
        params = model.init(jax.random.wrap_key_data(stream_seed(config.seed, INIT), impl="threefry2x32"))
        check_float32(params)
        units = model.units(params)
        if optimizer is None:
            optimizer = make_optimizer(config.optim, config.steps)
        else:
            optimizer = fit_optimizer(optimizer, params)
        estimator = make_estimator(config, model, params, units, loss, packed=not chunking.is_cpu(mesh))
        data, es = config.data, config.es
        window_length = data.tokens_before + data.window

        def draw(tokens: Array, streams: _Streams, step: Array, pairs: UInt32[Array, " pairs"]) -> Array:
            """Draw the windows of some pairs."""
            if data.carry:
                places = pair_seeds(streams.windows, 0, pairs)
                return follow_windows(tokens, places, data.batch_size, window_length, step)
            groups = pairs // es.pairs_a_window
            window_seeds = pair_seeds(streams.windows, step // data.new_tokens_interval, groups)
            return draw_windows(tokens, window_seeds, data.batch_size, window_length)

        chunk_pairs = es.chunk_pairs or chunking.chunk_pairs(config, estimator, mesh)
        self.model = model
        self.units = units
        self.chunk_pairs = chunk_pairs
        self.device_batch = chunk_pairs * mesh.size
        self.vector_length = estimator.vector_length
        self.scale = estimator.scale
        self.bounds = estimator.bounds
        self.reads_tokens = False
        self.halves = () if es.weights_per_pair == 1 else (es.weights_per_pair,)
        self._mesh = mesh
        self._texts: TextLosses | None = None
        self._window_length = window_length
        self._scored_at_once = chunking.shape_of_call(
            chunking.call_pairs(config, chunking.CALL_PAIRS), chunk_pairs, mesh
        )
        apply = make_apply(optimizer, units, config.optim.average, trained_of(config.es.frozen, params))
        if isinstance(estimator, LossEstimator):
            weighed_pairs = chunking.weighed_pairs(config, estimator, mesh)
            self._weighed_at_once = chunking.shape_of_call(
                chunking.call_pairs(config, chunking.CALL_WEIGHED_PAIRS), weighed_pairs, mesh
            )
            output_gradient = (
                make_output_gradient(model, units, draw, data, es.deviation, es.pairs_a_window, mesh)
                if estimator.is_output_exact
                else None
            )
            self._score, self._weigh, self._weigh_and_apply = _for_losses(
                estimator,
                draw,
                apply,
                output_gradient,
                config,
                mesh,
                chunk_pairs,
                weighed_pairs,
            )
            self._no_totals = self._on_every_device(estimator.zeros)
            self.reads_tokens = bool(estimator.embeddings) or estimator.is_output_exact
            if scorer is not None:
                self._texts = TextLosses(config, model, estimator.noise, scorer, mesh, chunk_pairs)
        else:
            self._sum = _for_sums(estimator.sum_chunk, draw, estimator.vector_length, mesh)
            self._apply_sum = jax.jit(make_apply_sum(apply, estimator.gradient, estimator.zeros))

        def skip(state: TrainState) -> TrainState:
            carried = first_states(config, model, state.params)
            return dataclasses.replace(state, step=state.step + 1, carried=carried)

        self._skip = jax.jit(skip)
        feedback = () if isinstance(estimator, LossEstimator) else estimator.feedback

        def first(params: Params) -> TrainState:
            return init_state(params, in_units(optimizer, units), first_states(config, model, params), feedback)

        self._first = first
        self.state: TrainState = self._on_every_device(first(params))
        # Seeds are arguments, not constants: a run with another seed finds its programs in the compilation cache.
        streams = _Streams(stream_seed(config.seed, PERTURBATIONS), stream_seed(config.seed, WINDOWS))
        self._streams = self._on_every_device(streams)
        self._tokens: Array | None = None
        if stream is not None:
            self.use_tokens(stream)

    @property
    def devices(self) -> list[jax.Device]:
        """List the devices that share the population."""
        return list(self._mesh.devices.flat)

    @default_flags()
    def use_tokens(self, stream: Integer[np.ndarray, " length"]) -> None:
        """Score on this text from now on.

        Args:
            stream: Packed training documents, in the smallest type that holds their ids, since every device has a copy.
                A new length or type means a new compilation.

        Raises:
            EsjaxError: The text is shorter than a window.
        """
        check_stream(len(stream), self._window_length)
        self._tokens = self._on_every_device(stream)

    @default_flags()
    def start_with(self, params: Params) -> None:
        """Make the state of step 0 from these parameters in place of random ones."""
        self.state = self._on_every_device(self._first(params))

    @default_flags()
    def use_params(self, params: Params) -> None:
        """Replace the parameters; the rest of the state stays."""
        self.state = dataclasses.replace(self.state, params=self._on_every_device(params))

    def score(self, spans: Sequence[Span]) -> Float[np.ndarray, "pairs 2"] | Int32[np.ndarray, "spans vector_length"]:
        """Return what hosts exchange for spans of pairs: the losses, or one gradient sum for each span."""
        if self.vector_length:
            return np.stack([self.sums(pairs_of([span])) for span in spans])
        return self.losses(pairs_of(spans))

    def update(self, payload: bytes) -> tuple[float | None, float | None]:
        """Apply the update of the present step.

        Args:
            payload: The update record, as it is published and stored in the ledger.

        Returns:
            Norms of the estimate and of the update, in units; None for a void step.

        Raises:
            EsjaxError: The update is for another step, pairing or model.
        """
        update = unpack_update(payload)
        step = int(self.state.step)
        if update.header.step != step:
            raise EsjaxError(f"update {update.header.step} came to a state at step {step}")
        if not update.header.applied:
            self.skip()
            return None, None
        if update.weights.shape[1:] != self.halves:
            raise EsjaxError(f"update {step} was made with another es.pairing; take the settings of its run")
        if update.header.vector_length != self.vector_length:
            raise EsjaxError(
                f"update {step} is of another model: {update.header.vector_length} numbers, not {self.vector_length}"
            )
        # The loss comes from the update record: the same bits on every host and in a replay.
        loss = math.nan if update.header.loss is None else update.header.loss
        if self.vector_length:
            info = self.apply_sum(update.weights, update.header.scale, loss)
        else:
            info = self.apply(update.pairs(), update.weights, update.header.scale, update.header.slope, loss)
        return float(info.gradient_norm), float(info.update_norm)

    def warm_up(self) -> None:
        """Run every function once to compile it; the state stays unchanged."""
        first = self.state
        pairs = np.arange(self.device_batch, dtype=np.uint32)
        if self.vector_length:
            self.apply_sum(self.sums(pairs), 0.0)
        else:
            if self._texts is not None:
                self._texts.warm_up(self.state.params, self._streams, self.state.step, pairs)
            else:
                self.losses(pairs)
            self.apply(pairs, np.ones((len(pairs), *self.halves), np.int8), 0.0, 0.0)
        self.state = first

    @default_flags()
    def losses(self, pairs: Integer[np.ndarray, " pairs"]) -> Float[np.ndarray, "pairs 2"]:
        """Score both members of some pairs of the present step, with the present parameters.

        Args:
            pairs: Numbers of pairs, from 0 to 2^32 - 1, in any order; at least one.
        """
        if self._texts is not None:
            return self._texts(self.state.params, self._streams, self.state.step, pairs.astype(np.uint32))
        assert self._tokens is not None, "there is nothing to score on before use_tokens"
        calls = [
            self._score(self.state.params, self._tokens, self._streams, self.state.step, part, count)
            for count, part in chunking.calls(self._scored_at_once, pairs.astype(np.uint32))
        ]
        return np.concatenate(calls).reshape(-1, 2)[: len(pairs)]

    @default_flags()
    def sums(self, pairs: Integer[np.ndarray, " pairs"]) -> Int32[np.ndarray, " vector_length"]:
        """Return the part of some pairs in the gradient sum of the present step, see `esjax.exchange.gradient_sums`.

        Args:
            pairs: Numbers of pairs, as for `losses`; all chunks but the last are whole.
        """
        assert self._tokens is not None, "there is nothing to score on before use_tokens"
        total = np.zeros(self.vector_length, np.int32)
        done = 0
        for count, part in chunking.calls(self._scored_at_once, pairs.astype(np.uint32)):
            left = np.int32(len(pairs) - done)
            total += np.asarray(self._sum(count, part, self.state, self._tokens, self._streams, left))
            done += part.size
        return total

    @default_flags()
    def apply_sum(self, total: Int32[np.ndarray, " vector_length"], scale: float, loss: float = math.nan) -> UpdateInfo:
        """Update with the gradient sum over all pairs of the step; see `apply`."""
        return self._take(*self._apply_sum(self.state, total, np.float32(scale), np.float32(loss)))

    @default_flags()
    def apply(
        self,
        pairs: Integer[np.ndarray, " pairs"],
        weights: Int8[np.ndarray, " pairs *halves"],
        scale: float,
        slope: float = 0.0,
        loss: float = math.nan,
    ) -> UpdateInfo:
        """Update with the shaped weights of the step's pairs; a missing pair counts as weight 0.

        An update that is not finite is skipped; its `update_norm` is then not finite.

        Args:
            pairs: Numbers of pairs.
            weights: int8 weights, see `esjax.core.Shaped`.
            scale: Scale of the weights.
            slope: Shaped value for each unit of difference, see `esjax.core.Shaped`, for an exact output layer.
            loss: Mean loss of the step, for optimizers that take a `value`.
        """
        tokens, totals = self._tokens if self.reads_tokens else (), self._no_totals
        assert tokens is not None, "there is no text before use_tokens"
        *calls, last = chunking.calls(self._weighed_at_once, pairs.astype(np.uint32), weights)
        for part in calls:
            totals = self._weigh(self.state, tokens, self._streams, totals, *part)
        # One program for both: a call to the devices costs as much as the noise of hundreds of pairs.
        scalars = np.float32(scale), np.float32(slope), np.float32(loss)
        return self._take(*self._weigh_and_apply(self.state, tokens, self._streams, totals, *scalars, *last))

    def _take(self, state: TrainState, info: UpdateInfo) -> UpdateInfo:
        if np.isfinite(info.update_norm):
            self.state = state
        else:
            self.skip()
        return info

    @default_flags()
    def skip(self) -> None:
        """Count a void step; the parameters stay unchanged.

        Carried states start anew: the next windows begin where those of this step end, and a void step does not record
        the states at these places.
        """
        self.state = self._skip(self.state)

    def _on_every_device(self, tree: Any) -> Any:
        """Copy arrays to all devices; in a group of processes, each process copies to its devices."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def copy(leaf: jax.typing.ArrayLike) -> Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

        return jax.tree.map(copy, tree)


def _for_losses(
    estimator: LossEstimator,
    draw: Callable[..., Array],
    apply: Apply,
    output_gradient: OutputGradient | None,
    config: Config,
    mesh: Mesh,
    chunk_pairs: int,
    weighed_pairs: int,
) -> tuple[Callable[..., Array], Callable[..., Totals], Callable[..., tuple[TrainState, UpdateInfo]]]:
    """Compile the functions of a step that exchanges losses: scores, sums of noise, and the update."""

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
        precision=config.es.precision,
    )

    def score(params: Params, tokens: Array, streams: _Streams, step: Array, pairs: Array, count: Array) -> Array:
        seeds = pair_seeds(streams.perturbations, step, pairs.reshape(-1))
        return losses(params, seeds, _Example(tokens, streams, step, pairs.reshape(-1)), count)

    def rows(tokens: _Tokens, streams: _Streams, step: Array, pairs: Array) -> Rows | None:
        if not estimator.embeddings:
            return None
        return rows_read(estimator.embeddings, draw(tokens, streams, step, pairs))

    sums = weigh(noise, mesh=mesh, chunk_pairs=weighed_pairs)
    gradient = estimate(noise, mesh=mesh, chunk_pairs=weighed_pairs)

    def weigh_pairs(
        state: TrainState,
        tokens: _Tokens,
        streams: _Streams,
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
        tokens: _Tokens,
        streams: _Streams,
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

    return jax.jit(score), jax.jit(weigh_pairs), jax.jit(weigh_and_apply)


def _for_sums(sum_chunk: SumChunk, draw: Callable[..., Array], vector_length: int, mesh: Mesh) -> Callable[..., Array]:
    """Compile the function of a step that exchanges gradient sums."""

    def add(
        chunk: Array, total: Array, state: TrainState, tokens: Array, streams: _Streams, pairs: Array, left: Array
    ) -> Array:
        ours, are_there = pairs[chunk], jnp.arange(pairs.shape[1]) < left - chunk * pairs.shape[1]
        seeds = pair_seeds(streams.perturbations, state.step, ours)
        windows = draw(tokens, streams, state.step, ours)
        return total + sum_chunk(state, Chunk(ours, seeds, windows, are_there))

    add_all = deal(mesh, add)

    def sum_pairs(
        count: Array, pairs: Array, state: TrainState, tokens: Array, streams: _Streams, left: Array
    ) -> Array:
        chunks = -(-count // pairs.shape[1])
        return add_all(chunks, jnp.zeros(vector_length, jnp.int32), state, tokens, streams, pairs, left)

    return jax.jit(sum_pairs)


class _Streams(NamedTuple):
    """Seeds of the run's streams of random numbers."""

    perturbations: UInt32[Array, "2"]
    windows: UInt32[Array, "2"]


class _Example(NamedTuple):
    """The example of a pair: the text, the seeds and the step that draw windows from it, and the pair's number."""

    tokens: Any
    streams: Any
    step: Any
    pair: Any
