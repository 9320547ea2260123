"""What is kept of a run is enough to go on and to replay it, whatever is damaged or was dropped; rows of the faults."""

import dataclasses
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import pytest
from processes import SMALL, TEXT, Fleet, fleet

import esjax
from esjax.cli import main
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.data.delivery import hash_bytes
from esjax.errors import EsjaxError
from esjax.hosts.protocol.actions import Snapshot, Store
from esjax.hosts.status import fetch_status
from esjax.replica.snapshot import to_bytes
from esjax.runs.checkpoint import digest, kept_steps
from esjax.runs.ledger import UPDATE, read
from esjax.runs.reader import read_run
from esjax.training.local_steps import LocalSteps, StepDone
from esjax.training.replay import replay
from esjax.training.run import Trainer, resume, train
from esjax.watch import recorded_run

__all__ = ["fleet"]

pytestmark = pytest.mark.usefixtures("lenient_promotion")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    return Config(
        steps=8,
        ledger=True,
        checkpoint_time=1e-6,  # a checkpoint after every step
        data=DataConfig(text=str(text), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )


@pytest.fixture
def whole(config: Config) -> str:
    """The digest after all steps of a run that nothing happened to."""
    run = train(replace(config, ledger=False))
    list(run)
    return state_digest(run)


def state_digest(run: Trainer) -> str:
    return digest(run._replica.state)


def places(run: Path) -> list[int]:
    """Return where the update of each step begins in the ledger, and its end."""
    found = [15]
    for record in read(run / "ledger"):
        found.append(found[-1] + record.size)
    return found


def damage(run: Path, step: int) -> None:
    content = bytearray((run / "ledger").read_bytes())
    content[places(run)[step] + 20] ^= 1
    (run / "ledger").write_bytes(content)


def tear(run: Path, step: int) -> None:
    (run / "ledger").write_bytes((run / "ledger").read_bytes()[: places(run)[step] + 9])


def damage_checkpoints(run: Path) -> None:
    for seal in (run / "checkpoints").glob("*/seal.json"):
        seal.write_bytes(seal.read_bytes().replace(b"0", b"1"))


def updates(run: Path) -> list[int]:
    return [record.step for record in read(run / "ledger") if record.kind == UPDATE]


@pytest.mark.parametrize(
    ("lose", "begins", "base", "said"),
    [
        (lambda run: damage(run, 1), 2, 4, "is damaged at byte"),
        (lambda run: tear(run, 3), 6, 6, "ends at step 3, and the newest checkpoint is of step 6"),
    ],
    ids=["damaged", "torn"],
)
@pytest.mark.parametrize("with_hosts", [False, True])
def test_row_63_a_ledger_damaged_below_the_newest_checkpoint_is_passed_over(
    config: Config,
    tmp_path: Path,
    whole: str,
    lose: Callable[[Path], Any],
    begins: int,
    base: int,  # the oldest checkpoint that is late enough
    said: str,
    with_hosts: bool,
) -> None:
    """Reference: the run that nothing happened to."""
    run, lines = tmp_path / "run", list[str]()
    list(train(replace(config, steps=6), run))
    assert kept_steps(run / "checkpoints") == [6, 5, 4]
    lose(run)
    if with_hosts:
        server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=8, tell=lines.append)
        with ExitStack() as stack:
            coordinator, _ = server._open(stack, stack.enter_context(server._recording()))
            assert coordinator.step == 6
            assert coordinator._downloads._history is not None
            assert coordinator._downloads._history.first == begins
    else:
        again = resume(run, steps=8, tell=lines.append)
        list(again)
        assert (again.step, state_digest(again)) == (8, whole)
        lines_of_replay: list[str] = []
        replayed = replay(run, tell=lines_of_replay.append)
        assert (replayed.agrees, replayed.digest, replayed.first) == (True, whole, base)
        assert lines_of_replay == [
            f"the ledger is whole from step {begins} on: replaying from the checkpoint of step {base}; earlier steps "
            "cannot be replayed"
        ]
    assert any(said in line for line in lines)
    assert f"the ledger begins at step {begins}: the run can be replayed from the oldest checkpoint" in " ".join(lines)


def test_what_becomes_of_the_state_of_a_host(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A false one puts its host aside, one that the disk does not take is not kept, an unconfirmed one is called so."""
    run, lines = tmp_path / "run", list[str]()
    list(train(replace(config, steps=2), run))
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=9, tell=lines.append)
    with ExitStack() as stack:
        coordinator, server_loop = server._open(stack, stack.enter_context(server._recording()))
        state = dataclasses.replace(server._replica.state, step=jnp.int32(3))
        data = to_bytes(state)
        snapshot, no_state = Snapshot(3, data, hash_bytes(data)), Snapshot(3, b"no state", hash_bytes(b"no state"))
        called: list[str] = []
        for name in ("stored", "not_stored", "is_false"):
            monkeypatch.setattr(coordinator.audits, name, lambda _, name=name: called.append(name))

        def store(given: Snapshot, expected: str, *, is_confirmed: bool) -> None:
            server_loop._store(Store(given, expected, is_confirmed))
            before = len(called)
            while len(called) == before:
                server_loop.turn()

        for given, expected in ((snapshot, "another"), (no_state, ""), (snapshot._replace(step=4), digest(state))):
            store(given, expected, is_confirmed=True)
        with monkeypatch.context() as full:
            full.setattr(server_loop._recorder, "write", Mock(side_effect=EsjaxError("the disk is full")))
            store(snapshot, digest(state), is_confirmed=False)
        assert lines[-1] == "no checkpoint at step 3: the disk is full"
        assert kept_steps(run / "checkpoints")[0] == 2
        store(snapshot, digest(state), is_confirmed=False)
        assert called == ["is_false", "is_false", "is_false", "not_stored", "stored"]
    assert kept_steps(run / "checkpoints")[0] == 3
    resume(run, tell=lines.append)
    assert any("the state of step 3 came from a host and was not confirmed" in line for line in lines)


def begin_to_store_step_3(server: Any, server_loop: Any) -> None:
    state = dataclasses.replace(server._replica.state, step=jnp.int32(3))
    data = to_bytes(state)
    server_loop._store(Store(Snapshot(3, data, hash_bytes(data)), digest(state), is_confirmed=True))


def test_hosts_are_answered_while_a_checkpoint_is_written(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk that takes as long as it likes the loop goes on, and its end waits until the checkpoint is whole."""
    run, has_room = tmp_path / "run", threading.Event()
    list(train(replace(config, steps=2), run))
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=9, tell=lambda _: None)
    with ExitStack() as stack:
        coordinator, server_loop = server._open(stack, stack.enter_context(server._recording()))
        write = server_loop._recorder.write

        def write_late(*parts: Any, **named: Any) -> None:
            assert has_room.wait(30), "the loop waits for the disk"
            write(*parts, **named)

        monkeypatch.setattr(server_loop._recorder, "write", write_late)
        begin_to_store_step_3(server, server_loop)
        with ThreadPoolExecutor() as client:
            status = client.submit(fetch_status, server.address)
            while not status.done():
                server_loop.turn()
        assert status.result().step == 2
        assert [one.step for one in coordinator.audits.snapshots] == [2]
        has_room.set()
    assert [one.step for one in coordinator.audits.snapshots] == [2, 3]
    assert kept_steps(run / "checkpoints")[0] == 3


def test_a_checkpoint_is_kept_also_if_it_is_not_known_whether_the_ledger_can_be_cut(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    list(train(replace(config, steps=2, ledger_horizon=1), run))
    lines = list[str]()
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=9, tell=lines.append)
    with ExitStack() as stack:
        coordinator, server_loop = server._open(stack, stack.enter_context(server._recording()))
        monkeypatch.setattr(recorded_run, "is_cut_due", Mock(side_effect=EsjaxError("cannot read 2")))
        begin_to_store_step_3(server, server_loop)
    assert lines[-1] == "the ledger keeps updates behind the horizon: cannot read 2"
    assert [one.step for one in coordinator.audits.snapshots] == [2, 3]
    assert kept_steps(run / "checkpoints")[0] == 3


def test_a_second_ctrl_c_waits_for_the_checkpoint_that_is_written(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where it ends no process: the folder is locked until the checkpoint is whole."""
    run = tmp_path / "run"
    list(train(replace(config, steps=2), run))
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=9, tell=lambda _: None)

    def serve_and_interrupt() -> None:
        with ExitStack() as stack:
            _, server_loop = server._open(stack, stack.enter_context(server._recording()))
            shutdown, interrupts = server_loop._writer.shutdown, [KeyboardInterrupt()]

            def interrupted() -> None:
                if interrupts:
                    raise interrupts.pop()
                with pytest.raises(EsjaxError, match="is being trained by another process"):
                    list(resume(run, steps=3))
                shutdown()

            monkeypatch.setattr(server_loop._writer, "shutdown", interrupted)

    with pytest.raises(KeyboardInterrupt):
        serve_and_interrupt()
    assert list(resume(run, steps=3))


def test_damage_above_the_newest_checkpoint_is_an_error(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(config, run))
    damage(run, 5)
    for step in (7, 8):
        shutil.rmtree(run / "checkpoints" / str(step))
    assert resume(run, steps=9).step == 8  # the checkpoint of step 6 is there
    shutil.rmtree(run / "checkpoints" / "6")
    for use in (resume, replay):
        with pytest.raises(EsjaxError, match=r"damaged at byte .*; restore it from a copy"):
            use(run)


def test_a_ledger_that_lost_all_updates_is_no_reason_to_train_anew(config: Config, tmp_path: Path, whole: str) -> None:
    """The state of step 0 follows from the seed, and the run makes the same updates again."""
    run, lines = tmp_path / "run", list[str]()
    list(train(replace(config, steps=2), run))
    tear(run, 0)
    shutil.rmtree(run / "checkpoints")
    again = resume(run, steps=8, tell=lines.append)
    assert again.step == 0
    assert "rebuilt from the seed and the ledger" in lines[0]
    list(again)
    assert state_digest(again) == whole


@pytest.mark.parametrize("starts", [1, 2])
def test_row_62_a_second_start_rebuilds_from_the_ledger_as_the_first(
    config: Config, tmp_path: Path, whole: str, starts: int
) -> None:
    """All seals are damaged; each start is killed after it has opened the files, or trains on."""
    run, lines = tmp_path / "run", list[str]()
    list(train(replace(config, steps=6), run))
    damage_checkpoints(run)
    replayed = replay(run, tell=lines.append)
    assert (int(replayed.state.step), replayed.compared) == (6, 0)
    assert replayed.summary().endswith(": nothing was compared, since no digest was kept")
    for _ in range(starts):
        server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=8, tell=lines.append)
        with ExitStack() as stack:
            coordinator, _ = server._open(stack, stack.enter_context(server._recording()))
            assert coordinator.step == 6
        shutil.rmtree(run / "checkpoints" / "0")  # what the coordinator keeps of the first state
    assert sum("rebuilt from the seed and the ledger" in line for line in lines) == starts
    again = resume(run, steps=8, tell=lines.append)
    assert sum("rebuilt from the seed and the ledger" in line for line in lines) == starts + 1
    list(again)
    assert state_digest(again) == whole


def test_behind_the_horizon_a_run_is_replayed_from_its_oldest_checkpoint(
    config: Config, tmp_path: Path, whole: str
) -> None:
    """Two steps are kept at least; resumed twice on the way."""
    config = replace(config, ledger_horizon=2, keep_checkpoints=1)
    run, lines = tmp_path / "run", list[str]()
    list(train(replace(config, steps=3), run))
    list(resume(run, steps=6, tell=lines.append))
    again = resume(run, steps=8, tell=lines.append)
    list(again)
    assert state_digest(again) == whole
    first = updates(run)[0]
    assert updates(run) == [*range(first, 8)]
    assert 2 <= 8 - first <= 5
    assert kept_steps(run / "checkpoints")[0] == 8
    said = [line for line in lines if "begins at step" in line]
    assert said[-1].endswith("the run can be replayed from the oldest checkpoint at or after it, not from the start")
    replayed = replay(run, tell=lines.append)
    assert (replayed.agrees, replayed.digest, replayed.first) == (True, whole, first)
    assert lines[-1].startswith(f"the ledger is whole from step {first} on: replaying from the checkpoint of step ")
    assert f"step 8, replayed from step {first} on, digest {whole}: " in replayed.summary()
    damage_checkpoints(run)
    for use in (resume, replay):
        with pytest.raises(EsjaxError, match=rf"ledger .*begins at step {first}(:|, and no checkpoint is whole)"):
            use(run, tell=lines.append)


def test_a_horizon_without_a_ledger_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(EsjaxError, match=r"without a ledger; set ledger to true \(--ledger\), or leave it out"):
        train(replace(config, ledger=False, ledger_horizon=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_coordinator_goes_on_with_a_ledger_that_has_a_horizon(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    list(train(replace(config, ledger_horizon=2), run))
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", steps=9)
    with ExitStack() as stack:
        recorder = stack.enter_context(server._recording())
        coordinator, _ = server._open(stack, recorder)
        assert coordinator.step == 8
        assert recorder.ledger is not None
        assert 0 < recorder.ledger.first == updates(run)[0] <= 6


@pytest.mark.parametrize("lose", [False, True])
def test_row_64_a_replay_says_what_it_compared(
    config: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lose: bool,
) -> None:
    """The only digest is that of the newest checkpoint, which is of the final state or of the one before."""
    run = tmp_path / "run"
    list(train(replace(config, steps=3, keep_checkpoints=2), run))
    if lose:
        shutil.rmtree(run / "checkpoints" / "3")
    found = replay(run)
    words = (
        "that of step 2, agrees; no digest of the final state was kept" if lose else "that of the final state, agrees"
    )
    assert (found.agrees, found.compared) == (True, 1)
    assert found.summary() == f"step 3, digest {found.digest}: the only digest, {words}"
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr("esjax.cli.hosts.prepare", lambda: None)  # JAX is in use already
    with pytest.raises(SystemExit) as end:
        main(["replay", str(run)])
    assert end.value.code == 1
    assert capsys.readouterr().out.endswith("nothing was compared, since no digest was kept\n")


def failing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    take = LocalSteps.take

    def fail(steps: LocalSteps) -> StepDone:
        if int(steps._replica.state.step) == step:
            raise ValueError("a device failed")
        return take(steps)

    monkeypatch.setattr(LocalSteps, "take", fail)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    failing(monkeypatch, 0)
    out = tmp_path / "run"
    if is_there:
        out.mkdir()
    with pytest.raises(ValueError, match="a device failed"):
        list(train(config, out))
    assert [*tmp_path.rglob("*")] == [tmp_path / "text.txt", *([out] if is_there else [])]


def test_a_run_that_fails_later_is_kept(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1)
    with pytest.raises(ValueError, match="a device failed"):
        list(train(config, tmp_path / "run"))
    assert resume(tmp_path / "run").step == 1


def test_what_another_process_has_trained_is_not_removed(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(replace(config, ledger=False), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    failing(monkeypatch, 0)
    with pytest.raises(ValueError, match="a device failed"):
        list(run)
    assert (tmp_path / "run" / "run.json").exists()


def test_a_moved_text_is_not_kept_in_a_run_that_another_process_trains(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(config, run)
    before = (run / "config.yaml").read_bytes()
    moved = shutil.copy(tmp_path / "text.txt", tmp_path / "moved.txt")
    for info in first:
        if info.step == 2:
            with pytest.raises(EsjaxError, match="is being trained by another process"):
                resume(run, text=str(moved))
    assert (run / "config.yaml").read_bytes() == before


def test_row_66_of_two_starts_into_one_folder_one_wins(fleet: Fleet) -> None:
    words = [*SMALL, "--steps", "3", "--out", str(fleet.run), "--data.text", str(TEXT)]
    started = [fleet.start("train", *words, "--seed", str(seed)) for seed in range(2)]
    codes = [process.ends() for process in started]
    assert sorted(codes) == [0, 2]
    winner, loser = codes.index(0), codes.index(2)
    assert started[loser].output.endswith(
        f"error: {str(fleet.run)!r} exists already and is left alone; give another --out, or resume it\n"
    )
    assert read_run(fleet.run).settings["seed"] == winner
    assert read_run(fleet.run).step == 3
    assert kept_steps(fleet.run / "checkpoints")[0] == 3  # a slow machine keeps another one before
    assert "Traceback" not in started[0].output + started[1].output
