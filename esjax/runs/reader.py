"""Reads run folders, also while another process trains there, without locking it out.

    for view in read_runs(find_runs("runs")):
        print(view.name, view.state, view.last("held_out"))

A view is what was on disk at one moment. `Metrics` follows a running run: each call reads only the new lines.
"""

import fcntl
import json
import os
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy import ndarray

from esjax.config.custom_names import SHOWN
from esjax.config.yaml_text import read_yaml
from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.runs.durable import try_lock
from esjax.runs.step_info import Limits
from esjax.texts import legible

State = Literal["running", "finished", "stopped"]
"""running: a process holds the lock. finished: the run reached the limits of its settings. stopped: neither."""

DEPTH = 4
"""Levels of folders that are searched for runs."""

SAMPLE_BYTES = 2**16
"""Bytes at the end of samples.txt that are read."""

NEARLY = 0.99
"""Part of the limit in seconds that counts as reached: the last line of the metrics is a little older than the stop."""

_SAMPLE = re.compile(r"^--- step (\d+)\n", re.MULTILINE)


class Sample(NamedTuple):
    """A text that the model wrote.

    Attributes:
        step: Steps done when it was written.
        text: What it wrote.
    """

    step: int
    text: str


@dataclass(frozen=True)
class RunView:
    """What a run folder held when it was read.

    Attributes:
        path: The folder.
        name: Name of the folder, with parent folders where runs that are read together share it.
        state: "running", "finished" or "stopped", see `State`.
        settings: Settings by dotted name, such as `es.sigma`. Names of custom parts are `custom.model`, `custom.loss`
            and so on; `code.model` and so on are the first digits of the hash of the file, for code in a file.
        metrics: An array of float64 [steps] for each name of `StepInfo`, NaN where a step has no such number, 1 and 0
            for true and false. Empty before the first step.
        baselines: Nats per token over the held-out documents, by n-gram model, worst first; empty if not recorded.
        samples: Newest texts that the model wrote, oldest first.
        notes: A line for each part of the folder that could not be read.
    """

    path: Path
    name: str
    state: State
    settings: Mapping[str, Any]
    metrics: Mapping[str, ndarray]
    baselines: Mapping[str, float]
    samples: Sequence[Sample]
    notes: Sequence[str]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.last("step") or 0)

    @property
    def unit(self) -> str:
        """Unit of the losses: "nats per token", the name of the custom loss, or "minus" and the name of the reward."""
        signs = {"custom.loss": "", "custom.reward": "minus "}
        custom = [f"{sign}{self.settings[key]}" for key, sign in signs.items() if key in self.settings]
        return custom[0] if custom else "nats per token"

    def last(self, column: str) -> float | None:
        """Return the newest number of a column that is not NaN; None if there is none."""
        values = self.metrics.get(column)
        if values is None:
            return None
        there = values[~np.isnan(values)]
        return float(there[-1]) if len(there) else None

    def seconds_at(self, step: int) -> float:
        """Return the training time in seconds after `step` steps; 0.0 if it is not recorded."""
        steps = self.metrics.get("step", np.zeros(0))
        seconds = self.metrics.get("seconds", np.zeros(len(steps)))
        return float(np.fmax.reduce(seconds[steps <= step], initial=0.0))

    def lowest(self, column: str) -> float | None:
        """Return the smallest number of a column; None if there is none."""
        values = self.metrics.get(column)
        if values is None or np.isnan(values).all():
            return None
        return float(np.nanmin(values))


class Metrics:
    """The metrics of a run, read piece by piece as they are written.

    Attributes:
        damaged: Number of lines that could not be read and are left out.
    """

    def __init__(self, run: Path) -> None:
        """Prepare; nothing is read yet.

        Args:
            run: Run folder.
        """
        self.damaged = 0
        self._path = run / "metrics.jsonl"
        self._columns: dict[str, array[float]] = {}
        self._rows = 0
        self._line = b""  # the last line read, which ends at the offset
        self._offset = 0

    def __len__(self) -> int:
        """Count the steps read."""
        return self._rows

    def read(self) -> bool:
        """Read the complete lines that were added since the last call.

        A line replaces earlier lines of the same and of later steps: a resumed run does lost steps again.

        Returns:
            Whether steps that were read before have changed or are gone.

        Raises:
            EsjaxError: The file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._line))
                data = file.read()
                anew = not data.startswith(self._line)
                if anew:  # a resumed run replaces the file, without the steps that it does again
                    file.seek(0)
                    data = file.read()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise EsjaxError(f"cannot read {self._path}: {error.strerror}") from error
        if anew:
            self._columns, self._rows, self._offset, self.damaged = {}, 0, 0, 0
        else:
            data = data[len(self._line) :]
        whole = data.rfind(b"\n") + 1  # the rest is still being written
        lines = data[:whole].splitlines(keepends=True)
        self._offset += whole
        self._line = lines[-1] if lines else b"" if anew else self._line
        superseding = [self._add(line) for line in lines]
        return anew or any(superseding)

    def columns(self, since: int = 0) -> dict[str, ndarray]:
        """Return the numbers read so far, by name.

        Args:
            since: Number of steps to leave out at the start.

        Returns:
            An array of float64 [steps] for each name, NaN where a step has no such number.
        """
        return {name: np.array(values[since:], np.float64) for name, values in self._columns.items()}

    def _add(self, line: bytes) -> bool:
        """Add a step; return whether it replaces earlier lines."""
        try:
            row = msgspec.json.decode(line, type=dict[str, float | bool | None])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            row = {}
        step = row.get("step")
        if step is None:
            self.damaged += 1
            return False
        rows = self._rows
        while self._rows and self._columns["step"][-1] >= step:
            for values in self._columns.values():
                values.pop()
            self._rows -= 1
        superseding = self._rows < rows
        for name in row.keys() - self._columns.keys():
            self._columns[name] = array("d", [np.nan]) * self._rows
        for name, values in self._columns.items():
            value = row.get(name)
            values.append(np.nan if value is None else value)
        self._rows += 1
        return superseding


def find_runs(path: str | Path) -> list[Path]:
    """Find the run folders at or below a folder, at most four levels deep.

    Args:
        path: A run folder, or a folder of run folders.

    Returns:
        Their paths, sorted; empty if there are none.

    Raises:
        EsjaxError: The folder does not exist or cannot be read.
    """
    path = given_path(path)
    try:
        os.listdir(path)
    except FileNotFoundError as error:
        raise EsjaxError(f"there is no folder {str(path)!r}") from error
    except OSError as error:
        raise EsjaxError(f"cannot read the folder {str(path)!r}: {error.strerror}") from error
    found = []
    for here, folders, files in os.walk(path):
        if "run.json" in files:
            found.append(Path(here))
        if "run.json" in files or len(Path(here).relative_to(path).parts) >= DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found)


def read_run(path: str | Path, metrics: Metrics | None = None, name: str = "") -> RunView:
    """Read a run.

    Args:
        path: Run folder.
        metrics: Metrics of the run that were read already. None: read them now.
        name: Name of the view. "": the name of the folder.

    Raises:
        EsjaxError: The path is not a run folder, or it cannot be read. A damaged file gives a note, not an error.
    """
    path = given_path(path)
    try:
        (path / "run.json").stat()
    except FileNotFoundError as error:
        is_folder = path.is_dir()
        raise EsjaxError(
            f"{str(path)!r} is not a run folder: it has no run.json" if is_folder else f"there is no run {str(path)!r}"
        ) from error
    except OSError as error:
        raise EsjaxError(f"cannot read the run {str(path)!r}: {error.strerror}") from error
    if metrics is None:
        metrics = Metrics(path)
        metrics.read()
    notes: list[str] = []
    columns = metrics.columns()
    if metrics.damaged:
        what = "line" if metrics.damaged == 1 else "lines"
        notes.append(f"{metrics.damaged:,} damaged {what} of metrics.jsonl left out")
    run = _mapping(_read(path / "run.json", notes), "run.json", notes)
    hashes = {kind: one["digest"][:SHOWN] for kind, one in run.get("code", {}).items()}
    text = _read(path / "config.yaml", notes)
    settings = flatten(_mapping(text, "config.yaml", notes)) | flatten(
        {section: values for section, values in (("custom", run.get("own")), ("code", hashes)) if values}
    )
    text = _read(path / "baselines.json", notes) if (path / "baselines.json").exists() else "{}"
    baselines = _mapping(text, "baselines.json", notes)
    return RunView(
        path=path,
        name=name or legible(path.resolve().name),
        state=_state(path, settings, columns),
        settings=settings,
        metrics=columns,
        baselines={name: float(value) for name, value in baselines.items() if isinstance(value, int | float)},
        samples=_read_samples(path / "samples.txt", notes),
        notes=notes,
    )


def read_runs(paths: Iterable[str | Path]) -> list[RunView]:
    """Read several runs and give them distinct names.

    Args:
        paths: Run folders; duplicates are left out.

    Raises:
        EsjaxError: A path is not a run folder, or it cannot be read.
    """
    chosen = list({path.resolve(): path for path in map(given_path, paths)}.values())
    names = distinct_names(chosen)
    return [read_run(path, name=name) for path, name in zip(chosen, names, strict=True)]


def is_running(path: Path) -> bool:
    """Return whether a process holds the lock of a run folder.

    This takes a shared lock for a moment, so readers do not disturb each other; `RunFolder.lock` tries several times.
    """
    try:
        with (path / ".lock").open() as lock:
            return not try_lock(lock, fcntl.LOCK_SH)
    except (FileNotFoundError, PermissionError):  # the run was never locked, or this user may not open the lock
        return False
    except EsjaxError:  # no run can start on a file system without locks
        return False


def has_reached(limits: Limits, step: float, seconds: float) -> bool:
    """Return whether a run has reached its limits, by the last line of its metrics.

    Args:
        limits: Limits of the whole run.
        step: Steps done; this limit is compared exactly.
        seconds: Training time; 99% of this limit is enough.
    """
    return step > 0 and limits.reached(step, seconds / NEARLY)


def differing(runs: Sequence[RunView]) -> list[str]:
    """Return the names of the settings in which runs differ, sorted. A setting that a run lacks counts as different."""
    names = sorted({name for run in runs for name in run.settings})
    return [name for name in names if len({_key(run.settings, name) for run in runs}) > 1]


def group_by_seed(runs: Sequence[RunView]) -> list[list[RunView]]:
    """Group the runs whose settings differ only in `seed`; the order of groups and runs is kept."""
    groups: dict[str, list[RunView]] = {}
    for run in runs:
        others = {name: value for name, value in run.settings.items() if name != "seed"}
        groups.setdefault(json.dumps(others, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name runs by the shortest distinct ends of their paths: `x`, or `a/x` and `b/x`."""
    parts = [path.resolve().parts for path in paths]
    ends = []
    for mine in parts:
        length = 1
        while length < len(mine) and sum(other[-length:] == mine[-length:] for other in set(parts)) > 1:
            length += 1
        ends.append(legible("/".join(mine[-length:]).lstrip("/")))
    return ends


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names: {"es": {"sigma": 0.1}} to {"es.sigma": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


def _state(path: Path, settings: Mapping[str, Any], columns: Mapping[str, ndarray]) -> State:
    if is_running(path):
        return "running"
    found = [settings.get(name) for name in Limits._fields]
    limits: list[Any] = [limit if isinstance(limit, int | float) else None for limit in found]
    last = {name: float(columns[name][-1]) for name in ("step", "seconds") if name in columns and len(columns[name])}
    if has_reached(Limits(*limits), last.get("step", 0), last.get("seconds", 0.0)):
        return "finished"
    return "stopped"


def _read(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"cannot read {path.name}: {error.strerror}")
        return ""


def _mapping(text: str, name: str, notes: list[str]) -> dict[str, Any]:
    """Parse JSON or YAML; JSON is valid YAML."""
    try:
        value = read_yaml(text) if text else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{name} is damaged")
        return {}
    return value


def _read_samples(path: Path, notes: list[str]) -> list[Sample]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"cannot read {path.name}: {error.strerror}")
        return []
    _, *found = _SAMPLE.split(text)
    samples: list[Sample] = []
    for step, text in zip(found[::2], found[1::2], strict=True):
        # A resumed run did lost steps again: samples of those steps are outdated.
        samples = [sample for sample in samples if sample.step < int(step)]
        samples.append(Sample(int(step), text.strip("\n")))
    return samples


def _key(settings: Mapping[str, Any], name: str) -> str | None:
    return json.dumps(settings[name], sort_keys=True, default=str) if name in settings else None
