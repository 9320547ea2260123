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
from esjax.config import EsConfig
from esjax.curves import smooth
from esjax.runs import read_run

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
        self.tab.wait_for_selector(".main-svg")

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
    assert tab.locator("#chart-held_out .annotation-text").all_text_contents() == ["unigram 3.00", "bigram 2.50"]
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
    tab.wait_for_selector(".main-svg")
    assert {line["name"] for line in page.lines("held_out")} == {"b"}
    assert page.axes("loss") == ["log", "log"]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, dashboard: str, scheme: str) -> None:
    page = Page(browser, dashboard, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 390
    widths = page.tab.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart.scrollWidth)")
    assert len(widths) == 4
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
    below = make(runs / "below", own={"reward": "outer.<locals>.right"})
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
