"""Custom code given as PATH.py:FUNCTION: reads the file, loads it, and compares its hash with the recorded one.

The code is trusted: loading a file runs it, as importing a module does, see `esjax.python_files`. The hash covers the
file alone, not its imports.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import optax

from esjax.config.custom_names import OPTIONS, SHOWN, Code, is_code
from esjax.errors import EsjaxError
from esjax.models.custom.parts import Custom, Reward, Tool, check_given
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.python_files import call_without_arguments, load_function


def refuse(line: str) -> NoReturn:
    """Raise EsjaxError: for commands that cannot continue with changed code."""
    raise EsjaxError(f"{line}; put the old file back, or train anew")


def load_custom(
    *,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
) -> Custom:
    """Collect custom parts as the user gives them, and load those that are code in a file.

    Args:
        model: See `Custom`: a function or a transformation, PATH.py:FUNCTION, or None.
        loss: Likewise.
        reward: Likewise.
        tool: Likewise.
        optimizer: Likewise. The function in a file takes no arguments and returns the transformation.

    Raises:
        EsjaxError: A file cannot be read or loaded or lacks the function, or a value is not valid for its kind.
    """
    given: dict[str, Any] = {"model": model, "loss": loss, "reward": reward, "tool": tool, "optimizer": optimizer}
    files = {kind: _File.read(kind, value) for kind, value in given.items() if is_code(value)}
    for kind, value in given.items():
        if kind not in files:
            check_given(kind, value)
    given |= {kind: file.load(kind) for kind, file in files.items()}
    return Custom(**given, code={kind: file.code for kind, file in files.items()})


def complete(given: Custom, known: Mapping[str, Code], changed: Callable[[str], None] = refuse) -> Custom:
    """Add the code in files that a run began with, for kinds that are not given.

    Args:
        given: The custom parts that are given.
        known: By kind, the code that the run began with.
        changed: Called with a message, before files of the run are loaded, if a hash differs from the known one.

    Raises:
        EsjaxError: A file cannot be read or loaded or lacks the function.
    """
    missing = {kind: str(code) for kind, code in known.items() if getattr(given, kind) is None}
    files = {kind: _File.read(kind, word, is_known=True) for kind, word in missing.items()}
    code = {**given.code, **{kind: file.code for kind, file in files.items()}}
    for kind, was in known.items():
        if kind in code and code[kind].digest != was.digest:
            hashes = f"SHA-256 {was.digest[:SHOWN]}, now {code[kind].digest[:SHOWN]}"
            changed(f"the {kind} {code[kind]} has changed since the run was begun ({hashes})")
    loaded: dict[str, Any] = {kind: file.load(kind) for kind, file in files.items()}
    return replace(given, **loaded, code=code)


class _File(NamedTuple):
    """PATH.py:FUNCTION, with the file as it was read."""

    code: Code
    source: bytes

    @classmethod
    def read(cls, kind: str, word: str, is_known: bool = False) -> "_File":
        named, _, name = word.rpartition(":")
        path = given_path(named)
        if not path.is_file():
            if is_known:
                raise EsjaxError(
                    f"the run was begun with the {kind} {name} of {str(path)!r}, and there is no such file now; put it "
                    f"back, or name it where it is: {OPTIONS[kind]} PATH.py:{name}"
                )
            raise EsjaxError(f"there is no file {str(path)!r}; {OPTIONS[kind]} takes PATH.py:FUNCTION")
        source = path.read_bytes()
        return cls(Code.of(str(path), name, source), source)

    def load(self, kind: str) -> Any:
        """Return the function, or the optimizer that it makes."""
        function = load_function(self.code, self.source)
        if kind != "optimizer":
            return function
        return call_without_arguments(self.code, function, "the optimizer", "an optax transformation")
