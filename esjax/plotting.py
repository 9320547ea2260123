"""The curves of runs as a picture, with matplotlib."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esjax.curves import Axis, make_curve, smooth
from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.runs import RunView, find_runs, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#3b7dd8", "#e0752d", "#2f9e6e", "#c2479b", "#8a63d2", "#b08a00", "#1a9fb3", "#d1495b", "#6b7f2a", "#7d6b5d")
"""Of the runs, in turn; readable on white and on black."""

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Of a text in a picture: it is shown letter by letter."""

PICTURES = (".png", ".svg", ".pdf")
"""Endings of the files that `plot` writes."""


def plot(
    *runs: str | Path | RunView,
    out: str | Path | None = None,
    over: Axis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.0,
) -> "Figure":
    """Draw the curves of runs: held-out loss beside the n-gram models, and loss of the population.

    In a notebook, `esjax.plot("runs/a", "runs/b")` at the end of a cell shows them.

    Args:
        runs: Run folders, folders of run folders, or runs as `esjax.runs.read_run` returns them.
        out: File to write, .png, .svg or .pdf. None: none is written.
        over: What the curves are drawn over.
        log_x: Whether that axis is logarithmic.
        log_y: Whether the loss is.
        smoothing: Steps over which the loss of the population is averaged, exponentially; 0: none.

    Returns:
        The figure, which pyplot does not know.

    Raises:
        EsjaxError: There is no such run, none of them has done a step, no loss is above 0 for its logarithm,
            matplotlib is missing, or the file cannot be written.
    """
    out = None if out is None else given_path(out)
    if out is not None and out.suffix not in PICTURES:
        raise EsjaxError(f"{str(out)!r} must end in {', '.join(PICTURES)} or .html")
    views = open_runs(runs)
    if log_y:
        check_log_y(views)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EsjaxError(f"a picture needs matplotlib ({error}): pip install 'esjax[plot]'") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    held_out, loss = figure.subplots(1, 2)
    lines = []
    for view, color in zip(views, cycle(COLORS), strict=False):
        _draw(held_out, view, "held_out", color, over, 0.0)
        lines.append(_draw(loss, view, "loss", color, over, smoothing))
    _draw_baselines(held_out, views)
    if not any(view.last("held_out") is not None for view in views):
        held_out.text(0.5, 0.5, "nothing was measured", transform=held_out.transAxes, ha="center", color="gray")
        held_out.set(xticks=[], yticks=[])
    held_out.set_title("held-out text")
    loss.set_title("population, training text" + (f", averaged over {smoothing:g} steps" if smoothing else ""))
    for axes in (held_out, loss):
        axes.set_xlabel(over)
        axes.set_ylabel(", ".join(sorted({view.unit for view in views})), **LITERAL)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, lines, [view.name for view in views], columns=4)
    if out is not None:
        try:
            figure.savefig(out, dpi=150)
        except OSError as error:
            raise EsjaxError(f"cannot write {str(out)!r}: {error.strerror}") from error
    return figure


def add_legend(figure: "Figure", lines: "Sequence[Line2D]", names: Sequence[str], columns: int) -> None:
    """Name lines below a figure, letter by letter: matplotlib leaves `_a` out, and reads `$a$` as a formula."""
    places = [str(place) for place in range(len(names))]
    legend = figure.legend(lines, places, loc="outside lower center", ncols=min(columns, len(names)), frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, **LITERAL)


def open_runs(runs: Iterable[str | Path | RunView]) -> list[RunView]:
    """Read runs that are named, or below a named folder; those that are read already are taken as they are.

    Raises:
        EsjaxError: There is no such run, or none of them has done a step.
    """
    views: list[RunView] = []
    paths: list[Path] = []
    for run in runs:
        if isinstance(run, RunView):
            views.append(run)
            continue
        found = find_runs(run)
        if not found:
            raise EsjaxError(f"there is no run folder at or below {str(run)!r}")
        paths += found
    views += read_runs(paths)
    if not views:
        raise EsjaxError("name a run folder, or a folder of them")
    if not any(view.step for view in views):
        raise EsjaxError(f"there is nothing to draw: no step is finished in {', '.join(view.name for view in views)}")
    return views


def check_log_y(views: Sequence[RunView]) -> None:
    """See that there is something to draw on an axis of logarithms.

    Raises:
        EsjaxError: Of the losses of one kind, held-out or not, none is above 0, as with a reward that is.
    """
    for column, what in (("held_out", "held-out loss"), ("loss", "loss")):
        values = np.concatenate([view.metrics.get(column, np.zeros(0)) for view in views])
        values = values[~np.isnan(values)]
        if len(values) and not (values > 0).any():
            unit = ", ".join(sorted({view.unit for view in views}))
            raise EsjaxError(f"no {what} ({unit}) is above 0, so it has no logarithm; leave log-y out")


def _draw(axes: "Axes", view: RunView, column: str, color: str, over: Axis, span: float) -> "Line2D":
    curve = make_curve(view.metrics, column)
    x = curve.over(over)
    few = len(x) <= 50
    if span > 0:
        axes.plot(x, curve.value, color=color, alpha=0.2, lw=0.8)
    (line,) = axes.plot(
        x, smooth(curve.step, curve.value, span), color=color, lw=1.6, marker="o" if few else "", ms=3, label=view.name
    )
    return line


def _draw_baselines(axes: "Axes", views: Sequence[RunView]) -> None:
    """Draw the n-gram lines, once for each text; of several texts, each in the color of its first run."""
    texts: dict[tuple[float, ...], tuple[RunView, str]] = {}
    for view, color in zip(views, cycle(COLORS), strict=False):
        if view.baselines:
            texts.setdefault(tuple(np.round(list(view.baselines.values()), 6).tolist()), (view, color))
    for view, color in texts.values():
        for name, value in view.baselines.items():
            line = "gray" if len(texts) == 1 else color
            axes.axhline(value, color=line, ls="--", lw=1)
            axes.annotate(
                f"{name} {value:.2f}" + (f" ({view.name})" if len(texts) > 1 else ""),
                (1.01, value),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize="small",
                color=line,
                **LITERAL,
            )
