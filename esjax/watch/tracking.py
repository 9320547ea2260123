"""What a run tells whoever watches it, and how that is kept from stopping or slowing the run."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from esjax.runs.step_info import StepInfo

SECONDS_A_ROW = 1.0
"""Time between the rows that trackers get; one with a held-out loss is always handed on."""

MOST_WAITING = 256
"""Rows and samples that may wait for a tracker: whose do not fit is left out."""

CLOSING_SECONDS = 30.0
"""Time that all trackers together have at the end to write what still waits."""


class TrackedRun(NamedTuple):
    """What a tracker is told at the start.

    Attributes:
        id: Names the run for ever, also when it is resumed; letters and digits.
        title: What a person calls it: the name of its folder, or "esjax".
        folder: Where the run is kept, or None.
        settings: All settings as plain dicts, lists, numbers, strings and None.
        baselines: Nats per token by name, worst first, that the held-out loss is read against.
        step: Steps done before: 0, or where the run goes on. Rows of later steps that were told before do not count.
    """

    id: str
    title: str
    folder: Path | None
    settings: Mapping[str, Any]
    baselines: Mapping[str, float]
    step: int


@runtime_checkable
class Tracker(Protocol):
    """Something that a run is shown to. Inherit from it and write those methods that there is a use for.

    The methods are called one after another in a thread of the tracker's own. If one raises, a line is told, and the
    tracker is closed and left out. A run that goes on starts it again.
    """

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on with, a run."""
        return  # this, here and below: a body, so that whoever inherits may leave the method out

    def log(self, row: Mapping[str, float]) -> None:
        """Take the numbers of a step.

        Args:
            row: Fields of `StepInfo` by name, those that are None left out. A loss may be NaN. Steps that follow fast
                are thinned to one row a second; then `void_pairs` are those of all steps since the row before.
        """
        return

    def sample(self, step: int, text: str) -> None:
        """Take a text that the model wrote after a step."""
        return

    def close(self) -> None:
        """Write what is left: the run ends here, or pauses. Called after a failure, too, that of `start` included."""
        return


class Watch:
    """The trackers of a run, a context manager: between `start` and its end they hear of every step.

    What keeps the run's own record is called at once, and its errors are the run's. Everybody else is handed things
    through a queue.
    """

    def __init__(self, trackers: Sequence[Tracker], tell: Callable[[str], None]) -> None:
        """Prepare; nobody is told anything yet.

        Args:
            trackers: Whom to tell.
            tell: Called, from any thread, with each line that a person should see.
        """
        self._trackers, self._tell = trackers, tell
        self._record: Tracker | None = None
        self._followers: list[_Follower] = []
        self._waiting: dict[str, float] | None = None
        self._void_pairs = 0
        self._next_at = 0.0

    def __enter__(self) -> "Watch":
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Hand on what waits, and give the trackers a moment to finish."""
        try:
            if self._record is not None:
                self._record.close()
        finally:
            if self._waiting is not None:
                self._hand_on(self._waiting)
            self._see_off()

    def start(self, run: TrackedRun, record: Tracker | None) -> None:
        """Tell everybody what run it is.

        Args:
            run: The run.
            record: What keeps the run's own record, or None.
        """
        if record is not None:
            record.start(run)
            self._record = record
        self._followers = [_Follower(tracker, run, self._tell) for tracker in self._trackers]

    def log(self, info: StepInfo) -> None:
        """Tell what a step did."""
        row = info.row()
        if self._record is not None:
            self._record.log(row)
        if not self._followers:
            return
        self._void_pairs += info.void_pairs
        row["void_pairs"] = self._void_pairs
        if info.held_out is None and time.monotonic() < self._next_at:
            self._waiting = row
        else:
            self._hand_on(row)

    def sample(self, step: int, text: str) -> None:
        """Tell what the model wrote after a step."""
        if self._record is not None:
            self._record.sample(step, text)
        for follower in self._followers:
            follower.put(lambda tracker: tracker.sample(step, text))

    def _hand_on(self, row: dict[str, float]) -> None:
        self._waiting, self._void_pairs = None, 0
        self._next_at = time.monotonic() + SECONDS_A_ROW
        for follower in self._followers:
            follower.put(lambda tracker: tracker.log(row))

    def _see_off(self) -> None:
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
        dropped: Whether the tracker hears no more of the run.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun, tell: Callable[[str], None]) -> None:
        # A daemon: a tracker that hangs cannot keep the program from ending.
        super().__init__(name=type(tracker).__name__, daemon=True)
        self.dropped = False
        self._tracker, self._run, self._tell = tracker, run, tell
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(MOST_WAITING)
        self.start()

    def put(self, call: Callable[[Tracker], None] | None) -> None:
        """Have the tracker called when it is free; None: closed."""
        if self.dropped:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._drop("it does not keep up")

    def run(self) -> None:
        """Call the tracker until it is to be closed, or is dropped."""
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
