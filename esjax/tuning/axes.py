"""A grid of settings: every combination of the values of some settings, the axes."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from esjax.config.errors import setting_names, wrong_name
from esjax.config.models import MODELS
from esjax.config.names import change, value_of
from esjax.config.settings import VARIANTS, Config, replace
from esjax.errors import EsjaxError

LONGEST_NAME = 200
"""Most characters of the name of a trial, which is the name of its folder."""


class Trial(NamedTuple):
    """One combination of values.

    Attributes:
        name: Unique in the grid and usable as the name of a folder: `es.sigma=0.1,seed=3`.
        values: Values by axis, with the types of the settings.
        config: All settings.
    """

    name: str
    values: Mapping[str, Any]
    config: Config


def parse_axis(words: str) -> tuple[str, list[str]]:
    """Parse `es.sigma=0.05,0.1` into a name and values.

    Raises:
        EsjaxError: The text has another form.
    """
    name, equals, values = words.partition("=")
    parts = [part.strip() for part in values.split(",")]
    if not (name and equals and all(parts)):
        raise EsjaxError(f"{words!r} is no axis; give a setting and its values, such as es.sigma=0.05,0.1")
    return name.strip().replace("-", "_"), parts


def parse_axes(all_words: Sequence[str]) -> dict[str, list[str]]:
    """Parse several axes, see `parse_axis`.

    Raises:
        EsjaxError: A text has another form, or two axes have the same name.
    """
    axes: dict[str, list[str]] = {}
    for words in all_words:
        name, values = parse_axis(words)
        if name in axes:
            raise EsjaxError(f"{name} is an axis twice; give all of its values in one")
        axes[name] = values
    return axes


def make_grid(base: Config, axes: Mapping[str, Sequence[Any]]) -> list[Trial]:
    """Combine the values of all axes; the last axis varies fastest.

    Args:
        base: Settings that are not axes.
        axes: Values by the name of a setting, such as `es.sigma`, or by `model`, whose values are names of models. A
            string is parsed as on the command line.

    Raises:
        EsjaxError: A setting does not exist, a value or a combination is not allowed, or two trials have the same name.
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
        combination = ", ".join(f"{name}={value}" for name, value in wanted.items())
        raise EsjaxError(f"{combination}: {error}") from error
    typed = {name: value_of(config, name) for name in wanted}
    name = ",".join(f"{name}={_plain(str(value).removeprefix(shared))}" for name, value in typed.items())
    return Trial(name, typed, config)


def _shared_folders(texts: Sequence[Any]) -> str:
    """Return the folders that all absolute paths share; names of trials leave them out."""
    folders = [text.rpartition("/")[0].split("/") for text in texts if isinstance(text, str) and text.startswith("/")]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{part}/" for part, *_ in shared)


def _plain(value: str) -> str:
    """Replace characters that do not belong in the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", value)
