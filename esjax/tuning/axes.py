"""A grid of settings: every combination of the values of some axes, around base settings."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esjax.config.errors import setting_names, wrong_name
from esjax.config.names import change, value_of
from esjax.config.settings import MODELS, VARIANTS, Config, replace
from esjax.errors import EsjaxError

LONGEST_NAME = 200
"""Characters of a trial's name: it is the name of a folder."""


class Trial(NamedTuple):
    """One combination.

    Attributes:
        name: Tells it from the others of its grid, and can be the name of a folder: `es.sigma=0.1,seed=3`.
        values: By axis, as the settings hold them.
        config: All settings.
    """

    name: str
    values: Mapping[str, Any]
    config: Config


def parse_axis(words: str) -> tuple[str, list[str]]:
    """Cut `es.sigma=0.05,0.1` into a name and values.

    Raises:
        EsjaxError: It is of another form.
    """
    name, equals, values = words.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not (name and equals and all(parts)):
        raise EsjaxError(f"{words!r} is no axis; give a setting and its values, such as es.sigma=0.05,0.1")
    return name.strip().replace("-", "_"), parts


def parse_axes(all_words: Sequence[str]) -> dict[str, list[str]]:
    """Cut several, see `parse_axis`.

    Raises:
        EsjaxError: One is of another form, or names the setting of another.
    """
    axes: dict[str, list[str]] = {}
    for words in all_words:
        name, values = parse_axis(words)
        if name in axes:
            raise EsjaxError(f"{name} is an axis twice; give all of its values in one")
        axes[name] = values
    return axes


def make_grid(base: Config, axes: Mapping[str, Sequence[Any]]) -> list[Trial]:
    """Combine the values of all axes, the last one varying fastest.

    Args:
        base: Settings of what is no axis.
        axes: Values by the name of a setting, `es.sigma`, or `model`, whose values are names of models. A text stands
            for what it would on the command line.

    Raises:
        EsjaxError: There is no such setting, a value or a combination is not allowed, or two come to the same.
    """
    if not axes:
        raise EsjaxError("there is no axis; give at least one, such as es.sigma=0.05,0.1")
    for name, values in axes.items():
        if isinstance(values, str) or not len(values):
            raise EsjaxError(f"the axis {name} needs a list of values, got {values!r}")
    combinations = itertools.product(*axes.values())
    shared = _shared_folders(axes.get("data.text", ()))
    trials = [_make_trial(base, dict(zip(axes, values, strict=True)), shared) for values in combinations]
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise EsjaxError(f"two runs would be called {name}; name each value once")
        if len(name) > LONGEST_NAME:
            raise EsjaxError(
                f"the name {name[:60]}… of a run is longer than {LONGEST_NAME} characters; take fewer axes"
            )
    return trials


def _make_trial(base: Config, wanted: Mapping[str, Any], shared: str) -> Trial:
    chosen = value_of(base, "model")
    model = wanted.get("model", chosen)
    if model not in MODELS:
        raise EsjaxError(f"there is no model {model!r}; there are {', '.join(MODELS)}")
    if model != chosen:
        base = replace(base, model=MODELS[model]())
    values = {name: value for name, value in wanted.items() if name != "model"}
    known = setting_names(base)
    for name in values:
        if name not in known:
            raise EsjaxError(wrong_name(name, known, VARIANTS))
        if isinstance(value_of(base, name), dict):
            raise EsjaxError(f"{name} holds several numbers and can be no axis; set it for the whole grid")
    try:
        config = change(base, values)
    except EsjaxError as error:
        said = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise EsjaxError(f"{said}: {error}") from error
    typed = {name: value_of(config, name) for name in wanted}
    name = ",".join(f"{name}={_plain(str(value).removeprefix(shared))}" for name, value in typed.items())
    return Trial(name, typed, config)


def _shared_folders(texts: Sequence[Any]) -> str:
    """Return the beginning of absolute paths that a trial's name can do without: the folders that all of them share."""
    folders = [text.rpartition("/")[0].split("/") for text in texts if isinstance(text, str) and text.startswith("/")]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{part}/" for part, *_ in shared)


def _plain(value: str) -> str:
    """Write a value so that it can be in the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", value)
