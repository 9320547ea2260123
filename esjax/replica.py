"""A host's copy of the run: it scores pairs and applies updates, and knows neither clock nor file nor network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int8, UInt32

from esjax.config import Config
from esjax.data.packing import check_stream, draw_windows
from esjax.es import TrainState, UpdateInfo, init_state, make_apply_total, make_weigh_seeds
from esjax.evaluate import Loss, cross_entropy, make_evaluate
from esjax.models.model import Model, Params
from esjax.noise import PERTURBATIONS, WINDOWS, make_space, pair_seeds
from esjax.optimizer import make_optimizer

CPU_SEQUENCES = 512
"""Sequences, times two members, that a CPU core evaluates at a time: their states stay in its cache."""

ACCELERATOR_SEQUENCES = 2**15
"""The same for an accelerator, which wants many."""

CHUNK_BYTES = 2**26
"""Bytes that the weights of a chunk's members may take where they have to be added up."""


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
    ) -> None:
        """Make the first parameters and set up the functions; nothing is compiled yet.

        Args:
            config: Settings of the run.
            model: The architecture.
            stream: Packed training documents.
            mesh: Devices that share the population.
            loss: Loss of one member on one window, the burn-in included. None: cross entropy.

        Raises:
            EsjaxError: The text is shorter than a window.
        """
        window_length = config.data.burn_in + config.data.window
        check_stream(len(stream), window_length)
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = model.init(jax.random.key(config.seed, impl="threefry2x32"))
        optimizer = make_optimizer(config.optim, config.steps)
        chunk_pairs = config.es.chunk_pairs or _chunk_pairs(config, model, params, mesh)
        space = make_space(
            model,
            params,
            space=config.es.space,
            noise=config.es.noise,
            sigma=config.es.sigma,
            rank=config.es.rank,
        )
        evaluate = make_evaluate(model, space, loss or cross_entropy(config.data.burn_in), mesh, chunk_pairs)
        weigh_seeds = make_weigh_seeds(space, mesh, chunk_pairs)

        self.model = model
        self.state: TrainState = jax.device_put(init_state(params, optimizer), everywhere)
        self.block_pairs = config.es.population_size // 2
        if config.es.time_per_step is not None:
            self.block_pairs = chunk_pairs * mesh.size

        def seeds(stream_of_keys: int, step: Array, block: Array) -> UInt32[Array, "pairs 2"]:
            pairs = block * self.block_pairs + jnp.arange(self.block_pairs)
            return pair_seeds(config.seed, stream_of_keys, step, pairs)

        def losses(params: Params, stream: Array, step: Array, block: Array) -> Float[Array, "pairs 2"]:
            window_seeds = seeds(WINDOWS, step // config.data.new_tokens_interval, block)
            windows = draw_windows(stream, window_seeds, config.data.batch_size, window_length)
            return evaluate(params, seeds(PERTURBATIONS, step, block), windows)

        self._losses = jax.jit(losses)
        self._weigh = jax.jit(lambda step, block, weights: weigh_seeds(seeds(PERTURBATIONS, step, block), weights))
        self._apply = jax.jit(make_apply_total(space, optimizer, model.unit, config.optim.average))
        self._stream = jax.device_put(jnp.asarray(stream), everywhere)

    def losses(self, block: int) -> Float[np.ndarray, "pairs 2"]:
        """Score both members of every pair of a block, with the present parameters."""
        losses = self._losses(self.state.params, self._stream, self.state.step, jnp.int32(block))
        return np.asarray(losses)

    def apply(self, weights: Int8[np.ndarray, " pairs"], scale: float) -> UpdateInfo:
        """Update with the shaped weights of whole blocks, from block 0 on."""
        total = None
        for block, part in enumerate(np.split(weights, len(weights) // self.block_pairs)):
            addend = self._weigh(self.state.step, jnp.int32(block), part)
            total = addend if total is None else jax.tree.map(jnp.add, total, addend)
        self.state, info = self._apply(self.state, total, jnp.float32(scale))
        return info

    def skip(self) -> None:
        """Count a step that was found void, and change nothing else."""
        self.state = dataclasses.replace(self.state, step=self.state.step + 1)


def _chunk_pairs(config: Config, model: Model, params: Params, mesh: Mesh) -> int:
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    pairs = (CPU_SEQUENCES if on_cpu else ACCELERATOR_SEQUENCES) // config.data.batch_size
    if config.es.space == "full" or not model.factored:
        member_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        pairs = min(pairs, CHUNK_BYTES // (2 * member_bytes))
    return max(pairs, 2)
