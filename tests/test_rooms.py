"""The rooms of the package: what import-linter's contracts in pyproject.toml do not say."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import esjax

PACKAGE = Path(__file__).parents[1] / "esjax"

PURE = (
    "esjax.core",
    "esjax.exchange",
    "esjax.hosts.coordination",
    "esjax.hosts.protocol",
    "esjax.models",
    "esjax.replica",
)
IMPURE = {"time", "os", "pathlib", "logging", "socket", "random", "datetime", "threading", "signal", "io", "glob"}
READS_FILES = {"esjax.models.custom.code"}
MOST_FILES = 14


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["esjax", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at the top, in a function or for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("room", PURE)
def test_these_rooms_know_no_clock_file_socket_environment_or_log(room: str) -> None:
    inside = [name for name in modules() if f"{name}.".startswith(f"{room}.") and name not in READS_FILES]
    assert inside
    for name in inside:
        assert not {imported.split(".")[0] for imported in imports(modules()[name])} & IMPURE, name


def test_the_core_is_the_package_that_stands_by_itself() -> None:
    core = {name for name in modules() if f"{name}.".startswith("esjax.core.")}
    for name in core:
        assert {i for i in imports(modules()[name]) if i.split(".")[0] == "esjax"} <= core


def test_no_room_is_crowded() -> None:
    rooms = Counter(path.parent for path in modules().values())
    assert max(rooms.values()) <= MOST_FILES, rooms.most_common(1)


def test_no_module_beside_the_rooms_has_the_name_of_what_is_public() -> None:
    inside = {path.stem for path in PACKAGE.iterdir()}
    assert not inside & set(esjax.__all__)


def test_one_file_knows_orbax() -> None:
    users = {name for name, path in modules().items() if any(m.startswith("orbax") for m in imports(path))}
    assert users == {"esjax.runs.checkpoint"}


def test_one_file_knows_libraries_of_models() -> None:
    def names(path: Path) -> set[str]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        return imports(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}

    known = ("flax.nnx", "flax.linen", "equinox")
    users = {room for room, path in modules().items() if any(name.startswith(known) for name in names(path))}
    assert users == {"esjax.models.adapters"}
