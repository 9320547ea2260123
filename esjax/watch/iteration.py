"""Iteration over a run: signals are handled while a step is taken, and a script that ends leaves a checkpoint."""

import concurrent.futures.thread  # noqa: F401  (registers its end of the program before this module does)
import os
import threading
from collections.abc import Generator, Iterator
from weakref import WeakSet

from esjax.runs.step_info import StepInfo
from esjax.signals import stop_on_signals


class Iteration(Iterator[StepInfo]):
    """The steps of a run, one at a time.

    Between two steps Ctrl-C and SIGTERM are the program's own. An iteration that is left half-way is closed, which
    leaves a checkpoint: when nothing refers to it any more (after `break` or an exception), and at the latest at the
    end of the program.
    """

    def __init__(self, steps: Generator[StepInfo], asked: threading.Event) -> None:
        """Wrap the generator of the steps; the event is set by the first signal while it runs."""
        self._steps, self._asked = steps, asked
        self._is_running = self._is_over = False
        _open.add(self)

    def __next__(self) -> StepInfo:
        """Take a step, and return its info."""
        self._is_running, is_over = True, True
        try:
            with stop_on_signals(self._asked):
                info = next(self._steps)
            is_over = False
            return info
        finally:
            self._is_running, self._is_over = False, is_over

    def close(self) -> None:
        """End the iteration, and leave a checkpoint. Nothing happens while a step is taken, by another thread."""
        if self._is_running or self._is_over:
            return
        self._is_over = True
        with stop_on_signals(self._asked):
            self._steps.close()

    def __del__(self) -> None:
        """Close it."""
        self.close()


_open: WeakSet[Iteration] = WeakSet()
_process = os.getpid()


def _close_all() -> None:
    if os.getpid() == _process:  # a child that was forked has copies, which are not its own
        for iteration in list(_open):
            iteration.close()


# Not `atexit`: its functions run after the executors of threads have shut down, with which orbax writes. Functions that
# are registered here run before, the last one first.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
