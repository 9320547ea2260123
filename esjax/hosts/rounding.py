"""The kind of a host's hardware, measured: a hash of small float computations.

Devices that round these alike should compute the same updates to the last bit, whatever they are called.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 64
"""Rows and columns of the arrays."""


def rounding_kind(device: jax.Device) -> str:
    """Compute with a device what an update and a model consist of, and hash the floats and the version of JAX.

    Returns:
        16 hexadecimal digits; hosts with equal ones are of one kind.
    """
    numbers = np.arange(1, SIZE * SIZE + 1, dtype=np.uint32) * np.uint32(2654435761)  # Knuth's multiplicative hash
    x = (numbers >> np.uint32(8)).astype(np.float32).reshape(SIZE, SIZE) / np.float32(2**23) - np.float32(1)
    summary = hashlib.blake2b(jax.__version__.encode(), digest_size=8)
    for result in jax.jit(_compute)(jax.device_put(x, device)):
        summary.update(np.asarray(result, np.float32).tobytes())
    return summary.hexdigest()


def _compute(x: jax.Array) -> list[jax.Array]:
    mean, square = 0.9 * x + 0.1 * x.T, 0.999 * x * x + 0.001 * x.T * x.T
    return [
        x @ x.T,
        (x.astype(jnp.bfloat16) @ x.T.astype(jnp.bfloat16)).astype(jnp.float32),
        jnp.tanh(x),
        jnp.exp(x),
        jax.nn.log_softmax(8 * x),
        x.sum(axis=0),
        jnp.sqrt((x * x).mean(axis=1)),
        x - 0.01 * mean / (jnp.sqrt(square) + 1e-8),  # a step of Adam
    ]
