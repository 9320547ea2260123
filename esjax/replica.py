"""A host's copy of the run: it scores pairs and applies updates, and knows neither clock nor file nor network."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int8, UInt32

from esjax.config import Config
from esjax.data.packing import check_stream, draw_windows
from esjax.errors import EsjaxError
from esjax.es import TrainState, UpdateInfo, init_state, make_apply_total, make_weigh_seeds
from esjax.evaluate import Loss, cross_entropy, make_evaluate
from esjax.models.model import Model, Params
from esjax.noise import INIT, PERTURBATIONS, WINDOWS, Space, Total, make_space, pair_seeds, stream_seed
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


class Replica:
    """Parameters, optimizer state, and the compiled functions that move them on.

    Attributes:
        model: The architecture.
        state: Everything that a later step depends on.
        block_pairs: Pairs that `losses` scores in one call. A fixed population is one block; with a time budget it
            is as small as the devices can work on without waste.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        stream: Int[np.ndarray, " length"],
        mesh: Mesh,
        loss: Loss | None = None,
        optimizer: optax.GradientTransformation | None = None,
    ) -> None:
        """Make the first parameters and set up the functions; nothing is compiled yet.

        Args:
            config: Settings of the run.
            model: The architecture.
            stream: Packed training documents.
            mesh: Devices that share the population.
            loss: Loss of one member on one window, the burn-in included. None: cross entropy.
            optimizer: Any optax transformation. None: the one that the settings name.

        Raises:
            EsjaxError: The text is shorter than a window, or a parameter of the model is not float32.
        """
        window_length = config.data.burn_in + config.data.window
        check_stream(len(stream), window_length)
        everywhere = NamedSharding(mesh, PartitionSpec())
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
        chunk_pairs = config.es.chunk_pairs or _chunk_pairs(config, model, space, params, mesh)
        evaluate = make_evaluate(model, space, loss or cross_entropy(config.data.burn_in), mesh, chunk_pairs)
        weigh_seeds = make_weigh_seeds(space, mesh, chunk_pairs)

        self.model = model
        self.state: TrainState = jax.device_put(init_state(params, optimizer), everywhere)
        self.block_pairs = config.es.population_size // 2
        if config.es.time_per_step is not None:
            self.block_pairs = chunk_pairs * mesh.size

        def seeds(stream: Array, step: Array, block: Array) -> UInt32[Array, "pairs 2"]:
            return pair_seeds(stream, step, block * self.block_pairs + jnp.arange(self.block_pairs))

        def losses(params: Params, tokens: Array, streams: _Streams, step: Array, block: Array) -> Array:
            window_seeds = seeds(streams.windows, step // config.data.new_tokens_interval, block)
            windows = draw_windows(tokens, window_seeds, config.data.batch_size, window_length)
            return evaluate(params, seeds(streams.perturbations, step, block), windows)

        def weigh(streams: _Streams, step: Array, block: Array, weights: Array) -> Total:
            return weigh_seeds(seeds(streams.perturbations, step, block), weights)

        self._losses = jax.jit(losses)
        self._weigh = jax.jit(weigh)
        self._apply = jax.jit(make_apply_total(space, optimizer, model.units(params), config.optim.average))
        self._tokens = jax.device_put(jnp.asarray(_smallest(stream)), everywhere)
        # Arguments, not constants: a run of another seed finds its programs compiled already.
        streams = _Streams(stream_seed(config.seed, PERTURBATIONS), stream_seed(config.seed, WINDOWS))
        self._streams = jax.device_put(streams, everywhere)

    def losses(self, block: int) -> Float[np.ndarray, "pairs 2"]:
        """Score both members of every pair of a block, with the present parameters."""
        losses = self._losses(self.state.params, self._tokens, self._streams, self.state.step, jnp.int32(block))
        return np.asarray(losses)

    def apply(self, weights: Int8[np.ndarray, " pairs"], scale: float) -> UpdateInfo:
        """Update with the shaped weights of whole blocks, from block 0 on.

        An update that is not finite is skipped: `update_norm` tells.
        """
        total = None
        for block, part in enumerate(np.split(weights, len(weights) // self.block_pairs)):
            addend = self._weigh(self._streams, self.state.step, jnp.int32(block), part)
            total = addend if total is None else jax.tree.map(jnp.add, total, addend)
        state, info = self._apply(self.state, total, jnp.float32(scale))
        if np.isfinite(info.update_norm):
            self.state = state
        else:
            self.skip()
        return info

    def skip(self) -> None:
        """Count a step that was found void, and change nothing else."""
        self.state = dataclasses.replace(self.state, step=self.state.step + 1)


class _Streams(NamedTuple):
    """Seeds of the run's streams of keys."""

    perturbations: UInt32[Array, "2"]
    windows: UInt32[Array, "2"]


def _check_float32(params: Params) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if leaf.dtype != jnp.float32:
            raise EsjaxError(f"parameter {jax.tree_util.keystr(path)} of the model is {leaf.dtype}; make it float32")


def _smallest(tokens: Int[np.ndarray, " length"]) -> np.ndarray:
    """Store ids in the smallest type that holds them."""
    return tokens.astype(np.min_scalar_type(tokens.max()))


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
