"""Settings of every benchmark, and how they are made small.

The docstring under each field is its help on the command line.
"""

from typing import Any

from esjax.config import Section


class Throughput(Section):
    """Member-tokens a second against rivals, a plain forward pass, and the machine's peak."""

    sizes: tuple[tuple[int, int, int, int], ...] = (
        (16, 4, 8, 4096),
        (32, 3, 32, 2048),
        (64, 4, 8, 2048),
        (256, 4, 32, 256),
        (512, 2, 32, 128),
        (1024, 2, 32, 64),
    )
    """Hidden size, layers, sequences a member, and population, of each rnn."""

    scale: int | None = None
    """Multiplies the populations. None: 1 on CPUs, 16 on an accelerator."""

    at_once: tuple[int, ...] | None = None
    """Sequences that a device has at a time, over all members, of which rivals try each. None: some that suit it."""

    peak: int = 2048
    """Rows of the square matrices whose product is the machine's peak."""

    rounds: int = 5
    """Turns of each way."""


SHORT: dict[str, Any] = {
    "throughput": Throughput(sizes=((8, 2, 2, 32),), scale=1, at_once=(64,), peak=128, rounds=2),
}
"""A few seconds each: to see that they run."""
