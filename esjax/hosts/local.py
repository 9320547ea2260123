"""Hosts as processes of this machine, which share its cores."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esjax.errors import EsjaxError

PATIENCE = 60.0
"""Seconds without a message from the coordinator after which a process ends."""

WORKER_BYTES = 600_000_000
"""Bytes of memory of a process with a small model, most of them for JAX."""

FAREWELL, LAST_WORD = 5.0, 15.0
"""Seconds that a process has to end by itself, and then after a signal: while it compiles, it notices neither."""


def check_workers(count: int, oversubscribe: bool = False) -> None:
    """Check that each process has a core, unless `oversubscribe` is set.

    Raises:
        EsjaxError: There are fewer cores than processes, or `count` is negative.
    """
    if count < 0:
        raise EsjaxError(f"workers must be at least 0, got {count}")
    cores = len(available_cores())
    if count > cores and not oversubscribe:
        raise EsjaxError(
            f"{count} workers on {cores} {'core' if cores == 1 else 'cores'} would take about "
            f"{count * WORKER_BYTES / 1e9:.1f} GB of memory, of {_memory() / 1e9:.1f} GB, and be no faster than "
            f"{cores}; give --workers {cores}, or --oversubscribe (in Python oversubscribe=True) to allow it"
        )


def _memory() -> int:
    """Return the size of this machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def local_workers(
    address: str, count: int, logs: Path, *, given: Sequence[str] = (), oversubscribe: bool = False
) -> Iterator[None]:
    """Run processes that join a run, and end them when the block ends.

    Args:
        address: tcp://HOST:PORT of the coordinator.
        count: Number of processes.
        logs: Folder for their log files, worker-0.log and so on.
        given: Options of `join` that name custom code, see `esjax.models.custom.Custom.words`.
        oversubscribe: Allow more processes than cores.

    Raises:
        EsjaxError: There are fewer cores, and `oversubscribe` is not set.
    """
    check_workers(count, oversubscribe)
    with ExitStack() as stack:
        processes = []
        for number, cores in enumerate(divide(available_cores(), count)):
            log = stack.enter_context((logs / f"worker-{number}.log").open("ab"))
            name = f"worker-{number}"
            words = ["join", address, "--name", name, "--patience", str(PATIENCE), *given]
            processes.append(_start(words, cores, log.fileno()))
        try:
            yield
        finally:
            for process in processes:
                _end(process)


def available_cores() -> list[int]:
    """Return the indices of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def divide(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide cores among processes as equally as possible; with more processes than cores, some share a core."""
    if count >= len(cores):
        return [[cores[number % len(cores)]] for number in range(count)]
    return [list(cores[number::count]) for number in range(count)]


def _start(words: list[str], cores: list[int], log: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(len(cores))}
    pin = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if pin else set()
    if pin:  # the child inherits the affinity from its start
        os.sched_setaffinity(0, cores)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "esjax", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches the coordinator alone, which then ends its hosts
        )
    finally:
        if pin:
            os.sched_setaffinity(0, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    for stop, seconds in ((lambda: None, FAREWELL), (process.terminate, LAST_WORD), (process.kill, LAST_WORD)):
        stop()
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
