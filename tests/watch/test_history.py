"""The history of metrics is bounded, and its means are those of all steps."""

import math

import numpy as np
import pytest

from esjax.runs.step_info import StepInfo
from esjax.watch import history
from esjax.watch.history import History


def info(step: int, loss: float, held_out: float | None = None) -> StepInfo:
    return StepInfo(step, step / 10, loss, 16, 0, True, 1.0, 1.0, step * 7, 70.0, held_out)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 8)


def remembered(steps: int) -> dict[str, np.ndarray]:
    kept = History()
    for step in range(1, steps + 1):
        kept.add(info(step, float(step**2), 5.0 if step % 10 == 1 else None))
    return kept.columns()


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 16, 100, 1003])
def test_rows_are_means_of_equal_runs_of_steps(steps: int) -> None:
    """Reference: means of slices of all losses; the last slice may be short."""
    columns = remembered(steps)
    rows = len(columns["step"])
    assert min(steps, 4) <= rows <= 8
    ends = columns["step"].astype(int)
    assert ends[-1] == steps
    assert len({*np.diff([0, *ends[:-1]])} if rows > 1 else {1}) == 1  # one stride, but for the last
    losses = np.arange(1, steps + 1, dtype=float) ** 2
    expected = [losses[start:end].mean() for start, end in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose(columns["loss"], expected)
    np.testing.assert_array_equal(columns["member_tokens"], 7 * ends)


def test_a_row_keeps_the_newest_held_out_loss_of_its_steps() -> None:
    """Reference: the last one measured among each row's steps; it is the number of that step."""
    kept = History()
    measured = [step for step in range(1, 101) if step % 10 == 1 or step % 7 == 0]
    for step in range(1, 101):
        kept.add(info(step, 1.0, float(step) if step in measured else None))
    columns = kept.columns()
    ends = columns["step"].astype(int)
    starts = [0, *ends[:-1]]
    assert ends.tolist() == [16, 32, 48, 64, 80, 96, 100]
    expected = [max(step for step in measured if start < step <= end) for start, end in zip(starts, ends, strict=True)]
    np.testing.assert_array_equal(columns["held_out"], expected)


def test_a_row_without_a_held_out_loss_has_none() -> None:
    kept = History()
    kept.add(info(1, 1.0))
    kept.add(info(2, 1.0, 3.0))
    np.testing.assert_array_equal(kept.columns()["held_out"], [math.nan, 3.0])


def test_a_loss_that_is_not_finite_is_left_out_of_a_mean() -> None:
    kept = History()
    for step, loss in enumerate([1.0, math.nan, 3.0, 5.0, math.nan, math.nan, 7.0, 9.0], start=1):
        kept.add(info(step, loss))
    np.testing.assert_array_equal(kept.columns()["loss"], [1.0, 4.0, math.nan, 8.0])
    assert len(History().columns()["loss"]) == 0


def test_a_row_has_the_mean_of_each_reward_with_a_name() -> None:
    """Reference: the same numbers as the reward itself."""
    kept = History()
    for step in range(1, 33):
        kept.add(info(step, -float(step))._replace(reward=float(step), rewards={"right": float(step)}))
    columns = kept.columns()
    assert len(columns["step"]) < 32
    np.testing.assert_allclose(columns["reward_right"], columns["reward"])


def test_a_row_keeps_the_mean_reward_and_what_was_last_measured_on_prompts() -> None:
    """Reference: a reward is minus the loss of the row; greedy rewards are numbers of their steps."""
    kept = History()
    for step in range(1, 33):
        greedy = float(step) if step % 3 == 0 else None
        kept.add(info(step, -float(step))._replace(reward=float(step), greedy_reward=greedy, pass_at_k=greedy))
    columns = kept.columns()
    np.testing.assert_array_equal(columns["reward"], -columns["loss"])
    newest = columns["step"] - columns["step"] % 3
    assert len(columns["step"]) < 32
    np.testing.assert_array_equal(columns["greedy_reward"][1:], newest[1:])
    np.testing.assert_array_equal(columns["pass_at_k"][1:], newest[1:])
