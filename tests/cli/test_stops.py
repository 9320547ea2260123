"""Ctrl-C and SIGTERM before the first step, as a shell, a launcher of several processes or a container sends them."""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from processes import SMALL, TEXT, Fleet, Process, fleet, free_port, wait_until

__all__ = ["fleet"]

BOTH = pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
EITHER = pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "SIGTERM"), pytest.param(signal.SIGINT, "Ctrl-C", marks=pytest.mark.nightly)],
)
"""One by day: both have one handler, as `test_native_code_cannot_delay_the_end` shows."""

HANG = """
import ctypes, sys

def hang(*_):
    print("it hangs", file=sys.stderr, flush=True)
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # for good, in native code: Python handles no signal meanwhile
"""

LOSS = f"""{HANG}
import jax

def loss(member, tokens, key):
    jax.debug.callback(hang)  # called when a step is computed
    return member.cross_entropy(tokens)
"""

BLOCKS = {
    "before a run": "if True:",
    "in the start of a run": "with stop_on_signals(), starting():",
    "after its first step": "with stop_on_signals(), starting():\n    started()",
}


def in_native_code(folder: Path, block: str) -> Process:
    """Start a program whose main thread hangs."""
    lines = ["from esjax.signals import *", "end_on_signals()", BLOCKS[block], "    hang()"]
    process = Process(program=("-c", "\n".join([HANG, *lines])), log=folder / "log")
    process.wait_for("it hangs")
    return process


@BOTH
@pytest.mark.parametrize("block", ["before a run", "in the start of a run"])
def test_native_code_cannot_delay_the_end(tmp_path: Path, block: str, number: signal.Signals, name: str) -> None:
    process = in_native_code(tmp_path, block)
    process.send(number)
    assert process.ends() == 128 + number
    assert process.output == f"it hangs\nstopped by {name}\n"


def test_after_the_first_step_a_second_signal_ends_native_code(tmp_path: Path) -> None:
    process = in_native_code(tmp_path, "after its first step")
    process.send(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # longer than `GRACE`: the first waits for the end of the step
        process.popen.wait(2.5)
    process.send(signal.SIGINT)
    assert process.ends() == 130


def training(fleet: Fleet, *words: str) -> list[str]:
    """Return the words of a run whose first step hangs."""
    code = fleet.folder / "loss.py"
    code.write_text(LOSS)
    given = ["--data.text", str(TEXT), *SMALL, "--loss.function", f"{code}:loss", "--out", str(fleet.run)]
    return ["train", *given, *words]


@EITHER
def test_row_61_the_first_step(fleet: Fleet, number: signal.Signals, name: str) -> None:
    process = fleet.start(*training(fleet, "--ledger"))
    process.wait_for("it hangs")
    process.send(number)
    assert process.ends() == 128 + number
    assert process.output.endswith(f"stopped by {name}\n")
    assert "Traceback" not in process.output


@EITHER
def test_row_61_process_0_of_a_group_waits_for_the_others(fleet: Fleet, number: signal.Signals, name: str) -> None:
    """JAX would wait for them for 300 s."""
    port = free_port()
    process = fleet.start(*training(fleet, "--distributed", f"127.0.0.1:{port},2,0"))
    wait_until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
    process.send(number)
    assert process.ends() == 128 + number
    assert process.output.endswith(f"stopped by {name}\n")


@EITHER
@pytest.mark.parametrize("command", ["train", "join"])
def test_row_61_another_process_waits_for_process_0(
    fleet: Fleet, command: str, number: signal.Signals, name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"127.0.0.1:{silent.getsockname()[1]},2,1"
        words = training(fleet) if command == "train" else ["join", "tcp://127.0.0.1:1"]
        process = fleet.start(*words, "--distributed", at)
        silent.accept()
        process.send(number)
        assert process.ends() == 128 + number
    assert process.output.endswith(f"stopped by {name}\n")


def test_row_61_hosts_of_this_machine_that_compile(fleet: Fleet) -> None:
    """There is nothing to save, so the coordinator does not wait for them."""
    process = fleet.start(*training(fleet, "--workers", "1"))
    log = fleet.run / "worker-0.log"
    wait_until(lambda: log.exists() and "it hangs" in log.read_text())
    worker = process.worker()
    process.send(signal.SIGINT)
    assert process.ends() == 0
    assert "Traceback" not in process.output
    assert not Path(f"/proc/{worker}").exists()


def test_row_61_a_host_that_compiles(fleet: Fleet) -> None:
    server = fleet.start("serve", "--bind", "tcp://127.0.0.1:0", *training(fleet)[1:])
    fleet.hear_address(server)
    host = fleet.join("one", "--loss.function", str(fleet.folder / "loss.py:loss"))
    host.wait_for("it hangs")
    host.send(signal.SIGTERM)
    assert host.ends() == 0
    assert host.output.endswith("one: left, it was stopped\n")
    server.wait_for("one leaves")
    server.send(signal.SIGTERM)  # no host is there
    assert server.ends() == 0


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("train", signal.SIGTERM),
        ("serve", signal.SIGTERM),
        ("join", signal.SIGTERM),
        pytest.param("train", signal.SIGINT, marks=pytest.mark.nightly),
    ],
)
def test_row_61_process_1_of_a_container(fleet: Fleet, command: str, number: signal.Signals) -> None:
    """The kernel drops a signal for process 1 that has no handler."""
    within = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*within, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of processes can be made here")
    words = {
        "train": training(fleet),
        "serve": ["serve", "--bind", "tcp://127.0.0.1:0", *training(fleet)[1:]],
        "join": ["join", "tcp://127.0.0.1:1"],
    }
    started = {"train": "it hangs", "serve": "waiting for hosts", "join": "joining tcp"}
    process = fleet.start(*words[command], within=within)
    process.wait_for(started[command])
    os.kill(process.child(), number)
    assert process.ends() == (128 + number if command == "train" else 0)
    assert "Traceback" not in process.output
