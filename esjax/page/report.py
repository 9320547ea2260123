"""The page as one file: the curves, settings and samples of some runs, without anything from the network."""

import json
from html import escape
from pathlib import Path
from typing import Any

from esjax.errors import EsjaxError
from esjax.page.content import curves, details, page_file, plotly_script, summary
from esjax.paths import given_path
from esjax.runs.durable import write_durably
from esjax.runs.reader import RunView
from esjax.watch.downsampling import Axis
from esjax.watch.plotting import check_log_y, open_runs


def report(
    *runs: str | Path | RunView,
    out: str | Path,
    over: Axis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.0,
    mean_over_seeds: bool = False,
) -> None:
    """Write a page that shows runs side by side, and needs nothing but a browser.

    Args:
        runs: Run folders, folders of run folders, or runs as `esjax.runs.reader.read_run` returns them.
        out: File to write, .html; about 5 MB, most of them the chart library.
        over: What the curves are drawn over at first; the reader may change that, and the rest.
        log_x: Whether that axis is logarithmic.
        log_y: Whether the loss is.
        smoothing: Steps over which curves are averaged, exponentially; 0: none.
        mean_over_seeds: Whether runs whose settings differ in nothing but the seed are drawn as one line, see
            `esjax.plot`.

    Raises:
        EsjaxError: There is no such run, none of them has done a step, no loss is above 0 for its logarithm,
            plotly is missing, or the file cannot be written.
    """
    out = given_path(out)
    if out.suffix != ".html":
        raise EsjaxError(f"{str(out)!r} must end in .html")
    views = open_runs(runs)
    if log_y:
        check_log_y(views)
    told: dict[str, Any] = {
        "view": {"over": over, "logX": log_x, "logY": log_y, "seeds": mean_over_seeds, "span": smoothing},
        "runs": [{**summary(view, str(i)), **details(view), "curves": curves(view)} for i, view in enumerate(views)],
    }
    try:
        write_durably(out, _alone(", ".join(view.name for view in views), told))
    except OSError as error:
        raise EsjaxError(f"cannot write {str(out)!r}: {error.strerror}") from error


def _alone(title: str, told: dict[str, Any]) -> str:
    """Put everything that the page asks for into it."""
    page = page_file("page.html")
    begin, end = '<script id="told" type="application/json">', "</script>"
    data = json.dumps(told, allow_nan=False).replace("<", "\\u003c")  # no text of a run ends the script
    for asked, given in {
        "<title>esjax</title>": f"<title>{escape(title)} - esjax</title>",
        '<link rel="stylesheet" href="page.css">': f"<style>{page_file('page.css')}</style>",
        '<script src="plotly.js"></script>': f"<script>{plotly_script('plot')}</script>",
        begin + end: begin + data + end,
        '<script src="charts.js"></script>': f"<script>{page_file('charts.js')}</script>",
        '<script src="page.js"></script>': f"<script>{page_file('page.js')}</script>",
    }.items():
        assert page.count(asked) == 1, asked
        page = page.replace(asked, given)
    return page
