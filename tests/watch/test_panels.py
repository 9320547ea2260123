"""What is drawn of a run, and in which unit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esjax.runs.reader import RunView
from esjax.watch.downsampling import smooth
from esjax.watch.panels import PANELS, drawn, lines_beside, unit_of
from esjax.watch.plotting import plot

STEPS = np.arange(1.0, 4.0)
SHARED = dict.fromkeys(("step", "seconds", "member_tokens", "held_out"), STEPS)


def view_of(name: str, settings: Mapping[str, Any], metrics: dict[str, np.ndarray]) -> RunView:
    return RunView(Path(), name, "finished", settings, SHARED | metrics, {}, (), ())


PLAIN = view_of("plain", {}, {"loss": STEPS, "reward": np.full(3, np.nan)})
JITTED = view_of("jitted", {"custom.reward": "near"}, {"loss": -STEPS})
TEXT = view_of(
    "text",
    {"custom.reward": "right"},
    {"loss": -STEPS, "reward": STEPS, "greedy_reward": STEPS, "pass_at_k": STEPS / 4},
)
NAMED = view_of("named", TEXT.settings, {**TEXT.metrics, "reward_short": STEPS, "reward_brief": STEPS / 2})


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
    assert [len(axes.lines) for axes in figure.axes] == [3, 1, 1, 1, 1]


def test_each_reward_that_has_a_name_has_a_panel_and_is_smoothed() -> None:
    figure = plot(NAMED, smoothing=2.0)
    titles = {axes.get_title().splitlines()[0]: axes for axes in figure.axes}
    assert list(titles)[-2:] == ["brief, training prompts", "short, training prompts"]
    short = titles["short, training prompts"]
    assert short.get_ylabel() == "right"
    np.testing.assert_allclose(np.asarray(short.lines[-1].get_ydata(), float), smooth(STEPS, STEPS, 2.0))
    assert [len(titles[PANELS[column]].lines) for column in ("held_out", "greedy_reward")] == [2, 1]


def test_with_a_reward_in_python_the_held_out_loss_is_beside_its_first_value() -> None:
    unmeasured = view_of("unmeasured", TEXT.settings, {**TEXT.metrics, "held_out": np.array([np.nan, 4.0, 5.0])})
    assert [lines_beside(view) for view in (PLAIN, JITTED, TEXT, unmeasured)] == [
        {},
        {},
        {"first value": 1.0},
        {"first value": 4.0},
    ]
    labels = [text.get_text() for text in plot(unmeasured).axes[0].texts]
    assert labels == ["first value 4.00"]
