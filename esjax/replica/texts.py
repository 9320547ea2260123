"""The losses of pairs whose members write text: written on the devices, and scored in Python at the same time."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int, UInt32

from esjax.config.settings import Config
from esjax.core.noise import Noise
from esjax.core.population import map_members
from esjax.core.seeds import pair_seeds
from esjax.data.packing import draw_places
from esjax.flags import default_flags
from esjax.models.model import Model, Params
from esjax.replica import chunking
from esjax.rewards.writing import Prompted, make_write, shape_of


@runtime_checkable
class TextScorer(Protocol):
    """What scores text, see `esjax.rewards.scoring.Scorer`."""

    @property
    def prompts(self) -> Any:
        """The encoded prompts, see `esjax.rewards.prompts.PromptTokens`."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a completion."""

    def load(self) -> None:
        """Get ready to score."""

    def losses(
        self, drawn: Int[np.ndarray, "pairs prompts"], tokens: Int[np.ndarray, "pairs members prompts length"]
    ) -> Callable[[], Float32[np.ndarray, "pairs members"]]:
        """Begin to score, and return a function that waits for the losses."""


class TextLosses:
    """Scores pairs by what their members write."""

    def __init__(
        self, config: Config, model: Model, noise: Noise, scorer: TextScorer, mesh: Mesh, chunk_pairs: int
    ) -> None:
        """Make the functions; nothing is compiled yet.

        Args:
            config: Settings of the run.
            model: The architecture.
            noise: How members differ.
            scorer: Scores the texts.
            mesh: Devices that share the population.
            chunk_pairs: Pairs that a device lets write at a time.
        """
        es, data, reward = config.es, config.data, config.reward
        self._scorer = scorer
        # One chunk for each device in a call: its texts are scored while the next call is written.
        self._at_once = chunking.shape_of_call(1, chunk_pairs, mesh)
        self._prompts = Prompted(*map(jnp.asarray, scorer.prompts))
        write = make_write(model, reward.length, reward.temperature, scorer.stops)
        members = map_members(
            write,
            noise,
            shape_of(data.batch_size, reward.length),
            mesh=mesh,
            chunk_pairs=chunk_pairs,
            precision=es.precision,
        )

        @jax.jit
        def write_pairs(
            params: Params, prompts: Prompted, streams: Any, step: Array, count: Array, pairs: UInt32[Array, "..."]
        ) -> tuple[Array, Array]:
            pairs = pairs.reshape(-1)
            seeds = pair_seeds(streams.windows, step // data.new_tokens_interval, pairs // es.pairs_a_window)
            drawn = draw_places(seeds, data.batch_size, len(prompts.tokens))
            examples = Prompted(prompts.tokens[drawn], prompts.lengths[drawn])
            return drawn, members(params, pair_seeds(streams.perturbations, step, pairs), examples, count)

        self._write = write_pairs

    @default_flags()
    def warm_up(self, params: Params, streams: Any, step: Array, pairs: UInt32[np.ndarray, " pairs"]) -> None:
        """Let members write, and load the reward, which is not called: it may be slow."""
        for count, part in chunking.calls(self._at_once, pairs):
            jax.block_until_ready(self._write(params, self._prompts, streams, step, count, part))
        self._scorer.load()

    def __call__(
        self, params: Params, streams: Any, step: Array, pairs: UInt32[np.ndarray, " pairs"]
    ) -> Float32[np.ndarray, "pairs 2"]:
        """Let both members of some pairs write, and score the texts; see `Replica.losses`."""
        waiting = []
        written: tuple[int, Array, Array] | None = None

        def score(count: int, drawn: Array, tokens: Array) -> None:
            waiting.append(self._scorer.losses(np.asarray(drawn)[:count], np.asarray(tokens)[:count]))

        for count, part in chunking.calls(self._at_once, pairs):
            begun = self._write(params, self._prompts, streams, step, count, part)
            if written is not None:
                score(*written)
            written = (int(count), *begun)
        assert written is not None, "there is at least one pair"
        score(*written)
        return np.concatenate([wait() for wait in waiting])
