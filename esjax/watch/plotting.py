"""Plots the curves of runs with matplotlib."""

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.paths import given_path
from esjax.runs.reader import RunView, find_runs, group_by_seed, read_runs
from esjax.watch.downsampling import Axis, make_curve, mean_and_range, smooth
from esjax.watch.panels import EVALUATIONS, LOSSES, drawn, lines_beside, panels_of, unit_of
from esjax.watch.plot_layout import LITERAL, STYLES, add_legend, spread_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

PICTURES = (".png", ".svg", ".pdf")
"""Suffixes of the files that `plot` writes."""

FEW = 50
"""Most points of a curve with a marker at each point."""

UNIT_WIDTH = 54
"""Characters in a line of the label of the vertical axis."""

NAME_WIDTH = 24
"""Characters of a run's name beside an n-gram line; the legend shows the whole name."""


def plot(
    *runs: str | Path | RunView,
    out: str | Path | None = None,
    over: Axis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.0,
    mean_over_seeds: bool = False,
) -> "Figure":
    """Draw the curves of runs: held-out loss with the n-gram lines, and loss of the population.

    If no run has a held-out loss, only the loss of the population is drawn. With a reward in Python, the mean reward,
    each reward that has a name, greedy reward and pass@k have their panels, and a line beside the held-out loss is its
    first value. Colors and line styles distinguish up to
    40 runs. In a notebook, `esjax.plot("runs/a", "runs/b")` at the end of a cell shows the figure.

    Args:
        runs: Run folders, folders of run folders, or runs as `esjax.runs.reader.read_run` returns them.
        out: File to write, .png, .svg or .pdf. None: no file.
        over: Horizontal axis: "steps", "seconds" or "member-tokens".
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the axis of the loss is logarithmic.
        smoothing: Steps over which loss and rewards of the population are averaged exponentially; 0 is no smoothing.
        mean_over_seeds: Whether runs whose settings differ only in the seed are drawn as one line, their mean, with a
            band from the lowest to the highest, where all of them have values.

    Returns:
        The figure; it is not registered with pyplot.

    Raises:
        EsjaxError: A run does not exist, no run has a finished step or a finite loss, `log_y` is set and no loss is
            above 0, `smoothing` is out of range, matplotlib is missing, or the file cannot be written.
    """
    out = None if out is None else given_path(out)
    if out is not None and out.suffix not in PICTURES:
        raise EsjaxError(f"{str(out)!r} must end in {', '.join(PICTURES)} or .html")
    check_smoothing(smoothing)
    views = open_runs(runs)
    if log_y:
        check_log_y(views)
    with needing("a plot", "plot"):
        from matplotlib.figure import Figure
    panels = panels_of(views)
    if not panels:
        raise EsjaxError(f"there is nothing to draw: no loss is finite in {', '.join(view.name for view in views)}")
    groups = group_by_seed(views) if mean_over_seeds else [[view] for view in views]
    styles = [style for _, style in zip(groups, cycle(STYLES), strict=False)]
    figure = Figure(figsize=(1 + 5 * len(panels), 4.7), layout="constrained")
    lines: list[Line2D] = []
    plots = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True))
    for group, style in zip(groups, styles, strict=True):
        by_label: dict[str, Line2D] = {}  # both panels have lines of the same labels
        for column, axes in plots.items():
            by_label |= _draw(axes, group, column, style, over, 0.0 if column in EVALUATIONS else smoothing)
        lines += by_label.values()
    labels = _draw_lines_beside(plots["held_out"], groups, styles) if "held_out" in plots else []
    for column, axes in plots.items():
        averaged = f"\naveraged over {smoothing:g} steps" if smoothing and column not in EVALUATIONS else ""
        axes.set_title(panels[column] + averaged)
        axes.set_xlabel(over)
        axes.set_ylabel(fill(", ".join(sorted({unit_of(view, column) for view in views})), UNIT_WIDTH), **LITERAL)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y and column in LOSSES else "linear")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, lines, columns=4)
    spread_labels(figure, labels)
    if out is not None:
        try:
            figure.savefig(out, dpi=150)
        except OSError as error:
            raise EsjaxError(f"cannot write {str(out)!r}: {error.strerror}") from error
    return figure


def open_runs(runs: Iterable[str | Path | RunView]) -> list[RunView]:
    """Read the runs at or below the given folders; runs that are read already are returned as they are.

    Raises:
        EsjaxError: A run does not exist, or no run has a finished step.
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


def check_smoothing(smoothing: float) -> None:
    """Check that curves can be averaged over so many steps.

    Raises:
        EsjaxError: It is below 0 or not finite.
    """
    if not 0 <= smoothing < math.inf:
        raise EsjaxError(f"smoothing must be at least 0 and finite, got {smoothing}")


def check_log_y(views: Sequence[RunView]) -> None:
    """Check that losses can be drawn on a logarithmic axis.

    Raises:
        EsjaxError: No held-out loss, or no loss of the population, is above 0, as with a positive reward.
    """
    for column, what in (("held_out", "held-out loss"), ("loss", "loss")):
        values = np.concatenate([drawn(view).get(column, np.zeros(0)) for view in views])
        values = values[~np.isnan(values)]
        if len(values) and not (values > 0).any():
            unit = ", ".join(sorted({unit_of(view, column) for view in views}))
            raise EsjaxError(f"no {what} ({unit}) is above 0, so it has no logarithm; leave log-y out")


def _draw(
    axes: "Axes", group: Sequence[RunView], column: str, style: dict[str, Any], over: Axis, span: float
) -> "dict[str, Line2D]":
    """Draw one run, or the mean and range of several; return the lines by their labels."""
    found = [(view.name, make_curve(drawn(view), column)) for view in group]
    found = [(name, curve) for name, curve in found if len(curve.value)]
    curves = [(name, curve.over(over), smooth(curve.step, curve.value, span)) for name, curve in found]
    if len(curves) > 1:
        _, x, y = zip(*curves, strict=True)
        band = mean_and_range(x, y)
        if len(band.x):
            axes.fill_between(band.x, band.low, band.high, color=style["color"], alpha=0.2, lw=0)
            curves, span = [(f"{group[0].name} and {len(group) - 1} more", band.x, band.mean)], 0.0
    if span > 0:
        for _, curve in found:
            axes.plot(curve.over(over), curve.value, color=style["color"], alpha=0.2, lw=0.8)
    lines = {}
    for name, x, y in curves:
        marker = "o" if len(x) <= FEW else ""
        (lines[name],) = axes.plot(x, y, lw=1.6, marker=marker, ms=3, label=name, **style)
    return lines


def _draw_lines_beside(
    axes: "Axes", groups: Sequence[Sequence[RunView]], styles: Sequence[dict[str, Any]]
) -> "list[Annotation]":
    """Draw the same lines once; if runs have different ones, in the color of the first run that has them."""
    texts: dict[tuple[float, ...], tuple[RunView, str]] = {}
    for group, style in zip(groups, styles, strict=True):
        if beside := lines_beside(group[0]):  # runs of a group differ only in the seed, so they have the same text
            text = tuple(np.round(list(beside.values()), 6).tolist())
            texts.setdefault(text, (group[0], style["color"]))
    labels = []
    for view, color in texts.values():
        for name, value in lines_beside(view).items():
            line = "gray" if len(texts) == 1 else color
            axes.axhline(value, color=line, ls=(0, (6, 4)), lw=0.8)
            label = axes.annotate(
                f"{name} {value:.2f}" + (f" ({_shorten(view.name)})" if len(texts) > 1 else ""),
                (1.0, value),
                (5.0, 0.0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize="small",
                color=line,
                **LITERAL,
            )
            labels.append(label)
    return labels


def _shorten(name: str) -> str:
    """Leave out the middle of a long name."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH // 2]}…{name[1 - NAME_WIDTH // 2 :]}"
