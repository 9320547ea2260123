"""How many pairs the devices take at a time."""

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from esjax.config.settings import Config
from esjax.replica.estimator import Estimator, LossEstimator

CPU_SEQUENCES = 256
"""Sequences, times two members, that a CPU core evaluates at a time at most: their states stay in its cache."""

CPU_CHUNKS = 16
"""Chunks that a fixed population is cut into at least, so that as many cores share it. Fixed, whatever the cores, so
that losses are the same to the last bit on any number of them."""

ACCELERATOR_SEQUENCES = 2**16
"""Sequences, times two members, that an accelerator evaluates at a time at most; it wants many."""

CPU_BYTES, ACCELERATOR_BYTES = 2**26, 2**31
"""Bytes that the noise, or the added up weights, of a chunk may take."""

CPU_WEIGHED_PAIRS, ACCELERATOR_WEIGHED_PAIRS = 2**9, 2**16
"""Pairs whose noise a device sums at a time at most."""

CPU_WEIGHED_BYTES = 2**23
"""Bytes of that noise: more would fall out of a core's cache."""

ACTIVATION_ROOM = 4
"""How many times as much room a noisy copy takes in a cache as a member: its noise is drawn token by token."""

CALL_PAIRS, CALL_WEIGHED_PAIRS = 2**12, 2**14
"""Pairs of one call to the devices, unless they want more at a time. They cost 13 bytes each, or 14, used or not."""


def call_pairs(config: Config, most: int) -> int:
    """Return how many pairs a call to the devices is made for."""
    return most if config.es.time_per_step is not None else min(most, config.es.pairs)


def shape_of_call(pairs: int, chunk_pairs: int, mesh: Mesh) -> tuple[int, int]:
    """Return chunks and pairs of a chunk of one call: at least so many pairs, and as many chunks for every device."""
    return -(-pairs // (chunk_pairs * mesh.size)) * mesh.size, chunk_pairs


def calls(shape: tuple[int, int], *arrays: np.ndarray) -> Iterator[tuple[np.ndarray | np.int32, ...]]:
    """Cut arrays of one row a pair into calls of one shape, the last filled up with zeros; at least one call.

    Yields:
        Number of pairs, and a part of each array.
    """
    size = math.prod(shape)
    for start in range(0, max(len(arrays[0]), 1), size):
        pairs = min(len(arrays[0]) - start, size)
        parts = [np.zeros((*shape, *array.shape[1:]), array.dtype) for array in arrays]
        for part, array in zip(parts, arrays, strict=True):
            part.reshape(size, *array.shape[1:])[:pairs] = array[start : start + pairs]
        yield np.int32(pairs), *parts


def is_cpu(mesh: Mesh) -> bool:
    """Return whether the devices are CPUs."""
    return mesh.devices.flat[0].platform == "cpu"


def chunk_pairs(config: Config, estimator: Estimator, mesh: Mesh) -> int:
    """Choose how many pairs a device evaluates at a time."""
    on_cpu = is_cpu(mesh)
    sequences = CPU_SEQUENCES if on_cpu else ACCELERATOR_SEQUENCES
    pairs = min(
        sequences // config.data.batch_size, (CPU_BYTES if on_cpu else ACCELERATOR_BYTES) // estimator.pair_bytes
    )
    pairs = 2 * pairs // config.es.members_per_pair
    if config.es.space == "activation":
        pairs //= ACTIVATION_ROOM
    if config.es.time_per_step is None:
        pairs = min(pairs, -(-config.es.pairs // (CPU_CHUNKS if on_cpu else mesh.size)))
    return max(min(pairs, estimator.most_pairs), 2)


def weighed_pairs(config: Config, estimator: LossEstimator, mesh: Mesh) -> int:
    """Choose of how many pairs a device sums the noise at a time."""
    pair_bytes = estimator.noise_bytes
    if is_cpu(mesh):
        pairs = min(CPU_WEIGHED_PAIRS, CPU_WEIGHED_BYTES // pair_bytes)
    else:
        pairs = min(ACCELERATOR_WEIGHED_PAIRS, ACCELERATOR_BYTES // pair_bytes)
    if config.es.time_per_step is None:
        pairs = min(pairs, -(-config.es.pairs // mesh.size))
    return max(1, min(pairs, estimator.most_pairs))
