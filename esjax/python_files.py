"""Loads a function from a Python file by its path. It imports no JAX, so worker processes start fast."""

import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from esjax.config.custom_names import Code
from esjax.errors import EsjaxError


def load_function(code: Code, source: bytes) -> Callable[..., Any]:
    """Run a file and return one of its functions; a process runs the same file once.

    Imports in the file look into its folder first.

    Args:
        code: The file, the function, and the hash of the file.
        source: The content of the file.

    Raises:
        EsjaxError: The file cannot be loaded or lacks the function.
    """
    module = _module(code, source)
    if not hasattr(module, code.name):
        there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(code.name, there, 1)
        raise EsjaxError(f"{code.path!r} has no {code.name}" + (f"; did you mean {near[0]}?" if near else ""))
    function = getattr(module, code.name)
    if not callable(function):
        raise EsjaxError(f"{code} is of type {type(function).__name__}; name a function")
    return function


def call_without_arguments(code: Code, function: Callable[..., Any], what: str, returns: str) -> Any:
    """Call a function of a file that makes something.

    Raises:
        EsjaxError: It needs arguments; the message says what it makes, and what it returns.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # a builtin does not say
        return function()
    try:
        signature.bind()
    except TypeError as error:
        raise EsjaxError(
            f"{code} takes {signature}; a function for {what} takes nothing, and returns {returns}"
        ) from error
    return function()


def _module(code: Code, source: bytes) -> ModuleType:
    """Run a file as a module, or return the module if this process ran the same file before."""
    name = f"esjax_code_{hashlib.sha256(code.path.encode(errors='surrogateescape')).hexdigest()[:8]}_{code.digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = code.path
    with ExitStack() as undo, _first_in_path(str(Path(code.path).parent)):
        sys.modules[name] = module  # dataclasses look their module up there
        undo.callback(sys.modules.pop, name)
        try:
            exec(compile(source, code.path, "exec"), vars(module))
        except SyntaxError as error:
            raise EsjaxError(f"cannot load {error.filename!r}, line {error.lineno}: {error.msg}") from error
        except ImportError as error:
            raise EsjaxError(f"cannot load {code.path!r}: {error}") from error
        undo.pop_all()
    return module


@contextmanager
def _first_in_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
