"""The standard outputs: whether one goes to a terminal, and what happens when one cannot be written."""

import os
import select
import sys
from typing import Any

from esjax.errors import EsjaxError
from esjax.texts import PROSE, legible

WITHOUT_CURSOR = ("", "dumb", "unknown")
"""Values of TERM for terminals that show the codes of the cursor as text, or may do so."""


def has_cursor(stream: Any) -> bool:
    """Return whether a text stream, or None, goes to a terminal in which the cursor can be moved.

    FORCE_COLOR and the like change nothing here: they are about colors, and a file has no cursor.
    """
    return stream is not None and stream.isatty() and os.environ.get("TERM", "").lower() not in WITHOUT_CURSOR


def print_text(text: str) -> None:
    """Print a text that a model wrote; in a terminal, characters that could control it are shown as escapes."""
    print(legible(text.replace("\r\n", "\n"), PROSE) if sys.stdout and sys.stdout.isatty() else text)


def flush_output() -> None:
    """Flush the standard output, while a failure can still be reported.

    Raises:
        EsjaxError: It cannot be written.
        BrokenPipeError: Its reader is gone.
    """
    if sys.stdout is None:  # the caller closed it
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise EsjaxError(f"cannot write the output: {error.strerror}") from error


def reader_is_gone() -> bool:
    """Return whether the reader of the output has gone, as after `| head`."""
    poller = select.poll()
    for descriptor in (1, 2):
        poller.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def discard_output() -> None:
    """Discard output that cannot be written; otherwise Python retries at exit and prints an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
