"""What a run is given beside its settings, and what it is called in records, in errors and on the command line."""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec

OPTIONS: Mapping[str, str] = MappingProxyType(
    {"model": "--model", "loss": "--loss.function", "reward": "--reward.function", "optimizer": "--optim.custom"}
)
"""By kind, the option that takes PATH.py:FUNCTION."""

CODE = " code"
"""Ends the key under which a host states the hash of the code of a kind, beside its name."""

SHOWN = 12
"""Digits of a hash that a person is shown."""

LONGEST, MARK = 100, " #"
"""Characters of an optimizer's name before its hash, and what stands between the two."""


class Code(msgspec.Struct, frozen=True):
    """A function in a Python file.

    Attributes:
        path: Absolute path of the file.
        name: Of the function.
        digest: SHA-256 of the file, in hexadecimal digits.
    """

    path: str
    name: str
    digest: str

    def __str__(self) -> str:
        """Write it as it is given on the command line."""
        return f"{self.path}:{self.name}"


def is_code(value: object) -> bool:
    """Tell whether something is a text of the form PATH.py:FUNCTION."""
    path, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return path.endswith(".py") and name.isidentifier()


def identities(names: Mapping[str, str], code: Mapping[str, Code]) -> dict[str, str]:
    """Return what a host and its coordinator compare: by kind, the name, and the hash of the code if it is known."""
    return {**names, **{f"{kind}{CODE}": one.digest for kind, one in code.items()}}


def unused_settings(kinds: Iterable[str], names: Iterable[str]) -> list[str]:
    """List the settings, among some, that a model or an optimizer given beside them takes the place of."""
    instead = [f"{section}." for kind, section in (("model", "model"), ("optimizer", "optim")) if kind in kinds]
    return [
        name for name in names if any(f"{name}.".startswith(section) for section in instead) and name != "optim.average"
    ]


def name_of(value: object) -> str:
    """Name a function, with the place where it was made; anything else by its type."""
    if isinstance(value, partial):
        return name_of(value.func)
    return getattr(value, "__qualname__", type(value).__name__)


def name_of_optimizer(transformation: Any) -> str:
    """Name an optax transformation by the functions that it consists of and the numbers that they hold.

    Returns:
        `scale_by_adam(0.9, 0.999, 1e-08, 0.0, None, False), scale(-0.01) #`, and eight digits of a hash, which covers
        what is cut off and what only `init` holds. Two of one name may still differ in what a function computes.
    """
    shown = _describe(transformation.update, ())
    whole = _describe((transformation.init, transformation.update), (), everything=True)
    return f"{shown[:LONGEST]}{MARK}{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _describe(value: Any, around: tuple[int, ...], everything: bool = False) -> str:
    """Describe what a function holds, without any address; `around` are the values that this one is part of."""

    def inside(values: Iterable[Any]) -> str:
        return ", ".join(filter(None, (_describe(one, (*around, id(value)), everything) for one in values)))

    if id(value) in around:
        return "..."
    if hasattr(value, "init") and hasattr(value, "update"):
        return inside([value.init, value.update] if everything else [value.update])
    if isinstance(value, partial):
        return inside([value.func, value.args, value.keywords])
    if inspect.ismethod(value):
        return f"{value.__qualname__}({inside([vars(value.__self__)])})"
    if inspect.isfunction(value):
        held = inspect.getclosurevars(value).nonlocals
        name = value.__qualname__.partition(".<locals>")[0]
        only_wraps = held and all(_holds_functions(one) for one in held.values())
        return inside(held.values()) if only_wraps and not everything else f"{name}({inside(held.values())})"
    if isinstance(value, Mapping):
        return inside(part for key in value for part in (str(key), value[key]))
    if isinstance(value, list | tuple):
        return inside(value)
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return f"{value.dtype}{list(value.shape)} {hashlib.sha256(value.tobytes()).hexdigest()[:8]}"
    return name_of(value)


def _holds_functions(value: Any) -> bool:
    return callable(value) or (isinstance(value, tuple) and all(map(_holds_functions, value)))
