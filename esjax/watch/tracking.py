"""The interface of trackers, and their threads: a tracker can neither stop nor slow a run."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from esjax.runs.step_info import StepInfo

SECONDS_A_ROW = 1.0
"""Seconds between the rows that trackers get; a row with an evaluation is always passed on."""

MOST_WAITING = 256
"""Most rows and samples that may wait for a tracker; a tracker that is slower is dropped."""

CLOSING_SECONDS = 30.0
"""Seconds that all trackers together have at the end to write what still waits."""


class TrackedRun(NamedTuple):
    """The run that a tracker follows, as passed to `Tracker.start`.

    Attributes:
        id: Permanent name of the run, also after a resume; letters and digits.
        title: Name of the run folder, or "esjax".
        folder: The run folder, or None.
        settings: All settings as plain dicts, lists, numbers, strings and None.
        baselines: Nats per token of the n-gram models over the held-out documents, by name, worst first.
        step: Steps done before this start, 0 for a new run. Earlier rows of later steps are outdated.
    """

    id: str
    title: str
    folder: Path | None
    settings: Mapping[str, Any]
    baselines: Mapping[str, float]
    step: int


@runtime_checkable
class Tracker(Protocol):
    """Base class of trackers. Inherit from it and override the methods that you need.

    Each tracker has its own thread, which calls the methods one after another. If a method raises, the run prints a
    line, closes the tracker and calls it no more. A resumed run starts it again.
    """

    def start(self, run: TrackedRun) -> None:
        """Begin a run, or continue it."""
        return  # a body, here and below, so that subclasses may leave the method out

    def log(self, row: Mapping[str, float]) -> None:
        """Take the numbers of a step.

        Args:
            row: Fields of `StepInfo` by name, without those that are None. A loss may be NaN. If steps are fast, there
                is one row a second; `void_pairs` then counts those of all steps since the last row.
        """
        return

    def sample(self, step: int, text: str) -> None:
        """Take a text that the model wrote after a step."""
        return

    def close(self) -> None:
        """Write what is buffered: the run ends or pauses. Called after a failure of a method, too."""
        return


class Watch:
    """The trackers of a run, as a context manager.

    The tracker that writes the run folder is called directly, and its errors stop the run. Each other tracker gets its
    calls through a queue.
    """

    def __init__(self, trackers: Sequence[Tracker], tell: Callable[[str], None]) -> None:
        """Prepare; no tracker is called yet.

        Args:
            trackers: Trackers to call through queues.
            tell: Called, from any thread, with each line for the user.
        """
        self._trackers, self._tell = trackers, tell
        self._record: Tracker | None = None
        self._followers: list[_Follower] = []
        self._waiting: dict[str, float] | None = None
        self._void_pairs = 0
        self._next_at = 0.0

    def __enter__(self) -> "Watch":
        """Return self."""
        return self

    def __exit__(self, *error: object) -> None:
        """Pass on the last row, and wait for the trackers to finish."""
        try:
            if self._record is not None:
                self._record.close()
        finally:
            if self._waiting is not None:
                self._pass_on(self._waiting)
            self._finish()

    def start(self, run: TrackedRun, record: Tracker | None) -> None:
        """Start all trackers.

        Args:
            run: The run.
            record: The tracker that writes the run folder, or None.
        """
        if record is not None:
            record.start(run)
            self._record = record
        self._followers = [_Follower(tracker, run, self._tell) for tracker in self._trackers]

    def log(self, info: StepInfo) -> None:
        """Pass on the info of a step."""
        row = info.row()
        if self._record is not None:
            self._record.log(row)
        if not self._followers:
            return
        self._void_pairs += info.void_pairs
        row["void_pairs"] = self._void_pairs
        if not info.is_evaluated and time.monotonic() < self._next_at:
            self._waiting = row
        else:
            self._pass_on(row)

    def sample(self, step: int, text: str) -> None:
        """Pass on a text that the model wrote after a step."""
        if self._record is not None:
            self._record.sample(step, text)
        for follower in self._followers:
            follower.put(lambda tracker: tracker.sample(step, text))

    def _pass_on(self, row: dict[str, float]) -> None:
        self._waiting, self._void_pairs = None, 0
        self._next_at = time.monotonic() + SECONDS_A_ROW
        for follower in self._followers:
            follower.put(lambda tracker: tracker.log(row))

    def _finish(self) -> None:
        until = time.monotonic() + CLOSING_SECONDS
        for follower in self._followers:
            follower.put(None)
        for follower in self._followers:
            follower.join(max(until - time.monotonic(), 0.0))
            if follower.is_alive() and not follower.dropped:
                self._tell(f"tracker {follower.name} is not done yet; its last rows may be missing")


class _Follower(threading.Thread):
    """The thread that calls one tracker.

    Attributes:
        dropped: Whether the tracker gets no more calls.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun, tell: Callable[[str], None]) -> None:
        # A daemon: a tracker that hangs cannot keep the program from ending.
        super().__init__(name=type(tracker).__name__, daemon=True)
        self.dropped = False
        self._tracker, self._run, self._tell = tracker, run, tell
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self.start()

    def put(self, call: Callable[[Tracker], None] | None) -> None:
        """Queue a call of the tracker; None closes it."""
        if self.dropped:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._drop("it does not keep up")

    def run(self) -> None:
        """Call the tracker until it is closed or dropped."""
        try:
            self._tracker.start(self._run)
            while not self.dropped and (call := self._calls.get()) is not None:
                call(self._tracker)
        except Exception as error:
            self._drop(str(error) or type(error).__name__)
        try:
            self._tracker.close()
        except Exception as error:
            if not self.dropped:
                self._drop(str(error) or type(error).__name__)

    def _drop(self, why: str) -> None:
        self.dropped = True
        self._tell(f"tracker {self.name} is left out from here on: {' '.join(why.split())}")
