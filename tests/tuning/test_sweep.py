"""Sweeps: each run is what it would be alone, whatever comes between, and no run stops the others."""

import csv
import io
import itertools
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from processes import Fleet

import esjax
from esjax.cli.sweep import _table, conclusion
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.errors import EsjaxError
from esjax.hosts import join
from esjax.hosts.serve import Server
from esjax.inference.loaded_run import load
from esjax.runs.checkpoint import digest
from esjax.runs.folder import RunFolder
from esjax.training.run import Trainer, resume, train, train_with
from esjax.tuning.seed_means import seed_means
from esjax.tuning.sweep import Hosts, Outcome, Sweep, resume_sweep, sweep
from esjax.tuning.sweep_plot import choose_axis, draw, make_figure
from esjax.tuning.sweep_record import Record, keep_record

pytestmark = pytest.mark.usefixtures("lenient_promotion")

AXES: Mapping[str, Sequence[Any]] = {"es.sigma": [0.1, 0.3], "seed": [0, 1]}
NAMES = [f"es.sigma={sigma},seed={seed}" for sigma in (0.1, 0.3) for seed in (0, 1)]

Show = Callable[[Trainer | Server], None]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    return Config(
        steps=3,
        data=DataConfig(text=str(tmp_path / "text.txt"), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "sweeps" / "first"


def go(run: Trainer | Server) -> None:
    for _ in run:
        pass


def stop_at(folder: str, step: int) -> Show:
    """Train, and have Ctrl-C come at a step of one run."""

    def show(run: Trainer | Server) -> None:
        for info in run:
            if run.folder and run.folder.path.name == folder and info.step == step:
                signal.raise_signal(signal.SIGINT)

    return show


def states(grid: Sweep) -> dict[str, str]:
    return {one.name: one.state for one in grid.outcomes()}


def state_digest(folder: Path) -> str:
    return digest(resume(folder, steps=100)._replica.state)


def kept(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def quiet(line: str) -> None:
    pass


# --- what it trains ---


def test_each_run_is_what_it_would_be_alone(config: Config, out: Path, tmp_path: Path) -> None:
    grid = sweep(AXES, config, out=out, tell=quiet)
    assert states(grid) == dict.fromkeys(NAMES, "waiting")
    outcomes = list(grid)
    assert [one.name for one in outcomes] == NAMES
    with (out / "sweep.csv").open(newline="") as file:
        losses = [float(row["held_out"]) for row in csv.DictReader(file)]
    assert losses == sorted(one.held_out for one in outcomes if one.held_out is not None)  # the best first
    assert not grid.stopped
    for sigma, seed in ((0.1, 1), (0.3, 0)):
        alone = replace(config, seed=seed, es=replace(config.es, sigma=sigma))
        go(train(alone, tmp_path / f"alone-{sigma}", tell=quiet))
        folder = out / f"es.sigma={sigma},seed={seed}"
        assert state_digest(folder) == state_digest(tmp_path / f"alone-{sigma}")
        one = next(one for one in outcomes if one.name == folder.name)
        assert one.values == {"es.sigma": sigma, "seed": seed}
        assert one.held_out == pytest.approx(load(folder).evaluate().nats_per_token)
        assert (one.state, one.step, one.note) == ("finished", 3, "")
        assert one.member_tokens == 3 * 32 * 6


def test_ctrl_c_stops_the_sweep_and_it_goes_on_to_the_same_weights(config: Config, out: Path, tmp_path: Path) -> None:
    said: list[str] = []
    axes = {"seed": [5, 6, 7]}
    grid = sweep(axes, config, out=out, show=stop_at("seed=6", 1), tell=said.append)
    assert [one.state for one in grid] == ["finished", "stopped"]
    assert grid.stopped
    assert states(grid) == {"seed=5": "finished", "seed=6": "stopped", "seed=7": "waiting"}
    assert "1 finished, 1 stopped, 1 waiting" in repr(grid)
    with (out / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["name"], row["seed"], row["state"]) for row in table] == [
        ("seed=5", "5", "finished"),
        ("seed=6", "6", "stopped"),
        ("seed=7", "7", "waiting"),
    ]
    before = kept(out / "seed=5")
    again = sweep(axes, config, out=out, tell=said.append)
    assert [one.name for one in again] == ["seed=6", "seed=7"]
    assert set(states(again).values()) == {"finished"}
    assert kept(out / "seed=5") == before  # a finished run is left alone
    assert "1 of 3 runs are finished already" in said
    go(train(replace(config, seed=6), tmp_path / "alone", tell=quiet))
    assert state_digest(out / "seed=6") == state_digest(tmp_path / "alone")
    assert list(resume_sweep(out, tell=quiet)) == []


def test_a_run_that_is_resumed_has_the_seconds_that_are_left(config: Config, out: Path) -> None:
    config = replace(config, steps=None, seconds=1000.0)
    list(sweep({"seed": [5]}, config, out=out, show=stop_at("seed=5", 3), tell=quiet))
    metrics = out / "seed=5" / "metrics.jsonl"
    metrics.write_text(re.sub(r'("step": 4, "seconds": )[\d.e-]+', r"\g<1>400.0", metrics.read_text()))
    seen: list[Trainer | Server] = []
    list(resume_sweep(out, show=seen.append, tell=quiet))
    (run,) = seen
    assert run.limits == (None, 600.0)


def test_a_run_without_a_checkpoint_begins_anew(config: Config, out: Path) -> None:
    grid = sweep({"seed": [5]}, config, out=out, tell=quiet)
    RunFolder.create(out / "seed=5", replace(config, seed=5), train(config).corpus.vocabulary, "")
    (out / "seed=5" / "metrics.jsonl").write_text('{"step": 3}\n')
    assert states(grid) == {"seed=5": "stopped"}
    assert [one.state for one in grid] == ["finished"]


def test_metrics_beyond_the_newest_checkpoint_do_not_count(config: Config, out: Path) -> None:
    """As when it is killed between its last line and its last checkpoint."""
    grid = sweep({"seed": [5]}, config, out=out, tell=quiet)
    list(grid)
    (checkpoint,) = (out / "seed=5" / "checkpoints").iterdir()
    checkpoint.rename(checkpoint.with_name("2"))
    assert states(grid) == {"seed=5": "stopped"}


def test_a_run_that_no_host_came_to_goes_on(config: Config, out: Path) -> None:
    """Stopped while it waits for hosts, it has a checkpoint and no step."""
    served: list[str] = []

    def stop(server: Server) -> None:
        served.append(server.folder.path.name)
        signal.raise_signal(signal.SIGINT)

    hosts, config = Hosts(announce=stop), replace(config, seconds=9.0)
    for grid in (sweep({"seed": [5]}, config, out=out, hosts=hosts, tell=quiet), resume_sweep(out, hosts=hosts)):
        assert [(one.state, one.step, one.note) for one in grid] == [("stopped", 0, "")]
    assert served == ["seed=5", "seed=5"]


def test_ctrl_c_while_a_run_is_made_stops_the_sweep(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **named: Any) -> Trainer:
        signal.raise_signal(signal.SIGINT)
        return train_with(*given, **named)

    grid = sweep({"seed": [5, 6]}, config, out=out, tell=quiet)
    with monkeypatch.context() as patch:
        patch.setattr("esjax.tuning.sweep.train_with", interrupted)
        assert [(one.name, one.step, one.note) for one in grid] == [("seed=5", 0, "")]
    assert grid.stopped
    assert [one.state for one in grid] == ["finished", "finished"]


def test_axes_in_another_order_are_the_same_sweep(config: Config, begun: Path) -> None:
    again = sweep(dict([*AXES.items()][::-1]), config, out=begun)
    assert [trial.name for trial in again.trials] == NAMES


# --- runs that fail ---


def test_a_run_that_fails_is_told_of_and_tried_again(config: Config, out: Path) -> None:
    def show(run: Trainer | Server) -> None:
        go(run)
        if run.config.seed == 0:
            raise RuntimeError("out of memory\nand so on")

    said: list[str] = []
    grid = sweep({"seed": [0, 1]}, replace(config, steps=2), out=out, show=show, tell=said.append)
    assert [(one.state, one.note) for one in grid] == [("failed", "RuntimeError: out of memory"), ("finished", "")]
    assert "seed=0 failed: RuntimeError: out of memory" in said
    assert [one.name for one in grid.outcomes()] == ["seed=1", "seed=0"]


def test_a_run_that_cannot_begin_does_not_stop_the_others(config: Config, out: Path) -> None:
    """A window that is longer than the text is only noticed with the text at hand."""
    grid = sweep({"data.window": [100000, 6]}, config, out=out, tell=quiet)
    first, second = grid
    assert (first.state, first.step) == ("failed", 0)
    assert "data.window" in first.note
    assert second.state == "finished"


def test_a_run_whose_losses_are_not_finite_is_marked(config: Config, out: Path) -> None:
    said: list[str] = []
    grid = sweep({"optim.learning_rate": [1e9, 0.1]}, config, out=out, tell=said.append)
    assert {one.values["optim.learning_rate"]: one.note for one in grid} == {1e9: "no update since step 1", 0.1: ""}
    assert any("not finite" in line for line in said)
    assert [one.values["optim.learning_rate"] for one in grid.outcomes()] == [0.1, 1e9]


# --- what it refuses ---


@pytest.fixture
def begun(config: Config, out: Path) -> Path:
    sweep(AXES, config, out=out)
    return out


def test_a_folder_is_of_one_sweep(config: Config, begun: Path) -> None:
    before = kept(begun)
    with pytest.raises(EsjaxError, match=r"is a sweep over --axis es.sigma=0.1,0.3 --axis seed=0,1; give another"):
        sweep({"es.sigma": [0.1]}, config, out=begun)
    with pytest.raises(EsjaxError, match=r"other settings, es.rank=1 in place of 2"):
        sweep(AXES, replace(config, es=replace(config.es, rank=2)), out=begun)
    assert kept(begun) == before
    sweep(AXES, config, out=begun)


def test_other_folders_are_left_alone(config: Config, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "photo.jpg").touch()
    with pytest.raises(EsjaxError, match="is no sweep, and is left alone"):
        sweep(AXES, config, out=out)
    with pytest.raises(EsjaxError, match="not the folder of a sweep"):
        resume_sweep(out)
    assert [path.name for path in out.iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize("text", ["", "axes: {", "[1]", "axes: {seed: [1]}", "axes: 3\nsettings: {}"])
def test_a_damaged_record_is_one_line(begun: Path, text: str) -> None:
    (begun / "sweep.yaml").write_text(text)
    with pytest.raises(EsjaxError, match=r"sweep.yaml is damaged"):
        resume_sweep(begun)


def test_a_record_that_names_something_twice_is_told_the_lines(begun: Path) -> None:
    text = (begun / "sweep.yaml").read_text() + "axes: {seed: [7]}\n"
    (begun / "sweep.yaml").write_text(text)
    with pytest.raises(EsjaxError, match=rf"\(axes is set twice, on lines 1 and {text.count(chr(10))};"):
        resume_sweep(begun)


def test_a_record_that_is_no_utf8_is_damaged(begun: Path) -> None:
    (begun / "sweep.yaml").write_bytes((begun / "sweep.yaml").read_text().encode("utf-16"))
    with pytest.raises(EsjaxError, match=r"sweep.yaml is damaged"):
        resume_sweep(begun)


def test_nothing_is_made_before_everything_is_known_to_be_right(config: Config, out: Path) -> None:
    for axes, settings, said in (
        ({"es.sigma": [0.1, -1]}, config, "above 0"),
        ({"seed": [1]}, replace(config, steps=None), "would never end"),
        ({"steps": [3, None]}, config, "the run steps=None would never end"),
        ({"data.text": [config.data.text, "none.txt"]}, config, "none.txt"),
    ):
        with pytest.raises(EsjaxError, match=said):
            sweep(axes, settings, out=out)
        assert not out.exists()


def test_one_process_at_a_time(config: Config, begun: Path) -> None:
    def show(run: Trainer | Server) -> None:
        with pytest.raises(EsjaxError, match="another process is at work"):
            next(iter(resume_sweep(begun, tell=quiet)))
        raise EsjaxError("seen")

    assert [one.note for one in sweep(AXES, config, out=begun, show=show, tell=quiet)] == ["seen"] * 4


# --- what it shows ---


def outcome(held_out: float | None = None, note: str = "", **values: object) -> Outcome:
    return Outcome(str(values), values, "finished" if held_out else "waiting", held_out, 1.0, 10, 3, note)


def test_the_table_shows_every_axis() -> None:
    table = _table([outcome(2.5, sigma=0.1, seed=0), outcome(None, sigma=0.2, seed=0, note="lost")])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["sigma"] == ["0.1", "0.2"]
    assert columns["held-out loss"] == ["2.5000", "-"]
    assert columns[""] == ["", "waiting: lost"]


def test_settings_are_compared_seed_by_seed() -> None:
    """Seeds lie 0.2 apart; 0.1 is 0.05 ahead of 0.2 each time, 0.3 now ahead of 0.1 and now behind; 0.9 has no loss."""
    losses = {0.1: (2.0, 2.2, 2.4), 0.2: (2.05, 2.25, 2.45), 0.3: (2.1, 2.1, 2.43)}
    outcomes = [
        outcome(losses[sigma][seed], sigma=sigma, space="full", seed=seed)
        for sigma in (0.2, 0.1, 0.3)
        for seed in (2, 0, 1)
    ]
    means = seed_means([*outcomes, outcome(None, sigma=0.9, space="full", seed=0)])
    assert [(mean.values["sigma"], mean.seeds, mean.ahead) for mean in means] == [
        (0.1, 3, True),
        (0.3, 3, True),
        (0.2, 3, False),
    ]
    assert [mean.mean for mean in means] == pytest.approx([2.2, 2.21, 2.25])
    assert means[0].values.keys() == {"sigma", "space"}
    assert means[0].interval > 0.3  # t = 4.3 times 0.2 / √3 or more
    told = conclusion(means)
    assert told.startswith("no difference seen between sigma=0.1 space=full, sigma=0.3 space=full;")
    assert conclusion(seed_means([one for one in outcomes if one.values["sigma"] != 0.3])) == (
        "best over 3 seeds: sigma=0.1 space=full"
    )
    assert conclusion(seed_means(outcomes[3:6])).startswith("2.2000 ± 0.4968 nats per token over 3 seeds")


def test_runs_with_a_reward_are_compared_by_it(tmp_path: Path) -> None:
    """Reference: the highest greedy reward is the best, however much of the text is forgotten."""
    rewards = {0.1: (0.2, 0.3, 0.25), 0.3: (0.7, 0.8, 0.74)}
    outcomes = [
        outcome(3.0 if sigma == 0.3 else 2.0, sigma=sigma, seed=seed)._replace(greedy_reward=rewards[sigma][seed])
        for sigma in (0.1, 0.3)
        for seed in (0, 1, 2)
    ]
    unmeasured = outcome(0.1, sigma=0.5, seed=0)  # its calls failed: the loss is no reward
    means = seed_means([unmeasured, *outcomes])
    assert [(mean.values["sigma"], mean.ahead) for mean in means] == [(0.3, True), (0.1, False)]
    assert [mean.mean for mean in means] == pytest.approx([2.24 / 3, 0.25])
    assert conclusion(means) == "best over 3 seeds: sigma=0.3"
    assert "greedy reward over 3 seeds" in conclusion(means[:1])
    table = _table(outcomes)
    assert {str(column.header): [*column.cells] for column in table.columns}["greedy reward"][0] == "0.2000"
    axes = make_figure([unmeasured, *outcomes]).axes[0]
    assert axes.get_ylabel() == "greedy reward on held-out prompts"
    assert max(np.max(np.asarray(line.get_ydata())) for line in axes.get_lines()) == 0.8


def test_a_sweep_puts_the_highest_greedy_reward_first(config: Config, out: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the\ncat\nsat\non\n")
    settings = esjax.RewardConfig(prompts=str(tmp_path / "prompts.txt"), length=4, held_out=0.3, processes=0)
    trained = sweep(
        {"seed": [0, 1, 2]},
        replace(config, reward=settings, steps=1),
        out=out,
        reward=lambda prompts, completions: [float(text.count("t")) for text in completions],
        tell=quiet,
    )
    assert [one.state for one in trained] == ["finished"] * 3
    rewards = [one.greedy_reward for one in trained.outcomes()]
    assert rewards == sorted((one for one in rewards if one is not None), reverse=True)
    assert len({*rewards}) > 1
    with (out / "sweep.csv").open() as file:
        assert [float(row["greedy_reward"]) for row in csv.DictReader(file)] == rewards


def test_seeds_that_not_all_settings_have_tell_nothing() -> None:
    outcomes = [outcome(2.0, sigma=0.1, seed=0), outcome(2.1, sigma=0.1, seed=1), outcome(2.2, sigma=0.2, seed=1)]
    assert [(mean.mean, mean.seeds) for mean in seed_means(outcomes)] == [(2.1, 1), (2.2, 1)]
    assert "so they cannot be compared" in conclusion(seed_means(outcomes))
    assert seed_means(outcomes[::2]) == []
    assert seed_means([outcome(2.0, sigma=0.1)]) == []


def test_the_plot_is_over_the_numbers_with_most_values() -> None:
    outcomes = [outcome(2.0, space=space, seed=1, sigma=sigma) for space in ("full", "x", "y") for sigma in (0.1, 0.2)]
    assert choose_axis(outcomes) == "sigma"
    assert choose_axis([outcome(2.0, space="full", noise="x")]) == "space"


Lines = dict[str, list[tuple[float, float]]]


def lines_of(axes: Axes) -> Lines:
    """Return what is drawn, by label; Matplotlib calls what has none by a name that begins with _."""
    found: Lines = {}
    for line in axes.get_lines():
        label = str(line.get_label())
        found["" if label.startswith("_") else label] = [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
    return found


def test_the_lines_of_the_plot_are_what_was_measured() -> None:
    """A line for each seed, over the sizes in order, without what was not measured."""
    outcomes = [outcome(2.0 + sigma + seed, sigma=sigma, seed=seed) for sigma in (4.0, 0.5, 1.0) for seed in (0, 1)]
    (axes,) = make_figure([*outcomes, outcome(None, sigma=0.25, seed=0)]).axes
    assert lines_of(axes) == {
        "seed=0": [(0.5, 2.5), (1.0, 3.0), (4.0, 6.0)],
        "seed=1": [(0.5, 3.5), (1.0, 4.0), (4.0, 7.0)],
    }
    assert (axes.get_xlabel(), axes.get_xscale(), axes.get_yscale()) == ("sigma", "log", "linear")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "0.5", "1.0", "4.0"]


def test_what_is_no_number_stands_side_by_side_and_what_went_astray_in_logarithms() -> None:
    outcomes = [outcome(held_out, space=space) for space, held_out in (("full", 2.0), ("low_rank", 16.0), (None, 3.0))]
    (axes,) = make_figure(outcomes).axes
    assert lines_of(axes) == {"": [(0.0, 2.0), (1.0, 16.0), (2.0, 3.0)]}
    assert (axes.get_xlabel(), axes.get_xscale(), axes.get_yscale()) == ("space", "linear", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["full", "low_rank", "None"]


def test_many_lines_of_a_sweep_are_told_apart_and_no_text_is_cut() -> None:
    texts = [f"/a/folder/of/texts/with_a_long_name_{i}.txt" for i in range(13)]
    figure = make_figure(
        [
            outcome(2.0 + size, **{"data.text": text, "optim.schedule": "inverse_sqrt", "model.hidden_size": f"{size}"})
            for text in texts
            for size in range(12)
        ]
    )
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}) == len(axes.get_lines())
    ticks = axes.get_xticklabels()
    assert not any(
        one.get_window_extent().overlaps(other.get_window_extent()) for one, other in itertools.pairwise(ticks)
    )
    for box in (text.get_window_extent() for text in [*legend.get_texts(), *ticks]):
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
    assert axes.get_window_extent().height > 200


@pytest.mark.parametrize("values", [[0.1, 0.2], ["full", "low_rank"], [None, 3], [True, False], [0, 5]])
def test_the_plot_is_a_picture(tmp_path: Path, values: list[object]) -> None:
    outcomes = [outcome(2.0 + i, axis=value, seed=seed) for i, value in enumerate(values) for seed in (0, 1)]
    assert draw([*outcomes, outcome(None, axis=values[0], seed=2)], tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]
    assert not draw([outcome(None, axis=values[0])], tmp_path / "none.png")


# --- hosts ---


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.close()


def free_port() -> int:
    """Find a port that is free with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def test_a_host_that_stays_takes_part_in_every_run(config: Config, out: Path, fleet: Fleet) -> None:
    """And a run with hosts is what it is alone."""
    fleet.address = f"tcp://127.0.0.1:{free_port()}"
    host = fleet.join("one", "--stay")
    sweep({"seed": [0, 1]}, replace(config, es=replace(config.es, chunk_pairs=4)), out=out)
    process = fleet.start("sweep", "--resume", str(out), "--bind", fleet.address)
    assert process.ends() == 0, process.output
    assert host.output.count("left, training has ended") == 2
    host.send(signal.SIGTERM)
    assert host.ends() == 0, host.output
    alone = replace(config, seed=1, es=replace(config.es, chunk_pairs=4))
    go(train(alone, fleet.folder / "alone", tell=quiet))
    assert digest(resume(out / "seed=1", steps=9)._replica.state) == state_digest(fleet.folder / "alone")


def test_a_host_that_stays_is_done_when_no_further_run_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the address; runs that were taken part in before are made up."""
    really, ended = join._take_part, iter([True, True])
    monkeypatch.setattr(join, "_take_part", lambda *arguments: next(ended, False) or really(*arguments))
    address, told = f"tcp://127.0.0.1:{free_port()}", list[str]()
    join.join(address, name="one", stay=True, patience=1.0, tell=told.append)
    assert told[-1] == "one: no further run in 1 s; left"
    with pytest.raises(EsjaxError, match=f"no word from {address}"):
        join.join(address, stay=True, patience=1.0, tell=told.append)


def test_from_python() -> None:
    assert esjax.sweep is sweep
    with pytest.raises(EsjaxError, match="would never end"):
        esjax.sweep({"seed": [1]}, Config(seed=7), out="nowhere")


def test_texts_of_an_axis_are_found_from_everywhere(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are called by what tells the texts apart."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/other.txt").write_text((tmp_path / "text.txt").read_text())
    sweep({"data.text": ["text.txt", "b/other.txt"]}, config, out="grid")
    monkeypatch.chdir("/")
    grid = resume_sweep(tmp_path / "grid")
    assert [trial.name for trial in grid.trials] == ["data.text=text.txt", "data.text=b_other.txt"]
    assert [outcome.state for outcome in grid] == ["finished"] * 2


def test_values_are_drawn_letter_by_letter() -> None:
    """matplotlib reads `$x_$` as a broken formula, and takes `_b` for no name at all."""
    texts = ("$x_$", "_b")
    figure = make_figure(
        [
            Outcome("", {"sigma": sigma, "text": text}, "finished", 2.0, 1.0, 1, 1, "")
            for sigma in (1, 2, 3)
            for text in texts
        ]
        + [Outcome("", {"sigma": 1, "text": text}, "waiting", None, 0.0, 0, 0, "") for text in texts]
    )
    figure.savefig(io.BytesIO())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["text=$x_$", "text=_b"]
    figure = make_figure([Outcome("", {"text": text}, "finished", 2.0, 1.0, 1, 1, "") for text in texts])
    figure.savefig(io.BytesIO())
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(texts)


def test_of_several_sweeps_into_one_folder_at_once_one_is_begun(config: Config, tmp_path: Path) -> None:
    for attempt in range(4):
        out = tmp_path / f"sweep {attempt}"
        start = threading.Barrier(3)

        def begin(seed: int, out: Path = out, start: threading.Barrier = start) -> int | str:
            start.wait()
            try:
                keep_record(out, Record({"seed": [seed]}, config, {}, {}))
            except EsjaxError as error:
                return str(error)
            return seed

        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(begin, range(3)))
        (winner,) = [one for one in found if isinstance(one, int)]
        assert [trial.values["seed"] for trial in resume_sweep(out).trials] == [winner]
        assert all(re.search("is a sweep over|is no sweep", str(one)) for one in found if one != winner)
        assert [path.name for path in out.iterdir()] == ["sweep.yaml"]


def test_a_run_that_another_process_trains_is_not_removed(config: Config, out: Path) -> None:
    """It has no checkpoint yet, so that the sweep would begin it anew."""
    grid = sweep({"seed": [5]}, config, out=out, tell=quiet)
    folder = RunFolder.create(out / "seed=5", replace(config, seed=5), train(config).corpus.vocabulary, "")
    folder.lock()
    try:
        (outcome,) = grid
    finally:
        folder.unlock()
    assert "another process is at work" in outcome.note
    assert RunFolder(out / "seed=5").name == folder.name
