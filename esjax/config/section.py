"""The base of all groups of settings: frozen, and checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from esjax.config.errors import explain, setting_names, wrong_name
from esjax.errors import EsjaxError


class _Kind(msgspec.StructMeta):
    """Metaclass of groups of settings: turns errors of the constructor into `EsjaxError`.

    msgspec does not call it while it reads a file: it adds the position in the file to a section's ValueError.
    """

    def __call__(self, *values: Any, **settings: Any) -> Any:
        for name in settings:
            if name not in self.__struct_fields__:
                raise EsjaxError(f"{self.__name__}: {wrong_name(name, setting_names(self()), ())}")
        try:
            return super().__call__(*values, **settings)
        except ValueError as error:
            raise EsjaxError(str(error)) from error


class Section(msgspec.Struct, metaclass=_Kind, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings.

    A mapping may stand for a group: `Config(es={"sigma": 0.1})` equals `Config(es=EsConfig(sigma=0.1))`.

    Raises:
        EsjaxError: A name is unknown, or a value has the wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(type(self)):
            value = _plain(getattr(self, field.name))
            try:
                msgspec.structs.force_setattr(self, field.name, msgspec.convert(value, field.type))
            except msgspec.ValidationError as error:
                said, here = str(error), f"`$.{field.name}"  # its position, seen from this section
                said = said.replace("`$", here, 1) if "`$" in said else f"{said} - at {here}`"
                raise ValueError(explain(ValueError(said), self.variants(), {field.name: value})) from error

    @classmethod
    def variants(cls) -> list[Any]:
        """Return the default settings in every form of the group, whose names and choices error messages list."""
        return [cls()]


def _plain(value: Any) -> Any:
    """Turn numbers of numpy and JAX into Python numbers, also inside mappings."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check(condition: bool, message: str) -> None:
    """Raise ValueError, which a group of settings turns into EsjaxError, unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_positive(section: Section, *names: str) -> None:
    """Check that each of these settings is None, or above 0 and finite."""
    for name in names:
        value = getattr(section, name)
        check(value is None or (math.isfinite(value) and value > 0), f"{name} must be above 0 and finite, got {value}")


def check_range(section: Section, low: float, high: float, *names: str) -> None:
    """Check that each of these settings is at least `low` and below `high`."""
    for name in names:
        value = getattr(section, name)
        check(low <= value < high, f"{name} must be at least {low} and below {high}, got {value}")
