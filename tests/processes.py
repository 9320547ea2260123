"""Real coordinators and hosts in processes of their own, on this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from conftest import PROGRAMS

from esjax.config.settings import from_yaml, replace, to_yaml
from esjax.runs.checkpoint import digest
from esjax.runs.ledger import UPDATE, read
from esjax.runs.step_info import Limits
from esjax.training.run import Trainer, train

SMALL = [
    "gru",
    *("--model.hidden-size", "8", "--model.head-size", "8"),
    *("--es.population-size", "64", "--es.chunk-pairs", "4", "--data.window", "8"),
    *("--checkpoint-time", "2", "--evaluate-time", "2"),
]
"""Settings of a small run, as words of a command line."""

SHARED = tempfile.TemporaryDirectory(prefix="esjax-tests-")
"""What the tests of a session share."""

TEXT = Path(SHARED.name) / "text.txt"
TEXT.write_text("\n\n".join(f"{i} to be, or not to be: that is the question {i * i}" for i in range(200)))

PATIENCE = 120.0
"""Seconds that a test waits for anything at most."""


def environment() -> dict[str, str]:
    """Share compiled programs between processes, and give each one device."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": PROGRAMS,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Process:
    """`esjax ...`, with all it prints in a file."""

    def __init__(
        self,
        *words: str,
        log: Path,
        file_blocks: int | None = None,
        program: Sequence[str] = ("-m", "esjax"),
        within: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            words: Of the command line.
            log: For all that it prints.
            file_blocks: Blocks of 1,024 bytes that a file may grow to, as on a disk that is full. None: any.
            program: What Python runs.
            within: Command that starts Python, such as unshare.
        """
        self.log = log
        command = [*within, sys.executable, *program, *words]
        if file_blocks is not None:
            command = ["bash", "-c", f'trap "" XFSZ; ulimit -f {file_blocks}; exec "$@"', "bash", *command]
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment(),
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.popen.poll() is not None)
        assert text in self.output, self.output

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def child(self) -> int:
        """Return the number of the only process that it has started."""
        (child,) = self._children()
        return child

    def worker(self) -> int:
        """Return the number of the only process that it has started to join its run."""
        (worker,) = (child for child in self._children() if b"\0join\0" in Path(f"/proc/{child}/cmdline").read_bytes())
        return worker

    def _children(self) -> list[int]:
        number = self.popen.pid
        return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]

    def ends(self) -> int:
        """Wait for its end, and return its exit code."""
        try:
            return self.popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError(self.output) from None


class Fleet:
    """A coordinator and its hosts; whatever still runs at the end is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.address = ""
        self._started: list[Process] = []

    def start(self, *words: str, file_blocks: int | None = None, within: Sequence[str] = ()) -> Process:
        log = self.folder / f"{len(self._started)}-{words[0]}.log"
        process = Process(*words, log=log, file_blocks=file_blocks, within=within)
        self._started.append(process)
        return process

    def serve(
        self,
        *words: str,
        bind: str = "tcp://127.0.0.1:0",
        file_blocks: int | None = None,
        within: Sequence[str] = (),
    ) -> Process:
        settings = ["--out", str(self.run), "--data.text", str(TEXT), *SMALL, "--bind", bind, *words]
        process = self.start("serve", *settings, file_blocks=file_blocks, within=within)
        self.hear_address(process)
        return process

    def serve_again(self, *words: str) -> Process:
        process = self.start("serve", "--resume", str(self.run), "--bind", self.address, *words)
        self.hear_address(process)
        return process

    def join(self, name: str, *words: str, within: Sequence[str] = ()) -> Process:
        return self.start("join", self.address, "--name", name, *words, within=within)

    def hear_address(self, process: Process) -> None:
        process.wait_for("esjax join ")
        self.address = process.output.split("esjax join ")[1].split()[0]

    def close(self) -> None:
        for process in self._started:
            process.popen.kill()
            process.popen.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for `PATIENCE` at most."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


def updates(run: Path) -> list[bytes]:
    return [record.payload for record in read(run / "ledger") if record.kind == UPDATE]


def steps_done(run: Path) -> int:
    return len(updates(run))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.close()


@cache
def begun(settings: str) -> tuple[Trainer, list[str]]:
    """Begin a run in this process, for all tests of these settings; and a list for the digest after each step."""
    return train(from_yaml(settings, ""), Path(tempfile.mkdtemp(dir=SHARED.name)) / "alone"), []


def alone(fleet: Fleet, steps: int) -> tuple[list[bytes], str]:
    """Train the run of a fleet anew in this process: its updates, and the digest of its state after so many steps."""
    config = from_yaml((fleet.run / "config.yaml").read_text(), "")
    trainer, digests = begun(to_yaml(replace(config, steps=None)))
    if trainer.step < steps:
        trainer.limits = Limits(steps, None)
        digests += [digest(trainer._replica.state) for _ in trainer]
    assert trainer.folder is not None
    return updates(trainer.folder.path)[:steps], digests[steps - 1]
