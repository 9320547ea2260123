"""The command line. Wrong arguments give an error of one line."""

import difflib
import os
import platform
import select
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any, NoReturn

import tyro
from rich.console import Console

from esjax import __version__
from esjax.cli.hosts import Join, Replay, Serve, Status, Token
from esjax.cli.infer import Evaluate, Generate, Tune
from esjax.cli.plot import Dashboard, Plot
from esjax.cli.settings import parse_settings
from esjax.cli.shared import PATHS, open_console
from esjax.cli.sweep import Sweep
from esjax.cli.train import Resume, Train
from esjax.cli.weights import Export, Import, ImportNpy
from esjax.errors import EsjaxError

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Any] = {
    "train": Train,
    "resume": Resume,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "tune": Tune,
    "generate": Generate,
    "plot": Plot,
    "dashboard": Dashboard,
    "serve": Serve,
    "join": Join,
    "status": Status,
    "token": Token,
    "replay": Replay,
    "export": Export,
    "import": Import,
    "import-npy": ImportNpy,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command and its arguments; None: those of the program.

    Raises:
        SystemExit: With code 2 after an error that the user can correct, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = open_console(stderr=True)
    try:
        with ExitStack() as stack:
            stack.callback(_flush)
            _parse(words).run(console)
    except EsjaxError as error:
        _fail(console, str(error))
    except KeyboardInterrupt:  # a program handles it in `esjax.__main__`
        sys.exit(130)
    except OSError as error:  # a full disk, a removed folder
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _let_go()
            return
        _fail(console, f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _parse(words: list[str]) -> Any:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    if words[0] == "--version":
        print(f"esjax {__version__} (JAX {version('jax')}, Python {platform.python_version()})")
        sys.exit(0)
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise EsjaxError(
            f"there is no command {name!r}; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
        )
    if name in ("train", "serve", "sweep"):
        return parse_settings(COMMANDS[name], name, rest)
    return tyro.cli(COMMANDS[name], args=rest, prog=f"esjax {name}", config=(tyro.conf.DisallowNone,), registry=PATHS)


def _flush() -> None:
    """Flush the output, while a failure can still be reported."""
    if sys.stdout is None:  # the caller closed it
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise EsjaxError(f"cannot write the output: {error.strerror}") from error


def _reader_is_gone() -> bool:
    """Return whether the reader of the output has gone, as after `| head`."""
    poller = select.poll()
    for descriptor in (1, 2):
        poller.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def _let_go() -> None:
    """Discard output that cannot be written; otherwise Python retries at exit and prints an error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(console: Console, message: str) -> NoReturn:
    try:
        console.print(f"error: {message}", style="red", soft_wrap=True)
    finally:  # even if the message cannot be written
        _let_go()
        sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: esjax COMMAND ...",
            "",
            "Train language models with evolution strategies.",
            "",
            *lines,
            "",
            "esjax COMMAND --help lists the options of a command; esjax --version prints the versions.",
        ]
    )
