"""A small model, its noise and its tokens, for tests of the core."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esjax.models import Model, gru, rnn
from esjax.models.model import Params
from esjax.noise import Space, make_space, pair_seeds, stream_seed

VOCAB = 7
PAIRS = 12
MODELS = {
    "rnn": rnn(VOCAB, hidden_size=4, n_layers=2),
    "gru": gru(VOCAB, hidden_size=4, head_size=6),
}


def space_of(model: Model, **settings: Any) -> Space:
    chosen = {"space": "low_rank", "noise": "rademacher", "sigma": 0.1, "rank": 1, **settings}
    return make_space(model, params_of(model), **chosen)


def params_of(model: Model) -> Params:
    return model.init(jax.random.key(3))


def seeds_of(pairs: int = PAIRS, step: int = 5) -> Array:
    return pair_seeds(stream_seed(1, 0), step, jnp.arange(pairs))


def tokens_of(pairs: int = PAIRS, sequences: int = 2, length: int = 6) -> Array:
    """Tokens with some STOPs (id 1) among them."""
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (pairs, sequences, length)), jnp.int32)
