"""Ctrl-C and SIGTERM: end the program at once before the first step, and stop at the next step from then on."""

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from esjax.terminal import has_cursor

SIGNALS = (signal.SIGINT, signal.SIGTERM)

STOPPING = "stopping, which takes a moment; a second Ctrl-C ends at once"
"""Printed after the first signal."""

SHOW_CURSOR = "\x1b[?25h"
"""Shows the cursor again, which a progress line may have hidden."""

GRACE = 1.0
"""Seconds that the main thread has to handle a signal. Python handles none while native code runs there, such as a
compilation, or `jax.distributed` waiting for other processes."""

_HANDLED = b"\0"
"""Written to the pipe after the numbers of the signals that `stop_on_signals` has handled."""

_starting = threading.Event()
_pipe = -1
_open_blocks: list[threading.Event] = []  # the events of the blocks of `stop_on_signals`


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM print one line and end the program at once; call it first, before the slow imports.

    The exit status is 128 plus the number of the signal. An exception would not always end the program: Python prints
    and drops one that is raised in a callback of the garbage collector, where JAX has some, and one that is raised
    while an extension module is imported can crash the interpreter. Process 1 of a container needs handlers, too: the
    kernel drops its signals otherwise. A thread ends the program when the main thread does not within `GRACE`.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    numbers, into = os.pipe()
    os.set_blocking(into, False)
    _set_pipe(into)
    os.register_at_fork(after_in_child=lambda: _set_pipe(-1))  # a child's signals are not this program's
    threading.Thread(target=_watch, args=(numbers,), daemon=True, name="esjax-signals").start()


def _set_pipe(into: int) -> None:
    global _pipe
    _pipe = into
    signal.set_wakeup_fd(into, warn_on_full_buffer=False)


def _watch(numbers: int) -> None:
    """Read the numbers of signals from a pipe, and end the program for one that the main thread does not handle."""
    waiting, came = 0, 0
    while True:
        if not select.select([numbers], [], [], GRACE if waiting else None)[0]:
            if signal.getsignal(waiting) is _end or _starting.is_set() or came > 1:
                _end(waiting, None)
            waiting = 0
            continue
        for byte in os.read(numbers, 64):
            if byte in SIGNALS:
                came += not waiting  # a launcher may send one to the process, and to its group
                waiting = byte
            elif byte == _HANDLED[0]:
                waiting = 0


@contextmanager
def starting() -> Iterator[None]:
    """Mark the start of a run, until `started` or the end of the block: there is nothing to save yet.

    Within it and `stop_on_signals`, a signal ends a program at once all the same.
    """
    _starting.set()
    try:
        yield
    finally:
        _starting.clear()


def started() -> None:
    """Mark that a step is done, or that the program looks at the event of `stop_on_signals` all the time."""
    _starting.clear()


def _end(number: int, frame: FrameType | None) -> NoReturn:
    line = f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}\n"
    stderr = sys.__stderr__
    try:
        # Written by its descriptor, since the signal may interrupt a print; not if that would block.
        if stderr is not None and select.select([], [stderr.fileno()], [], GRACE)[1]:
            os.write(stderr.fileno(), (f"{SHOW_CURSOR}\n{line}" if has_cursor(stderr) else line).encode())
    finally:
        os._exit(128 + number)


@contextmanager
def stop_on_signals(asked: threading.Event | None = None) -> Iterator[threading.Event]:
    """Set an event at the first signal; a second signal goes to the handler that was there before.

    Python delivers signals to the main thread only; in another thread the event is never set.

    Args:
        asked: The event; None: a new one. Within a block for the same event, a block changes nothing.
    """
    asked = asked or threading.Event()
    if threading.current_thread() is not threading.main_thread() or asked in _open_blocks:
        yield asked
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    over = False

    def ask(number: int, frame: FrameType | None) -> None:
        if _pipe >= 0:
            os.write(_pipe, _HANDLED)
        handler = before[number]
        if not (over or asked.is_set() or (_starting.is_set() and handler is _end)):
            asked.set()
            return
        # The block may be over: a run that ended later than this one may have put this handler back.
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # process 1: the kernel dropped the signal

    for number in SIGNALS:
        signal.signal(number, ask)
    _open_blocks.append(asked)
    try:
        yield asked
    finally:
        over = True
        _open_blocks.remove(asked)
        for number in SIGNALS:
            if signal.getsignal(number) is ask:
                signal.signal(number, before[number])
