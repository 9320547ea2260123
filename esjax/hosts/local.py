"""Hosts as processes of this machine, which share its cores."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from esjax.cores import available_cores
from esjax.errors import EsjaxError
from esjax.texts import legible

PATIENCE = 60.0
"""Seconds without a message from the coordinator after which a process ends."""

WORKER_BYTES = 600_000_000
"""Bytes of memory of a process with a small model, most of them for JAX."""

CHECK = 1.0
"""Seconds between checks that the processes live."""

RESTARTS = 3
"""Times that a process is started again."""

LAST_LINES, LAST_BYTES = 5, 2000
"""Lines and bytes that are shown of the log of a process that ended."""

FAREWELL = {"leave": 1.5, "terminate": 0.5, "kill": 15.0}
"""Seconds that all processes together have to end: by themselves, after SIGTERM, after SIGKILL. They hold nothing that
is needed, and one that compiles notices nothing."""


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


class LocalWorkers:
    """Processes that join a run.

    Attributes:
        lost: Names of the processes that ended too often, and were not started again.
    """

    def __init__(
        self,
        count: int,
        logs: Path,
        tell: Callable[[str], None],
        *,
        given: Sequence[str] = (),
        oversubscribe: bool = False,
    ) -> None:
        """Prepare.

        Args:
            count: Number of processes, at least 1.
            logs: Folder for their log files, worker-0.log and so on.
            tell: Prints a line for the user.
            given: Options of `join` that name custom code, see `esjax.models.custom.Custom.words`.
            oversubscribe: Allow more processes than cores.

        Raises:
            EsjaxError: There are fewer cores, and `oversubscribe` is not set.
        """
        check_workers(count, oversubscribe)
        self.lost: list[str] = []
        self._count, self._logs, self._tell, self._given = count, logs, tell, given

    @contextmanager
    def joined(self, address: str) -> Iterator[Callable[[], None]]:
        """Start the processes, and end them when the block ends.

        Args:
            address: tcp://HOST:PORT of the coordinator.

        Returns:
            A function to call often, which starts processes that ended again, each `RESTARTS` times at most.

        Raises:
            EsjaxError: By that function: no process is left.
        """
        workers: list[_Worker] = []
        next_at = 0.0

        def check() -> None:
            nonlocal next_at
            if time.monotonic() < next_at:
                return
            for worker in workers:
                if worker.name not in self.lost and worker.process.poll() is not None:
                    self._replace(worker)
            if len(self.lost) == len(workers):
                self.check_kept()
            next_at = time.monotonic() + CHECK

        try:
            for number, cores in enumerate(divide(available_cores(), self._count)):
                name = f"worker-{number}"
                words = ["join", address, "--name", name, "--patience", str(PATIENCE), *self._given]
                workers.append(_Worker(name, words, cores, self._logs / f"{name}.log"))
            yield check
        finally:
            _end([worker.process for worker in workers])

    def check_kept(self) -> None:
        """Check that no process was lost.

        Raises:
            EsjaxError: Some were.
        """
        if self.lost:
            raise EsjaxError(
                f"{' and '.join(self.lost)} ended {RESTARTS + 1} times and could not be kept; the reason is in the "
                f"logs in {self._logs}. The run is kept, too: correct what ended them, and resume it"
            )

    def _replace(self, worker: "_Worker") -> None:
        code, again = worker.process.returncode, worker.restarts < RESTARTS
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        then = f"it is started again, {worker.restarts + 1} of {RESTARTS} times" if again else "it is not started again"
        lines = worker.last_lines()
        self._tell(f"{worker.name} {how}; {then}; {'the end of' if lines else 'nothing is in'} {worker.log}:")
        for line in lines:
            self._tell(f"  {legible(line)}")
        if again:
            worker.restarts += 1
            worker.start()
        else:
            self.lost.append(worker.name)


class _Worker:
    """A process, which is running when this is made.

    Attributes:
        process: The process that was started last.
        restarts: How often it was started again.
    """

    def __init__(self, name: str, words: Sequence[str], cores: Sequence[int], log: Path) -> None:
        self.name, self.log = name, log
        self._words, self._cores = words, cores
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """Start the process; -P keeps files of the working folder from standing in for modules of Python."""
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(len(self._cores))}
        pin = hasattr(os, "sched_setaffinity")
        before = os.sched_getaffinity(0) if pin else set()
        if pin:  # the child inherits the affinity from its start
            os.sched_setaffinity(0, self._cores)
        try:
            with self.log.open("ab") as log:
                self._begin = log.tell()
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "esjax", *self._words],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches the coordinator alone, which then ends its hosts
                )
        finally:
            if pin:
                os.sched_setaffinity(0, before)

    def last_lines(self) -> list[str]:
        """Return the end of what the last process wrote."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._begin, size - LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()][-LAST_LINES:]


def divide(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide cores among processes as equally as possible; with more processes than cores, some share a core."""
    if count >= len(cores):
        return [[cores[number % len(cores)]] for number in range(count)]
    return [list(cores[number::count]) for number in range(count)]


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for way, seconds in FAREWELL.items():
        until = time.monotonic() + seconds
        running = [process for process in processes if process.poll() is None]
        for process in running:
            if way != "leave":
                getattr(process, way)()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
