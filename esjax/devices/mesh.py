"""The devices of this host, and the settings of XLA that must be made before JAX starts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from esjax.cores import available_cores
from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.texts import first_line

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh


def prepare_devices(cache: Path | None = None) -> None:
    """Give JAX one CPU device per core, with one thread each, and a folder that keeps compiled programs.

    Populations of small networks are about twice as fast on these as on one device with all threads. Call this at the
    start of a program, before the first use of JAX. Settings in the environment (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`,
    `JAX_COMPILATION_CACHE_DIR`) take precedence.

    Args:
        cache: Folder for compiled programs. None: they are not kept.

    Raises:
        EsjaxError: JAX has been used already, with another number of devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()

    import jax

    is_free = "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ
    if is_free and jax.config.jax_num_cpu_devices != len(available_cores()):  # type: ignore[attr-defined]
        try:
            jax.config.update("jax_num_cpu_devices", len(available_cores()))
        except RuntimeError as error:
            raise EsjaxError(
                "JAX has been used already, so its devices are fixed; call prepare_devices() before anything else uses "
                "JAX (in a notebook, restart the kernel first), or leave it out: training gives the same, but slower"
            ) from error
    if cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(given_path(cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def start_devices() -> None:
    """Let JAX find its devices; it does so once in a process.

    Raises:
        EsjaxError: The machine has no devices of the kind that the environment asks for, or they do not work.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError without text: the plugin of a platform is missing
        asked = os.environ.get("JAX_PLATFORMS")
        which = f" of JAX_PLATFORMS={asked}" if asked else ""
        said = str(error).strip().splitlines() or ["it knows of none"]
        raise EsjaxError(
            f"JAX cannot use the devices{which}: {said[0]}; install what they need, such as esjax[cuda13], or set "
            "JAX_PLATFORMS=cpu"
        ) from error


def device_failure(error: Exception) -> str:
    """Describe an error of the devices in one line."""
    return f"the devices failed: {first_line(error, 300)}"


def cpu_mesh() -> "Mesh":
    """Return a mesh of one CPU device, for a process that computes little."""
    import jax

    return _line_up(jax.devices("cpu")[:1])


def local_mesh() -> "Mesh":
    """Return a mesh of this process's devices along the axis of pairs."""
    import jax

    return _line_up(jax.local_devices())


def whole_mesh() -> "Mesh":
    """Return a mesh of the devices of the whole process group, see `esjax.devices.process_group`."""
    import jax

    return _line_up(jax.devices())


def _line_up(devices: "list[jax.Device]") -> "Mesh":
    import jax

    from esjax.core.population import PAIRS_AXIS

    return jax.make_mesh((len(devices),), (PAIRS_AXIS,), (jax.sharding.AxisType.Auto,), devices=devices)
