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
        "esjax.config.mistakes",
        "esjax.config.custom_names",
        "esjax.replica.streams",
        "esjax.data.tokens",
        "esjax.config.yaml_text",
    ),
    ("esjax.config.settings",),
    ("esjax.config.names",),
    ("esjax.tuning.axes", "esjax.models.layers", "esjax.models.model"),
    ("esjax.models.rnn", "esjax.models.gru", "esjax.models.check", "esjax.models.sequence"),
    ("esjax.models", "esjax.models.adapters", "esjax.models.member"),
    ("esjax.exchange.gradient_sums", "esjax.replica.carried_state"),
    ("esjax.replica.activation", "esjax.replica.update"),
    ("esjax.replica.partial_sums",),
    ("esjax.replica.estimator", "esjax.exchange.update_record"),
    ("esjax.replica.chunking",),
    (
        "esjax.inference.score",
        "esjax.inference.generate",
        "esjax.replica.optimizer",
        "esjax.replica.transformation",
        "esjax.models.custom",
    ),
    (
        "esjax.runs.step_info",
        "esjax.data",
        "esjax.data.packing",
        "esjax.hosts",
        "esjax.tuning.intervals",
        "esjax.watch.downsampling",
        "esjax.page",
        "esjax.watch.plot_layout",
    ),
    ("esjax.data.delivery", "esjax.exchange.values"),
    ("esjax.hosts.protocol.wire", "esjax.replica.notices"),
    (
        "esjax.hosts.protocol.actions",
        "esjax.hosts.protocol.request_channel",
        "esjax.hosts.protocol.registry",
        "esjax.hosts.protocol.scoring",
        "esjax.hosts.protocol.tasks",
        "esjax.hosts.protocol.leases",
    ),
    ("esjax.hosts.protocol.downloads", "esjax.hosts.protocol.audits", "esjax.hosts.protocol.transfers"),
    ("esjax.hosts.protocol.side_tasks", "esjax.hosts.protocol.steps"),
    ("esjax.hosts.protocol.coordinator", "esjax.hosts.protocol.worker"),
    # Above this line everything is pure: no clock, file, socket, environment or logging.
    ("esjax.paths",),
    (
        "esjax.data.vocabulary",
        "esjax.data.ngram",
        "esjax.runs.durable",
        "esjax.terminal",
        "esjax.data.text_files",
        "esjax.watch.tracking",
        "esjax.models.custom_code",
    ),
    ("esjax.data.sources",),
    ("esjax.data.corpus", "esjax.runs.ledger", "esjax.runs.reader", "esjax.replica.snapshot"),
    (
        "esjax.devices.mesh",
        "esjax.devices.process_group",
        "esjax.watch.history",
        "esjax.signals",
        "esjax.replica.replica",
        "esjax.inference.language_model",
        "esjax.runs.checkpoint",
        "esjax.runs.folder",
        "esjax.watch.summary",
    ),
    ("esjax.weights.start",),
    (
        "esjax.weights.npy",
        "esjax.inference.held_out",
        "esjax.weights.safetensors",
        "esjax.watch.plotting",
        "esjax.page.content",
        "esjax.watch.trackers",
        "esjax.watch.metrics_server",
    ),
    ("esjax.inference.capabilities",),
    ("esjax.inference.loaded_run",),
    ("esjax.weights.files",),
    (
        "esjax.hosts.transport.flood_guard",
        "esjax.hosts.transport.keys",
        "esjax.hosts.transport.address",
        "esjax.hosts.transport.sockets",
        "esjax.hosts.local",
        "esjax.hosts.noise_fingerprint",
        "esjax.hosts.executor",
    ),
    ("esjax.hosts.transport.client", "esjax.hosts.transport.server"),
    ("esjax.training.local_steps",),
    ("esjax.tuning.gradient_cosine",),
    ("esjax.tuning.sigma",),
    ("esjax.hosts.status", "esjax.hosts.server_loop", "esjax.hosts.join"),
    ("esjax.hosts.serve", "esjax.training.run", "esjax.training.replay"),
    ("esjax.watch.progress", "esjax.tuning.sweep", "esjax.page.report", "esjax.page.follow"),
    ("esjax.page.server",),
    ("esjax.cli.shared", "esjax.tuning.sweep_plot", "esjax.tuning.seed_means"),
    ("esjax.cli.weights", "esjax.cli.hosts", "esjax.cli.plot", "esjax.cli.sweep", "esjax.cli.train", "esjax.cli.infer"),
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
    assert users == {"esjax.runs.checkpoint"}


def test_one_room_knows_libraries_of_models() -> None:
    def names(path: Path) -> set[str]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        return imports(path) | {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}

    known = ("flax.nnx", "flax.linen", "equinox")
    users = {room for room, path in modules().items() if any(name.startswith(known) for name in names(path))}
    assert users == {"esjax.models.adapters"}
