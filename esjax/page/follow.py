"""Follows the runs below a folder while they are trained."""

import secrets
from pathlib import Path
from threading import Lock
from typing import Any

from esjax.errors import EsjaxError
from esjax.page.content import curves, details, summary
from esjax.paths import given_path
from esjax.runs.reader import Metrics, RunView, distinct_names, find_runs, is_running, read_run
from esjax.texts import legible


class _Followed:
    """A run and what was read of it so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = Metrics(path)
        self._view: RunView | None = None
        self._renew_mark()

    def view(self, name: str) -> RunView:
        """Read new metrics. A run that has ended and not changed is not read again."""
        steps = len(self._metrics)
        anew = self._metrics.read()
        if anew:
            self._renew_mark()
        running = is_running(self.path)
        view = self._view
        at_rest = view is not None and not anew and steps == len(self._metrics)
        if view is None or running or not at_rest or view.state == "running" or view.name != name:
            self._view = view = read_run(self.path, self._metrics, name)
        return view

    def _renew_mark(self) -> None:
        self.mark = secrets.token_hex(4)  # invalidates the points that pages have


class Follower:
    """Answers questions about the runs below a folder; its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Find the runs below a folder.

        Raises:
            EsjaxError: The folder does not exist.
        """
        self.folder = given_path(folder)
        self._lock = Lock()
        self._runs: dict[str, _Followed] = {}
        self._names: dict[str, str] = {}
        self._find()

    def runs(self) -> list[dict[str, Any]]:
        """Return a summary of every run, the newest first.

        If a run cannot be read, its summary holds the reason in `error`.
        """
        with self._lock:
            self._find()
            order = sorted(self._runs, key=lambda run: _made_at(self._runs[run].path), reverse=True)
            return [self._summary(run) for run in order]

    def run(self, run: str, mark: str = "", known: dict[str, tuple[int, int]] | None = None) -> dict[str, Any]:
        """Return the details of a run, and the points of its curves that the page does not have.

        Args:
            run: Identifier of the run, from `runs`.
            mark: The mark of the last answer; "" if there was none.
            known: Points that the page has, see `curves`; ignored if the mark has changed.

        Raises:
            EsjaxError: The run does not exist or cannot be read.
        """
        with self._lock:
            followed = self._followed(run)
            view = followed.view(self._names[run])
            points = curves(view, known if mark == followed.mark else None)
            return {**summary(view, run), **details(view), "mark": followed.mark, "curves": points}

    def path(self, run: str) -> Path:
        """Return the folder of a run.

        Raises:
            EsjaxError: The run does not exist.
        """
        with self._lock:
            return self._followed(run).path

    def _followed(self, run: str) -> _Followed:
        if run not in self._runs:
            self._find()
        if run not in self._runs:  # only folders that were found are read, whatever path the name holds
            raise EsjaxError(f"there is no run {run!r} in {str(self.folder)!r}")
        return self._runs[run]

    def _find(self) -> None:
        paths = find_runs(self.folder)
        found = {legible(path.relative_to(self.folder).as_posix()): path for path in paths}
        self._runs = {run: self._runs.get(run) or _Followed(path) for run, path in found.items()}
        self._names = dict(zip(found, distinct_names(paths), strict=True))

    def _summary(self, run: str) -> dict[str, Any]:
        try:
            return summary(self._runs[run].view(self._names[run]), run)
        except EsjaxError as error:
            return {"run": run, "name": self._names[run], "state": "stopped", "last": {}, "error": str(error)}


def _made_at(path: Path) -> float:
    try:
        return (path / "run.json").stat().st_mtime
    except OSError:
        return 0.0
