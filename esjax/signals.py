"""Ctrl-C and SIGTERM: the end of a program that has nothing to lose yet, and a wish to stop at the next step."""

import os
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
"""What a person is told after the first signal."""

SHOW_CURSOR = "\x1b[?25h"
"""To a terminal whose cursor a line of progress may have hidden."""


def end_on_signals() -> None:
    """Have Ctrl-C and SIGTERM end the program at once, with one line; for its entry, before the slow imports.

    An exception would not always end it: one that is raised in a callback, such as those that JAX has in the garbage
    collector, is printed and forgotten, and one raised while an extension module is imported can crash the interpreter.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    line = f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}\n"
    stderr = sys.__stderr__
    try:
        if stderr is not None:  # by its number: the signal may have come in the middle of a print
            os.write(stderr.fileno(), (f"{SHOW_CURSOR}\n{line}" if has_cursor(stderr) else line).encode())
    finally:
        os._exit(128 + number)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Set an event at the first signal; a second one acts as it did before.

    Outside the main thread, where Python hands out no signals, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    over = False

    def ask(number: int, frame: FrameType | None) -> None:
        if not (over or asked.is_set()):
            asked.set()
            return
        # Not ours: it may still come here if another run beside this one ended later and put this handler back.
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        over = True
        for number in SIGNALS:
            if signal.getsignal(number) is ask:
                signal.signal(number, before[number])
