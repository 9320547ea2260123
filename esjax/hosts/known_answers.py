"""Known answers: hashes of what a host draws from a known seed. Hosts that draw other numbers cannot train together."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from esjax.core.seeds import key_of, pair_seeds, stream_seed
from esjax.core.signs import draw
from esjax.data.packing import draw_windows
from esjax.flags import default_flags
from esjax.replica.streams import WINDOWS

NUMBERS = 1000
"""Entries of noise that are hashed."""

ROUNDED_TO = 0.01
"""Parameters are rounded to multiples of this number: the last bits of a normal differ between processors."""


@default_flags()  # as a run does
def known_answers() -> dict[str, str]:
    """Hash what is drawn from a known seed: rademacher and gaussian noise, windows, first parameters, sampled tokens.

    Gaussian noise is hashed to the last bit. The other answers are integers, or rounded: they are the same on every
    processor.
    """
    return {name: _hash(drawn) for name, drawn in jax.jit(_draw)().items()}


def _draw() -> dict[str, jax.Array]:
    """Draw each kind of number once, by the functions that runs draw with: each of them takes long to compile."""
    seeds = pair_seeds(stream_seed(1, WINDOWS), 3, jnp.arange(4, 9, dtype=jnp.uint32))
    first, second = jax.random.split(key_of(1))  # as models do
    logits = jnp.linspace(0.0, 3.0, 50, dtype=jnp.float32)
    return {
        "rademacher": draw("rademacher", seeds[0], NUMBERS),
        "gaussian": draw("gaussian", seeds[1], NUMBERS),
        "windows": draw_windows(jnp.arange(5000, dtype=jnp.int32), seeds, 3, 20),
        "parameters": jnp.rint(jax.random.normal(first, (NUMBERS,)) / ROUNDED_TO),
        "sampling": jax.random.categorical(second, logits, shape=(NUMBERS,), mode="low"),
    }


def _hash(drawn: jax.Array) -> str:
    return hashlib.blake2b(np.asarray(drawn).astype("<f4").tobytes(), digest_size=8).hexdigest()
