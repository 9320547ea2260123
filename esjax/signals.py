"""Ctrl-C and SIGTERM: end the program at once before training, and stop at the next step during training."""

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
"""Printed after the first signal."""

SHOW_CURSOR = "\x1b[?25h"
"""Shows the cursor again, which a progress line may have hidden."""

_handled: list[threading.Event] = []  # events of the blocks of `stop_on_signals` that are open


def end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM print one line and end the program at once; call it first, before the slow imports.

    The exit status is 128 plus the number of the signal. An exception would not always end the program: Python prints
    and drops one that is raised in a callback of the garbage collector, where JAX has some, and one that is raised
    while an extension module is imported can crash the interpreter.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    line = f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}\n"
    stderr = sys.__stderr__
    try:
        if stderr is not None:  # written by its descriptor: the signal may interrupt a print
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
    if threading.current_thread() is not threading.main_thread() or asked in _handled:
        yield asked
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    over = False

    def ask(number: int, frame: FrameType | None) -> None:
        if not (over or asked.is_set()):
            asked.set()
            return
        # The block may be over: a run that ended later than this one may have put this handler back.
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, ask)
    _handled.append(asked)
    try:
        yield asked
    finally:
        over = True
        _handled.remove(asked)
        for number in SIGNALS:
            if signal.getsignal(number) is ask:
                signal.signal(number, before[number])
