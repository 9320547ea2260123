"""Seconds from the start of a process to the first line of training, to the help, and to the import of the library.

The first line is printed after the first step and its evaluation. Cold: the compilation cache is empty; warm: it holds
all programs. For comparison: the start of Python, and a first product in JAX. All in turns, each in a new process.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.report import Report, Row
from bench.settings import Start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JAX = "import jax; jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))))"
"""A program that only multiplies in JAX: the least time of any program that uses JAX."""


def run(settings: Start) -> Report:
    """Start all candidates in turns."""
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        train = [sys.executable, "-m", "esjax", "train", *settings.words]
        candidates = {
            "python": Candidate(partial(_finish, [sys.executable, "-c", ""])),
            "import esjax": Candidate(partial(_finish, [sys.executable, "-c", "import esjax"])),
            "esjax --help": Candidate(partial(_finish, [sys.executable, "-m", "esjax", "--help"])),
            "esjax train --help": Candidate(partial(_finish, [sys.executable, "-m", "esjax", "train", "--help"])),
            "a first product in JAX": Candidate(partial(_finish, [sys.executable, "-c", JAX])),
            "first step, cold": Candidate(lambda: _first_line(train, Path(tempfile.mkdtemp(dir=folder)))),
            "first step, warm": Candidate(lambda: _first_line(train, warm)),
        }
        candidates["first step, warm"].call()
        rates = alternate(candidates, settings.rounds, least=0.0)
    rows = [
        {
            "start of": name,
            "seconds": spread(1 / values),
            "÷ python": spread(rates["python"] / values),
            "÷ a first product in JAX": spread(rates["a first product in JAX"] / values),
        }
        for name, values in rates.items()
    ]
    return Report(rows, partial(plot, rows))


def _finish(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _first_line(command: list[str], cache: Path) -> None:
    """Train until the first line of a step, with the compilation cache in `cache`."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        command = [*command, "--out", str(Path(folder) / "run")]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stderr is not None
        with process, process.stderr as lines:
            said = []
            for line in lines:
                said.append(line)
                if line.startswith("step 1"):
                    break
            else:
                raise RuntimeError("it ended before its first step:\n" + "".join(said))
            process.kill()


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw seconds."""
    axes = figure.add_subplot()
    times = [row["seconds"] for row in rows]
    axes.barh([row["start of"] for row in rows], [time.median for time in times])
    low, high = ([abs(getattr(time, end) - time.median) for time in times] for end in ("low", "high"))
    axes.errorbar([time.median for time in times], np.arange(len(rows)), xerr=[low, high], fmt="none", color="black")
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
