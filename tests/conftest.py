"""Strict JAX, four CPU devices, and shapes checked at every call of the package."""

import tempfile

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same small programs.
PROGRAMS = tempfile.TemporaryDirectory(prefix="esjax-tests-")
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook("esjax", "typechecker.check")

from collections.abc import Iterator  # noqa: E402

from jax.sharding import AxisType, Mesh  # noqa: E402

PAIRS_AXIS = "pairs"


def mesh_of(devices: int) -> Mesh:
    """Line up the first few devices."""
    return jax.make_mesh((devices,), (PAIRS_AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])


@pytest.fixture
def lenient_promotion() -> Iterator[None]:
    """Let optax's Adam multiply integers with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
