"""A host's copy of the run. It scores pairs and applies updates; it uses no clock, no file and no network."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Int32, Integer

from esjax.config.settings import Config
from esjax.core.seeds import PERTURBATIONS, stream_seed
from esjax.data.packing import check_stream
from esjax.errors import EsjaxError
from esjax.exchange.update_record import Span, pairs_of, unpack_update
from esjax.flags import default_flags
from esjax.models.custom.check import check_float32
from esjax.models.member import Loss
from esjax.models.model import Model, Params
from esjax.replica import chunking
from esjax.replica.estimators.estimator import LossEstimator
from esjax.replica.programs import LossPrograms, Streams, SumPrograms, make_programs
from esjax.replica.streams import INIT, WINDOWS
from esjax.replica.texts import TextLosses, TextScorer
from esjax.replica.update import TrainState, UpdateInfo


class Replica:
    """The training state and the compiled functions that score pairs and update it.

    Attributes:
        model: The architecture.
        units: Unit of each leaf.
        state: Everything that a later step depends on. An update takes its place in memory: copy the arrays that you
            keep.
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
        self._first_params = lambda: model.init(
            jax.random.wrap_key_data(stream_seed(config.seed, INIT), impl="threefry2x32")
        )
        params = self._first_params()
        check_float32(params)
        self._programs = programs = make_programs(config, model, params, mesh, loss, optimizer)
        estimator = programs.estimator
        self.model = model
        self.units = programs.units
        self.chunk_pairs = programs.chunk_pairs
        self.device_batch = programs.chunk_pairs * mesh.size
        self.vector_length = estimator.vector_length
        self.scale = estimator.scale
        self.bounds = estimator.bounds
        self.reads_tokens = False
        self.halves = () if config.es.weights_per_pair == 1 else (config.es.weights_per_pair,)
        self.state: TrainState
        self._mesh = mesh
        self._window_length = config.data.window_length
        self._texts: TextLosses | None = None
        if isinstance(estimator, LossEstimator):
            self._no_totals = self._on_every_device(estimator.zeros)
            self.reads_tokens = bool(estimator.embeddings) or estimator.is_output_exact
            if scorer is not None:
                self._texts = TextLosses(config, model, estimator.noise, scorer, mesh, programs.chunk_pairs)
        self.begin(params)
        # Seeds are arguments, not constants: a run with another seed finds its programs in the compilation cache.
        streams = Streams(stream_seed(config.seed, PERTURBATIONS), stream_seed(config.seed, WINDOWS))
        self._streams = self._on_every_device(streams)
        self._tokens: Array | None = None
        if stream is not None:
            self.use_tokens(stream)

    @property
    def is_lost(self) -> bool:
        """Return whether the devices failed in an update, so that the state is gone from their memory."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))

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
    def begin(self, params: Params | None = None) -> None:
        """Make the state of step 0 from these parameters; None: the random ones."""
        first = self._programs.first(self._first_params() if params is None else params)
        self.state = self._on_every_device(first)  # the state of before is freed here
        self.resume_from(self.state)

    @default_flags()
    def resume_from(self, state: TrainState) -> None:
        """Go on from a copy of this state: an update cannot take over memory that belongs to numpy, as of a file."""
        self.state = jax.tree.map(jnp.copy, state)

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
        """Run every function once to compile it, and make the state of step 0 again."""
        pairs = np.arange(self.device_batch, dtype=np.uint32)
        if self.vector_length:
            self.apply_sum(self.sums(pairs), 0.0)
        else:
            if self._texts is not None:
                self._texts.warm_up(self.state.params, self._streams, self.state.step, pairs)
            else:
                self.losses(pairs)
            self.apply(pairs, np.ones((len(pairs), *self.halves), np.int8), 0.0, 0.0)
        self.begin()

    @default_flags()
    def losses(self, pairs: Integer[np.ndarray, " pairs"]) -> Float[np.ndarray, "pairs 2"]:
        """Score both members of some pairs of the present step, with the present parameters.

        Args:
            pairs: Numbers of pairs, from 0 to 2^32 - 1, in any order; at least one.
        """
        if self._texts is not None:
            return self._texts(self.state.params, self._streams, self.state.step, pairs.astype(np.uint32))
        assert self._tokens is not None, "there is nothing to score on before use_tokens"
        assert isinstance(self._programs.exchanged, LossPrograms)
        score = self._programs.exchanged.score
        calls = [
            score(self.state.params, self._tokens, self._streams, self.state.step, part, count)
            for count, part in chunking.calls(self._programs.scored_at_once, pairs.astype(np.uint32))
        ]
        return np.concatenate(calls).reshape(-1, 2)[: len(pairs)]

    @default_flags()
    def sums(self, pairs: Integer[np.ndarray, " pairs"]) -> Int32[np.ndarray, " vector_length"]:
        """Return the part of some pairs in the gradient sum of the present step, see `esjax.exchange.gradient_sums`.

        Args:
            pairs: Numbers of pairs, as for `losses`; all chunks but the last are whole.
        """
        assert self._tokens is not None, "there is nothing to score on before use_tokens"
        assert isinstance(self._programs.exchanged, SumPrograms)
        add = self._programs.exchanged.add
        total = np.zeros(self.vector_length, np.int32)
        done = 0
        for count, part in chunking.calls(self._programs.scored_at_once, pairs.astype(np.uint32)):
            left = np.int32(len(pairs) - done)
            total += np.asarray(add(count, part, self.state, self._tokens, self._streams, left))
            done += part.size
        return total

    @default_flags()
    def apply_sum(self, total: Int32[np.ndarray, " vector_length"], scale: float, loss: float = math.nan) -> UpdateInfo:
        """Update with the gradient sum over all pairs of the step; see `apply`."""
        assert isinstance(self._programs.exchanged, SumPrograms)
        apply = self._programs.exchanged.apply
        return self._take(*apply(self.state, total, np.float32(scale), np.float32(loss)))

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
        assert isinstance(self._programs.exchanged, LossPrograms)
        _, weigh, weigh_and_apply, at_once = self._programs.exchanged
        *calls, last = chunking.calls(at_once, pairs.astype(np.uint32), weights)
        for part in calls:
            totals = weigh(self.state, tokens, self._streams, totals, *part)
        # One program for both: a call to the devices costs as much as the noise of hundreds of pairs.
        scalars = np.float32(scale), np.float32(slope), np.float32(loss)
        return self._take(*weigh_and_apply(self.state, tokens, self._streams, totals, *scalars, *last))

    def _take(self, state: TrainState, info: UpdateInfo) -> UpdateInfo:
        jax.block_until_ready(info)  # devices that fail do so here, while the state is the lost one
        self.state = state
        return info

    @default_flags()
    def skip(self) -> None:
        """Count a void step; the parameters stay unchanged.

        Carried states start anew: the next windows begin where those of this step end, and a void step does not record
        the states at these places.
        """
        self.state = self._programs.skip(self.state)

    def _on_every_device(self, tree: Any) -> Any:
        """Copy arrays to all devices; in a group of processes, each process copies to its devices."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def copy(leaf: jax.typing.ArrayLike) -> Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

        return jax.tree.map(copy, tree)
