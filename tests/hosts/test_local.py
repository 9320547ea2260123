"""Hosts as processes of this machine: what ends is started again, and said, and modules are those of Python."""

import os
import signal
import sys
from pathlib import Path

import pytest
from processes import SMALL, TEXT, Fleet, fleet, steps_done, wait_until

from esjax.errors import EsjaxError
from esjax.hosts import local
from esjax.hosts.local import RESTARTS, LocalWorkers
from esjax.training.replay import replay

__all__ = ["fleet"]

PROGRAM = r"""#!/bin/sh
case "$*" in
    *worker-0*) printf 'one\n\033[2Jtwo\n'; exit 7 ;;
    *) exec sleep 1000 ;;
esac
"""
"""In place of Python: worker-0 ends at once, and others stay."""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program"
    path.write_text(PROGRAM)
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(local, "CHECK", 0.0)


@pytest.mark.usefixtures("program")
def test_row_60_a_process_that_ends_again_and_again_is_given_up(tmp_path: Path) -> None:
    told: list[str] = []
    workers = LocalWorkers(2, tmp_path, told.append, oversubscribe=True)
    with workers.joined("tcp://127.0.0.1:1") as check:
        wait_until(lambda: check() is not None or bool(workers.lost))
        check()  # the other one goes on
    log = tmp_path / "worker-0.log"
    then = [f"it is started again, {number} of {RESTARTS} times" for number in range(1, RESTARTS + 1)]
    assert told == [
        line
        for what in [*then, "it is not started again"]
        for line in (f"worker-0 ended with exit code 7; {what}; the end of {log}:", "  one", "  \\x1b[2Jtwo")
    ]
    assert log.read_text().count("one") == 1 + RESTARTS
    with pytest.raises(EsjaxError, match=rf"^worker-0 ended {1 + RESTARTS} times .* logs in {tmp_path}\. "):
        workers.check_kept()


@pytest.mark.usefixtures("program")
def test_row_60_without_any_process_the_run_ends(tmp_path: Path) -> None:
    workers = LocalWorkers(1, tmp_path, lambda line: None)
    with workers.joined("tcp://127.0.0.1:1") as check, pytest.raises(EsjaxError, match=r"^worker-0 ended"):
        wait_until(lambda: check() is not None)  # never


def test_row_60_a_file_of_the_working_folder_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "random", "tyro", "zmq"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "worker-0.log"
    with LocalWorkers(1, tmp_path, pytest.fail).joined("tcp://127.0.0.1:1"):
        wait_until(lambda: "joining" in log.read_text() or "shadowed" in log.read_text())
    assert "shadowed" not in log.read_text()


@pytest.mark.usefixtures("lenient_promotion")
def test_row_60_a_killed_process_is_replaced(fleet: Fleet) -> None:
    words = [*SMALL, "--out", str(fleet.run), "--data.text", str(TEXT)]
    run = fleet.start("train", "--workers", "1", *words)
    wait_until(lambda: (fleet.run / "ledger").exists() and steps_done(fleet.run) >= 3)
    os.kill(run.worker(), signal.SIGKILL)
    run.wait_for("worker-0 was killed by signal 9; it is started again, 1 of 3 times")
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + 3)
    run.send(signal.SIGTERM)
    assert run.ends() == 0
    assert replay(fleet.run).agrees


@pytest.mark.nightly
def test_row_60_processes_that_cannot_be_kept_end_the_run_with_an_error(fleet: Fleet) -> None:
    """The file of a custom loss breaks meanwhile."""
    code = fleet.folder / "loss.py"
    code.write_text("def loss(member, tokens, key):\n    return member.cross_entropy(tokens)\n")
    given = ["--data.text", str(TEXT), *SMALL, "--loss.function", f"{code}:loss", "--out", str(fleet.run)]
    run = fleet.start("train", "--workers", "1", "--steps", "1000000", *given)
    wait_until(lambda: (fleet.run / "ledger").exists() and steps_done(fleet.run) >= 3)
    code.write_text("raise RuntimeError('broken')\n")
    os.kill(run.worker(), signal.SIGKILL)
    assert run.ends() == 2
    *before, last = run.output.splitlines()
    assert last.startswith("error: worker-0 ended 4 times and could not be kept")
    assert sum("broken" in line for line in before) >= RESTARTS
