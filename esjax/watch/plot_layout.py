"""The layout of a picture: styles that tell lines apart, and texts that are neither cut nor on top of each other."""

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
"""Of the runs, in turn; readable on white and on black."""

DASHES = ("-", "--", "-.", ":")
"""Line styles, in turn, once all colors are used."""

STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": dash} for dash, color in product(DASHES, COLORS)
)
"""Color and line style of the first 40 lines of a picture; after these they begin again."""

LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}
"""Of a text in a picture: it is shown letter by letter."""

LINE_HEIGHT = 1.1
"""Distance of two labels beside the axes, in heights of a label."""


def add_legend(figure: "Figure", lines: Sequence["Line2D"], columns: int) -> None:
    """Put a legend below the axes, and make the figure as high, and if need be as wide, as it takes.

    Args:
        figure: With a constrained layout.
        lines: What it lists, by their labels.
        columns: At most; fewer where they would be wider than the figure.
    """
    places = [str(place) for place in range(len(lines))]  # matplotlib leaves a label `_a` out, and reads `$a$` as math
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
    """Move labels beside the axes up or down until none lies on another, and make the figure higher if it must be.

    Args:
        figure: With all that is drawn, and its legend.
        labels: Beside one axes, each at its `xy`, moved in `offset points`.
    """
    if not labels:
        return
    axes = labels[0].axes
    assert axes is not None
    gap = LINE_HEIGHT * 72 / figure.dpi * max(label.get_window_extent().height for label in labels)
    figure.draw_without_rendering()  # lays it out, so that places are known
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
    """Turn the labels of the horizontal axis upright if they lie on each other, and make the figure higher by that."""
    figure.draw_without_rendering()
    boxes = sorted(label.get_window_extent().intervalx.tolist() for label in axes.get_xticklabels())
    if any(right > left for (_, right), (left, _) in pairwise(boxes)):
        axes.tick_params(axis="x", rotation=90)
        longest = max(right - left for left, right in boxes)
        figure.set_figheight(figure.get_figheight() + longest / figure.dpi)


def spread(places: ndarray, gap: float, low: float, high: float) -> ndarray:
    """Move places as little as it takes to be `gap` apart, by least squares, and not below `low` or above `high`.

    Args:
        places: Any number of them, in any order.
        gap: Smallest distance of two; (len(places) - 1) * gap must not be more than high - low.
        low: Lowest place.
        high: Highest place.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(places, kind="stable")
    ramp = gap * np.arange(len(places))
    free = isotonic_regression(places[order] - ramp).x  # they must not fall
    moved = np.empty(len(places))
    moved[order] = np.clip(free, low, high - ramp[-1]) + ramp
    return moved
