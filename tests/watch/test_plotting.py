"""Curves as files: they show the measurements; and one clear line for each mistake."""

import json
import math
import re
import shutil
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from recorded import append, line_of, make

import esjax
from esjax import cli
from esjax.config.settings import EsConfig
from esjax.errors import EsjaxError
from esjax.runs.reader import read_run
from esjax.watch.plot_layout import spread


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make(tmp_path / "runs" / "a", done=6, es=EsConfig(sigma=0.1)).keep_baselines({"unigram": 3.0, "bigram": 2.5})
    make(tmp_path / "runs" / "b", done=4)
    return tmp_path / "runs"


def points(line: Line2D) -> np.ndarray:
    """Return where a line goes: one row of x and y for each point."""
    return np.array(line.get_xydata(), float)


def test_the_lines_are_the_metrics(runs: Path) -> None:
    held_out, loss = esjax.plot(runs, over="seconds").axes
    a, b = loss.get_lines()
    assert (a.get_label(), b.get_label()) == ("a", "b")
    np.testing.assert_array_equal(points(a), [[step / 2, 5 - step] for step in range(1, 7)])
    first, _, unigram, bigram = held_out.get_lines()
    np.testing.assert_array_equal(points(first), [[1, 2], [2, 0], [3, -2]])
    assert (points(unigram)[0, 1], points(bigram)[0, 1]) == (3.0, 2.5)
    assert [text.get_text() for text in held_out.texts] == ["unigram 3.00", "bigram 2.50"]
    assert loss.get_xlabel() == "seconds"


def test_axes_may_be_logarithmic_and_smoothed(runs: Path) -> None:
    held_out, loss = esjax.plot(runs / "a", log_x=True, log_y=True, smoothing=1e9).axes
    assert {axes.get_xscale() for axes in (held_out, loss)} == {"log"}
    assert {axes.get_yscale() for axes in (held_out, loss)} == {"log"}
    raw, smoothed = loss.get_lines()
    np.testing.assert_allclose(points(smoothed)[:, 1], [4.0, 3.5, 3.0, 2.5, 2.0, 1.5])  # means of all so far
    np.testing.assert_array_equal(points(raw)[:, 1], [4.0, 3.0, 2.0, 1.0, 0.0, -1.0])


@pytest.mark.parametrize("smoothing", [math.nan, math.inf, -1.0])
def test_smoothing_that_is_no_number_of_steps_is_refused(runs: Path, smoothing: float) -> None:
    for write in (esjax.plot, partial(esjax.report, out=runs / "r.html")):
        with pytest.raises(EsjaxError, match=f"^smoothing must be at least 0 and finite, got {smoothing}$"):
            write(runs / "a", smoothing=smoothing)


def test_losses_below_zero_have_no_logarithm(runs: Path) -> None:
    """As those of a reward are; with a run beside it that has some, only what is below is left out."""
    below = make(runs / "below", custom={"reward": "right"})
    append(below.path, "".join(line_of(step) for step in range(6, 9)))
    for write in (esjax.plot, partial(esjax.report, out=runs / "r.html")):
        with pytest.raises(EsjaxError, match=r"no held-out loss \(minus right\) is above 0, .*; leave log-y out"):
            write(below.path, log_y=True)
        write(below.path)
    _, loss = esjax.plot(below.path, runs / "a", log_y=True).axes
    assert loss.get_ylabel() == "minus right, nats per token"


def test_n_gram_lines_of_two_texts_name_their_runs(runs: Path) -> None:
    (runs / "b" / "baselines.json").write_text('{"unigram": 2.75}')
    held_out, _ = esjax.plot(runs).axes
    assert [text.get_text() for text in held_out.texts] == ["unigram 3.00 (a)", "bigram 2.50 (a)", "unigram 2.75 (b)"]


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_written(runs: Path, ending: str, magic: bytes) -> None:
    out = runs / f"out.{ending}"
    esjax.plot(read_run(runs / "a"), out=out)
    assert out.read_bytes().startswith(magic)


def test_an_unfinished_run_is_drawn_so_far(runs: Path) -> None:
    append(runs / "a", line_of(7) + line_of(8)[:20])
    _, loss = esjax.plot(runs / "a").axes
    assert len(points(loss.get_lines()[0])) == 7


def is_whole(figure: Figure) -> bool:
    """Return whether all that is drawn, texts included, lies within the figure."""
    figure.draw_without_rendering()
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def overlapping(labels: list[Text]) -> list[tuple[str, str]]:
    """Return the pairs of texts that lie on each other."""
    pairs = combinations(labels, 2)
    return [(a.get_text(), b.get_text()) for a, b in pairs if a.get_window_extent().overlaps(b.get_window_extent())]


def styles(figure: Figure) -> dict[str, tuple[object, str]]:
    """Return color and line style by the labels of the legend."""
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    return {
        name: (line.get_color(), line.get_linestyle()) for name, line in zip(names, legend.get_lines(), strict=True)
    }


def test_forty_runs_can_be_distinguished_and_are_listed(tmp_path: Path) -> None:
    names = [f"run{i:02d}" for i in range(40)]
    for name in names:
        make(tmp_path / name, done=2)
    figure = esjax.plot(tmp_path)
    found = styles(figure)
    assert list(found) == names
    assert len(set(found.values())) == 40
    assert is_whole(figure)


@pytest.mark.parametrize("smoothing", [0.0, 1e6 / 3])
@pytest.mark.parametrize("columns", [("held_out", "loss"), ("loss",)])
def test_no_text_is_cut(tmp_path: Path, columns: tuple[str, ...], smoothing: float) -> None:
    """Long names of runs and of a reward, n-gram models of many texts, and averages over many steps."""
    long = "a_rather_long_name_of_a_run_" * 5
    for i, name in enumerate([long, "b", "c", "d" * 60, *"efghijkl"]):
        custom = {"reward": "make_a_reward_of_a_long_name.<locals>.right_answers_to_questions"} if i == 1 else {}
        folder = make(tmp_path / name, done=4, custom=custom)
        folder.keep_baselines({"unigram": 3.0 + i / 100, "bigram": 2.5 + i / 100, "trigram": 2.49 + i / 100})
        if "held_out" not in columns:
            (tmp_path / name / "metrics.jsonl").write_text(line_of(1) + line_of(3))
    figure = esjax.plot(tmp_path, smoothing=smoothing)
    assert len(figure.axes) == len(columns)
    assert is_whole(figure)
    assert len(styles(figure)) == 12
    assert long in styles(figure)
    labels = list(figure.axes[0].texts)
    assert len(labels) == (36 if "held_out" in columns else 0)
    assert overlapping(labels) == []
    assert min(axes.get_window_extent().width for axes in figure.axes) > 300


def test_labels_that_would_lie_on_each_other_move_apart_in_order(runs: Path) -> None:
    (runs / "a" / "baselines.json").write_text('{"unigram": 3.0, "bigram": 2.01, "trigram": 2.0, "4-gram": 1.99}')
    figure = esjax.plot(runs / "a", out=runs / "a.png")
    assert is_whole(figure)
    labels = figure.axes[0].texts
    assert overlapping(list(labels)) == []
    heights = [label.get_window_extent().y0 for label in labels]
    assert heights == sorted(heights, reverse=True)
    assert labels[0].get_position() == (5.0, 0.0)  # it had room
    assert labels[2].get_position()[1] == pytest.approx(0, abs=0.1)  # in the middle of three


def test_places_are_spread_by_least_squares_between_bounds() -> None:
    """By hand: the mean of those that meet stays where it was, unless a bound is in the way."""
    places = np.array([2.0, 1.0, 1.0, 9.0])
    np.testing.assert_allclose(spread(places, 2.0, -9, 99), [10 / 3, -2 / 3, 4 / 3, 9.0])
    np.testing.assert_allclose(spread(places, 2.0, 0, 9), [4.0, 0.0, 2.0, 9.0])


def test_runs_without_a_held_out_loss_have_one_panel(tmp_path: Path) -> None:
    """As those of a reward that hold no text back."""
    run = make(tmp_path / "a", custom={"reward": "right"})
    append(run.path, line_of(1) + line_of(3))
    (loss,) = esjax.plot(run.path).axes
    assert (loss.get_title(), loss.get_ylabel()) == ("population, training text", "minus right")
    (line,) = loss.get_lines()
    np.testing.assert_array_equal(points(line), [[1, 4], [3, 2]])
    append(run.path, line_of(4))  # measured by the reward, which no n-gram model has
    held_out, _ = esjax.plot(run.path).axes
    (line,) = held_out.get_lines()
    np.testing.assert_array_equal(points(line), [[4, 0]])


def test_runs_of_which_no_loss_is_finite_are_said(tmp_path: Path) -> None:
    append(make(tmp_path / "a").path, '{"step": 1, "loss": null}\n')
    with pytest.raises(EsjaxError, match=r"no loss is finite in a$"):
        esjax.plot(tmp_path / "a")


def test_runs_that_differ_in_the_seed_are_one_line_in_a_band(tmp_path: Path) -> None:
    """By hand: losses 5 - step of one, twice those of another, as far as both go; a third run is alone."""
    make(tmp_path / "a", done=4, seed=1)
    make(tmp_path / "b", done=4, es=EsConfig(sigma=0.1))
    doubled = [json.loads(line_of(step)) for step in range(1, 7)]
    append(
        make(tmp_path / "c", seed=2).path,
        "".join(json.dumps({**row, "loss": 2 * row["loss"]}) + "\n" for row in doubled),
    )
    figure = esjax.plot(tmp_path, mean_over_seeds=True)
    assert list(styles(figure)) == ["a and 1 more", "b"]
    loss = figure.axes[1]
    mean, alone = loss.get_lines()
    np.testing.assert_array_equal(points(mean), [[1, 6], [2, 4.5], [3, 3], [4, 1.5]])
    np.testing.assert_array_equal(points(alone)[:, 1], [4, 3, 2, 1])
    (band,) = loss.collections
    corners = np.asarray(band.get_paths()[0].vertices).tolist()
    for step in range(1, 5):
        heights = {y for x, y in corners if x == step}
        assert heights == {5 - step, 2 * (5 - step)}
    assert len(esjax.plot(tmp_path).axes[1].get_lines()) == 3


def test_the_command_draws_the_mean_over_seeds(runs: Path) -> None:
    cli.main(["plot", str(runs), "--out", str(runs / "r.html"), "--mean-over-seeds"])
    assert data_of((runs / "r.html").read_text())["view"]["seeds"] is True


def test_seeds_without_a_common_part_are_drawn_one_by_one(tmp_path: Path) -> None:
    for seed, step in ((1, 2), (2, 4)):
        append(make(tmp_path / str(seed), seed=seed).path, line_of(step))
    figure = esjax.plot(tmp_path, mean_over_seeds=True)
    assert list(styles(figure)) == ["1", "2"]
    assert [points(line).tolist() for line in figure.axes[1].get_lines()] == [[[2, 3]], [[4, 1]]]


def data_of(page: str) -> dict:
    (found,) = re.findall(r'<script id="embedded" type="application/json">(.*?)</script>', page)
    return json.loads(found)


def test_a_report_stands_alone(runs: Path) -> None:
    shutil.copytree(runs / "a", runs / "more" / "a")
    text = 'a </script><script>alert("x")</script>'
    for folder in (runs / "a", runs / "b"):
        (folder / "samples.txt").write_text(f"--- step 4\n{text}\n\n")
    esjax.report(runs, out=runs / "r.html", over="seconds", log_y=True, smoothing=7.0)
    page = (runs / "r.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:)', page)
    data = data_of(page)
    assert data["view"] == {"over": "seconds", "logX": False, "logY": True, "seeds": False, "span": 7.0}
    a, b, more = data["runs"]
    assert (a["name"], b["name"], more["name"]) == ("runs/a", "b", "more/a")
    assert a["settings"]["es.sigma"] == 0.1
    assert a["curves"]["loss"]["value"] == [4.0, 3.0, 2.0, 1.0, 0.0, -1.0]
    assert a["curves"]["loss"]["member_tokens"] == [100, 200, 300, 400, 500, 600]
    assert a["units"]["held_out"] == "nats per token"
    assert b["samples"] == [{"step": 4, "text": text}]
    assert "<title>runs/a, b, more/a - esjax</title>" in page


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none", "there is no folder"), ("empty", "no run folder at or below"), ("new", "no step is finished in new")],
)
def test_what_cannot_be_drawn_is_said(runs: Path, name: str, reason: str) -> None:
    (runs / "empty").mkdir()
    make(runs / "new")
    for write in (lambda: esjax.plot(runs / name), lambda: esjax.report(runs / name, out=runs / "r.html")):
        with pytest.raises(EsjaxError, match=reason):
            write()
    assert not (runs / "r.html").exists()


def test_a_file_that_cannot_be_written_is_said(runs: Path) -> None:
    with pytest.raises(EsjaxError, match="cannot write"):
        esjax.plot(runs, out=runs / "none" / "x.png")
    with pytest.raises(EsjaxError, match="cannot write"):
        esjax.report(runs, out=runs / "none" / "x.html")
    with pytest.raises(EsjaxError, match="must end in"):
        esjax.plot(runs, out=runs / "x.gif")
    with pytest.raises(EsjaxError, match="must end in"):
        esjax.report(runs, out=runs / "x.png")


def test_a_missing_extra_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(EsjaxError, match=r"esjax\[plot\]"):
        esjax.plot(runs)
    with pytest.raises(EsjaxError, match=r"esjax\[plot\]"):
        esjax.report(runs, out=runs / "r.html")


def test_the_python_of_the_page_about_it_runs(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(runs.parent)
    exec(compile(code, "docs/comparing.md", "exec"), {})
    assert capsys.readouterr().out == "a stopped 6 -2.0 [0.1]\nb stopped 4 0.0 [None]\n"
    assert len(data_of((runs.parent / "report.html").read_text())["runs"]) == 2


def test_runs_are_named_letter_by_letter(tmp_path: Path) -> None:
    """matplotlib reads `$x_$` as a broken formula, and takes `_base` for no name at all."""
    names = ["$x_$", "_base", "a\\$b", "x_1^2"]
    for place, name in enumerate(names):
        make(tmp_path / name, done=3).keep_baselines({"unigram": 3.0 + place})
    figure = esjax.plot(*(tmp_path / name for name in names), out=tmp_path / "runs.png")
    assert (tmp_path / "runs.png").exists()
    texts = [*figure.legends[0].get_texts(), *figure.axes[0].texts]
    assert [text.get_text() for text in texts] == [
        *names,
        *(f"unigram {3 + place}.00 ({name})" for place, name in enumerate(names)),
    ]
    assert not any(text.get_parse_math() for text in texts)
    assert len(figure.legends[0].get_lines()) == len(names)
