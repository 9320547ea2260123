"""Parses settings on the command line: a YAML file, the name of a model, and options."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import tyro

from esjax.cli.shared import PATHS, CustomOptions, Watching
from esjax.config.custom_names import OPTIONS, is_code, unused_settings
from esjax.config.errors import setting_names, wrong_name
from esjax.config.models import MODELS
from esjax.config.names import change, value_of
from esjax.config.settings import VARIANTS, Config, from_yaml, replace
from esjax.data.text_files import read_text
from esjax.errors import EsjaxError
from esjax.paths import given_path


class _Option(NamedTuple):
    """An option on the command line.

    Attributes:
        typed: The option as typed, with dashes.
        name: Name of the setting: es.exact_logits, also for --es.no-exact-logits.
        words: Values of the option.
    """

    typed: str
    name: str
    words: list[str]

    def value(self, default: Any) -> Any:
        """Return the value as strings; its kind is that of `default`."""
        if isinstance(default, bool):
            return _name(self.typed) == self.name
        if len(self.words) < _fewest(default):
            raise EsjaxError(f"{self.typed} needs {'a name and a number' if isinstance(default, dict) else 'a value'}")
        if not isinstance(default, dict):
            return self.words[0]
        names = self.words[::2]
        if len(set(names)) < len(names):
            raise EsjaxError(f"{self.typed} names {max(names, key=names.count)} twice; leave one of them out")
        return dict(zip(names, self.words[1::2], strict=True))


def parse_settings(command: Any, name: str, words: Sequence[str]) -> Any:
    """Read settings from a file, then the name of a model, then options; later ones override earlier ones.

    Tyro parses the options of the command and prints the help. Settings are parsed here, so that an error is one line.

    Args:
        command: A dataclass whose field `settings` is a `Config`.
        name: Name of the command.
        words: Arguments after the command.

    Raises:
        EsjaxError: An option does not exist, or its value is not allowed.
    """
    of_command = _command_options(command)
    options, loose = _cut(
        words, {**of_command, **{key: value for one in VARIANTS for key, value in _defaults(one).items()}}
    )
    config = [option.value(None) for option in options if option.name == "config"]
    settings = from_yaml(read_text(given_path(config[-1])), config[-1]) if config else Config()
    settings, code = _choose_model(
        settings, loose + [option.value(None) for option in options if option.name == "model"]
    )
    known = {**of_command, **_defaults(settings)}
    values: dict[str, Any] = {}
    rest: list[str] = []
    for option in options:
        if option.name not in known:
            raise EsjaxError(wrong_name(option.name, [*known], VARIANTS, "option", _typed))
        value = option.value(known[option.name])
        if option.name not in of_command:
            values[option.name] = value
        elif option.name != "model":
            rest.append(option.typed if isinstance(value, bool) else f"{option.typed}={value}")
    rest += [f"{OPTIONS['model']}={word}" for word in code]
    custom = [kind for kind, typed in OPTIONS.items() if any(word.startswith(f"{typed}=") for word in rest)]
    for name in unused_settings(custom, values):
        kind = "model" if name.startswith("model.") else "optimizer"
        raise EsjaxError(f"{_typed(name)} changes nothing in the {kind} of a file; set it there, or leave it out")
    if not any(option.name in ("h", "help") for option in options):
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


def _cut(words: Sequence[str], defaults: Mapping[str, Any]) -> tuple[list[_Option], list[str]]:
    """Split arguments into options with their values, and words that belong to no option.

    Args:
        words: The arguments.
        defaults: Default values of all options, by name. An option with a Boolean default takes no value.
    """
    groups: list[list[str]] = [[""]]
    for word in words:
        if word.startswith("--") or word == "-h":
            typed, *value = word.split("=", 1)
            groups.append([typed, *value])
        else:
            groups[-1].append(word)
    options, loose = [], groups[0][1:]
    for typed, *after in groups[1:]:
        name = _name(typed)
        positive = re.sub(r"(^|\.)no_", r"\1", name)
        if isinstance(defaults.get(positive), bool):
            name = positive
        default = defaults.get(name)
        most = len(after) // 2 * 2 if isinstance(default, dict) else _fewest(default)
        options.append(_Option(typed, name, after[:most]))
        loose += after[most:]
    return options, loose


def _fewest(default: Any) -> int:
    """Return the number of values that an option needs."""
    return 0 if isinstance(default, bool) else 2 if isinstance(default, dict) else 1


def _name(typed: str) -> str:
    return typed.lstrip("-").replace("-", "_")


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _defaults(settings: Config) -> dict[str, Any]:
    return {name: value_of(settings, name) for name in setting_names(settings)}


def _command_options(command: Any) -> dict[str, Any]:
    """Return the options of a command that are not settings, with their defaults."""
    options: dict[str, Any] = {"h": False, "help": False}
    for field in fields(command):
        if field.name == "watching":
            options |= {option.name: option.default for option in fields(Watching)}
        elif field.name == "custom":
            options |= {OPTIONS[option.name].lstrip("-"): option.default for option in fields(CustomOptions)}
        elif field.name != "settings":
            options[field.name] = field.default
    return options
