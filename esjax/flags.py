"""The flags of JAX under which a run computes, whatever the process sets: its numbers follow from its settings.

Hosts of one run have to get the same numbers, and one who goes on with it next month, too. Flags are set for a thread
and for the time of a call alone, so that code outside the run keeps its own.
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
        # A loss that is not finite makes a pair void; it does not end the run.
        "debug_nans": False,
        "debug_infs": False,
    }
)
"""What JAX sets by itself, of those flags that change numbers or forbid what is allowed by default."""

_GUARDS = ("transfer_guard_host_to_device", "transfer_guard_device_to_device", "transfer_guard_device_to_host")


@contextmanager
def default_flags() -> Iterator[None]:
    """Compute with JAX's defaults until the block, or the function that this decorates, ends."""
    with ExitStack() as stack:
        for name in _changed():
            stack.enter_context(getattr(jax, name)(DEFAULTS.get(name, "allow")))
        yield


def changed_flags() -> str:
    """Say in a line which flags of this process a run does not use, or ""."""
    names = ", ".join(f"jax_{name}" for name in _changed())
    return f"this process sets {names}; a run computes with JAX's defaults all the same" if names else ""


def _changed() -> list[str]:
    """Name the flags that stand otherwise; a thread that has them already at their defaults enters nothing."""
    changed = [name for name, value in DEFAULTS.items() if _value(name) != value]
    return changed + [name for name in _GUARDS if _value(name) not in (None, "allow")]


def _value(name: str) -> Any:
    return getattr(jax.config, f"jax_{name}")
