"""A run computes with JAX's default flags, whichever flags the process sets, so that settings alone decide its results.

All hosts of a run must get the same numbers, and so must a process that resumes the run later. The flags are set for
one thread and for the time of a call, so other code of the process keeps its flags.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import jax

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "enable_x64": False,
        "threefry_partitionable": True,
        "default_prng_impl": "threefry2x32",
        "default_matmul_precision": None,
        "numpy_dtype_promotion": "standard",
        "numpy_rank_promotion": "allow",
        "disable_jit": False,
        # A loss that is not finite makes its pair void and must not end the run.
        "debug_nans": False,
        "debug_infs": False,
    }
)
"""JAX's defaults of the flags that change numbers, or that forbid what is allowed by default."""

_GUARDS = ("transfer_guard_host_to_device", "transfer_guard_device_to_device", "transfer_guard_device_to_host")


@contextmanager
def default_flags() -> Iterator[None]:
    """Compute with JAX's default flags until the block or the decorated function ends."""
    with ExitStack() as stack:
        for name in _changed():
            stack.enter_context(getattr(jax, name)(DEFAULTS.get(name, "allow")))
        yield


def names_of_changed() -> str:
    """Name the flags of this process that differ from JAX's defaults, separated by commas."""
    return ", ".join(f"jax_{name}" for name in _changed())


def changed_flags() -> str:
    """Name in one line the flags of this process that a run ignores; "" if there are none."""
    names = names_of_changed()
    return f"this process sets {names}; runs ignore that and use JAX's defaults" if names else ""


def _changed() -> list[str]:
    """List the flags that differ from their defaults in this thread."""
    changed = [name for name, value in DEFAULTS.items() if _value(name) != value]
    return changed + [name for name in _GUARDS if _value(name) not in (None, "allow")]


def _value(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")
