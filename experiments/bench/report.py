"""Writes the results of a benchmark as JSON, as a Markdown table and as a plot."""

import json
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.measure import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""A row of a table by column: text, numbers and spreads; lists and mappings go to the JSON file alone."""


class Report(NamedTuple):
    """The results of a benchmark.

    Attributes:
        rows: Rows of the table.
        plot: Draws them. None: no plot.
        notes: Lines below the table.
    """

    rows: Sequence[Row]
    plot: Callable[["Figure"], None] | None = None
    notes: Sequence[str] = ()


def machine() -> dict[str, Any]:
    """Describe the machine and the versions."""
    import jax

    devices = jax.devices()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(folder: Path, name: str, settings: Any, report: Report) -> str:
    """Write `name`.json, .md and .png; return the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table = to_table(report)
    found = {
        "benchmark": name,
        "machine": machine(),
        "settings": settings,
        "rows": [{key: _plain(value) for key, value in row.items()} for row in report.rows],
    }
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(table + "\n")
    if report.plot is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        report.plot(figure)
        figure.savefig(folder / f"{name}.png", dpi=120)
    return table


def print_row(row: Row) -> Row:
    """Print a row at once, since the whole table may take an hour; return the row."""
    shown = (f"{column} {_word(value)}" for column, value in row.items() if value is not None and _is_shown(value))
    print(", ".join(shown), file=sys.stderr, flush=True)
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_table(report: Report) -> str:
    """Return the Markdown table of a report; a spread is shown as median [least, greatest]."""
    columns = list(dict.fromkeys(key for row in report.rows for key, value in row.items() if _is_shown(value)))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_word(row.get(column)) for column in columns] for row in report.rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), *("\n" + note for note in report.notes)])


def _is_shown(value: Any) -> bool:
    return isinstance(value, Spread) or not isinstance(value, (list, tuple, dict))


def _word(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        return f"{_word(value.median)} [{_word(value.low)}, {_word(value.high)}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
