"""Parses settings on the command line: a YAML file, the name of a model, and options.

tyro parses the command's own options and prints the help. docs/design.md says why it does not parse the settings.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import tyro

from esjax.cli.shared import PATHS
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
        value: Its value; None: no word follows an option that there is not.
    """

    typed: str
    name: str
    value: str | bool | dict[str, str] | None


def parse_settings(command: Any, name: str, words: Sequence[str]) -> Any:
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
            raise EsjaxError(wrong_name(option.name, known, VARIANTS, "option", _typed))
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
