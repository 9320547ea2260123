"""Line styles, and a layout in which no text is cut off or overlaps another."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

COLORS = ("#3b7dd8", "#e0752d", "#2f9e6e", "#c2479b", "#8a63d2", "#b08a00", "#1a9fb3", "#d1495b", "#6b7f2a", "#7d6b5d")
"""Colors of the runs, in order; readable on white and on black."""

DASHES = ("-", "--", "-.", ":")
"""Line styles; the next one begins after each round of colors."""

STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": dash} for dash, color in product(DASHES, COLORS)
)
"""Color and line style of the first 40 lines of a plot; then they repeat."""

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Options of a text in a plot: it is shown literally, without markup."""

LINE_HEIGHT = 1.1
"""Least distance of two labels beside the axes, in heights of a label."""


def add_legend(figure: "Figure", lines: Sequence["Line2D"], columns: int) -> None:
    """Put a legend below the axes, and enlarge the figure so that it fits.

    Args:
        figure: A figure with a constrained layout.
        lines: Lines to list, by their labels.
        columns: Most columns; fewer if they would be wider than the figure.
    """
    places = [
        str(place) for place in range(len(lines))
    ]  # matplotlib would skip a label `_a`, and typeset `$a$` as math
    for count in range(min(columns, len(lines)), 0, -1):
        legend = figure.legend(lines, places, loc="outside lower center", ncols=count, frameon=False, handlelength=3)
        for text, line in zip(legend.get_texts(), lines, strict=True):
            text.set(text=line.get_label(), **LITERAL)
        box = legend.get_window_extent()
        wide, high = box.width / figure.dpi, box.height / figure.dpi
        if wide <= figure.get_figwidth():
            break
        if count > 1:
            legend.remove()
    figure.set_size_inches(max(wide, figure.get_figwidth()), figure.get_figheight() + high)


def spread_labels(figure: "Figure", labels: Sequence["Annotation"]) -> None:
    """Move labels beside the axes up or down until none overlaps, and make the figure higher if necessary.

    Args:
        figure: The finished figure, with its legend.
        labels: Labels beside one axes, each at its `xy`, with an offset in points.
    """
    if not labels:
        return
    axes = labels[0].axes
    assert axes is not None
    gap = LINE_HEIGHT * 72 / figure.dpi * max(label.get_window_extent().height for label in labels)
    figure.draw_without_rendering()  # computes the layout, and so the positions
    missing = gap * len(labels) / 72 - axes.get_window_extent().height / figure.dpi
    if missing > 0:
        figure.set_figheight(figure.get_figheight() + missing)
        figure.draw_without_rendering()
    points = axes.transData.transform([(0.0, float(label.xy[1])) for label in labels])[:, 1] * 72 / figure.dpi
    bottom, top = axes.get_window_extent().intervaly * 72 / figure.dpi
    moved = spread(points, gap, bottom, top)
    for label, shift in zip(labels, moved - points, strict=True):
        label.set_position((label.get_position()[0], float(shift)))


def turn_overlapping_ticks(figure: "Figure", axes: "Axes") -> None:
    """Turn the labels of the horizontal axis by 90 degrees if they overlap, and make the figure higher for them."""
    figure.draw_without_rendering()
    boxes = sorted(label.get_window_extent().intervalx.tolist() for label in axes.get_xticklabels())
    if any(right > left for (_, right), (left, _) in pairwise(boxes)):
        axes.tick_params(axis="x", rotation=90)
        longest = max(right - left for left, right in boxes)
        figure.set_figheight(figure.get_figheight() + longest / figure.dpi)


def spread(places: ndarray, gap: float, low: float, high: float) -> ndarray:
    """Move positions as little as possible, in squares, until they are `gap` apart and between `low` and `high`.

    Args:
        places: Positions, in any order.
        gap: Least distance of two positions; (len(places) - 1) * gap must be at most high - low.
        low: Lowest position.
        high: Highest position.

    Returns:
        The new positions, in the order of `places`.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(places, kind="stable")
    ramp = gap * np.arange(len(places))
    free = isotonic_regression(places[order] - ramp).x  # must not decrease
    moved = np.empty(len(places))
    moved[order] = np.clip(free, low, high - ramp[-1]) + ramp
    return moved
