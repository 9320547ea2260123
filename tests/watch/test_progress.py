"""The line of progress: its content, and that it fits into any window."""

import io
import time

import pytest
from progress_lines import BASELINES, INFO, TWO_MINUTES, WHOLE
from rich.console import Console
from rich.text import Text

from esjax.runs.step_info import Limits, StepInfo
from esjax.watch.progress import Part, Progress, fit


def shown(infos: list[StepInfo], *, width: int | None = None, limits: Limits = TWO_MINUTES) -> list[str]:
    """What a window of a width, or a file, shows in the end; escape sequences left out of the first."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=width is not None, width=width, height=20, color_system=None)
    with Progress(console, BASELINES, limits) as progress:
        for info in infos:
            progress.update(info)
    if width is None:
        return written.getvalue().splitlines()
    return on_screen(written.getvalue())


def on_screen(written: str) -> list[str]:
    """Leave out what was wiped out, and the escape sequences that hide and show the cursor."""
    return written.replace("\x1b[?25l", "").replace("\x1b[?25h", "").split("\r\x1b[2K")[-1].splitlines()


def test_a_line_shows_progress_loss_and_speed() -> None:
    assert shown([INFO]) == [WHOLE]
    assert shown([INFO], width=200) == [WHOLE]


def test_the_first_step_weighs_no_more_than_its_age() -> None:
    """By hand: (0.9 * 4 + 2) / 1.9 = 2.947 nats and (0.9 * 1 + 3) / 1.9 = 2.05 M/s; uncorrected, 3.8 and 1.2 M/s."""
    first = INFO._replace(loss=4.0, member_tokens_per_second=1e6)
    line = shown([first, INFO._replace(loss=2.0, member_tokens_per_second=3e6)], width=200)[0]
    assert "  loss 2.947  " in line
    assert "  2.05 M/s  " in line


@pytest.mark.parametrize("width", range(1, len(WHOLE) + 2))
def test_it_is_one_line_in_a_window_of_any_width(width: int) -> None:
    (line,) = shown([INFO], width=width)
    assert len(line) <= width
    assert (line == WHOLE) == (width >= len(WHOLE))


@pytest.mark.parametrize(
    ("seconds", "since", "word"), [(1, 10, "3.08 M/s"), (1, 11, "no step for 0:11"), (4, 12, "M/s")]
)
def test_a_rate_of_long_ago_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, seconds: float, since: float, word: str
) -> None:
    """Steps of so many seconds each; then, for so long, none."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = Progress(console, BASELINES, TWO_MINUTES)
    for _ in range(2):
        now += seconds
        progress.update(INFO)
    now += since
    (line,) = progress.__rich_console__(console, console.options)
    assert word in line.plain


def test_less_important_parts_are_left_out_first() -> None:
    # By hand: the columns that each needs, and what is gone at one column less.
    order = ["|update|", "0:41", "hosts", "unigram", "M/s", "trigram", "left", "void pairs", "loss", "step", "held-out"]
    gone: list[str] = []
    for width in range(len(WHOLE), 12, -1):
        (line,) = shown([INFO], width=width)
        gone += [word for word in order if word not in line and word not in gone]
    assert gone == order[:-1]


def test_a_window_that_is_made_narrower_gets_a_line_that_fits() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, height=20, color_system=None)
    with Progress(console, BASELINES, TWO_MINUTES) as progress:
        progress.update(INFO)
        console.width = 30
    assert on_screen(written.getvalue()) == ["step 1,234  held-out 2.391"]


def test_the_last_part_is_cut_off() -> None:
    parts = [Part(0, Text("less")), Part(2, Text("more")), Part(1, Text("or less"), Part(1, Text("less")))]
    for width, text in (
        (19, "less  more  or less"),
        (18, "more  or less"),
        (12, "more  less"),
        (5, "more"),
        (3, "mo…"),
    ):
        assert fit(parts, width).plain == text


def test_held_out_is_read_against_the_next_model_to_beat_where_there_is_little_room() -> None:
    for held_out, mark in (
        (4.0, "> unigram 3.34"),
        (3.0, "> bigram 2.51"),
        (2.0, "> trigram 1.99"),
        (1.5, "< trigram 1.99"),
    ):
        (line,) = shown([INFO._replace(held_out=held_out)], width=100)
        assert f"held-out {held_out:.3f} ({mark})" in line


def test_void_pairs_are_added_up_and_not_shown_if_there_are_none() -> None:
    assert "void" not in shown([INFO._replace(void_pairs=0)])[-1]
    calm = INFO._replace(void_pairs=0)
    assert "void pairs 5 " in shown([INFO, calm, INFO._replace(void_pairs=2), calm], width=200)[0]


def test_the_age_of_the_held_out_loss_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 104.4, 111.0]).__next__
    monkeypatch.setattr("esjax.watch.progress.time.monotonic", clock)
    measured, not_measured = INFO, INFO._replace(held_out=None)
    none, fresh, *later = shown([not_measured, measured, measured, not_measured])
    assert "held-out -  3.08 M/s" in none
    assert "ago" not in fresh + later[0]
    assert "trigram 1.99)  0:07 ago  3.08 M/s" in later[1]


def test_the_age_grows_while_nothing_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("esjax.watch.progress.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    progress = Progress(console, BASELINES, TWO_MINUTES)
    progress.update(INFO)
    now[0] = 109.0
    with console.capture() as drawn:
        console.print(progress)
    assert "0:09 ago" in drawn.get()


def test_neighbouring_numbers_can_be_distinguished() -> None:
    (line,) = shown([INFO._replace(held_out=2.5114)])
    assert "held-out 2.511 (< unigram 3.34 > bigram 2.510 > trigram 1.99)" in line


@pytest.mark.parametrize(
    ("bigram", "shown_as"),
    [
        (2.5112, "2.5114 (< unigram 3.34 > bigram 2.5112"),
        (2.51141, "2.51140 (< unigram 3.34 < bigram 2.51141"),
        (2.5114, "2.511 (< unigram 3.34 = bigram 2.51"),
        (2.5114 + 1e-9, "2.511 (< unigram 3.34 = bigram 2.51"),
    ],
)
def test_close_numbers_have_the_digits_that_they_need(
    monkeypatch: pytest.MonkeyPatch, bigram: float, shown_as: str
) -> None:
    monkeypatch.setitem(BASELINES, "bigram", bigram)
    (line,) = shown([INFO._replace(held_out=2.5114)])
    assert f"held-out {shown_as} > trigram 1.99)" in line


def test_without_baselines_the_held_out_loss_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in reversed(list(BASELINES)):  # undone in the order of the dict
        monkeypatch.delitem(BASELINES, name)
    assert "held-out 2.391  3.08 M/s" in shown([INFO])[0]


def test_an_update_of_which_nothing_is_known_is_left_out() -> None:
    unknown = INFO._replace(update_norm=float("nan"))
    assert "|update|" not in shown([unknown])[0]
    assert "|update| nan" in shown([unknown._replace(applied=False)])[0]


def test_hosts_and_time_left_are_shown_where_there_are_some() -> None:
    (line,) = shown([INFO._replace(hosts=None)], limits=Limits(None, None))
    assert "hosts" not in line
    assert "left" not in line
    assert "hosts 4" in WHOLE


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, "0/s"), (950.0, "950/s"), (12_340.0, "12.3 k/s"), (3.08e6, "3.08 M/s")]
)
def test_rates_are_short(rate: float, text: str) -> None:
    assert f"  {text}  " in shown([INFO._replace(member_tokens_per_second=rate)])[0]


def test_a_line_shows_rewards_and_what_is_forgotten_beside_its_first_value() -> None:
    first = INFO._replace(loss=-0.25, reward=0.25, held_out=2.0, greedy_reward=0.5, pass_at_k=0.75)
    later = INFO._replace(loss=-0.25, reward=0.25, held_out=2.5, greedy_reward=0.625, pass_at_k=0.875)
    line = shown([first, later], width=200)[0]
    assert "  reward 0.250  greedy 0.625  pass@k 0.875  held-out 2.500 (first 2.000)  " in line
