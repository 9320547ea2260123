"""A host's copy of the run: it scores pairs and applies updates, and knows neither clock nor file nor network."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Integer, UInt32

from esjax.config import Config
from esjax.data.packing import check_stream, draw_windows
from esjax.errors import EsjaxError
from esjax.es import TrainState, UpdateInfo, init_state, make_apply_total, make_weigh_pairs, zero_total
from esjax.evaluate import Loss, cross_entropy, make_deal, make_evaluate_chunk
from esjax.models.model import Model, Params
from esjax.noise import INIT, PERTURBATIONS, WINDOWS, Space, make_space, pair_seeds, stream_seed
from esjax.optimizer import make_optimizer

CPU_SEQUENCES = 512
"""Sequences, times two members, that a CPU core evaluates at a time at most: their states stay in its cache."""

CPU_CHUNKS = 16
"""Chunks that a fixed population is cut into at least, so that as many cores share it. Fixed, whatever the cores, so
that losses are the same to the last bit on any number of them."""

ACCELERATOR_SEQUENCES = 2**15
"""Sequences, times two members, that an accelerator evaluates at a time at most; it wants many."""

CPU_BYTES, ACCELERATOR_BYTES = 2**26, 2**31
"""Bytes that the noise, or the added up weights, of a chunk may take."""

CPU_WEIGHED_PAIRS, ACCELERATOR_WEIGHED_PAIRS = 2**9, 2**14
"""Pairs whose noise a device sums at a time at most."""

CPU_WEIGHED_BYTES = 2**23
"""Bytes of that noise: more would fall out of a core's cache."""

CALL_PAIRS, CALL_WEIGHED_PAIRS = 2**12, 2**14
"""Pairs of one call to the devices, unless they want more at a time. They cost 13 bytes each, used or not."""


class Replica:
    """Parameters, optimizer state, and the compiled functions that move them on.

    Attributes:
        model: The architecture.
        state: Everything that a later step depends on.
        chunk_pairs: Pairs that a device evaluates at a time. A pair's losses are the same to the last bit, whatever the
            call and the devices, as long as it comes with the same others in a whole chunk.
        granule: Pairs that all devices together evaluate at a time; with fewer, some are idle.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        stream: Integer[np.ndarray, " length"] | None,
        mesh: Mesh,
        loss: Loss | None = None,
        optimizer: optax.GradientTransformation | None = None,
    ) -> None:
        """Make the first parameters and set up the functions; nothing is compiled yet.

        Args:
            config: Settings of the run.
            model: The architecture.
            stream: Packed training documents, see `use_tokens`. None: nothing is scored, or not yet.
            mesh: Devices that share the population, of this process or of several.
            loss: Loss of one member on one window, the burn-in included. None: cross entropy.
            optimizer: Any optax transformation. None: the one that the settings name.

        Raises:
            EsjaxError: The text is shorter than a window, or a parameter of the model is not float32.
        """
        params = model.init(jax.random.wrap_key_data(stream_seed(config.seed, INIT), impl="threefry2x32"))
        _check_float32(params)
        optimizer = optimizer or make_optimizer(config.optim, config.steps)
        space = make_space(
            model,
            params,
            space=config.es.space,
            noise=config.es.noise,
            sigma=config.es.sigma,
            rank=config.es.rank,
        )
        window_length = config.data.burn_in + config.data.window
        evaluate_chunk = make_evaluate_chunk(model, space, loss or cross_entropy(config.data.burn_in))

        def score(
            chunk: Array, losses: Array, params: Params, tokens: Array, streams: _Streams, step: Array, pairs: Array
        ) -> Array:
            window_seeds = pair_seeds(streams.windows, step // config.data.new_tokens_interval, pairs[chunk])
            windows = draw_windows(tokens, window_seeds, config.data.batch_size, window_length)
            seeds = pair_seeds(streams.perturbations, step, pairs[chunk])
            return losses.at[chunk].set(evaluate_chunk(params, seeds, windows))

        deal = make_deal(mesh, score)

        def score_pairs(count: Array, pairs: Array, *arguments: Any) -> Array:
            return deal(count, jnp.zeros((*pairs.shape, 2)), *arguments, pairs)

        chunk_pairs = config.es.chunk_pairs or _chunk_pairs(config, model, space, params, mesh)
        weighed_pairs = _weighed_pairs(config, space, mesh)
        self.model = model
        self.chunk_pairs = chunk_pairs
        self.granule = chunk_pairs * mesh.size
        self._mesh = mesh
        self._window_length = window_length
        self._scored_at_once = _shape_of_call(CALL_PAIRS, chunk_pairs, mesh)
        self._weighed_at_once = _shape_of_call(CALL_WEIGHED_PAIRS, weighed_pairs, mesh)
        self._score = jax.jit(score_pairs)
        self._weigh = jax.jit(make_weigh_pairs(space, mesh))
        self._apply = jax.jit(make_apply_total(space, optimizer, model.units(params), config.optim.average))
        self.state: TrainState = self._on_every_device(init_state(params, optimizer))
        self._zero_total = self._on_every_device(zero_total(space, params))
        # Arguments, not constants: a run of another seed finds its programs compiled already.
        streams = _Streams(stream_seed(config.seed, PERTURBATIONS), stream_seed(config.seed, WINDOWS))
        self._streams = self._on_every_device(streams)
        self._tokens: Array | None = None
        if stream is not None:
            self.use_tokens(stream)

    def use_tokens(self, stream: Integer[np.ndarray, " length"]) -> None:
        """Score on this text from now on.

        Args:
            stream: Packed training documents, of the smallest type that holds their ids, since every device has a copy.
                Another length or type is compiled for anew.

        Raises:
            EsjaxError: The text is shorter than a window.
        """
        check_stream(len(stream), self._window_length)
        self._tokens = self._on_every_device(stream)

    def losses(self, pairs: Integer[np.ndarray, " pairs"]) -> Float[np.ndarray, "pairs 2"]:
        """Score both members of some pairs of the present step, with the present parameters.

        Args:
            pairs: Indices, from 0 to 2^32 - 1, in any order; at least one.
        """
        assert self._tokens is not None, "there is nothing to score on before use_tokens"
        arguments = (self.state.params, self._tokens, self._streams, self.state.step)
        calls = [
            self._score(count, part, *arguments)
            for count, part in _calls(self._scored_at_once, pairs.astype(np.uint32))
        ]
        return np.concatenate(calls).reshape(-1, 2)[: len(pairs)]

    def apply(
        self, pairs: Integer[np.ndarray, " pairs"], weights: Int8[np.ndarray, " pairs"], scale: float
    ) -> UpdateInfo:
        """Update with the shaped weights of the step's pairs; one that is left out counts as weight 0.

        An update that is not finite is skipped: `update_norm` tells.
        """
        total = self._zero_total
        for count, *part in _calls(self._weighed_at_once, pairs.astype(np.uint32), weights):
            total = self._weigh(total, self._streams.perturbations, self.state.step, *part, count)
        state, info = self._apply(self.state, total, np.float32(scale))
        if np.isfinite(info.update_norm):
            self.state = state
        else:
            self.skip()
        return info

    def skip(self) -> None:
        """Count a step that was found void, and change nothing else."""
        self.state = dataclasses.replace(self.state, step=self.state.step + 1)

    def _on_every_device(self, tree: Any) -> Any:
        """Copy arrays to all devices, those of other processes included: each process copies its own."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())

        def copy(leaf: jax.typing.ArrayLike) -> Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index])

        return jax.tree.map(copy, tree)


class _Streams(NamedTuple):
    """Seeds of the run's streams of keys."""

    perturbations: UInt32[Array, "2"]
    windows: UInt32[Array, "2"]


def _shape_of_call(pairs: int, chunk_pairs: int, mesh: Mesh) -> tuple[int, int]:
    """Return chunks and pairs of a chunk of one call: at least so many pairs, and as many chunks for every device."""
    return -(-pairs // (chunk_pairs * mesh.size)) * mesh.size, chunk_pairs


def _calls(shape: tuple[int, int], *arrays: np.ndarray) -> Iterator[tuple[np.ndarray | np.int32, ...]]:
    """Cut arrays of one value a pair into calls of one shape, the last filled up with zeros.

    Yields:
        Number of chunks that hold pairs, and a part of each array.
    """
    chunks, chunk_pairs = shape
    size = chunks * chunk_pairs
    for start in range(0, len(arrays[0]), size):
        pairs = min(len(arrays[0]) - start, size)
        parts = [np.zeros(shape, array.dtype) for array in arrays]
        for part, array in zip(parts, arrays, strict=True):
            part.reshape(-1)[:pairs] = array[start : start + pairs]
        yield np.int32(-(-pairs // chunk_pairs)), *parts


def _check_float32(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if leaf.dtype != jnp.float32:
            raise EsjaxError(f"parameter {jax.tree_util.keystr(path)} of the model is {leaf.dtype}; make it float32")


def _chunk_pairs(config: Config, model: Model, space: Space, params: Params, mesh: Mesh) -> int:
    pair_bytes = 4 * space.numbers
    if config.es.space == "full" or not model.factored:
        pair_bytes += 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if mesh.devices.flat[0].platform == "cpu":
        sequences, room = CPU_SEQUENCES, CPU_BYTES
    else:
        sequences, room = ACCELERATOR_SEQUENCES, ACCELERATOR_BYTES
    pairs = min(sequences // config.data.batch_size, room // pair_bytes)
    if config.es.time_per_step is None:
        shares = CPU_CHUNKS if room == CPU_BYTES else mesh.size
        pairs = min(pairs, -(-config.es.population_size // (2 * shares)))
    return max(pairs, 2)


def _weighed_pairs(config: Config, space: Space, mesh: Mesh) -> int:
    pair_bytes = 4 * space.numbers
    if mesh.devices.flat[0].platform == "cpu":
        pairs = min(CPU_WEIGHED_PAIRS, CPU_WEIGHED_BYTES // pair_bytes)
    else:
        pairs = min(ACCELERATOR_WEIGHED_PAIRS, ACCELERATOR_BYTES // pair_bytes)
    if config.es.time_per_step is None:
        pairs = min(pairs, -(-config.es.population_size // (2 * mesh.size)))
    return max(1, min(pairs, space.exact_pairs))
