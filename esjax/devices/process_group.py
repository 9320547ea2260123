"""The process group: several processes that compute together by `jax.distributed`, or this process alone."""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from esjax.errors import EsjaxError
from esjax.texts import first_line


def connect(processes: str) -> None:
    """Make this process a part of a process group; call it before the first use of JAX's devices.

    Args:
        processes: `auto` where JAX finds the other processes by itself (TPU pods, Slurm, Open MPI); or HOST:PORT,N,I
            with the address at which process 0 waits for the others, the number of processes, and this one's index.

    Raises:
        EsjaxError: `processes` has another form, or the other processes cannot be reached.
    """
    match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", processes)
    if processes != "auto" and not (match and int(match[3]) < int(match[2])):
        raise EsjaxError(
            f"{processes!r} names no process group; give auto, or HOST:PORT,N,I with I below N, such as "
            "10.0.0.1:7777,4,0"
        )
    # The service would take SIGTERM for itself, and training saves a checkpoint at SIGTERM without it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if match is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
    except (ValueError, RuntimeError) as error:
        raise EsjaxError(f"cannot reach the processes of {processes!r}: {first_line(error)}") from error


def leads() -> bool:
    """Return whether this is process 0, which alone prints, writes files and uses the network."""
    return jax.process_index() == 0


def share(data: bytes) -> bytes:
    """Return the bytes of process 0 in every process; every process must call it."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)[:size]
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def share_number(number: float) -> float:
    """Return the number of process 0 in every process, as a float32; every process must call it."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def any_of(flag: bool) -> bool:
    """Return whether the flag is set in any process; every process must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def here(tree: Any) -> Any:
    """Copy a pytree of global arrays to this process's devices; a single process returns it as it is."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), tree)
