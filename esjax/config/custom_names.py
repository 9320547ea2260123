"""Names of custom models, losses, rewards, tools and optimizers: in records, in errors and on the command line."""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import msgspec

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "model": "--model",
        "loss": "--loss.function",
        "reward": "--reward.function",
        "tool": "--reward.tool",
        "optimizer": "--optim.custom",
    }
)
"""The command-line option of each kind; it takes PATH.py:FUNCTION."""

CODE = " code"
"""Suffix of the key under which a host reports the hash of the code of a kind."""

SHOWN = 12
"""Digits of a hash that messages show."""

LONGEST, MARK = 100, " #"
"""Most characters of an optimizer's name before its hash, and the text between name and hash."""


class Code(msgspec.Struct, frozen=True):
    """A function in a Python file.

    Attributes:
        path: Absolute path of the file.
        name: Name of the function.
        digest: SHA-256 of the file, in hexadecimal digits.
    """

    path: str
    name: str
    digest: str

    @classmethod
    def of(cls, path: str, name: str, source: bytes) -> "Code":
        """Name a function of a file with this content."""
        return cls(path, name, hashlib.sha256(source).hexdigest())

    def __str__(self) -> str:
        """Return PATH.py:FUNCTION, as on the command line."""
        return f"{self.path}:{self.name}"


def is_code(value: object) -> bool:
    """Return whether a value is a string of the form PATH.py:FUNCTION."""
    path, _, name = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return path.endswith(".py") and name.isidentifier()


def identities(names: Mapping[str, str], code: Mapping[str, Code]) -> dict[str, str]:
    """Return what a host and its coordinator compare: by kind, the name, and the hash of the code if there is one."""
    return {**names, **{f"{kind}{CODE}": one.digest for kind, one in code.items()}}


def describe_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return why a host cannot take part whose custom parts are `theirs`, see `identities`, or "".

    Parts are compared by name, and by the hash of their file where both sides have one.
    """
    wanted, names = ({kind: one[kind] for kind in sorted(one.keys() & OPTIONS)} for one in (ours, theirs))
    if names != wanted:
        needed = ", ".join(f"{kind} {name}" for kind, name in wanted.items()) or "no custom parts"
        options = " ".join(f"{OPTIONS[kind]} PATH.py:FUNCTION" for kind in wanted)
        return f"the run has {needed}; join with the same{f': {options}' if options else ''}"
    for kind, name in wanted.items():
        was, found = (one.get(f"{kind}{CODE}", "") for one in (ours, theirs))
        if was and found and was != found:
            return (
                f"the file of this host's {kind} {name} (SHA-256 {found[:SHOWN]}) is not the coordinator's "
                f"({was[:SHOWN]}); copy that one here"
            )
    return ""


def unused_settings(kinds: Iterable[str], names: Iterable[str]) -> list[str]:
    """List those of the named settings that have no effect with a custom model or optimizer."""
    instead = [f"{section}." for kind, section in (("model", "model"), ("optimizer", "optim")) if kind in kinds]
    return [
        name for name in names if any(f"{name}.".startswith(section) for section in instead) and name != "optim.average"
    ]


def name_of(value: object) -> str:
    """Return the qualified name of a function, or the type of any other value."""
    if isinstance(value, partial):
        return name_of(value.func)
    return getattr(value, "__qualname__", type(value).__name__)


def name_of_optimizer(transformation: Any) -> str:
    """Name an optax transformation by the functions that it consists of and the numbers in their closures.

    Returns:
        For example `scale_by_adam(0.9, 0.999, 1e-08, 0.0, None, False), scale(-0.01) #` and eight digits of a hash. The
        hash covers the whole name before it was shortened, and `init`. The code of the functions is not hashed.
    """
    shown = _describe(transformation.update, ())
    whole = _describe((transformation.init, transformation.update), (), everything=True)
    return f"{shown[:LONGEST]}{MARK}{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _describe(value: Any, around: tuple[int, ...], everything: bool = False) -> str:
    """Describe the values in a function's closure, without addresses; `around` holds the ids of enclosing values."""

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
