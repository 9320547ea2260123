"""Runs read from outside: half-written, resumed, renamed, and going on."""

import fcntl
import json
import math
import shutil
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import pytest
from recorded import append, line_of, make

import esjax
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.runs.folder import RunFolder
from esjax.runs.reader import (
    Metrics,
    Sample,
    differing,
    distinct_names,
    find_runs,
    group_by_seed,
    is_running,
    read_run,
    read_runs,
)


def test_a_run_is_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", done=3, es=EsConfig(sigma=0.3))
    folder.keep_baselines({"unigram": 3.0, "bigram": 2.5})
    folder.add_sample(2, "first\n--- not a step")
    folder.add_sample(3, "second\n\npart")
    run = read_run(tmp_path / "run")
    assert (run.name, run.state, run.step, run.notes) == ("run", "stopped", 3, [])
    assert run.settings["es.sigma"] == 0.3
    assert run.settings["model.name"] == "mingru"
    assert run.settings["steps"] is None
    assert run.metrics["loss"].tolist() == [4.0, 3.0, 2.0]
    np.testing.assert_array_equal(run.metrics["held_out"], [math.nan, 2.0, math.nan])
    assert run.last("held_out") == 2.0
    assert run.last("nothing") is None
    assert list(run.baselines.items()) == [("unigram", 3.0), ("bigram", 2.5)]
    assert run.samples == [Sample(2, "first\n--- not a step"), Sample(3, "second\n\npart")]


def test_a_run_without_a_step_is_read(tmp_path: Path) -> None:
    make(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert (run.step, dict(run.metrics), run.baselines, run.samples) == (0, {}, {}, [])


@pytest.mark.parametrize(
    ("custom", "unit"),
    [
        ({}, "nats per token"),
        ({"model": "bigram"}, "nats per token"),
        ({"loss": "wrong"}, "wrong"),
        ({"model": "bigram", "reward": "right"}, "minus right"),
    ],
)
def test_losses_have_a_unit(tmp_path: Path, custom: dict[str, str], unit: str) -> None:
    RunFolder.create(tmp_path / "run", Config(), Vocabulary("byte"), "", custom)
    assert read_run(tmp_path / "run").unit == unit


def test_what_a_run_has_of_its_own_is_a_setting(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", Config(), Vocabulary("byte"), "", {"model": "bigram"})
    assert read_run(tmp_path / "run").settings["custom.model"] == "bigram"


def test_a_line_that_is_being_written_waits(tmp_path: Path) -> None:
    make(tmp_path, done=2)
    line = line_of(3)
    append(tmp_path, line[:9])
    metrics = Metrics(tmp_path)
    metrics.read()
    assert len(metrics) == 2
    append(tmp_path, line[9:])
    assert not metrics.read()
    assert metrics.columns()["loss"].tolist() == [4.0, 3.0, 2.0]
    assert metrics.columns(since=2)["loss"].tolist() == [2.0]
    assert metrics.damaged == 0


@pytest.mark.parametrize("damage", ["{", "\0\0", "[1]", '{"loss": 1.0}', '{"step": "x"}', '{"step": null}', ""])
def test_a_damaged_line_is_left_out_and_said(tmp_path: Path, damage: str) -> None:
    make(tmp_path, done=2)
    append(tmp_path, damage + "\n" + line_of(3))
    run = read_run(tmp_path)
    assert run.metrics["step"].tolist() == [1, 2, 3]
    assert run.notes == ["1 damaged line of metrics.jsonl left out"]


def test_nulls_and_columns_that_come_and_go_are_nan(tmp_path: Path) -> None:
    make(tmp_path)
    append(tmp_path, '{"step": 1, "loss": null}\n{"step": 2, "late": 7}\n{"step": 3, "loss": 1.0, "applied": true}\n')
    columns = read_run(tmp_path).metrics
    np.testing.assert_array_equal(columns["applied"], [math.nan, math.nan, 1.0])
    np.testing.assert_array_equal(columns["loss"], [math.nan, math.nan, 1.0])
    np.testing.assert_array_equal(columns["late"], [math.nan, 7.0, math.nan])


def test_the_metrics_of_a_resumed_run_are_read_again(tmp_path: Path) -> None:
    folder = make(tmp_path, done=4)
    metrics = Metrics(tmp_path)
    assert not metrics.read()
    with folder.open_metrics(2, print) as file:  # it goes on from a checkpoint at step 2
        file.write(line_of(3))
    assert metrics.read()
    assert metrics.columns()["step"].tolist() == [1, 2, 3]
    with folder.open_metrics(2, print) as file:  # and again, farther than it had come
        file.write("".join(line_of(step).replace("seconds", "later") for step in range(3, 9)))
    assert metrics.read()
    assert metrics.columns()["step"].tolist() == [*range(1, 9)]
    assert np.isnan(metrics.columns()["seconds"][2:]).all()
    assert not metrics.read()
    assert len(metrics) == 8


def test_steps_that_are_done_again_supersede_those_that_were_lost(tmp_path: Path) -> None:
    make(tmp_path, done=5)
    metrics = Metrics(tmp_path)
    assert not metrics.read()
    again = line_of(4).replace("1.0", "7.0")
    append(tmp_path, again)
    assert metrics.read()
    append(tmp_path, line_of(5))
    assert not metrics.read()
    for columns in (metrics.columns(), read_run(tmp_path).metrics):
        assert columns["step"].tolist() == [1, 2, 3, 4, 5]
        assert columns["loss"].tolist() == [4.0, 3.0, 2.0, 7.0, 0.0]
    folder = RunFolder(tmp_path)
    for step, text in ((2, "first"), (4, "lost"), (3, "done again"), (5, "new")):
        folder.add_sample(step, text)
    assert [sample.text for sample in read_run(tmp_path).samples] == ["first", "done again", "new"]


def test_the_training_time_after_a_step(tmp_path: Path) -> None:
    """Half a second a step; the lines of step 2 and 3 are missing."""
    make(tmp_path, done=1)
    append(tmp_path, line_of(4))
    run = read_run(tmp_path)
    assert [run.seconds_at(step) for step in range(6)] == [0.0, 0.5, 0.5, 0.5, 2.0, 2.0]
    append(tmp_path, '{"step": 5}\n')
    assert read_run(tmp_path).seconds_at(5) == 2.0
    make(tmp_path / "none")
    assert read_run(tmp_path / "none").seconds_at(3) == 0.0


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    folder = make(tmp_path, done=1)
    assert not is_running(tmp_path)
    folder.lock()
    assert read_run(tmp_path).state == "running"
    folder.unlock()
    assert read_run(tmp_path).state == "stopped"


def test_whoever_looks_keeps_nobody_from_training(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.lock()
    folder.unlock()
    with (tmp_path / ".lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        Timer(0.02, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        folder.lock()  # asked for while another looks
    folder.unlock()


@pytest.mark.parametrize(
    ("settings", "state"),
    [({"steps": 4}, "finished"), ({"steps": 5}, "stopped"), ({"seconds": 2.0}, "finished"), ({}, "stopped")],
)
def test_a_run_is_finished_at_its_limits(tmp_path: Path, settings: dict[str, Any], state: str) -> None:
    make(tmp_path, done=4, **settings)
    assert read_run(tmp_path).state == state


@pytest.mark.parametrize(
    ("settings", "last", "state"),
    [
        # Steps are counted; only seconds are of another clock than the one that ends a run.
        ({"steps": 1000}, '{"step": 995, "seconds": 1.0}', "stopped"),
        ({"steps": 1000}, '{"step": 1000, "seconds": 1.0}', "finished"),
        ({"seconds": 1000.0}, '{"step": 7, "seconds": 995.0}', "finished"),
        ({"seconds": 1000.0}, '{"step": 7, "seconds": 985.0}', "stopped"),
        ({"seconds": 1000.0}, '{"step": 7}', "stopped"),
    ],
)
def test_a_limit_is_nearly_reached_by_seconds_alone(
    tmp_path: Path, settings: dict[str, Any], last: str, state: str
) -> None:
    make(tmp_path, **settings)
    append(tmp_path, last + "\n")
    assert read_run(tmp_path).state == state


@pytest.mark.parametrize("name", ["config.yaml", "baselines.json", "run.json"])
def test_a_damaged_part_is_a_note(tmp_path: Path, name: str) -> None:
    make(tmp_path, done=2).keep_baselines({"unigram": 3.0})
    (tmp_path / name).write_text("[1, {")
    run = read_run(tmp_path)
    assert run.notes == [f"{name} is damaged"]
    assert run.step == 2


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "none", "there is no run"),
        (tmp_path, "not a run folder"),
        (tmp_path / ("x" * 300), "cannot read"),
    ]:
        with pytest.raises(EsjaxError, match=reason) as caught:
            read_run(path)
        assert str(path) in str(caught.value)
    with pytest.raises(EsjaxError, match="there is no folder"):
        find_runs(tmp_path / "none")


def test_runs_are_found_at_and_below_a_folder(tmp_path: Path) -> None:
    for name in ["b", "a/deep/run", ".hidden/run", "b/inside"]:
        make(tmp_path / name)
    (tmp_path / "other").mkdir()
    assert find_runs(tmp_path) == [tmp_path / "a" / "deep" / "run", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    assert find_runs(tmp_path / "other") == []


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/run", "y/run", "z")]
    for path in paths:
        make(path)
    assert [run.name for run in read_runs([*paths, paths[0]])] == ["x/run", "y/run", "z"]
    assert distinct_names([Path("/a/b/run"), Path("/b/run"), Path("/b")]) == ["a/b/run", "b/run", "b"]


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    make(tmp_path / "a", es=EsConfig(sigma=0.1))
    make(tmp_path / "b", es=EsConfig(sigma=0.2))
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    RunFolder.create(tmp_path / "d", Config(es=EsConfig(sigma=0.1)), Vocabulary("byte"), "", {"loss": "mine"})
    a, b, c, d = read_runs([tmp_path / name for name in "abcd"])
    assert differing([a, b]) == ["es.sigma"]
    assert differing([a, c]) == []
    assert differing([a, d]) == ["custom.loss"]


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    make(tmp_path / "a", seed=1)
    make(tmp_path / "b", seed=1, es=EsConfig(sigma=0.1))
    make(tmp_path / "c", seed=2)
    make(tmp_path / "d", seed=3, custom={"loss": "mine"})
    groups = group_by_seed(read_runs(find_runs(tmp_path)))
    assert [[run.name for run in group] for group in groups] == [["a", "c"], ["b"], ["d"]]


def test_the_lowest_number_of_a_column_is_found(tmp_path: Path) -> None:
    make(tmp_path / "a", done=4)
    append(tmp_path / "a", line_of(2).replace('"step": 2', '"step": 5'))
    view = read_run(tmp_path / "a")
    assert (view.last("loss"), view.lowest("loss")) == (3.0, 1.0)
    assert view.lowest("held_out") == 0.0
    assert view.lowest("nothing") is None


def test_baselines_are_recorded_once(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.keep_baselines({})
    assert not (tmp_path / "baselines.json").exists()
    folder.keep_baselines({"unigram": 3.0})
    folder.keep_baselines({"unigram": 9.0})
    assert json.loads((tmp_path / "baselines.json").read_text()) == {"unigram": 3.0}


@pytest.mark.usefixtures("lenient_promotion")
def test_what_a_run_left_is_what_it_said(tmp_path: Path) -> None:
    """Reference: the infos and baselines of the run itself."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    config = Config(
        steps=3,
        data=DataConfig(text=str(tmp_path / "text.txt"), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )
    trainer = esjax.train(config, tmp_path / "run")
    states = []
    infos = []
    for info in trainer:
        infos.append(info)
        states.append(read_run(tmp_path / "run").state)
    run = read_run(tmp_path / "run")
    assert states == ["running"] * 3
    assert run.state == "finished"
    for name in ("step", "loss", "update_norm", "applied", "member_tokens"):
        assert run.metrics[name].tolist() == [getattr(info, name) for info in infos]
    assert run.last("held_out") == infos[-1].held_out
    assert run.baselines == trainer.baselines
    assert run.samples[-1].step == 3
