"""Settings by their dotted names, such as `es.sigma`: read them and change them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, get_args, get_type_hints

import msgspec

from esjax.config.errors import explain
from esjax.config.models import MODELS
from esjax.config.settings import VARIANTS, Config
from esjax.errors import EsjaxError


def value_of(config: Config, name: str) -> Any:
    """Return the value of a setting; for `model`, the name of the model."""
    if name == "model":
        return next(model for model, kind in MODELS.items() if isinstance(config.model, kind))
    return _walk(config, name)


def change(config: Config, values: Mapping[str, Any]) -> Config:
    """Copy settings with some of them changed and check them together.

    Args:
        config: Settings.
        values: New values by dotted name. A string is parsed as the setting's type: None, a number, or a word.

    Raises:
        EsjaxError: A value has the wrong type, is out of range, or does not fit another setting.
    """
    changed: dict[str, Any] = msgspec.to_builtins(config)
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        inside = changed
        for part in section.split(".") if section else ():
            inside = inside[part]
        inside[last] = _read(value, get_type_hints(type(_walk(config, section)))[last])
    try:
        # Not strict: true and 1e3 are strings here.
        return msgspec.convert(changed, Config, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise EsjaxError(explain(error, VARIANTS, values)) from error


def _walk(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split(".") if name else ():
        value = getattr(value, part)
    return value


def _read(value: Any, hint: Any) -> Any:
    """Parse a string as a Python number if the setting takes one: msgspec rejects .5 and 1_000."""
    if isinstance(value, dict):
        return {name: _read(inner, get_args(hint)[1]) for name, inner in value.items()}
    if not isinstance(value, str):
        return value
    for number in (int, float):
        if number in (hint, *get_args(hint)):
            with suppress(ValueError):
                return number(value)
    return None if value == "None" and hint is not str else value
