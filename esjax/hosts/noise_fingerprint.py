"""Noise fingerprints: hashes of the noise of a known seed. Hosts whose noise differs cannot train together."""

import hashlib
from typing import Literal

import jax.numpy as jnp
import numpy as np

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.core.signs import draw

NUMBERS = 1000
"""Entries of noise that are hashed."""

KINDS: tuple[Literal["rademacher", "gaussian"], ...] = ("rademacher", "gaussian")


def noise_fingerprints() -> dict[str, str]:
    """Hash the noise of a known pair, for each kind of noise (rademacher, gaussian)."""
    seed = pair_seeds(stream_seed(1, 2), 3, jnp.arange(4, 5, dtype=jnp.uint32))[0]
    return {kind: _hash(np.asarray(draw(kind, seed, NUMBERS))) for kind in KINDS}


def _hash(noise: np.ndarray) -> str:
    return hashlib.blake2b(noise.astype("<f4").tobytes(), digest_size=8).hexdigest()
