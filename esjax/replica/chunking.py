"""Chunk sizes: how many pairs a device evaluates or sums at a time."""

import math
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

from esjax.config.settings import Config
from esjax.replica.estimators.estimator import Estimator, LossEstimator

CPU_SEQUENCES = 256
"""Most sequences, each with two members, that a CPU core evaluates at a time, so that their states fit its cache."""

CPU_CHUNKS = 16
"""Least number of chunks of a fixed population on CPUs, so that 16 cores can share it. It does not depend on the number
of cores, so losses are the same to the last bit on any number of them."""

ACCELERATOR_SEQUENCES = 2**16
"""Most sequences, each with two members, that an accelerator evaluates at a time; it needs many to be busy."""

CPU_BYTES, ACCELERATOR_BYTES = 2**26, 2**31
"""Most bytes for the noise, the added-up weights and the logits of a chunk."""

CPU_LOGIT_BYTES, LEAST_PAIRS = 2**19, 8
"""Most bytes for the logits of a chunk on a CPU: what a model computes of whole windows then fits a core's cache. And
pairs to which this does not limit it: fewer are not faster, and hosts get pairs in multiples of a chunk."""

CPU_WEIGHED_PAIRS, ACCELERATOR_WEIGHED_PAIRS = 2**9, 2**16
"""Most pairs whose noise a device sums at a time."""

CPU_WEIGHED_BYTES = 2**23
"""Most bytes of that noise on a CPU, so that it fits a core's cache."""

CPU_GATED_SEQUENCES = 32
"""Sequences that a CPU core reads at a time with credit by gates. Their tokens are scored in smaller blocks."""

ACTIVATION_ROOM = 4
"""Cache that a noisy copy takes, relative to a member: its noise is drawn token by token."""

CALL_PAIRS, CALL_WEIGHED_PAIRS = 2**12, 2**14
"""Pairs of one call to the devices, unless a chunk on each device is more. Each costs 13 or 14 bytes, used or not."""


def call_pairs(config: Config, most: int) -> int:
    """Return the number of pairs of a call to the devices, at most `most`."""
    return most if config.es.time_per_step is not None else min(most, config.es.pairs)


CALLS_OF_TEXT = 4
"""Least number of calls of a population that writes: the text of one is scored in Python while the next is written."""


def shape_of_call(pairs: int, chunk_pairs: int, mesh: Mesh) -> tuple[int, int]:
    """Return (chunks, pairs per chunk) of a call: at least `pairs` in all, and equally many chunks for every device."""
    return -(-pairs // (chunk_pairs * mesh.size)) * mesh.size, chunk_pairs


def calls(shape: tuple[int, int], *arrays: np.ndarray) -> Iterator[tuple[np.ndarray | np.int32, ...]]:
    """Cut arrays with one row per pair into calls of one shape, at least one; the last is padded with zeros.

    Yields:
        Number of pairs, and a part of each array, [*shape, ...].
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
    if config.es.is_gated:
        pairs = (CPU_GATED_SEQUENCES if on_cpu else ACCELERATOR_SEQUENCES) // config.data.batch_size
        pairs = min(pairs, config.es.pairs if on_cpu else -(-config.es.pairs // mesh.size))
        return max(min(pairs, estimator.most_pairs), 2)
    pairs = min(
        sequences // config.data.batch_size, (CPU_BYTES if on_cpu else ACCELERATOR_BYTES) // estimator.pair_bytes
    )
    if on_cpu and estimator.logit_bytes:
        pairs = max(1, min(pairs, max(LEAST_PAIRS, CPU_LOGIT_BYTES // estimator.logit_bytes)))
        pairs = 1 << pairs.bit_length() - 1  # a power of 2: 11 pairs take longer than 8, or than 16
    pairs = 2 * pairs // config.es.members_per_pair
    if config.es.space == "activation":
        pairs //= ACTIVATION_ROOM
    if config.es.time_per_step is None:
        calls = CALLS_OF_TEXT if config.writes else 1
        pairs = min(pairs, -(-config.es.pairs // (CPU_CHUNKS if on_cpu else mesh.size * calls)))
    return max(min(pairs, estimator.most_pairs), 2)


def weighed_pairs(config: Config, estimator: LossEstimator, mesh: Mesh) -> int:
    """Choose for how many pairs a device sums the noise at a time."""
    pair_bytes = estimator.noise_bytes
    if is_cpu(mesh):
        pairs = min(CPU_WEIGHED_PAIRS, CPU_WEIGHED_BYTES // pair_bytes)
    else:
        pairs = min(ACCELERATOR_WEIGHED_PAIRS, ACCELERATOR_BYTES // pair_bytes)
    if config.es.time_per_step is None:
        pairs = min(pairs, -(-config.es.pairs // mesh.size))
    return max(1, min(pairs, estimator.most_pairs))
