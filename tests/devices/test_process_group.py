"""Several processes that compute as one, on this machine: the same run as one process makes."""

import signal
from pathlib import Path

import pytest
from processes import SMALL, TEXT, Fleet, Process, alone, fleet, free_port, steps_done, updates, wait_until

from esjax.devices.process_group import any_of, connect, here, leads, share, share_number
from esjax.errors import EsjaxError
from esjax.training.replay import replay

__all__ = ["fleet"]

pytestmark = pytest.mark.usefixtures("lenient_promotion")


def train_together(fleet: Fleet, count: int, *words: str) -> list[Process]:
    at = f"127.0.0.1:{free_port()},{count}"
    settings = [*SMALL, "--ledger", "--data.text", str(TEXT), "--out", str(fleet.run), *words]
    return [fleet.start("train", "--distributed", f"{at},{i}", *settings) for i in range(count)]


def test_processes_train_as_one(fleet: Fleet) -> None:
    """Three: the pairs do not divide evenly."""
    processes = train_together(fleet, 3, "--steps", "12")
    assert [process.ends() for process in processes] == [0, 0, 0]
    expected_updates, expected_digest = alone(fleet, 12)
    assert updates(fleet.run) == expected_updates
    replayed = replay(fleet.run)
    assert replayed.agrees
    assert replayed.compared == 1  # the checkpoint that process 0 wrote
    assert replayed.digest == expected_digest
    assert "held-out" in processes[0].output
    assert all("held-out" not in process.output for process in processes[1:])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("number", "words"),
    [(1, ("--es.time-per-step", "0.05")), (0, ())],
    ids=["budget", "fixed"],
)
def test_rows_36_sigterm_on_one_stops_all_with_a_checkpoint(fleet: Fleet, number: int, words: tuple[str, ...]) -> None:
    """A time budget is agreed on, too."""
    processes = train_together(fleet, 2, *words)
    wait_until(lambda: (fleet.run / "ledger").exists() and steps_done(fleet.run) >= 8)
    processes[number].send(signal.SIGTERM)
    assert [process.ends() for process in processes] == [0, 0]
    assert all("Traceback" not in process.output for process in processes)
    newest = max(int(path.name) for path in (fleet.run / "checkpoints").iterdir())
    assert newest == steps_done(fleet.run)
    assert replay(fleet.run).agrees


def test_processes_are_one_host(fleet: Fleet) -> None:
    server = fleet.serve("--steps", "12")
    at = f"127.0.0.1:{free_port()},2"
    pod = [fleet.join("pod", "--distributed", f"{at},{i}") for i in range(2)]
    other = fleet.join("other")
    assert [process.ends() for process in (server, other, *pod)] == [0, 0, 0, 0], pod[1].output
    assert "pod joins: 2 x cpu" in server.output
    assert updates(fleet.run) == alone(fleet, 12)[0]
    assert replay(fleet.run).agrees


@pytest.mark.parametrize("words", ["", "2", "host:1", "host:1,2,2", "host:1,2,x", "host,2,0", "automatic"])
def test_words_that_name_no_processes_are_one_clear_line(words: str) -> None:
    with pytest.raises(EsjaxError, match="HOST:PORT,N,I"):
        connect(words)


def test_one_process_decides_for_itself(tmp_path: Path) -> None:
    assert leads()
    assert share(b"word") == b"word"
    assert share_number(0.1) == 0.1
    assert [any_of(True), any_of(False)] == [True, False]
    assert here(tmp_path) is tmp_path
