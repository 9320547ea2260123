"""The command line: arguments in, one clear line out when they are wrong."""

import difflib
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

import tyro
from rich.console import Console

import esjax
from esjax.cli.exchange import Export, Import, ImportNpy
from esjax.cli.hosts import Join, Replay, Serve, Status, Token
from esjax.cli.look import Dashboard, Plot
from esjax.cli.settings import parse_settings
from esjax.cli.shared import LITERAL, PATHS
from esjax.cli.sweep import Sweep
from esjax.cli.train import Resume, Train
from esjax.cli.use import Evaluate, Generate, Tune
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
    """Run a command; exit with 2 on a mistake that a person can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True, **LITERAL)
    try:
        _parse(words).run(console)
    except EsjaxError as error:
        _fail(console, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a disk that filled up, a folder that was taken away
        _fail(console, f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _parse(words: list[str]) -> Any:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    if words[0] == "--version":
        print(f"esjax {esjax.__version__} (JAX {version('jax')}, Python {platform.python_version()})")
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


def _fail(console: Console, message: str) -> NoReturn:
    console.print(f"error: {message}", style="red", soft_wrap=True)
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
            "esjax COMMAND --help lists the options of a command, esjax --version the versions.",
        ]
    )
