"""A file imports only from the rooms above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "esjax"

# From the top of the house to the ground floor; files of one tuple do not see each other.
FLOORS = [
    ("esjax.core.seeds", "esjax.core.shaping", "esjax.core.units"),
    ("esjax.core.leaves", "esjax.core.signs"),
    ("esjax.core.perturbed",),
    ("esjax.core.rules",),
    ("esjax.core.interpreter", "esjax.core.noise"),
    ("esjax.core.population",),
    ("esjax.core.gradient",),
    ("esjax.core",),
    # What is above this line imports nothing of the package but what is there itself.
    (
        "esjax",
        "esjax.errors",
        "esjax.flags",
        "esjax.mistakes",
        "esjax.names",
        "esjax.streams",
        "esjax.tokens",
        "esjax.yaml_text",
    ),
    ("esjax.config",),
    ("esjax.dotted",),
    ("esjax.axes", "esjax.models.layers", "esjax.models.model"),
    ("esjax.models.rnn", "esjax.models.gru", "esjax.models.check", "esjax.models.sequence"),
    ("esjax.models", "esjax.models.adapters", "esjax.member"),
    ("esjax.sums", "esjax.carrying"),
    ("esjax.activation", "esjax.es"),
    ("esjax.summing",),
    ("esjax.estimator", "esjax.update_record"),
    ("esjax.chunking",),
    ("esjax.score", "esjax.generate", "esjax.optimizer", "esjax.transformation", "esjax.own"),
    (
        "esjax.step_info",
        "esjax.data",
        "esjax.data.packing",
        "esjax.hosts",
        "esjax.comparing",
        "esjax.curves",
        "esjax.page",
        "esjax.plot_layout",
    ),
    ("esjax.data.delivery", "esjax.exchange"),
    ("esjax.hosts.wire", "esjax.notices"),
    (
        "esjax.hosts.effects",
        "esjax.hosts.line",
        "esjax.hosts.roster",
        "esjax.hosts.scoring",
        "esjax.hosts.tasks",
        "esjax.hosts.work",
    ),
    ("esjax.hosts.handouts", "esjax.hosts.rounds", "esjax.hosts.transfers"),
    ("esjax.hosts.chores", "esjax.hosts.steps"),
    ("esjax.hosts.coordinator", "esjax.hosts.worker"),
    # Above this line everything is pure: no clock, file, socket, environment or logging.
    ("esjax.paths",),
    (
        "esjax.data.vocabulary",
        "esjax.data.ngram",
        "esjax.files",
        "esjax.terminal",
        "esjax.text_files",
        "esjax.tracking",
        "esjax.custom_code",
    ),
    ("esjax.data.sources",),
    ("esjax.data.corpus", "esjax.ledger", "esjax.runs", "esjax.snapshot"),
    (
        "esjax.devices",
        "esjax.processes",
        "esjax.history",
        "esjax.interrupts",
        "esjax.replica",
        "esjax.trained",
        "esjax.checkpoint",
        "esjax.run_folder",
        "esjax.summary",
    ),
    ("esjax.importing",),
    (
        "esjax.import_npy",
        "esjax.held_out",
        "esjax.tensors",
        "esjax.plotting",
        "esjax.page.content",
        "esjax.trackers",
        "esjax.metrics_server",
    ),
    ("esjax.usable",),
    ("esjax.loading",),
    ("esjax.exporting",),
    (
        "esjax.hosts.flood",
        "esjax.hosts.keys",
        "esjax.hosts.address",
        "esjax.hosts.sockets",
        "esjax.hosts.local",
        "esjax.hosts.answers",
        "esjax.hosts.executor",
    ),
    ("esjax.hosts.client_transport", "esjax.hosts.server_transport"),
    ("esjax.local_steps",),
    ("esjax.gradient_cosine",),
    ("esjax.tune",),
    ("esjax.hosts.ask", "esjax.hosts.desk", "esjax.hosts.join"),
    ("esjax.hosts.serve", "esjax.training", "esjax.replaying"),
    ("esjax.progress", "esjax.sweeping", "esjax.page.report", "esjax.page.follow"),
    ("esjax.page.server",),
    ("esjax.cli.shared", "esjax.sweep_plot", "esjax.seed_means"),
    ("esjax.cli.exchange", "esjax.cli.hosts", "esjax.cli.look", "esjax.cli.sweep", "esjax.cli.train", "esjax.cli.use"),
    ("esjax.cli.settings",),
    ("esjax.cli",),
    ("esjax.__main__",),
]
CORE_FLOORS = 8
PURE_FLOORS = 25
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}

IMPURE = {"time", "os", "pathlib", "logging", "socket", "random", "datetime", "threading", "signal", "io", "glob"}


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


def test_every_file_has_a_floor() -> None:
    assert set(modules()) == set(FLOOR)


@pytest.mark.parametrize("name", [name for name in FLOOR if name != "esjax"])
def test_imports_go_up(name: str) -> None:
    for imported in imports(modules()[name]):
        if imported.split(".")[0] == "esjax":
            assert FLOOR[imported] < FLOOR[name], f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for names in FLOORS[:PURE_FLOORS] for name in names if name != "esjax"])
def test_core_is_pure(name: str) -> None:
    assert not {imported.split(".")[0] for imported in imports(modules()[name])} & IMPURE


def test_core_is_the_package_that_stands_by_itself() -> None:
    core = {name for name in FLOOR if f"{name}.".startswith("esjax.core.")}
    assert core == {name for names in FLOORS[:CORE_FLOORS] for name in names}
    for name in core:
        assert {i for i in imports(modules()[name]) if i.split(".")[0] == "esjax"} <= core


def test_one_room_knows_orbax() -> None:
    users = {name for name, path in modules().items() if any(m.startswith("orbax") for m in imports(path))}
    assert users == {"esjax.checkpoint"}


def test_one_room_knows_libraries_of_models() -> None:
    def names(path: Path) -> set[str]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        return imports(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}

    known = ("flax.nnx", "flax.linen", "equinox")
    users = {room for room, path in modules().items() if any(name.startswith(known) for name in names(path))}
    assert users == {"esjax.models.adapters"}
