"""A model with its vocabulary: generation and scoring of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy import ndarray

from esjax.core.population import PAIRS_AXIS
from esjax.core.seeds import key_of
from esjax.data.packing import pack_lanes
from esjax.data.tokens import UNK
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.inference.generate import Sampling, beam_search, sample
from esjax.inference.score import make_score
from esjax.models.member import Member
from esjax.models.model import Model, Params, State

SHORTEST = 32
"""Least number of tokens to which a prompt is padded for a model that reads prompts at once; then powers of two."""

HOTTEST = float(np.finfo(np.float32).max)
"""Highest temperature."""


class Evaluation(NamedTuple):
    """How well a model predicts whole documents, including the STOP at the end of each.

    Attributes:
        nats_per_token: Mean loss per token.
        bits_per_byte: Loss in bits per UTF-8 byte of the documents; the end of each document counts as a byte.
        tokens: Number of tokens scored.
        unknown_tokens: Number of these tokens that are outside the vocabulary and were scored as UNK.
        baselines: Nats per token of n-gram models over the same documents, by name: unigram, bigram, trigram. They
            are fitted to the text that the run was trained on; empty if that text is missing.
        note: Why there are no baselines, or "".
    """

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    unknown_tokens: int
    baselines: Mapping[str, float]
    note: str = ""

    def __repr__(self) -> str:
        """Show four decimals."""
        values = {**self._asdict(), "baselines": {name: round(value, 4) for name, value in self.baselines.items()}}
        if not self.note:
            del values["note"]
        shown = (f"{key}={round(value, 4) if isinstance(value, float) else value}" for key, value in values.items())
        return f"Evaluation({', '.join(shown)})"


class Written(NamedTuple):
    """A text that a model wrote after a prompt.

    Attributes:
        text: The continuation, without the prompt.
        log_probability: Log probability of the continuation in nats, for beam search; None for sampling.
    """

    text: str
    log_probability: float | None = None

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class Functions(NamedTuple):
    """Compiled functions of a model. Parameters are arguments, since they change during training.

    Attributes:
        score: `(params, *lanes) -> mean nats per token`.
        read: `(params, prompt, count) -> state`, see `Member.read`.
        sample: `(params, state, keys, max_tokens, sampling) -> tokens`.
        beam_search: `(params, state, beams, max_tokens) -> found`.
    """

    score: Callable[..., jax.Array]
    read: Callable[..., State]
    sample: Callable[..., jax.Array]
    beam_search: Callable[..., Any]


def make_functions(model: Model) -> Functions:
    """Make the functions; JAX compiles each at its first call."""
    return Functions(
        jax.jit(make_score(model)),
        jax.jit(lambda params, prompt, count: Member(model, params).read(prompt, count=count)),
        jax.jit(partial(sample, model), static_argnums=(3,)),
        jax.jit(partial(beam_search, model), static_argnums=(2, 3)),
    )


class LanguageModel:
    """A model that scores and writes text."""

    def __init__(self, model: Model, vocabulary: Vocabulary, mesh: Mesh) -> None:
        """Set up; nothing is compiled yet."""
        self.model = model
        self.vocabulary = vocabulary
        self._mesh = mesh
        self._functions = make_functions(model)

    @default_flags()
    def lanes(self, documents: Sequence[ndarray]) -> tuple[jax.Array, jax.Array]:
        """Pack encoded documents into lanes for `loss`, sharded over all devices."""
        lanes = pack_lanes(documents)
        missing = -len(lanes.tokens) % self._mesh.size
        spread = NamedSharding(self._mesh, PartitionSpec(PAIRS_AXIS))
        tokens, scored = (np.pad(array, ((0, missing), (0, 0))) for array in lanes)
        return jax.device_put(jnp.asarray(tokens), spread), jax.device_put(jnp.asarray(scored), spread)

    @default_flags()
    def loss(self, params: Params, lanes: tuple[jax.Array, jax.Array]) -> float:
        """Return the mean nats per token over the documents that `lanes` packed."""
        return float(self._functions.score(params, *lanes))

    def score(
        self, params: Params, documents: Sequence[ndarray], size: int, baselines: Mapping[str, float], note: str = ""
    ) -> Evaluation:
        """Score whole documents.

        Args:
            params: The parameters.
            documents: Encoded documents.
            size: UTF-8 bytes of the documents, one more for the end of each.
            baselines: Nats per token of n-gram models over the same documents, by name.
            note: Why there are no baselines, or "".
        """
        nats = self.loss(params, self.lanes(documents))
        tokens = sum(len(document) + 1 for document in documents)
        unknown = sum(int(np.count_nonzero(document == UNK)) for document in documents)
        return Evaluation(nats, nats * tokens / size / math.log(2), tokens, unknown, baselines, note)

    @default_flags()
    def write(
        self,
        params: Params,
        prompt: str,
        *,
        max_tokens: int,
        count: int,
        seed: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[Written]:
        """Sample continuations of a prompt, see `RunInference.generate`.

        Raises:
            EsjaxError: A number is out of range.
        """
        _require_table("count", count, "max_tokens", max_tokens)
        _require(0 <= temperature <= HOTTEST, f"temperature must be at least 0 and a finite float32, got {temperature}")
        _require(top_k >= 0, f"top_k must be at least 0, got {top_k}")
        _require(0 < top_p <= 1, f"top_p must be above 0 and at most 1, got {top_p}")
        _require(0 <= seed < 2**32, f"seed must be at least 0 and below 2^32, got {seed}")
        state = self._after(params, prompt)
        keys = jax.random.split(key_of(seed), count)
        sampling = Sampling(temperature, min(top_k, self.vocabulary.size), top_p)
        tokens = self._functions.sample(params, state, keys, max_tokens, sampling)
        return [self._written(prompt, row) for row in np.asarray(tokens)]

    @default_flags()
    def search(self, params: Params, prompt: str, *, beams: int, max_tokens: int) -> list[Written]:
        """Find the most probable continuations of a prompt, best first, see `RunInference.search`.

        Raises:
            EsjaxError: A number is out of range.
        """
        _require_table("beams", beams, "max_tokens", max_tokens)
        _require_table("beams", beams, "the size of the vocabulary", self.vocabulary.size)
        state = self._after(params, prompt)
        found = self._functions.beam_search(params, state, beams, max_tokens)
        pairs = zip(np.asarray(found.tokens), np.asarray(found.log_probability), strict=True)
        return [self._written(prompt, row, float(total)) for row, total in pairs if np.isfinite(total)]

    def _written(self, prompt: str, tokens: ndarray, log_probability: float | None = None) -> Written:
        return Written(self.vocabulary.decode_after(prompt, tokens), log_probability)

    def _after(self, params: Params, prompt: str) -> State:
        """Return the state after a prompt.

        Models that read a prompt at once compile for each length, which takes seconds: lengths are rounded up.
        """
        tokens = self.vocabulary.encode(prompt)
        padded = min(max(1 << (len(tokens) - 1).bit_length(), SHORTEST), self.model.context - 1)
        if self.model.read is None or len(tokens) > padded:
            return self._functions.read(params, tokens, None)
        return self._functions.read(params, np.pad(tokens, (0, padded - len(tokens))), np.int32(len(tokens)))


def _require_table(rows_name: str, rows: int, columns_name: str, columns: int) -> None:
    """Check the sizes of a table whose places are counted in int32."""
    for name, size in ((columns_name, columns), (rows_name, rows)):
        _require(size >= 1, f"{name} must be at least 1, got {size}")
    _require(rows * columns < 2**31, f"{rows_name} times {columns_name} must be below 2^31, got {rows} times {columns}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EsjaxError(message)
