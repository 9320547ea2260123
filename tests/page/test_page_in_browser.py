"""The page in a real browser: runs beside each other, on a phone's width and in the dark, and one that goes on."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright
from processes import PATIENCE, Fleet, Process, wait_until
from recorded import append, line_of, make

import esjax
from esjax.config.settings import EsConfig
from esjax.runs.reader import read_run
from esjax.watch.downsampling import make_curve, mean_and_range, smooth
from esjax.watch.plot_layout import STYLES

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        # As root, as in a container, Chromium has no sandbox of its own.
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


class Page:
    """A page, and what went wrong in it."""

    def __init__(self, browser: Browser, address: str, **look: Any) -> None:
        self.troubles: list[str] = []
        self.tab = browser.new_context(**look).new_page()
        self.tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.tab.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.tab.on("request", lambda asked: self._see(asked.url))
        self.tab.goto(address)
        self.tab.wait_for_selector(".main-svg >> visible=true")

    def _see(self, address: str) -> None:
        if not re.match(r"(http://127\.0\.0\.1:|file:|data:|blob:)", address):
            self.troubles.append(f"it asks for {address}")

    def lines(self, column: str) -> list[dict]:
        """Return the lines of a chart, as they are drawn."""
        told = self.tab.evaluate(f"JSON.stringify(document.getElementById('chart-{column}').data)")
        return json.loads(told)

    def drawn(self, run: str) -> list[float]:
        """Return the steps at which the loss of a run is drawn."""
        return next((line["x"] for line in self.lines("loss") if line["name"] == run), [])

    def width(self, column: str) -> float:
        """Return how wide a chart is drawn."""
        return self.tab.evaluate(f"document.querySelector('#chart-{column} .main-svg').getBoundingClientRect().width")

    def axes(self, column: str) -> list[str]:
        """Return the kinds of a chart's two axes."""
        layout = f"document.getElementById('chart-{column}').layout"
        return self.tab.evaluate(f"[{layout}.xaxis.type, {layout}.yaxis.type]")

    def differing(self) -> list[list[str]]:
        """Return the rows of settings that are marked."""
        return [row.locator("th, td").all_text_contents() for row in self.tab.locator("tr.differs").all()]

    def close(self) -> None:
        self.tab.context.close()
        assert self.troubles == []


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name, sigma in (("a", 0.1), ("b", 0.2)):
        folder = make(tmp_path / "runs" / name, done=6, es=EsConfig(sigma=sigma))
        folder.keep_baselines({"unigram": 3.0, "bigram": 2.5})
        folder.add_sample(6, f"<b>written by {name}</b>")
    return tmp_path / "runs"


@pytest.fixture
def dashboard(runs: Path, tmp_path: Path) -> Iterator[str]:
    process = Process("dashboard", str(runs), "--port", "0", log=tmp_path / "dashboard.log")
    process.wait_for("http://")
    yield process.output.strip()
    process.send(signal.SIGINT)
    assert process.ends() == 0, process.output


def test_two_runs_lie_over_each_other_with_their_differences_marked(browser: Browser, dashboard: str) -> None:
    page = Page(browser, dashboard + "#run=a&run=b")
    tab = page.tab
    a, b = page.lines("loss")
    assert (a["name"], b["name"]) == ("a", "b")
    assert a["x"] == [1, 2, 3, 4, 5, 6]
    assert a["y"] == b["y"] == [4, 3, 2, 1, 0, -1]
    assert page.lines("held_out")[0]["y"] == [2, 0, -2]
    assert tab.locator("#chart-held_out .legendtext").all_text_contents() == ["unigram 3.00", "bigram 2.50"]
    assert page.differing() == [["es.sigma", "0.1", "0.2"]]
    assert tab.locator("pre").all_text_contents() == ["<b>written by a</b>", "<b>written by b</b>"]
    page.close()


def test_axes_smoothing_and_choice_are_changed_and_kept_in_the_address(browser: Browser, dashboard: str) -> None:
    page = Page(browser, dashboard + "#run=a&run=b")
    tab = page.tab
    tab.select_option("[name=over]", "member-tokens")
    tab.select_option("[name=span]", "3000")
    tab.check("[name=logX]")
    tab.check("[name=logY]")
    measured, smoothed, *_ = page.lines("loss")
    assert smoothed["x"] == measured["x"] == [100, 200, 300, 400, 500, 600]
    by_python = smooth(np.arange(1.0, 7.0), np.array(measured["y"], float), 3000.0)
    np.testing.assert_allclose(smoothed["y"], by_python, rtol=1e-12)
    assert page.axes("loss") == ["log", "log"]
    assert page.axes("update_norm") == ["log", "linear"]
    tab.locator("li", has_text="held-out").filter(has=tab.get_by_text("a", exact=True)).get_by_role(
        "checkbox"
    ).uncheck()
    assert {line["name"] for line in page.lines("held_out")} == {"b"}
    assert page.differing() == []
    tab.reload()
    tab.wait_for_selector(".main-svg >> visible=true")
    assert {line["name"] for line in page.lines("held_out")} == {"b"}
    assert page.axes("loss") == ["log", "log"]
    page.close()


def test_a_filter_and_two_buttons_choose_runs_by_name(browser: Browser, dashboard: str, runs: Path) -> None:
    for name in ("b long", "c long"):
        make(runs / name, done=2)
    page = Page(browser, dashboard + "#run=a&run=b")
    tab = page.tab
    listed = tab.locator("#runs .name")
    tab.fill("#filter", "LO b")
    assert listed.all_text_contents() == ["b long"]
    assert tab.locator("#hint").text_content() == "Select runs to see them side by side."
    tab.get_by_role("button", name="show all").click()
    wait_until(lambda: [line["name"] for line in page.lines("loss")] == ["b long"])
    tab.reload()
    tab.wait_for_selector(".main-svg >> visible=true")
    wait_until(lambda: [line["name"] for line in page.lines("loss")] == ["b long"])
    tab.get_by_role("button", name="hide all").click()
    tab.fill("#filter", "none of them")
    assert tab.locator("#hint").text_content() == 'No run has "none of them" in its name.'
    tab.fill("#filter", "")
    wait_until(lambda: {line["name"] for line in page.lines("loss")} == {"a", "b"})
    tab.get_by_role("button", name="hide all").click()
    tab.locator("#charts").wait_for(state="hidden")
    page.close()


def test_the_table_of_runs_sorts_by_each_column(browser: Browser, tmp_path: Path) -> None:
    """Reference: the metrics, by hand. The run z got worse again, and y has no held-out loss."""
    make(tmp_path / "x", done=4, es=EsConfig(sigma=0.2), seed=10)
    z = make(tmp_path / "z", done=4, es=EsConfig(sigma=0.1), seed=9)
    append(z.path, json.dumps({"step": 5, "seconds": 2.5, "member_tokens": 2000, "loss": 0.5, "held_out": 1.5}) + "\n")
    append(make(tmp_path / "y", es=EsConfig(sigma=0.3), seed=8).path, line_of(1))
    esjax.report(tmp_path, out=tmp_path / "report.html")
    page = Page(browser, (tmp_path / "report.html").as_uri())
    table = page.tab.locator("#table")

    def rows() -> list[list[str]]:
        return [row.locator("td").all_text_contents() for row in table.locator("tbody tr").all()]

    heads = table.locator("th").all_text_contents()
    results = ["held-out loss", "best held-out loss", "training loss", "steps done", "seconds trained", "member-tokens"]
    assert heads == ["run", "state", *results, "es.sigma", "seed"]
    assert rows() == [
        ["x", "stopped", "0.000", "0.000", "1.000", "4", "2.0", "400", "0.2", "10"],
        ["y", "stopped", "-", "-", "4.000", "1", "0.5", "100", "0.3", "8"],
        ["z", "stopped", "1.500", "0.000", "0.500", "5", "2.5", "2,000", "0.1", "9"],
    ]
    for head, rising in {
        "run": "xyz",
        "held-out loss": "xzy",
        "training loss": "zxy",
        "member-tokens": "yxz",
        "seed": "yzx",
    }.items():
        button = table.get_by_role("button", name=head, exact=True)
        button.click()
        assert "".join(row[0] for row in rows()) == rising
        assert table.locator("[aria-sort=ascending]").text_content() == head
        button.click()
        falling = "zxy" if head == "held-out loss" else rising[::-1]  # what is missing stays last
        assert "".join(row[0] for row in rows()) == falling
    page.close()


def test_runs_that_differ_in_the_seed_are_one_line_in_a_band(browser: Browser, tmp_path: Path) -> None:
    """Reference: the band that Python draws. Each run is measured at other steps."""
    make(tmp_path / "a", done=7, seed=1)
    for name, seed, steps in (("b", 2, (1, 4, 6)), ("c", 3, (2, 3, 9))):
        rows = [{"step": step, "seconds": step, "member_tokens": step, "loss": 10 + step**2 / seed} for step in steps]
        append(make(tmp_path / name, seed=seed).path, "".join(json.dumps(row) + "\n" for row in rows))
    make(tmp_path / "other", done=5, es=EsConfig(sigma=0.1))
    esjax.report(tmp_path, out=tmp_path / "report.html", mean_over_seeds=True)
    page = Page(browser, (tmp_path / "report.html").as_uri())
    low, high, mean, other = page.lines("loss")
    assert (mean["name"], other["name"]) == ("a and 2 more", "other")
    curves = [make_curve(read_run(tmp_path / name).metrics, "loss") for name in "abc"]
    band = mean_and_range([curve.step for curve in curves], [curve.value for curve in curves])
    assert mean["x"] == low["x"] == high["x"] == band.x.tolist()
    for drawn, reference in ((mean, band.mean), (low, band.low), (high, band.high)):
        np.testing.assert_allclose(drawn["y"], reference, rtol=1e-6)  # it is sent seven digits
    assert high["fill"] == "tonexty"
    swatches = [mark.get_attribute("stroke") for mark in page.tab.locator("#runs .swatch path").all()]
    assert swatches[:3] == [mean["line"]["color"]] * 3
    page.tab.uncheck("[name=seeds]")
    assert [line["name"] for line in page.lines("loss")] == ["a", "b", "c", "other"]
    page.close()


def test_forty_runs_have_forty_styles_as_in_pictures(browser: Browser, tmp_path: Path) -> None:
    for i in range(40):
        make(tmp_path / f"run{i:02d}", done=1)
    esjax.report(tmp_path, out=tmp_path / "report.html")
    page = Page(browser, (tmp_path / "report.html").as_uri())
    names = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
    assert [(line["line"]["color"], line["line"]["dash"]) for line in page.lines("loss")] == [
        (style["color"], names[style["linestyle"]]) for style in STYLES
    ]
    page.close()


def test_a_chart_without_a_line_is_not_shown(browser: Browser, tmp_path: Path) -> None:
    """As the held-out loss of a reward that holds no text back; another run brings it back, in its size."""
    append(make(tmp_path / "a", custom={"reward": "right"}).path, line_of(1) + line_of(3))
    make(tmp_path / "b", done=4)
    esjax.report(tmp_path, out=tmp_path / "report.html")
    page = Page(browser, (tmp_path / "report.html").as_uri() + "#filter=a")
    held_out, loss = (page.tab.locator(f"#chart-{column}") for column in ("held_out", "loss"))
    assert (held_out.is_visible(), loss.is_visible()) == (False, True)
    page.tab.fill("#filter", "")
    assert held_out.is_visible()
    wait_until(lambda: abs(page.width("held_out") - page.width("loss")) < 2)
    page.close()


def test_samples_stand_above_settings(browser: Browser, dashboard: str) -> None:
    page = Page(browser, dashboard + "#run=a&run=b")
    shown = page.tab.locator("article > section:visible").evaluate_all("sections => sections.map(({id}) => id)")
    assert shown == ["charts", "table", "samples", "settings"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, dashboard: str, scheme: str) -> None:
    page = Page(browser, dashboard, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 390
    widths = page.tab.locator(".chart:visible").evaluate_all("charts => charts.map((chart) => chart.scrollWidth)")
    assert len(widths) == 2  # these runs have losses, and neither rewards nor rates
    assert max(widths) <= 390
    ground = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)))
    assert brightness < 150 if scheme == "dark" else brightness > 600
    page.close()


def test_a_run_that_begins_is_listed_and_followed_with_its_hosts(browser: Browser, dashboard: str, runs: Path) -> None:
    page = Page(browser, dashboard + "#run=a")
    row = page.tab.locator("li").filter(has=page.tab.get_by_text("run", exact=True))
    with closing(Fleet(runs)) as fleet:
        fleet.serve()
        fleet.join("north")
        row.wait_for(timeout=PATIENCE * 1000)
        row.get_by_role("checkbox").check()
        row.get_by_text("running").wait_for()
        wait_until(lambda: len(page.drawn("run")) > 2)
        before = page.drawn("run")
        wait_until(lambda: len(page.drawn("run")) > len(before))
        assert page.drawn("run")[: len(before)] == before
        assert ["data.window", "32", "8"] in page.differing()
        page.tab.locator("#hosts td", has_text="north").wait_for()
    row.get_by_text("stopped").wait_for()
    page.tab.locator("#hosts").wait_for(state="hidden")
    wait_until(lambda: page.drawn("run")[-1] == read_run(runs / "run").step)
    page.close()


def test_a_report_is_the_same_page_without_a_server(browser: Browser, runs: Path, tmp_path: Path) -> None:
    esjax.report(runs, out=tmp_path / "report.html", over="seconds", smoothing=7.0)
    page = Page(browser, (tmp_path / "report.html").as_uri())
    assert page.lines("loss")[0]["x"] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert page.tab.input_value("[name=span]") == "7"
    assert page.differing() == [["es.sigma", "0.1", "0.2"]]
    assert page.tab.locator("pre").all_text_contents() == ["<b>written by a</b>", "<b>written by b</b>"]
    page.close()


def test_losses_of_a_reward_have_its_name_and_no_logarithm(browser: Browser, runs: Path, tmp_path: Path) -> None:
    below = make(runs / "below", custom={"reward": "outer.<locals>.right"})
    append(below.path, "".join(line_of(step) for step in range(6, 9)))
    esjax.report(below.path, runs / "a", out=tmp_path / "report.html")
    page = Page(browser, (tmp_path / "report.html").as_uri())
    title = "#chart-loss .ytitle"
    assert page.tab.locator(title).text_content() == "minus outer.<locals>.right, nats per token"
    page.tab.check("[name=logY]")
    assert page.axes("loss") == ["linear", "log"]
    page.tab.locator("li", has_text="held-out").filter(has=page.tab.get_by_text("a", exact=True)).get_by_role(
        "checkbox"
    ).uncheck()
    assert page.axes("loss") == ["linear", "linear"]
    assert page.tab.locator(title).text_content() == "minus outer.<locals>.right"
    page.close()


def test_all_measures_of_a_reward_are_drawn_and_the_held_out_loss_beside_its_first_value(
    browser: Browser, tmp_path: Path
) -> None:
    """Reference: the metrics, by hand. A reward whose name another run has is in the same chart."""
    for name, shown in (("a", ("right", "short")), ("b", ("right",))):
        rows = [
            {"step": step, "seconds": step, "member_tokens": step, "loss": -step / 8, "reward": step / 8}
            | {f"reward_{reward}": step / 16 for reward in shown}
            | ({"held_out": 2.0 + step / 4, "greedy_reward": step / 4, "pass_at_k": step / 8} if step % 2 == 0 else {})
            for step in range(1, 9)
        ]
        append(make(tmp_path / name, custom={"reward": "score"}).path, "".join(json.dumps(row) + "\n" for row in rows))
    esjax.report(tmp_path / "a", tmp_path / "b", out=tmp_path / "report.html", smoothing=3.0)
    page = Page(browser, (tmp_path / "report.html").as_uri())
    tab = page.tab
    titles = ["Held-out loss", "Reward, mean of the population", "Reward on held-out prompts, greedy"]
    titles += [
        "pass@k on held-out prompts",
        "Reward right, mean of the population",
        "Reward short, mean of the population",
    ]
    assert tab.locator("#charts h2:visible").all_text_contents() == titles
    assert tab.locator("#chart-held_out .legendtext").all_text_contents() == ["first value 2.50"]
    assert [line["y"] for line in page.lines("greedy_reward")] == [[0.5, 1, 1.5, 2]] * 2
    assert [line["name"] for line in page.lines("reward_right")][1::2] == ["a", "b"]  # each above what is not smoothed
    assert [line["name"] for line in page.lines("reward_short")][1::2] == ["a"]
    by_python = smooth(np.arange(1.0, 9.0), np.arange(1.0, 9.0) / 16, 3.0)
    np.testing.assert_allclose(page.lines("reward_short")[1]["y"], by_python, rtol=1e-6)
    assert tab.locator("#chart-reward_short .ytitle").text_content() == "score"
    heads = tab.locator("#table th").all_text_contents()
    row = dict(zip(heads, tab.locator("#table tbody tr").first.locator("td").all_text_contents(), strict=True))
    assert [row[head] for head in ("reward", "greedy reward", "pass@k")] == ["1.000", "2.000", "1.000"]
    page.close()
