"""Strict JAX, four CPU devices, and types and shapes checked at every call of the package."""

import gc
import os
import signal
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Compiling is most of the work of the tests. Processes that tests start inherit this. 0 compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The older emitters of kernels compile in half the time, and one piece a program, not up to 32, in three quarters of
# that. XLA ends a program that gives it a flag it has no more.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

import jax
import pytest
import typechecker
from beartype.claw import beartype_package
from jaxtyping import install_import_hook

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; several tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(50_000)  # JAX keeps so many objects that looking for cycles among them took a twelfth of the time
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same small programs, in whichever process of a run they are.
CACHE = "ESJAX_TESTS_PROGRAMS"
if "PYTEST_XDIST_WORKER" not in os.environ:
    OWN_PROGRAMS = tempfile.TemporaryDirectory(prefix="esjax-tests-")
    os.environ[CACHE] = OWN_PROGRAMS.name
PROGRAMS = os.environ[CACHE]
jax.config.update("jax_compilation_cache_dir", PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")

OF_THREAD = threading.local()


def context_of_thread() -> Any:
    """Return one MLIR context for all programs of a thread. JAX makes one for each, a third of the time of lowering."""
    if not hasattr(OF_THREAD, "context"):
        OF_THREAD.context = make_ir_context()
    return OF_THREAD.context


if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jax").startswith("0.10."):
    from jax._src.interpreters import mlir

    make_ir_context = mlir.make_ir_context
    mlir.make_ir_context = context_of_thread

# In hosts jaxtyping would take most of the time of what a simulation says and hears: it sees to the files with arrays,
# and beartype alone to the others.
ESJAX = Path(__file__).parents[1] / "esjax"
WITH_ARRAYS = [
    ".".join(path.relative_to(ESJAX).with_suffix("").parts)
    for path in (ESJAX / "hosts").rglob("*.py")
    if "jaxtyping" in path.read_text()
]
beartype_package("esjax.hosts", conf=typechecker.CONF)
install_import_hook(
    [
        *(f"esjax.{path.stem}" for path in ESJAX.iterdir() if path.stem != "hosts"),
        *(f"esjax.{name}" for name in WITH_ARRAYS),
    ],
    "typechecker.check",
)

from collections.abc import Iterator  # noqa: E402

import shared_programs  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

from esjax import flags  # noqa: E402

shared_programs.share()

# A run computes under JAX's defaults; here it is as strict as the rest.
flags.DEFAULTS = {name: value for name, value in flags.DEFAULTS.items() if not name.startswith("numpy_")}

PAIRS_AXIS = "pairs"

NEWER_EMITTERS: dict[str, Any] = {}
"""Options of a program that is compiled with the emitters that users have."""
if "xla_cpu_use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    NEWER_EMITTERS["xla_cpu_use_fusion_emitters"] = True


def mesh_of(devices: int) -> Mesh:
    """Line up the first few devices."""
    return jax.make_mesh((devices,), (PAIRS_AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with tests of several processes: one worker waits for them, and the others compute meanwhile."""
    items.sort(key=lambda item: "fleet" not in getattr(item, "fixturenames", ()))


@pytest.fixture
def lenient_promotion() -> Iterator[None]:
    """Let optax's Adam multiply integers with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
