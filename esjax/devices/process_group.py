"""Several processes that compute as one, as `jax.distributed` knows them; without it, this one alone."""

import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from esjax.errors import EsjaxError


def connect(processes: str) -> None:
    """Join this process with others; before the first use of JAX's devices.

    Args:
        processes: `auto`, where JAX finds the others by itself, as on TPU pods, under Slurm and Open MPI; or
            HOST:PORT,N,I: address at which process 0 waits for the others, their number, and the index of this one.

    Raises:
        EsjaxError: The words are wrong, or the others are not to be found.
    """
    match = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", processes)
    if processes != "auto" and not (match and int(match[3]) < int(match[2])):
        raise EsjaxError(
            f"{processes!r} names no processes; give auto, or HOST:PORT,N,I with I below N, such as 10.0.0.1:7777,4,0"
        )
    try:
        if match is None:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(match[1], int(match[2]), int(match[3]))
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise EsjaxError(f"cannot find the processes of {processes!r}: {reason}") from error


def leads() -> bool:
    """Tell whether this is the process that talks, writes and decides."""
    return jax.process_index() == 0


def share(data: bytes) -> bytes:
    """Give the leading process's bytes to all; every process calls it."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)[:size]
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()


def share_number(number: float) -> float:
    """Give the leading process's number to all, as a float32; every process calls it."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.broadcast_one_to_all(np.float32(number)))


def any_of(flag: bool) -> bool:
    """Tell whether any process says so; every process calls it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def here(tree: Any) -> Any:
    """Copy what all processes hold together to this one's own devices; alone it is there already."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), tree)
