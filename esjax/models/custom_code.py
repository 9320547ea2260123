"""Custom code given as PATH.py:FUNCTION: reads the file, loads it, and compares its hash with the recorded one.

The code is trusted: loading a file runs it, as importing a module does. Imports in the file look into its folder first.
The hash covers the file alone, not its imports.
"""

import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

from esjax.config.custom_names import OPTIONS, SHOWN, Code, is_code
from esjax.errors import EsjaxError
from esjax.models.custom import Custom, check_given
from esjax.paths import given_path

NOTHING: Mapping[str, Code] = MappingProxyType({})


def refuse(line: str) -> NoReturn:
    """Raise EsjaxError: for commands that cannot continue with changed code."""
    raise EsjaxError(f"{line}; put the old file back, or train anew")


def gather(known: Mapping[str, Code] = NOTHING, changed: Callable[[str], None] = refuse, /, **given: Any) -> Custom:
    """Collect the custom parts of a run and load those that are code in a file.

    Args:
        known: By kind, the code that the run began with; used for kinds that are not given.
        changed: Called with a message, before anything is loaded, if a hash differs from the known one.
        given: By kind, see `Custom`: a function or a transformation, PATH.py:FUNCTION, or None. The function for an
            optimizer takes no arguments and returns the transformation.

    Raises:
        EsjaxError: A file cannot be read or loaded or lacks the function, or a value is not valid for its kind.
    """
    values, code, sources = dict(given), {}, {}
    for kind in OPTIONS:
        value = given.get(kind)
        if is_code(value) or (value is None and kind in known):
            code[kind], sources[kind] = _read(kind, value or str(known[kind]), is_known=value is None)
            if kind in known and code[kind].digest != known[kind].digest:
                was, now = (one.digest[:SHOWN] for one in (known[kind], code[kind]))
                changed(f"the {kind} {code[kind]} has changed since the run was begun (SHA-256 {was}, now {now})")
        else:
            check_given(kind, value)
    for kind, one in code.items():
        function = _function(one, _module(one, sources[kind]))
        values[kind] = _transformation(one, function) if kind == "optimizer" else function
    return Custom(**values, code=code)


def _read(kind: str, word: str, is_known: bool) -> tuple[Code, bytes]:
    """Read the file of PATH.py:FUNCTION; return its identity and its source."""
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
    return Code(str(path), name, hashlib.sha256(source).hexdigest()), source


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


def _function(code: Code, module: ModuleType) -> Callable[..., Any]:
    """Return the function of a module, or raise EsjaxError."""
    if not hasattr(module, code.name):
        there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(code.name, there, 1)
        raise EsjaxError(f"{code.path!r} has no {code.name}" + (f"; did you mean {near[0]}?" if near else ""))
    function = getattr(module, code.name)
    if not callable(function):
        raise EsjaxError(f"{code} is of type {type(function).__name__}; name a function")
    return function


def _transformation(code: Code, function: Callable[..., Any]) -> Any:
    """Call a function without arguments to make the optimizer."""
    signature = inspect.signature(function)
    try:
        signature.bind()
    except TypeError as error:
        raise EsjaxError(
            f"{code} takes {signature}; a function for the optimizer takes nothing, and returns an optax transformation"
        ) from error
    return function()
