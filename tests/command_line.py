"""Commands run in this process, a terminal for what it prints, and a small text to run them on."""

import io
import os
import pty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from select import select
from typing import Any, NamedTuple, TextIO

from esjax import cli

SENTENCE = "the cat sat on a mat and saw no dog there but it did not mind at all so be it"
WORDS = SENTENCE.split()
TEXT = "\n\n".join(" ".join(WORDS[i : i + 5]) for i in range(len(WORDS) - 4)) + "\n"

TINY = (
    *("--data.text", "text.txt", "--data.held-out", "0.3", "--data.window", "4"),
    *("--es.population-size", "8", "--model.hidden-size", "4"),
)


class Called(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def call(*words: str) -> Called:
    """Run a command in this process, on streams like those of a terminal."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as end:
            code = end.code
    return Called(code or 0, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def succeed(*words: str) -> Called:
    called = call(*words)
    assert called.code == 0, called.err
    return called


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Callable[[str], str]]]:
    """Open a pseudo-terminal: its stream for a program, and a function that reads on until some text is shown."""
    window, end = pty.openpty()

    def shown(awaited: str) -> str:
        found = b""  # as bytes, since a part may end within a character
        while awaited.encode() not in found and select([window], [], [], 20)[0]:  # the kernel hands over parts, later
            found += os.read(window, 2**16)
        return found.decode(errors="replace")

    try:
        with os.fdopen(end, "w") as stream:
            yield stream, shown
    finally:
        os.close(window)
