"""How fast several processes of this machine train together, compared with one that has all its cores.

    python experiments/bench_workers.py --workers 2 4 --rounds 3

Runs take turns, so that what else the machine does meets all of them alike; of each, member-tokens a second are counted
from the tenth step on. Prints a line of JSON for each run, and the ratio of the medians to one process at the end.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

SKIPPED = 10
"""Steps at the start that are not counted."""


@dataclass(frozen=True)
class Bench:
    """Compare processes that train together with one alone."""

    settings: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Settings of train, after --."""

    workers: tuple[int, ...] = (2,)
    """Numbers of processes."""

    rounds: int = 3
    """Turns."""

    seconds: float = 20.0
    """Seconds of a run."""


def rate(workers: int, bench: Bench) -> float:
    """Train, and return member-tokens a second; 0 workers: one process with all cores."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["--seconds", str(bench.seconds), "--evaluate-time", "1000", "--out", str(run), *bench.settings]
        command = [sys.executable, "-m", "esjax", "train", "--workers", str(workers), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is missing"
    first, last = rows[SKIPPED], rows[-2]  # the last one may end with an evaluation
    return (last["member_tokens"] - first["member_tokens"]) / (last["seconds"] - first["seconds"])


def main(bench: Bench) -> None:
    """Take turns, and compare."""
    rates: dict[int, list[float]] = {number: [] for number in (0, *bench.workers)}
    for _ in range(bench.rounds):
        for number, found in rates.items():
            found.append(rate(number, bench))
            print(json.dumps({"workers": number, "member_tokens_per_second": found[-1]}), flush=True)
    alone = statistics.median(rates[0])
    for number in bench.workers:
        print(json.dumps({"workers": number, "ratio_to_one_process": statistics.median(rates[number]) / alone}))


if __name__ == "__main__":
    main(tyro.cli(Bench))
