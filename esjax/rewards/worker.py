"""The program of a worker process: loads a function from its file, and calls it on texts that come through a socket."""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

from esjax.config.custom_names import Code
from esjax.errors import EsjaxError
from esjax.python_files import load_function
from esjax.rewards.calls import Kind, Scored, make_call

REPORT = 0.05
"""Seconds of calls after which their results are sent; one by one they would take longer than many rewards."""

PARENT = 1.0
"""Seconds between looks whether the training process still runs."""


def main(words: Sequence[str]) -> None:
    """Serve calls until the training process closes the socket.

    Args:
        words: File descriptor of the socket, path of the file, name of the function, hash of the file or "", kind of
            the function, and weights in JSON.
    """
    connection = Connection(int(words[0]))
    os.dup2(2, 1)  # standard output may be a pipe of the training program
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    path, name, known, kind, weights = words[1:]
    try:
        source = Path(path).read_bytes()
        code = Code.of(path, name, source)
        if known not in ("", code.digest):
            raise EsjaxError("the file has changed since the run was started; start it anew, or put the file back")
        function = load_function(code, source)
    except BaseException as error:
        connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
        return
    connection.send("")
    call = make_call(cast("Kind", kind), function, json.loads(weights))
    while True:
        try:
            texts, one_by_one = connection.recv()
        except EOFError:
            return
        done, sent_at = Scored.nothing(), time.monotonic()
        for number in range(texts.calls):
            done.add_call(call(texts, number), texts.size)
            if one_by_one or time.monotonic() - sent_at > REPORT:
                connection.send(done)
                done, sent_at = Scored.nothing(), time.monotonic()
        if done.values:
            connection.send(done)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, also within a call that never returns."""
    while os.getppid() == parent:
        time.sleep(PARENT)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
