"""The cores of this machine that this process may use."""

import os


def available_cores() -> list[int]:
    """Return their indices."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
