"""Hosts that are processes of this machine, its cores divided among them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esjax.errors import EsjaxError

PATIENCE = 60.0
"""Seconds after which a process ends whose coordinator says nothing."""

WORKER_BYTES = 600_000_000
"""Memory that a process takes with a small model; most of it is JAX."""

FAREWELL, LAST_WORD = 5.0, 15.0
"""Seconds that processes have to end by themselves, and once they are asked: what still compiles hears nothing."""


def check_workers(count: int, oversubscribe: bool = False) -> None:
    """See that so many processes have a core each, or that more of them are wanted.

    Raises:
        EsjaxError: There are fewer cores; it says what memory the processes would take.
    """
    if count < 0:
        raise EsjaxError(f"workers must be at least 0, got {count}")
    cores = len(available_cores())
    if count > cores and not oversubscribe:
        raise EsjaxError(
            f"{count} workers on {cores} {'core' if cores == 1 else 'cores'} would take about "
            f"{count * WORKER_BYTES / 1e9:.1f} GB of memory, of {_memory() / 1e9:.1f} GB, and be no faster than "
            f"{cores}; give --workers {cores}, or --oversubscribe (from Python oversubscribe=True) for so many"
        )


def _memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def local_workers(
    address: str, count: int, logs: Path, *, given: Sequence[str] = (), oversubscribe: bool = False
) -> Iterator[None]:
    """Run processes that join a run, and end them.

    Args:
        address: tcp://HOST:PORT of the coordinator.
        count: Number of processes.
        logs: Folder for what they print.
        given: Options of `join` that name code, see `esjax.models.custom.Custom.words`.
        oversubscribe: Start more processes than there are cores.

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
    """List the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def divide(cores: Sequence[int], count: int) -> list[list[int]]:
    """Deal cores to processes: as equally as can be, at least one each, so that some share one if there are few."""
    if count >= len(cores):
        return [[cores[number % len(cores)]] for number in range(count)]
    return [list(cores[number::count]) for number in range(count)]


def _start(words: list[str], cores: list[int], log: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(len(cores))}
    pin = hasattr(os, "sched_setaffinity")
    before = os.sched_getaffinity(0) if pin else set()
    if pin:  # the child inherits it before it runs a line
        os.sched_setaffinity(0, cores)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "esjax", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the coordinator, which tells them
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
