"""The program as a shell sees it: signals from its first moment on, and outputs that take everything or say why not."""

import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from command_line import terminal
from progress_lines import BASELINES, INFO, TWO_MINUTES, WHOLE
from rich.table import Table

from esjax import cli
from esjax.cli.shared import open_console
from esjax.paths import cache_folder
from esjax.terminal import has_cursor
from esjax.watch.progress import Progress

PROGRAMS = (["-m", "esjax"], [str(Path(__file__).parents[2] / "experiments" / "run.py")])

IN_A_CALLBACK = """
import gc, signal, sys
from esjax.signals import end_on_signals

end_on_signals()
gc.callbacks.append(lambda *_: signal.raise_signal(int(sys.argv[1])))
gc.collect()
print("it went on")
"""


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_in_a_callback_ends_the_program(number: signal.Signals, name: str) -> None:
    """An exception would be printed there and forgotten. 128 and the signal's number are what shells expect."""
    done = python("-c", IN_A_CALLBACK, str(int(number)))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", f"stopped by {name}\n")


@pytest.mark.parametrize("program", PROGRAMS, ids=["package", "checkout"])
def test_ctrl_c_during_the_imports_is_one_line(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    before = os.environ.get("PYTHONPATH", "")
    done = python(*program, "--help", PYTHONPATH=f"{tmp_path}:{before}" if before else str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_what_an_output_cannot_encode_is_written_by_escapes() -> None:
    """The help has the sign of plus and minus, number 0xb1 of Unicode."""
    done = python("-m", "esjax", "train", "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\xb1" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
def test_a_full_output_is_one_line() -> None:
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -m esjax --help > /dev/full', sys.executable],
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # which Python takes for unset: it writes at the end
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (2, "error: cannot write the output: No space left on device\n")


def test_a_pipe_that_breaks_elsewhere_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of our own output, which is read here, is whole: some other program has gone."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_parse", broken)
    written = StringIO()
    with redirect_stderr(written), pytest.raises(SystemExit) as end:
        cli.main(["status"])
    assert (end.value.code, written.getvalue()) == (2, "error: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("term", ["xterm-256color", "dumb", "unknown", "", None])
def test_a_cursor_is_moved_in_a_real_terminal_alone(
    term: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if term is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", term)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    assert not has_cursor(None)
    with (tmp_path / "file").open("w") as file:
        assert not has_cursor(file)
    with terminal() as (stream, shown):
        assert has_cursor(stream) == (term == "xterm-256color")
        with redirect_stderr(stream), Progress(open_console(stderr=True), BASELINES, TWO_MINUTES) as progress:
            progress.update(INFO)
            if not has_cursor(stream):  # then the line is there at once, not at the end
                assert "step 1,234" in shown("step 1,234")
                return
        assert "\x1b[?25h" in shown("\x1b[?25h")


def test_a_file_gets_whole_lines_and_no_cursor_whatever_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "TERM": "xterm", "COLUMNS": "20"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_COLOR", "1")  # of the colors, which are asked for, nothing here
    written = StringIO()
    with redirect_stderr(written), Progress(open_console(stderr=True), BASELINES, TWO_MINUTES) as progress:
        progress.update(INFO)
    line = written.getvalue()
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[0m", "\x1b[1;2m"):  # bold and dim are no colors
        line = line.replace(code, "")
    assert line == f"{WHOLE}\n"


def test_a_table_is_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "20")
    names = ["optim.learning_rate", "model.hidden_size", "member-tokens"]
    row = ["0.0123456789", "1234567890", "12,345,678,901"]
    table = Table(*names, box=None)
    table.add_row(*row)
    with terminal() as (stream, shown):
        with redirect_stdout(stream):
            open_console().print(table)
        text = shown(row[-1])
    assert all(word in text for word in (*names, *row))


def test_without_a_home_compiled_programs_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "esjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "esjax"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a user whom the system does not know
    assert cache_folder() is None
