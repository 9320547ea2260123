"""Commands run in this process, and a small text to run them on."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

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
