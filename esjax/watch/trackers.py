"""Trackers: the run folder's metrics and samples, TensorBoard, Weights & Biases, and Trackio.

The packages of the last three are extras, imported when a run starts; none of them needs an account.
"""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import msgspec

from esjax.config.settings import to_plain
from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.runs.durable import writing
from esjax.runs.folder import RunFolder, json_line
from esjax.texts import PROSE, legible
from esjax.watch.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

PROJECT = "esjax"
"""Name of the project in trackers that have projects."""


class JsonLines(Tracker):
    """Writes metrics.jsonl and samples.txt of a run folder: every step, as soon as it is done."""

    def __init__(self, folder: RunFolder, tell: Callable[[str], None]) -> None:
        """Prepare; `tell` is called with each line for the user."""
        self._folder, self._tell = folder, tell
        self._metrics: IO[str] | None = None

    def start(self, run: TrackedRun) -> None:
        """Open the metrics and drop the lines of steps that will be done again."""
        with self._writing_metrics():
            self._metrics = self._folder.open_metrics(run.step, self._tell)

    def log(self, row: Mapping[str, float]) -> None:
        """Write a line."""
        assert self._metrics is not None
        with self._writing_metrics():
            self._metrics.write(json_line(row) + "\n")

    def sample(self, step: int, text: str) -> None:
        """Append the text."""
        with writing(self._folder.path / "samples.txt"):
            self._folder.add_sample(step, legible(text, PROSE))

    def close(self) -> None:
        """Close the metrics."""
        if self._metrics is not None:
            with self._writing_metrics():
                self._metrics.close()

    def _writing_metrics(self) -> AbstractContextManager[None]:
        return writing(self._folder.path / "metrics.jsonl")


class TensorBoard(Tracker):
    """Writes event files in the folder `tensorboard` of the run folder."""

    def __init__(self) -> None:
        """Prepare; nothing is written before a run starts."""
        self._writer: SummaryWriter | None = None
        self._baselines: Mapping[str, float] = {}

    def start(self, run: TrackedRun) -> None:
        """Write the settings as text; TensorBoard drops the events of steps that will be done again."""
        from tensorboardX import SummaryWriter

        if run.folder is None:
            raise EsjaxError("TensorBoard files go into the run folder, and the run has none; give out=")
        self._writer = SummaryWriter(
            str(run.folder / "tensorboard"),
            purge_step=run.step + 1,
            flush_secs=10,
            filename_suffix=f".{run.step}",  # otherwise files of the same second have the same name
        )
        self._baselines = run.baselines
        settings = msgspec.yaml.encode(run.settings).decode()
        self._writer.add_text("settings", _indented(settings), run.step)

    def log(self, row: Mapping[str, float]) -> None:
        """Write each number under its name, and the baselines with each held-out loss."""
        assert self._writer is not None
        numbers = dict(row)
        step = int(numbers.pop("step"))
        if "held_out" in numbers:
            numbers |= {f"baselines/{name}": value for name, value in self._baselines.items()}
        for name, value in numbers.items():
            self._writer.add_scalar(name, float(value), step)

    def sample(self, step: int, text: str) -> None:
        """Write the text."""
        assert self._writer is not None
        self._writer.add_text("sample", _indented(text), step)

    def close(self) -> None:
        """Write what is buffered, and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Tracker):
    """Weights & Biases: offline, in the run folder, unless the user has logged in or set WANDB_MODE."""

    def __init__(self) -> None:
        """Prepare; nothing is written before a run starts."""
        self._run: Any = None

    def start(self, run: TrackedRun) -> None:
        """Begin a run with the run's id, or continue it."""
        import wandb

        # None: the mode in WANDB_MODE, or online.
        mode = None if "WANDB_MODE" in os.environ or wandb.login(prompt=False) else "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=run.id,
            name=run.title,
            dir=None if "WANDB_DIR" in os.environ else run.folder,
            config={**run.settings, "baselines": dict(run.baselines)},
            mode=mode,
            resume="allow",
            reinit="create_new",  # several runs of one process are separate
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps of wandb only increase; those of a run decrease if it was killed and resumed from its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, float]) -> None:
        """Log the numbers."""
        self._run.log(dict(row))

    def sample(self, step: int, text: str) -> None:
        """Log the text."""
        import wandb

        self._run.log({"step": step, "sample": wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self) -> None:
        """Send or write what is buffered, and finish."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackio(Tracker):
    """Trackio: a local database, shown by `trackio show`."""

    def __init__(self) -> None:
        """Prepare; nothing is written before a run starts."""
        self._run: Any = None

    def start(self, run: TrackedRun) -> None:
        """Begin a run with the run's name, or continue it."""
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{run.title}-{run.id[:6]}",
            config={**run.settings, "baselines": dict(run.baselines)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, row: Mapping[str, float]) -> None:
        """Log the numbers."""
        numbers = dict(row)
        self._run.log(numbers, step=int(numbers.pop("step")))

    def sample(self, step: int, text: str) -> None:
        """Log the text."""
        import trackio

        self._run.log({"sample": trackio.Markdown(_indented(text))}, step=step)

    def close(self) -> None:
        """Send or write what is buffered, and finish."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def _indented(text: str) -> str:
    """Make a text a block of code in Markdown, so that it is shown unchanged."""
    return "".join(f"    {line}\n" for line in legible(text, PROSE).split("\n"))


def tracked_run(folder: RunFolder, baselines: Mapping[str, float], step: int) -> TrackedRun:
    """Describe a run that has a folder, see `TrackedRun`."""
    return TrackedRun(folder.name, folder.path.resolve().name, folder.path, to_plain(folder.config), baselines, step)


_NAMED: dict[str, tuple[str, Callable[[], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
    "trackio": ("trackio", Trackio),
}


def find_trackers(trackers: Sequence[Tracker | str]) -> list[Tracker]:
    """Make a tracker for each name; trackers are returned as they are.

    Args:
        trackers: Trackers, or "tensorboard", "wandb", "trackio"; duplicates are left out.

    Raises:
        EsjaxError: A name is unknown, its package is not installed, or an object is not a tracker.
    """
    found: dict[object, Tracker] = {}
    for tracker in trackers:
        if isinstance(tracker, str):
            found[tracker] = _make(tracker)
        elif isinstance(tracker, Tracker) and not isinstance(tracker, type):
            found[id(tracker)] = tracker
        else:
            raise EsjaxError(f"{tracker!r} is no tracker; make an object of a class that inherits from esjax.Tracker")
    return list(found.values())


def _make(name: str) -> Tracker:
    if name not in _NAMED:
        raise EsjaxError(f"there is no tracker {name!r}; there are {', '.join(_NAMED)}")
    package, make = _NAMED[name]
    with needing(f"tracker {name}", name):
        if find_spec(package) is None:  # it may take seconds to import
            raise ModuleNotFoundError(f"No module named {package!r}")
    return make()
