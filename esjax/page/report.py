"""The page as one file, with curves, settings and samples of runs; it loads nothing from the network."""

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
from esjax.watch.plotting import check_log_y, check_smoothing, open_runs


def report(
    *runs: str | Path | RunView,
    out: str | Path,
    over: Axis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.0,
    mean_over_seeds: bool = False,
) -> None:
    """Write a page that shows runs side by side and needs only a browser.

    Args:
        runs: Run folders, folders of run folders, or runs as `esjax.runs.reader.read_run` returns them.
        out: File to write, .html; about 5 MB, most of it the chart library.
        over: Horizontal axis at first: "steps", "seconds" or "member-tokens". The page can change this option and
            those below.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the axis of the loss is logarithmic.
        smoothing: Steps over which curves are averaged exponentially; 0 is no smoothing.
        mean_over_seeds: Whether runs whose settings differ only in the seed are drawn as one line, see `esjax.plot`.

    Raises:
        EsjaxError: A run does not exist, no run has a finished step, `log_y` is set and no loss is above 0,
            `smoothing` is out of range, plotly is missing, or the file cannot be written.
    """
    out = given_path(out)
    if out.suffix != ".html":
        raise EsjaxError(f"{str(out)!r} must end in .html")
    check_smoothing(smoothing)
    views = open_runs(runs)
    if log_y:
        check_log_y(views)
    content: dict[str, Any] = {
        "view": {"over": over, "logX": log_x, "logY": log_y, "seeds": mean_over_seeds, "span": smoothing},
        "runs": [{**summary(view, str(i)), **details(view), "curves": curves(view)} for i, view in enumerate(views)],
    }
    try:
        write_durably(out, _standalone(", ".join(view.name for view in views), content))
    except OSError as error:
        raise EsjaxError(f"cannot write {str(out)!r}: {error.strerror}") from error


def _standalone(title: str, content: dict[str, Any]) -> str:
    """Return the page with its scripts, styles and data inlined."""
    page = page_file("page.html")
    begin, end = '<script id="embedded" type="application/json">', "</script>"
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")  # so that no text of a run ends the script
    for reference, inlined in {
        "<title>esjax</title>": f"<title>{escape(title)} - esjax</title>",
        '<link rel="stylesheet" href="page.css">': f"<style>{page_file('page.css')}</style>",
        '<script src="plotly.js"></script>': f"<script>{plotly_script('plot')}</script>",
        begin + end: begin + data + end,
        '<script src="charts.js"></script>': f"<script>{page_file('charts.js')}</script>",
        '<script src="page.js"></script>': f"<script>{page_file('page.js')}</script>",
    }.items():
        assert page.count(reference) == 1, reference
        page = page.replace(reference, inlined)
    return page
