"""Trackers: their calls; that none of them can stop or slow a run; and that what they write can be read back."""

import json
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import esjax
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, to_plain
from esjax.errors import EsjaxError
from esjax.runs.checkpoint import digest
from esjax.runs.step_info import StepInfo
from esjax.training.run import Trainer
from esjax.watch import tracking
from esjax.watch.trackers import TensorBoard, find_trackers
from esjax.watch.tracking import TrackedRun, Tracker, Watch

pytestmark = pytest.mark.usefixtures("lenient_promotion")

INFO = StepInfo(1, 0.0, 2.0, 8, 0, True, 1.0, 0.1, 32, 100.0)


class Notes(Tracker):
    """A custom tracker: it remembers its calls, and raises in the method named `fails_at`."""

    def __init__(self, fails_at: str = "") -> None:
        self.heard: list[tuple[str, Any]] = []
        self._fails_at = fails_at

    def _hear(self, name: str, what: Any) -> None:
        self.heard.append((name, what))
        if name == self._fails_at:
            raise RuntimeError("the paper\nis full")

    def start(self, run: TrackedRun) -> None:
        self._hear("start", run)

    def log(self, row: Mapping[str, float]) -> None:
        self._hear("log", dict(row))

    def sample(self, step: int, text: str) -> None:
        self._hear("sample", (step, text))

    def close(self) -> None:
        self._hear("close", None)

    def calls_of(self, name: str) -> list[Any]:
        return [what for heard, what in self.heard if heard == name]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Four steps, each with an evaluation, so that no row is left out, and from the second on with a sample."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    return Config(
        steps=4,
        checkpoint_time=1e-9,
        evaluate_time=1e-9,
        data=DataConfig(text=str(text), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )


def state_digest(trainer: Trainer) -> str:
    return digest(trainer._replica.state)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- their calls ---


def test_a_tracker_follows_a_run_and_its_continuation(config: Config, tmp_path: Path) -> None:
    """Reference: what the run folder holds."""
    folder, notes = tmp_path / "run", Notes()
    run = esjax.train(config, folder, trackers=[notes])
    list(run)
    (start,) = notes.calls_of("start")
    name = json.loads((folder / "run.json").read_text())["name"]
    assert start == TrackedRun(name, "run", folder, to_plain(config), run.baselines, 0)
    assert start.settings["es"]["population_size"] == 32
    assert list(start.baselines) == ["unigram", "bigram", "trigram"]
    assert [heard for heard, _ in notes.heard] == ["start", "log", *["log", "sample"] * 3, "close"]
    assert notes.calls_of("log") == rows(folder)
    samples = "".join(f"--- step {step}\n{text}\n\n" for step, text in notes.calls_of("sample"))
    assert samples == (folder / "samples.txt").read_text()

    notes = Notes()
    list(esjax.resume(folder, steps=6, trackers=[notes]))
    assert notes.calls_of("start") == [start._replace(step=4)]
    assert notes.calls_of("log") == rows(folder)[4:]


def test_a_run_without_a_folder_keeps_its_name_when_it_goes_on(config: Config) -> None:
    notes = Notes()
    run = esjax.train(config, trackers=[notes])
    list(run)
    run.limits = run.limits._replace(steps=6)
    list(run)
    first, second = notes.calls_of("start")
    assert first.folder is None
    assert second == first._replace(step=4)
    assert [row["step"] for row in notes.calls_of("log")] == [1, 2, 3, 4, 5, 6]


def test_rows_are_thinned_but_no_void_pair_and_no_held_out_loss_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SECONDS_A_ROW", 1e9)
    notes, record = Notes(), Notes()
    with Watch([notes], print) as watch:
        watch.start(TrackedRun("a", "a", None, {}, {}, 0), record)
        for step, void, held_out in [(1, 0, None), (2, 3, None), (3, 1, 2.5), (4, 0, None), (5, 2, None)]:
            watch.log(INFO._replace(step=step, void_pairs=void, held_out=held_out))
        watch.log(INFO._replace(step=6, greedy_reward=0.5))
        watch.log(INFO._replace(step=7))
    # The first row, those with an evaluation, and the last one; void pairs as counted by hand.
    rows = [(row["step"], row["void_pairs"]) for row in notes.calls_of("log")]
    assert rows == [(1, 0), (3, 4), (6, 2), (7, 0)]
    assert [(row["step"], row["void_pairs"]) for row in record.calls_of("log")] == [
        (1, 0),
        (2, 3),
        (3, 1),
        (4, 0),
        (5, 2),
        (6, 0),
        (7, 0),
    ]


# --- that they do no harm ---


@pytest.mark.parametrize(
    ("fails_at", "heard"),
    [
        ("start", ["start", "close"]),
        ("log", ["start", "log", "close"]),
        ("sample", ["start", "log", "sample", "close"]),
        ("close", ["start", *["log", "sample"] * 4, "close"]),
    ],
)
def test_a_tracker_that_fails_is_dropped_and_the_run_goes_on(config: Config, fails_at: str, heard: list[str]) -> None:
    broken, well, lines = Notes(fails_at), Notes(), list[str]()
    run = esjax.train(config, trackers=[broken, well], tell=lines.append)
    # Without a folder there are no checkpoints, so no samples: passed on by hand.
    with Watch(run.trackers, lines.append) as watch:
        watch.start(run._tracked(0), None)
        for _ in range(4):
            watch.log(INFO._replace(held_out=2.0))
            watch.sample(1, "text")
    assert lines == ["tracker Notes is left out from here on: the paper is full"]
    assert [name for name, _ in broken.heard] == heard
    assert [name for name, _ in well.heard] == ["start", *["log", "sample"] * 4, "close"]


def test_trackers_change_nothing_of_a_run(config: Config, tmp_path: Path) -> None:
    digests = []
    for trackers in ([], [Notes("start"), Notes("log"), TensorBoard(), esjax.MetricsServer(0)]):
        run = esjax.train(config, tmp_path / str(len(trackers)), trackers=trackers, tell=lambda line: None)
        assert len(list(run)) == 4
        digests.append(state_digest(run))
    assert digests[0] == digests[1]


class Stuck(Tracker):
    """A tracker that does not come back from its first row before it is set free."""

    def __init__(self) -> None:
        self.free, self.closed = threading.Event(), threading.Event()

    def log(self, row: Mapping[str, float]) -> None:
        self.free.wait(60)

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize(
    ("waiting", "line"),
    [
        (256, "tracker Stuck is not done yet; its last rows may be missing"),
        (2, "tracker Stuck is left out from here on: it does not keep up"),
    ],
)
def test_a_tracker_that_hangs_delays_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch, waiting: int, line: str
) -> None:
    monkeypatch.setattr(tracking, "MOST_WAITING", waiting)
    monkeypatch.setattr(tracking, "CLOSING_SECONDS", 0.0)
    stuck, lines = Stuck(), list[str]()
    assert len(list(esjax.train(config, trackers=[stuck], tell=lines.append))) == 4
    assert lines == [line]
    stuck.free.set()
    assert stuck.closed.wait(60)  # set free, it is closed all the same


def test_a_tracker_may_be_any_object_with_the_four_methods(config: Config) -> None:
    class Plain:
        steps = 0

        def start(self, run: TrackedRun) -> None: ...

        def log(self, row: Mapping[str, float]) -> None:
            self.steps += 1

        def sample(self, step: int, text: str) -> None: ...

        def close(self) -> None: ...

    plain = Plain()
    list(esjax.train(config, trackers=[plain]))
    assert plain.steps == 4


def test_names_are_found_and_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    custom = Notes()
    board, other = find_trackers(["tensorboard", custom, "tensorboard"])
    assert isinstance(board, TensorBoard)
    assert other is custom
    with pytest.raises(EsjaxError, match="no tracker 'tensorbored'; there are tensorboard, wandb, trackio"):
        find_trackers(["tensorbored"])
    with pytest.raises(EsjaxError, match="is no tracker"):
        find_trackers([Notes])  # type: ignore[list-item]
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")):
        monkeypatch.setitem(__import__("sys").modules, package, None)  # as if it were not installed
        words = rf"tracker {name} needs a library that is missing .*{package}'\): pip install 'esjax\[{name}\]'"
        with pytest.raises(EsjaxError, match=words):
            find_trackers([name])


# --- what they write ---


def records(file: Path) -> Iterator[bytes]:
    """Read the records of an event file: length, its checksum, data, their checksum."""
    data = file.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + size]
        data = data[16 + size :]


def read_events(folder: Path) -> list[Any]:
    from tensorboardX.proto.event_pb2 import Event

    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return [Event.FromString(record) for file in files for record in records(file)]


def scalars(events: list[Any]) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def texts(events: list[Any]) -> dict[tuple[str, int], str]:
    return {
        (value.tag, event.step): value.tensor.string_val[0].decode()
        for event in events
        for value in event.summary.value
        if not value.HasField("simple_value")
    }


def test_tensorboard_holds_what_the_folder_holds(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = esjax.train(config, folder, trackers=["tensorboard"])
    list(run)
    events = read_events(folder / "tensorboard")
    found = scalars(events)
    expected = {
        (name, int(row["step"])): value for row in rows(folder) for name, value in row.items() if name != "step"
    }
    expected |= {(f"baselines/{name}", step): value for name, value in run.baselines.items() for step in range(1, 5)}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == np.float32(value), key  # event files hold float32
    written = texts(events)
    assert "population_size: 32" in written["settings/text_summary", 0]
    for step in range(2, 5):
        text = "\n".join(line[4:] for line in written["sample/text_summary", step].split("\n"))
        assert f"--- step {step}\n{text}\n" in (folder / "samples.txt").read_text()

    list(esjax.resume(folder, steps=5, trackers=["tensorboard"]))
    events = read_events(folder / "tensorboard")
    assert ("loss", 5) in scalars(events)
    # What a reader drops: events of steps from there on that came before it. Also for a run that begins again at 1.
    assert [event.step for event in events if event.HasField("session_log")] == [1, 5]


def test_event_files_of_one_second_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    board = TensorBoard()
    for step in (0, 1):
        board.start(TrackedRun("a", "a", tmp_path, {}, {}, step))
        board.log(INFO._replace(step=step + 1).row())
        board.close()
    assert {step for name, step in scalars(read_events(tmp_path / "tensorboard")) if name == "loss"} == {1, 2}


def test_tensorboard_without_a_folder_says_so(config: Config) -> None:
    lines: list[str] = []
    list(esjax.train(config, trackers=["tensorboard"], tell=lines.append))
    (line,) = lines
    assert "TensorBoard is left out" in line
    assert "give out=" in line


def test_wandb_writes_offline_under_one_id(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))  # no user is logged in
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    folder, lines = tmp_path / "run", list[str]()
    list(esjax.train(config, folder, trackers=["wandb"], tell=lines.append))
    list(esjax.resume(folder, steps=5, trackers=["wandb"], tell=lines.append))
    assert lines == []
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    found = [Record.FromString(record) for file in files for record in leveldb_records(file.read_bytes())]
    name = json.loads((folder / "run.json").read_text())["name"]
    assert {record.run.run_id for record in found if record.HasField("run")} == {name}
    logged = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [row["loss"] for row in logged if "loss" in row] == [row["loss"] for row in rows(folder)]
    assert [row["step"] for row in logged if "sample/_type" in row] == [2, 3, 4, 5]


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Read the records of a log of LevelDB's format, after a header of 7 bytes; blocks have 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_trackio_writes_to_its_database_under_one_name(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder, lines = tmp_path / "run", list[str]()
    list(esjax.train(config, folder, trackers=["trackio"], tell=lines.append))
    list(esjax.resume(folder, steps=5, trackers=["trackio"], tell=lines.append))
    assert lines == []
    name = "run-" + json.loads((folder / "run.json").read_text())["name"][:6]
    logged = SQLiteStorage.get_logs("esjax", name)
    assert [(row["step"], row["loss"]) for row in logged if "loss" in row] == [
        (row["step"], row["loss"]) for row in rows(folder)
    ]
    assert [row["step"] for row in logged if "sample" in row] == [2, 3, 4, 5]


def test_a_loss_that_is_not_finite_is_shown(tmp_path: Path) -> None:
    board = TensorBoard()
    with Watch([board], print) as watch:
        watch.start(TrackedRun("a", "a", tmp_path, {}, {}, 0), None)
        watch.log(INFO._replace(loss=float("nan")))
    assert np.isnan(scalars(read_events(tmp_path / "tensorboard"))["loss", 1])
