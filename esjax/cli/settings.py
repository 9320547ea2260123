"""Settings on the command line: a file, the name of a model, and options, read from one line of words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import tyro

from esjax.cli.shared import PATHS, CustomOptions, Watching
from esjax.config.custom_names import OPTIONS, is_code, unused_settings
from esjax.config.errors import setting_names, wrong_name
from esjax.config.names import change, value_of
from esjax.config.settings import MODELS, VARIANTS, Config, from_yaml, replace
from esjax.data.text_files import read_text
from esjax.errors import EsjaxError
from esjax.paths import given_path


class _Option(NamedTuple):
    """An option as it stands on the line.

    Attributes:
        typed: With its dashes.
        name: Of what it sets: es.exact_logits, also where it is typed --es.no-exact-logits.
        words: Its values.
    """

    typed: str
    name: str
    words: list[str]

    def value(self, default: Any) -> Any:
        """Read what it sets to, as texts; `default` tells the kind."""
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
    """Read settings from a file, then a model's name, then the options, each over the one before.

    The command's own options and the help are left to the option parser: of settings it would say in many lines, and in
    words of its own, what is said here in one.

    Args:
        command: A dataclass whose field `settings` is a `Config`.
        name: Of the command.
        words: After the command.

    Raises:
        EsjaxError: There is no such option, or it cannot have that value.
    """
    of_command = _own_options(command)
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
    """Take the model that is named by the option, or among the words that belong to none; if it is code, return it."""
    for word in words:
        if word.endswith(".py"):
            raise EsjaxError(f"{word!r} is a file; name the function in it that builds the model, {word}:FUNCTION")
        if word not in MODELS and not is_code(word):
            raise EsjaxError(f"{word!r} is neither the value of an option nor a model; models are {', '.join(MODELS)}")
    if len(words) > 1:
        raise EsjaxError(f"one model at a time, not {' and '.join(words)}")
    kinds = [MODELS[word] for word in words if word in MODELS]
    if kinds and not isinstance(settings.model, kinds[0]):  # that of the file keeps its settings
        settings = replace(settings, model=kinds[0]())
    return settings, [word for word in words if word not in MODELS]


def _cut(words: Sequence[str], defaults: Mapping[str, Any]) -> tuple[list[_Option], list[str]]:
    """Cut a line into options, each with its values, and the words that belong to none.

    Args:
        words: The line.
        defaults: Of all options, by name. What is true or false is a switch, and takes no value.
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
    """Count the values that an option needs."""
    return 0 if isinstance(default, bool) else 2 if isinstance(default, dict) else 1


def _name(typed: str) -> str:
    return typed.lstrip("-").replace("-", "_")


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _defaults(settings: Config) -> dict[str, Any]:
    return {name: value_of(settings, name) for name in setting_names(settings)}


def _own_options(command: Any) -> dict[str, Any]:
    """List a command's options that are no settings, with their defaults."""
    custom: dict[str, Any] = {"h": False, "help": False}
    for field in fields(command):
        if field.name == "watching":
            custom |= {option.name: option.default for option in fields(Watching)}
        elif field.name == "custom":
            custom |= {OPTIONS[option.name].lstrip("-"): option.default for option in fields(CustomOptions)}
        elif field.name != "settings":
            custom[field.name] = field.default
    return custom
