"""What is drawn of a run, and in which unit."""

from pathlib import Path

import numpy as np
import pytest

from esjax.runs.reader import RunView
from esjax.watch.panels import PANELS, drawn, unit_of
from esjax.watch.plotting import plot

STEPS = np.arange(1.0, 4.0)
SHARED = dict.fromkeys(("step", "seconds", "member_tokens", "held_out"), STEPS)


def view_of(name: str, settings: dict[str, str], metrics: dict[str, np.ndarray]) -> RunView:
    return RunView(Path(), name, "finished", settings, SHARED | metrics, {}, (), ())


PLAIN = view_of("plain", {}, {"loss": STEPS, "reward": np.full(3, np.nan)})
JITTED = view_of("jitted", {"custom.reward": "near"}, {"loss": -STEPS})
TEXT = view_of(
    "text",
    {"custom.reward": "right"},
    {"loss": -STEPS, "reward": STEPS, "greedy_reward": STEPS, "pass_at_k": STEPS / 4},
)


@pytest.mark.parametrize(
    ("view", "units"),
    [
        (PLAIN, {"held_out": "nats per token", "loss": "nats per token"}),
        (JITTED, {"held_out": "minus near", "loss": "minus near"}),
        (
            TEXT,
            {
                "held_out": "nats per token",
                "reward": "right",
                "greedy_reward": "right",
                "pass_at_k": "fraction of prompts",
            },
        ),
    ],
)
def test_each_column_has_its_unit(view: RunView, units: dict[str, str]) -> None:
    shown = [column for column in PANELS if np.isfinite(drawn(view).get(column, np.zeros(0))).any()]
    assert {column: unit_of(view, column) for column in shown} == units


def test_a_plot_has_a_panel_for_each_column_that_a_run_has() -> None:
    figure = plot(TEXT, PLAIN, log_y=True)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == list(PANELS.values())
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear", "linear", "linear"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 1, 1, 1]
