"""Ctrl-C and SIGTERM as a wish to stop at the next step, so that nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
