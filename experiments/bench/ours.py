"""Evaluation and step of this library as candidates to be timed, on random tokens."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from bench.measure import Candidate
from esjax.config.settings import Config
from esjax.core.population import PAIRS_AXIS
from esjax.models import build_model
from esjax.replica.replica import Replica
from esjax.training.local_steps import LocalSteps

VOCAB = 83
"""Number of token ids, that of builtin:shakespeare."""


def random_tokens(shape: int | tuple[int, ...]) -> np.ndarray:
    """Draw random tokens without STOP."""
    return np.random.default_rng(0).integers(2, VOCAB, shape).astype(np.uint8)


def first_devices(count: int) -> Mesh:
    """Make a mesh of the first few devices."""
    return jax.make_mesh((count,), (PAIRS_AXIS,), (AxisType.Auto,), devices=jax.local_devices()[:count])


def replica_of(config: Config, mesh: Mesh) -> Replica:
    """Set up a host's copy of a run."""
    return Replica(config, build_model(config.model, VOCAB), random_tokens(2**16), mesh)


def member_tokens(config: Config) -> int:
    """Count the member-tokens of a step."""
    return config.es.population * config.data.batch_size * config.data.window


def evaluation(config: Config, replica: Replica) -> Candidate:
    """Score the whole population once: draw its noise and windows, and return the losses."""
    pairs = np.arange(config.es.pairs, dtype=np.uint32)
    return Candidate(lambda: replica.losses(pairs), member_tokens(config))


def step(config: Config, replica: Replica) -> Candidate:
    """Do a whole step: evaluation, shaping, the sum of the noise, Adam."""
    steps = LocalSteps(config, replica, custom={})

    def call() -> object:
        steps.take()
        return replica.state

    return Candidate(call, member_tokens(config))
