"""What the page is made of, and what it is told about a run."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from numpy import ndarray

from esjax.errors import EsjaxError
from esjax.runs.reader import RunView
from esjax.watch.downsampling import COLUMN_OF, make_curve

COLUMNS = ("held_out", "loss", "member_tokens_per_second", "update_norm")
"""Metrics that the page draws."""

LAST = ("step", "seconds", "member_tokens", "loss", "held_out", "member_tokens_per_second", "population", "void_pairs")
"""Metrics that it lists, as they were last."""

SAMPLES = 3
"""Newest samples of a run that it shows."""


def page_file(name: str) -> str:
    """Read one of the files beside this one."""
    return (files("esjax.page") / name).read_text(encoding="utf-8")


def plotly_script(extra: str) -> str:
    """Read the chart library, which its package brings along.

    Args:
        extra: What to install if it is missing.

    Raises:
        EsjaxError: The package is missing.
    """
    try:
        return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except ModuleNotFoundError as error:
        raise EsjaxError(f"the page needs plotly: pip install 'esjax[{extra}]'") from error


def summary(view: RunView, run: str) -> dict[str, Any]:
    """Tell in short how a run stands.

    Args:
        view: The run.
        run: What the page calls it when it asks for more.
    """
    return {
        "run": run,
        "name": view.name,
        "state": view.state,
        "unit": view.unit,
        "last": {name: view.last(name) for name in LAST},
        "best": view.lowest("held_out"),
    }


def details(view: RunView) -> dict[str, Any]:
    """Tell what there is of a run beside its curves."""
    return {
        "settings": {name: _plain(value) for name, value in view.settings.items()},
        "baselines": dict(view.baselines),
        "samples": [sample._asdict() for sample in view.samples[-SAMPLES:]],
        "notes": list(view.notes),
    }


def curves(view: RunView, known: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Return the points of the curves that the page does not know yet.

    Args:
        view: The run.
        known: For each column, the stride of the points that it has and how many they are.

    Returns:
        For each column `stride`, `start`, the number of the first point told, and a list for `value` and each axis.
    """
    told: dict[str, Any] = {}
    for column in COLUMNS:
        curve = make_curve(view.metrics, column)
        stride, count = (known or {}).get(column, (0, 0))
        start = count if stride == curve.stride and 0 <= count <= len(curve.value) else 0
        told[column] = {
            "stride": curve.stride,
            "start": start,
            **{name: _numbers(getattr(curve, name)[start:]) for name in (*COLUMN_OF.values(), "value")},
        }
    return told


def _numbers(values: ndarray) -> list[float | None]:
    """Round to what a screen can show."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()]


def _plain(value: Any) -> Any:
    """Make a setting one that JSON has: infinity and NaN become words."""
    if isinstance(value, bool | int | str) or value is None or (isinstance(value, float) and np.isfinite(value)):
        return value
    return str(value)
