"""The losses of pairs whose members write text: written on the devices, and scored in Python at the same time."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int, UInt32

from esjax.config.settings import Config
from esjax.core.noise import Noise
from esjax.core.population import map_members
from esjax.core.seeds import pair_seeds
from esjax.data.packing import draw_places
from esjax.data.tokens import STOP
from esjax.flags import default_flags
from esjax.models.model import Model, Params
from esjax.replica import chunking
from esjax.rewards.tools import WriteOn
from esjax.rewards.writing import Prompted, beginnings, make_write, shape_of


@runtime_checkable
class TextScorer(Protocol):
    """What scores text, see `esjax.rewards.scoring.Scorer`."""

    @property
    def prompts(self) -> Any:
        """The encoded prompts, see `esjax.rewards.prompts.PromptTokens`."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a completion."""

    @property
    def tool(self) -> Any:
        """What calls a tool for members, see `esjax.rewards.tools.ToolUse`, or None."""

    def finish(
        self,
        drawn: Int[np.ndarray, "pairs prompts"],
        tokens: Int[np.ndarray, "pairs members prompts length"],
        write_on: WriteOn,
    ) -> tuple[Int[np.ndarray, "pairs members prompts length"], Bool[np.ndarray, " pairs"]]:
        """Call the tool, let members write on, and return what they wrote, and for which pairs the tool failed."""

    def load(self) -> None:
        """Get ready to score."""

    def losses(
        self,
        drawn: Int[np.ndarray, "pairs prompts"],
        tokens: Int[np.ndarray, "pairs members prompts length"],
        failed: Bool[np.ndarray, " pairs"],
    ) -> Callable[[], Float32[np.ndarray, "pairs members"]]:
        """Begin to score, and return a function that waits for the losses."""


class Writers(NamedTuple):
    """Functions that let the members of pairs write.

    Attributes:
        begin: `(params, prompts, streams, step, count, pairs) -> (drawn, tokens)`: which prompts each pair has, and
            what its members write after them.
        go_on: `(params, texts, streams, step, count, pairs) -> tokens`: the same after a text of each member.
    """

    begin: Callable[..., tuple[Array, Array]]
    go_on: Callable[..., Array]


def make_writers(
    config: Config,
    model: Model,
    noise: Noise,
    mesh: Mesh,
    chunk_pairs: int,
    stops: tuple[int, ...],
    pauses: tuple[int, ...],
) -> Writers:
    """Make the functions; nothing is compiled yet.

    Args:
        config: Settings of the run.
        model: The architecture.
        noise: How members differ.
        mesh: Devices that share the population.
        chunk_pairs: Pairs that a device lets write at a time.
        stops: Tokens that end a completion.
        pauses: Tokens after which a tool is called.
    """
    es, data, reward = config.es, config.data, config.reward
    write = make_write(model, reward.length, reward.temperature, stops, pauses)

    def members(by_member: bool) -> Callable[..., Array]:
        return map_members(
            write,
            noise,
            shape_of(data.batch_size, reward.length),
            mesh=mesh,
            chunk_pairs=chunk_pairs,
            precision=es.precision,
            by_member=by_member,
        )

    @jax.jit
    def begin(
        params: Params, prompts: Prompted, streams: Any, step: Array, count: Array, pairs: UInt32[Array, "..."]
    ) -> tuple[Array, Array]:
        pairs = pairs.reshape(-1)
        seeds = pair_seeds(streams.windows, step // data.new_tokens_interval, pairs // es.pairs_a_window)
        drawn = draw_places(seeds, data.batch_size, len(prompts.lengths))
        examples = jax.tree.map(lambda leaf: leaf[drawn], prompts)
        return drawn, members(False)(params, pair_seeds(streams.perturbations, step, pairs), examples, count)

    @jax.jit
    def go_on(
        params: Params, texts: Prompted, streams: Any, step: Array, count: Array, pairs: UInt32[Array, "..."]
    ) -> Array:
        seeds = pair_seeds(streams.perturbations, step, pairs.reshape(-1))
        return members(True)(params, seeds, texts, count)

    return Writers(begin, go_on)


class TextLosses:
    """Scores pairs by what their members write."""

    def __init__(
        self, config: Config, model: Model, noise: Noise, scorer: TextScorer, mesh: Mesh, chunk_pairs: int
    ) -> None:
        """Set up; `scorer` scores the texts, and for the other arguments see `make_writers`."""
        self._scorer = scorer
        # One chunk for each device in a call: its texts are scored while the next call is written.
        self._at_once = chunking.shape_of_call(1, chunk_pairs, mesh)
        self._prompts = beginnings(scorer.prompts)
        self._shape = (-1, 2, config.data.batch_size)
        pauses = () if scorer.tool is None else tuple(scorer.tool.pauses)
        self.writers = make_writers(config, model, noise, mesh, chunk_pairs, scorer.stops, pauses)

    @default_flags()
    def warm_up(self, params: Params, streams: Any, step: Array, pairs: UInt32[np.ndarray, " pairs"]) -> None:
        """Let members write, with a tool also on; load the functions, which are not called: they may be slow."""
        for count, part in chunking.calls(self._at_once, pairs):
            _, written = self.writers.begin(params, self._prompts, streams, step, count, part)
            if self._scorer.tool is not None:
                members = (part.size, *self._shape[1:])
                longest = self._prompts.tokens.shape[1] + written.shape[-1]
                tokens, lengths = np.full((*members, longest), STOP, np.int32), np.zeros(members, np.int32)
                texts = Prompted(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(lengths))
                written = self.writers.go_on(params, texts, streams, step, count, part)
            jax.block_until_ready(written)
        self._scorer.load()

    def __call__(
        self, params: Params, streams: Any, step: Array, pairs: UInt32[np.ndarray, " pairs"]
    ) -> Float32[np.ndarray, "pairs 2"]:
        """Let both members of some pairs write, and score the texts; see `Replica.losses`."""
        waiting: list[Callable[[], Float32[np.ndarray, "pairs members"]]] = []

        def score(count: np.int32, part: UInt32[np.ndarray, "..."], drawn: Array, written: Array) -> None:
            def write_on(*text: np.ndarray) -> np.ndarray:
                texts = Prompted(*(jnp.asarray(leaf.reshape(*self._shape, *leaf.shape[1:])) for leaf in text))
                more = np.asarray(self.writers.go_on(params, texts, streams, step, count, part))
                return more.reshape(-1, more.shape[-1])

            prompts, tokens, failed = np.asarray(drawn), np.asarray(written), np.zeros(part.size, bool)
            if self._scorer.tool is not None:
                is_there = np.arange(part.size) < count  # the others fill up the chunk
                tokens = np.where(is_there[:, None, None, None], tokens, STOP)
                tokens, failed = self._scorer.finish(prompts, tokens, write_on)
            waiting.append(self._scorer.losses(prompts[:count], tokens[:count], failed[:count]))

        begun: tuple[Any, ...] | None = None
        for count, part in chunking.calls(self._at_once, pairs):
            now = count, part, *self.writers.begin(params, self._prompts, streams, step, count, part)
            if begun is not None:
                score(*begun)
            begun = now
        assert begun is not None, "there is at least one pair"
        score(*begun)
        return np.concatenate([wait() for wait in waiting])
