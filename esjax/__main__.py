"""`python -m esjax` and the command `esjax`: the command line, and what a program sets up before it."""

import io
import sys

from esjax.interrupts import end_on_signals


def set_up() -> None:
    """Have signals end the program with one line, and its output show what it cannot encode by escapes.

    Before the slow imports, and by programs alone: it is for the whole process.
    """
    end_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run() -> None:
    """Run the command that the program was called with."""
    set_up()
    from esjax.cli import main

    main()


if __name__ == "__main__":
    run()
