"""`python -m esjax` and the command `esjax`: the command line, and what a program sets up before it."""

import io
import os
import sys

from esjax.signals import end_on_signals


def set_up() -> None:
    """Have signals end the program with one line, and its outputs take everything, by escapes what they cannot encode.

    Before the slow imports, and by programs alone: it is for the whole process.
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # an output that was closed: no file of a run shall get its number, to which libraries write
    os.close(spare)
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
