"""Rate of several processes of this machine that train together, compared with one process that has all cores.

Runs take turns; the rate of each, in member-tokens per second, counts from the tenth step.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.measure import spread
from bench.report import Report, Row
from bench.settings import Workers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIPPED = 10
"""Steps at the start that are not counted."""


def run(settings: Workers) -> Report:
    """Take turns, and compare."""
    rates: dict[int, list[float]] = {number: [] for number in (0, *settings.workers)}
    for _ in range(settings.rounds):
        for number, found in rates.items():
            found.append(rate(number, settings))
    alone = np.array(rates[0])
    rows = [
        {
            "processes": number or "one, all cores",
            "M/s": float(np.median(found)) / 1e6,
            "÷ one process": spread(np.array(found) / alone),
        }
        for number, found in rates.items()
    ]
    return Report(rows, partial(plot, rows))


def rate(workers: int, settings: Workers) -> float:
    """Train and return member-tokens per second; 0 workers: one process with all cores."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["--seconds", str(settings.seconds), "--evaluate-time", "1000", "--out", str(out), *settings.words]
        command = [sys.executable, "-m", "esjax", "train", "--workers", str(workers), "--oversubscribe", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing"
    first, last = rows[SKIPPED], rows[-2]  # the last one may end with an evaluation
    return (last["member_tokens"] - first["member_tokens"]) / (last["seconds"] - first["seconds"])


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the ratios."""
    axes = figure.add_subplot()
    axes.bar([str(row["processes"]) for row in rows], [row["÷ one process"].median for row in rows])
    axes.set(xlabel="processes", ylabel="rate ÷ that of one process")
