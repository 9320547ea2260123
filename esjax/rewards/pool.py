"""Worker processes that call a reward or a tool: they may raise, hang or be killed, and the run goes on.

Processes are started as programs, never forked: JAX has threads. The function is loaded in them from its file, so only
text travels. A thread for each process sends it calls and waits for their results.
"""

import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

from esjax.config.custom_names import Code
from esjax.rewards.calls import Failure, Kind, Scored, Texts
from esjax.rewards.worker import REPORT

START = 120.0
"""Seconds that a process has to load the function, with all that its file imports."""

WORTH = 0.01
"""Seconds of calls for which another process is sent a message; with less to do, one process makes them all."""

CLOSED = "closed"
"""Kind of the failure of calls that the end of the run leaves out."""

SLACK = 0.2
"""Seconds on top of a call's time limit for the way of its result."""


NONE: Mapping[str, float] = MappingProxyType({})
"""No weights: each reward weighs 1."""


class Pool:
    """Calls a function in several processes, which start with the first call, or with `load`.

    Attributes:
        calls: Calls that have ended so far, about: threads count without a lock.
    """

    def __init__(
        self, code: Code, processes: int, seconds: float, kind: Kind = "reward", weights: Mapping[str, float] = NONE
    ) -> None:
        """Set up.

        Args:
            code: The file and the function in it.
            processes: Number of processes, at least 1.
            seconds: Time limit of a call.
            kind: What the function is.
            weights: Weights of rewards by their names.
        """
        self._code, self._count, self._seconds = code, processes, seconds
        self._words = [code.path, code.name, code.digest, kind, json.dumps(dict(weights))]
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._workers: set[_Worker] = set()
        self._spare: list[_Worker] = []  # loaded, and of no thread
        self._is_closed = False
        self._call_seconds = math.inf  # of a call, as last measured
        self.calls = 0

    def load(self) -> Failure | None:
        """Start all processes and wait until they have loaded the function; return why one of them has not, or None."""
        self._is_closed = False
        fresh = [self._begin_worker() for _ in range(self._count - len(self._workers))]
        until = time.monotonic() + START
        for worker in fresh:
            worker.load(until - time.monotonic())
            if worker.broken:
                for one in fresh:
                    self._end(one)
                return worker.broken
        self._spare += fresh
        return None

    def score(self, texts: Texts) -> list[Future[Scored]]:
        """Queue calls; the results of all futures, joined, are theirs, in their order."""
        self._start()
        parts = math.ceil(min(max(texts.calls * self._call_seconds / WORTH, 1), self._count))
        size = -(-texts.calls // parts)
        batches = [_Batch(texts.part(first, first + size)) for first in range(0, texts.calls, size)]
        for batch in batches:
            self._batches.put(batch)
        return [batch.future for batch in batches]

    def close(self) -> None:
        """End all processes. `load` and `score` start new ones."""
        self._is_closed = True
        for worker in [*self._workers]:
            worker.kill()
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        while self._spare:
            self._end(self._spare.pop())

    def _start(self) -> None:
        if not self._threads:
            self._is_closed = False
            self._threads = [
                threading.Thread(target=self._serve, daemon=True, name=f"esjax-reward-{number}")
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()

    def _serve(self) -> None:
        """Make the calls of one batch after another in one process, which is replaced when it breaks."""
        worker: _Worker | None = None
        while (batch := self._batches.get()) is not None:
            size, calls = batch.texts.size, batch.texts.calls
            scored = Scored.nothing()
            one_by_one = False
            failure = Failure(CLOSED, "the run was ended")
            try:
                while (done := len(scored.values) // size) < calls and not self._is_closed:
                    if worker is None:
                        worker = self._new_worker()
                    began = time.monotonic()
                    if not worker.broken:
                        worker.send(batch.texts.part(done, calls), one_by_one)
                    while not worker.broken and len(scored.values) < size * calls:
                        patience = self._seconds + SLACK + (0 if one_by_one else REPORT)
                        found = worker.receive(patience, self._seconds)
                        scored.add(found, size)
                        self.calls += len(found.values) // size
                    if worker.broken:
                        if not worker.is_loaded:
                            scored.fail(worker.broken, calls - done, size)
                        elif one_by_one:
                            scored.fail(worker.broken, 1, size)
                            self.calls += 1
                        one_by_one = True  # any call without a result may be the one that failed
                        self._end(worker)
                        worker = None
                    self._call_seconds = (time.monotonic() - began) / (calls - done)
            except Exception as error:  # no process can be started, or an answer cannot be sent: the run goes on
                failure = Failure(type(error).__name__, f"it cannot be called: {type(error).__name__}: {error}")
                self._end(worker)
                worker = None
            scored.fail(failure, calls - len(scored.values) // size, size)
            batch.future.set_result(scored)
        self._end(worker)

    def _begin_worker(self) -> "_Worker":
        worker = _Worker(self._code, self._words)
        self._workers.add(worker)
        if self._is_closed:  # meanwhile, by `close`, which did not see this one
            worker.kill()
        return worker

    def _new_worker(self) -> "_Worker":
        if self._spare:
            with suppress(IndexError):  # another thread was faster
                return self._spare.pop()
        worker = self._begin_worker()
        worker.load(START)
        return worker

    def _end(self, worker: "_Worker | None") -> None:
        """End a process and forget it."""
        if worker is not None:
            worker.close()
            self._workers.discard(worker)


class _Batch:
    """Calls that one process makes, and the future of their results."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts
        self.future: Future[Scored] = Future()


class _Worker:
    """A worker process.

    Attributes:
        is_loaded: Whether it has loaded the function.
        broken: Why it can no longer be used, or None.
    """

    def __init__(self, code: Code, words: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "esjax.rewards.worker", str(theirs.fileno()), *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # The same imports as here; a reward that uses JAX leaves accelerators to the training.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"},
                start_new_session=True,  # Ctrl-C is for the training process, which then ends this one
            )
        self._connection = Connection(ours.detach())
        self._code = code
        self.is_loaded = False
        self.broken: Failure | None = None

    def load(self, patience: float) -> None:
        """Wait until the process has loaded the function."""
        said = self._receive(max(patience, 0.0), f"its file took more than {START:g} s to load")
        if said:
            self.broken = Failure("load", f"cannot load {self._code}: {said}")
        self.is_loaded = self.broken is None

    def send(self, texts: Texts, one_by_one: bool) -> None:
        """Have the process make calls, and report after each or now and then."""
        try:
            self._connection.send((texts, one_by_one))
        except OSError:
            self._ended()

    def receive(self, patience: float, seconds: float) -> Scored:
        """Wait for results; there are none from a process that is broken, as it then is after `patience`."""
        return self._receive(patience, f"it took more than {seconds:g} s (reward.seconds)") or Scored.nothing()

    def _receive(self, patience: float, too_long: str) -> Any:
        try:
            if self._connection.poll(patience):
                return self._connection.recv()
            self.broken = Failure("time", too_long)
        except (OSError, EOFError):
            self._ended()
        return None

    def _ended(self) -> None:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.broken = Failure("killed", f"its worker process {how}")

    def kill(self) -> None:
        """End the process, and those that the reward has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and free the socket."""
        self.kill()
        self._process.wait()
        self._connection.close()
