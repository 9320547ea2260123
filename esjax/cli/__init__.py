"""The command line: from words to a command with its settings, which runs. A wrong word is an error of one line.

tyro parses the commands' own options and prints the help. docs/design.md says why it does not parse the settings.
"""

import difflib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from importlib.metadata import version
from typing import Any, NamedTuple, NoReturn

import tyro
from rich.console import Console

from esjax import __version__
from esjax.cli.hosts import Join, Replay, Serve, Status, Token
from esjax.cli.infer import Evaluate, Generate, Tune
from esjax.cli.plot import Dashboard, Plot
from esjax.cli.shared import PATHS, open_console
from esjax.cli.sweep import Sweep
from esjax.cli.train import Resume, Train
from esjax.cli.weights import Export, Import, ImportNpy
from esjax.config.custom_names import OPTIONS, is_code, unused_settings
from esjax.config.errors import setting_names, wrong_name
from esjax.config.models import MODELS
from esjax.config.names import change, value_of
from esjax.config.settings import VARIANTS, Config, from_yaml, replace
from esjax.data.text_files import read_text
from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.terminal import discard_output, flush_output, reader_is_gone
from esjax.texts import PROSE, legible

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
            stack.callback(flush_output)
            _parse(words).run(console)
    except EsjaxError as error:
        _fail(console, str(error))
    except KeyboardInterrupt:  # a program handles it in `esjax.__main__`
        sys.exit(130)
    except OSError as error:  # a full disk, a removed folder
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            discard_output()
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
        return _parse_settings(COMMANDS[name], name, rest)
    return tyro.cli(COMMANDS[name], args=rest, prog=f"esjax {name}", config=(tyro.conf.DisallowNone,), registry=PATHS)


class _Option(NamedTuple):
    """An option on the command line.

    Attributes:
        typed: The option as typed, with dashes.
        name: Name of the setting: data.carry, also for --data.no-carry.
        value: Its value; None: no word follows an option that there is not.
    """

    typed: str
    name: str
    value: str | bool | dict[str, str] | None


def _parse_settings(command: Any, name: str, words: Sequence[str]) -> Any:
    """Read settings from a file, then the name of a model, then options; later ones override earlier ones.

    Args:
        command: A dataclass whose field `settings` is a `Config`.
        name: Name of the command.
        words: Arguments after the command.

    Raises:
        EsjaxError: An option does not exist, or its value is not allowed.
    """
    own = {"h": False, "help": False, **_own_options(command)}
    defaults = {setting: value_of(one, setting) for one in VARIANTS for setting in setting_names(one)}
    options, loose = _split(words, {**own, **defaults})
    file, models = ([str(option.value) for option in options if option.name == kind] for kind in ("config", "model"))
    settings = from_yaml(read_text(given_path(file[-1])), file[-1]) if file else Config()
    settings, code = _choose_model(settings, loose + models)
    known = [*own, *setting_names(settings)]
    for option in options:
        if option.name not in known:
            raise EsjaxError(wrong_name(option.name, known, VARIANTS, "option", _typed, name))
        if option.value == {}:
            raise EsjaxError(f"{option.typed} needs a name and a number")
    values = {option.name: option.value for option in options if option.name not in own}
    rest = [
        option.typed if isinstance(option.value, bool) else f"{option.typed}={option.value}"
        for option in options
        if option.name in own and option.name != "model"
    ]
    rest += [f"{OPTIONS['model']}={word}" for word in code]
    custom = [kind for kind, typed in OPTIONS.items() if any(word.startswith(f"{typed}=") for word in rest)]
    for setting in unused_settings(custom, values):
        kind = "model" if setting.startswith("model.") else "optimizer"
        raise EsjaxError(f"{_typed(setting)} changes nothing in the {kind} of a file; set it there, or leave it out")
    if not {"-h", "--help"} & set(rest):
        settings = change(settings, values)
    return tyro.cli(
        command,
        args=rest,
        prog=f"esjax {name}",
        default=command(settings),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.DisallowNone),
        registry=PATHS,
    )


def _choose_model(settings: Config, words: Sequence[str]) -> tuple[Config, list[str]]:
    """Choose the model that is named; return the settings, and the model as a list if it is code in a file."""
    for word in words:
        if word.endswith(".py"):
            raise EsjaxError(f"{word!r} is a file; name the function in it that builds the model, {word}:FUNCTION")
        if word not in MODELS and not is_code(word):
            raise EsjaxError(f"{word!r} is neither the value of an option nor a model; models are {', '.join(MODELS)}")
    if len(words) > 1:
        raise EsjaxError(f"one model at a time, not {' and '.join(words)}")
    kinds = [MODELS[word] for word in words if word in MODELS]
    if kinds and not isinstance(settings.model, kinds[0]):  # the same model keeps its settings from the file
        settings = replace(settings, model=kinds[0]())
    return settings, [word for word in words if word not in MODELS]


def _split(words: Sequence[str], defaults: Mapping[str, Any]) -> tuple[list[_Option], list[str]]:
    """Split arguments into options with their values, and words that belong to no option.

    Args:
        words: The arguments.
        defaults: Default values of all options, by name. One that is true or false takes no word, a mapping takes pairs
            of words, and all others take one.

    Raises:
        EsjaxError: An option lacks its value.
    """
    groups: list[list[str]] = [[""]]
    for word in words:
        if word.startswith("--") or word == "-h":
            groups.append(word.split("=", 1))
        else:
            groups[-1].append(word)
    options, loose = [], groups[0][1:]
    for typed, *after in groups[1:]:
        name = typed.lstrip("-").replace("-", "_")
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        default = defaults.get(positive if isinstance(defaults.get(positive), bool) else name)
        value: str | bool | dict[str, str] | None
        if isinstance(default, bool):
            taken, value, name = 0, name == positive, positive
        elif isinstance(default, dict):
            taken = len(after) // 2 * 2
            value = dict(zip(after[:taken:2], after[1:taken:2], strict=True))
            if len(value) < taken // 2:
                twice = max(value, key=after[:taken:2].count)
                raise EsjaxError(f"{typed} names {twice} twice; leave one of them out")
        else:
            taken, value = 1, after[0] if after else None
            if value is None and name in defaults:
                raise EsjaxError(f"{typed} needs a value")
        options.append(_Option(typed, name, value))
        loose += after[taken:]
    return options, loose


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _own_options(command: Any) -> dict[str, Any]:
    """Return the options of a command that are not settings, with their defaults."""
    options: dict[str, Any] = {}
    for field in fields(command):
        if isinstance(field.default_factory, type):  # a group of options
            options |= _own_options(field.default_factory)
        elif field.name != "settings":
            options[OPTIONS.get(field.name, field.name).lstrip("-")] = field.default
    return options


def _fail(console: Console, message: str) -> NoReturn:
    try:
        console.print(f"error: {legible(message, PROSE)}", style="red", soft_wrap=True)
    finally:  # even if the message cannot be written
        discard_output()
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
