"""Plots a sweep: held-out loss or greedy reward over one axis, a line for each combination of the others."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esjax.extras import needing
from esjax.tuning.sweep import Outcome, RankedBy, measure_of
from esjax.watch.plot_layout import LITERAL, STYLES, add_legend, turn_overlapping_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WIDE = 8
"""Ratio of the largest to the smallest number from which on an axis is logarithmic."""


UNITS: dict[RankedBy, str] = {
    "held-out loss": "held-out loss, nats/token",
    "greedy reward": "greedy reward on held-out prompts",
}
"""Label of the vertical axis, by what the runs are compared by."""


def draw(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Draw what the runs are compared by, and replace the file atomically.

    Args:
        outcomes: Outcomes of one sweep.
        path: File to write, in the format of its suffix.

    Returns:
        Whether there was a number to draw.

    Raises:
        EsjaxError: matplotlib is missing.
    """
    if all(one.value is None for one in outcomes):
        return False
    partial = path.with_suffix(f".partial{path.suffix}")
    make_figure(outcomes).savefig(partial, dpi=150)
    partial.replace(path)
    return True


def make_figure(outcomes: Sequence[Outcome]) -> "Figure":
    """Draw what the runs are compared by.

    Args:
        outcomes: Outcomes of one sweep, at least one of them with a value.

    Raises:
        EsjaxError: matplotlib is missing.
    """
    with needing("a plot", "plot"):
        from matplotlib.figure import Figure
    axis = choose_axis(outcomes)
    positions = _positions([one.values[axis] for one in outcomes])
    lines: dict[str, list[tuple[float, float]]] = {}
    ranked_by = measure_of(outcomes)
    for one in outcomes:
        if one.value is None or one.ranked_by != ranked_by:
            continue
        others = ", ".join(f"{name}={value}" for name, value in one.values.items() if name != axis)
        lines.setdefault(others, []).append((positions[str(one.values[axis])], one.value))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.subplots()
    drawn: list[Line2D] = []
    for label, style in zip(sorted(lines), cycle(STYLES), strict=False):
        x, y = zip(*sorted(lines[label]), strict=True)
        drawn += plot.plot(x, y, lw=1.6, marker="o", ms=4, label=label or None, **style)
    if _is_wide(list(positions.values())):
        plot.set_xscale("log")
    plot.set_xticks(list(positions.values()), list(positions), **LITERAL)
    if _is_wide([value for line in lines.values() for _, value in line]):
        plot.set_yscale("log")  # one of the runs diverged
    plot.tick_params(axis="x", which="minor", bottom=False)
    plot.set_xlabel(axis)
    plot.set_ylabel(UNITS[ranked_by])
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    if any(lines):
        add_legend(figure, drawn, columns=3)
    turn_overlapping_ticks(figure, plot)
    return figure


def choose_axis(outcomes: Sequence[Outcome]) -> str:
    """Return the axis of numbers with the most values, or else the first axis."""
    names = list(outcomes[0].values)
    columns = {name: [one.values[name] for one in outcomes] for name in names}
    return max(names, key=lambda name: (_are_numbers(columns[name]), len(set(map(str, columns[name])))))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _positions(values: Sequence[Any]) -> dict[str, float]:
    """Return positions on the horizontal axis: numbers by value, others side by side."""
    if _are_numbers(values):
        return {str(value): float(value) for value in sorted(values)}
    return {name: float(i) for i, name in enumerate(dict.fromkeys(map(str, values)))}


def _is_wide(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) >= WIDE * min(numbers)
