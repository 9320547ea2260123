"""Known answers: hashes of what a host draws from a known seed. Hosts that draw other numbers cannot train together."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from esjax.core.seeds import key_of, pair_seeds, stream_seed
from esjax.core.signs import draw
from esjax.data.packing import draw_windows, follow_windows
from esjax.flags import default_flags
from esjax.models.mingru import mingru
from esjax.replica.streams import INIT, WINDOWS

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


def _draw() -> dict[str, list[jax.Array]]:
    pairs = jnp.arange(4, 9, dtype=jnp.uint32)
    seed = pair_seeds(stream_seed(1, 2), 3, pairs[:1])[0]
    stream, of_windows = jnp.arange(5000, dtype=jnp.int32), pair_seeds(stream_seed(1, WINDOWS), 3, pairs)
    model = mingru(7, hidden_size=4, head_size=4, n_layers=1, gate_tokens=1)
    params = model.init(jax.random.wrap_key_data(stream_seed(1, INIT), impl="threefry2x32"))
    logits = jnp.linspace(0.0, 3.0, 50, dtype=jnp.float32)
    return {
        "rademacher": [draw("rademacher", seed, NUMBERS)],
        "gaussian": [draw("gaussian", seed, NUMBERS)],
        "windows": [
            draw_windows(stream, of_windows, 3, 20),
            follow_windows(stream, of_windows, 3, 20, jnp.int32(7)),
        ],
        "parameters": [jnp.rint(leaf / ROUNDED_TO) for leaf in jax.tree.leaves(params)],
        "sampling": [jax.random.categorical(key_of(1), logits, shape=(NUMBERS,), mode="low")],
    }


def _hash(drawn: list[jax.Array]) -> str:
    content = b"".join(np.asarray(array).astype("<f4").tobytes() for array in drawn)
    return hashlib.blake2b(content, digest_size=8).hexdigest()
