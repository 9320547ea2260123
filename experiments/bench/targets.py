"""Compares the results of benchmarks, read from their JSON files, with the targets."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.report import Report, Row

Rows = list[dict[str, Any]]


class Target(NamedTuple):
    """A target.

    Attributes:
        benchmark: Name of the benchmark that measures it.
        what: Description of the figure.
        bound: Value to reach.
        is_most: True: the figure must be at most `bound`; False: at least.
        find: `(rows) -> figures`, of which the worst counts. Empty if it was not measured, or never reached.
    """

    benchmark: str
    what: str
    bound: float
    is_most: bool
    find: Callable[[Rows], Iterable[float | None]]


def column(name: str, **chosen: Any) -> Callable[[Rows], Iterable[float | None]]:
    """Select a column of the rows that have given values in other columns."""
    return lambda rows: [
        _middle(row.get(name)) for row in rows if all(row.get(key) == value for key, value in chosen.items())
    ]


def rnn(hidden: int, sequences: int) -> dict[str, Any]:
    """Select the row of one rnn."""
    return {"model": "rnn", "hidden": hidden, "sequences": sequences}


def reached_below(loss: float, methods: Iterable[str]) -> Callable[[Rows], Iterable[float | None]]:
    """Select the seconds of the fastest of some methods to a loss."""

    def quickest(rows: Rows) -> Iterable[float | None]:
        found = [row.get(f"below {loss}: s") for row in rows if row["method"] in methods]
        times = [time for time in found if time is not None]
        return [min(times)] if times else [None] * bool(found)

    return quickest


RNNS = ((16, 8, 75, 1.7), (32, 32, 23, 1.4), (64, 8, 25, 1.4), (256, 32, 4.5, 1.2))
"""Hidden size, sequences per member, and target ratios: evaluation to numpy, and step to the best rival."""

WEIGHTS = "low rank 1", "low rank 4", "full"

ONE_HOST, MANY_HOSTS = ({"changed": "model", "hosts": hosts} for hosts in (1, 16))

TARGETS = (
    *(
        Target("throughput", f"rnn {hidden}: evaluation ÷ numpy", least, False, column("evaluation ÷ numpy", **size))
        for hidden, sequences, least, _ in RNNS
        for size in [rnn(hidden, sequences)]
    ),
    *(
        Target("throughput", f"rnn {hidden}: step ÷ best rival", least, False, column("step ÷ best rival", **size))
        for hidden, sequences, _, least in RNNS
        for size in [rnn(hidden, sequences)]
    ),
    Target("throughput", "evaluation ÷ forward, all sizes", 0.95, False, column("evaluation ÷ forward")),
    Target("learning", "seconds to 3.33, noise on weights", 10, True, reached_below(3.33, WEIGHTS)),
    Target("learning", "seconds to 2.507, bigram, noise on weights", 6, True, reached_below(2.507, WEIGHTS)),
    Target("learning", "seconds to 1.988, trigram, on activations", 8, True, reached_below(1.988, ("gates",))),
    Target(
        "update",
        "update ÷ evaluation, one host, rnns",
        1 / 50,
        True,
        column("update ÷ evaluation", changed="model", hosts=1),
    ),
    Target("update", "update ÷ step, 16 hosts, rnns", 1 / 10, True, column("update ÷ step", changed="model", hosts=16)),
    Target("start", "seconds to the first step, cold", 15, True, column("seconds", **{"start of": "first step, cold"})),
    Target("start", "seconds to the first step, warm", 8, True, column("seconds", **{"start of": "first step, warm"})),
    Target("coordinator", "own ms a step, 256 hosts", 20, True, column("own_ms", hosts=256)),
)


def compare(folder: Path) -> Report:
    """Compare all results in a folder with the targets; the worst row counts."""
    files = {target.benchmark: folder / f"{target.benchmark}.json" for target in TARGETS}
    found = {name: json.loads(file.read_text())["rows"] for name, file in files.items() if file.exists()}
    return Report([_row(target, found) for target in TARGETS])


def _row(target: Target, found: Mapping[str, Rows]) -> Row:
    figures = [*target.find(found.get(target.benchmark, []))]
    row = {"benchmark": target.benchmark, "what": target.what}
    row |= {"must be": f"{'at most' if target.is_most else 'at least'} {target.bound:.4g}"}
    if not figures:
        return {**row, "found": None, "reached": "not measured"}
    if None in figures:
        return {**row, "found": None, "reached": "no"}
    worst = (max if target.is_most else min)(figure for figure in figures if figure is not None)
    is_reached = worst <= target.bound if target.is_most else worst >= target.bound
    return {**row, "found": worst, "reached": "yes" if is_reached else "no"}


def _middle(value: Any) -> float | None:
    return value["median"] if isinstance(value, dict) else value
