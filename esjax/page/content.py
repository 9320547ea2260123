"""Files of the page, and the data about a run that it shows."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from numpy import ndarray

from esjax.extras import needing
from esjax.runs.reader import RunView
from esjax.watch.downsampling import COLUMN_OF, make_curve
from esjax.watch.panels import PANELS, drawn, lines_beside, named_rewards, unit_of

COLUMNS = (*PANELS, "member_tokens_per_second", "update_norm")
"""Metrics that the page draws, beside rewards that have names."""

LAST = (
    *("step", "seconds", "member_tokens", "loss", "held_out", "reward", "greedy_reward", "pass_at_k"),
    *("member_tokens_per_second", "population", "void_pairs"),
)
"""Metrics whose last values the page lists."""

SAMPLES = 3
"""Most samples of a run that the page shows, the newest ones."""


def page_file(name: str) -> str:
    """Read a file of the page from the package."""
    return (files("esjax.page") / name).read_text(encoding="utf-8")


def plotly_script(extra: str) -> str:
    """Read the JavaScript of the chart library from the package plotly.

    Args:
        extra: Extra of esjax that installs plotly, for the error message.

    Raises:
        EsjaxError: The package is missing.
    """
    with needing("the page", extra):
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def summary(view: RunView, run: str) -> dict[str, Any]:
    """Return the name, state and last metrics of a run.

    Args:
        view: The run.
        run: Identifier of the run in requests of the page.
    """
    return {
        "run": run,
        "name": view.name,
        "state": view.state,
        "units": {column: unit_of(view, column) for column in (*PANELS, *named_rewards(view.metrics))},
        "last": {name: view.last(name) for name in LAST},
        "best": view.lowest("held_out"),
    }


def details(view: RunView) -> dict[str, Any]:
    """Return the settings, samples and notes of a run, and what its held-out loss is compared with."""
    return {
        "settings": {name: _plain(value) for name, value in view.settings.items()},
        "baselines": dict(lines_beside(view)),
        "samples": [sample._asdict() for sample in view.samples[-SAMPLES:]],
        "notes": list(view.notes),
    }


def curves(view: RunView, known: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Return the points of the curves that the page does not have yet.

    Args:
        view: The run.
        known: For each column, the stride and the number of the points that the page has.

    Returns:
        A dict for each column, with `stride`, `start` (the index of the first new point), and a list for `value` and
        for each axis.
    """
    points: dict[str, Any] = {}
    for column in (*COLUMNS, *named_rewards(view.metrics)):
        curve = make_curve(drawn(view), column)
        stride, count = (known or {}).get(column, (0, 0))
        start = count if stride == curve.stride and 0 <= count <= len(curve.value) else 0
        points[column] = {
            "stride": curve.stride,
            "start": start,
            **{name: _numbers(getattr(curve, name)[start:]) for name in (*COLUMN_OF.values(), "value")},
        }
    return points


def _numbers(values: ndarray) -> list[float | None]:
    """Round to seven digits; None for NaN and infinity."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()]


def _plain(value: Any) -> Any:
    """Make a setting a JSON value: infinity and NaN become strings."""
    if isinstance(value, bool | int | str) or value is None or (isinstance(value, float) and np.isfinite(value)):
        return value
    return str(value)
