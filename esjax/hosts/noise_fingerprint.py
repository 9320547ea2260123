"""Noise fingerprints: hashes of the noise of a known seed. Hosts whose noise differs cannot train together."""

import hashlib
import platform
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.core.signs import draw

NUMBERS = 1000
"""Entries of noise that are hashed."""

KINDS: tuple[Literal["rademacher", "gaussian"], ...] = ("rademacher", "gaussian")


def noise_fingerprints() -> dict[str, str]:
    """Hash the noise of a known pair, for each kind of noise (rademacher, gaussian)."""
    seed = pair_seeds(stream_seed(1, 2), 3, jnp.arange(4, 5, dtype=jnp.uint32))[0]
    return {kind: _hash(np.asarray(draw(kind, seed, NUMBERS))) for kind in KINDS}


def describe_devices(devices: list[jax.Device]) -> str:
    """Describe devices for the status: their number, their kind, and the name of the machine."""
    return f"{len(devices)} x {devices[0].device_kind}, {platform.node()}"


def kind_of(devices: list[jax.Device]) -> str:
    """Name hardware and version of JAX; hosts of one kind should compute the same floats to the last bit."""
    return f"{_model(devices[0])}, jax {jax.__version__}"[:128]


def _model(device: jax.Device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    try:  # processors of another model may add in another order
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, PermissionError):  # not Linux, or a container that hides the file
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _hash(noise: np.ndarray) -> str:
    return hashlib.blake2b(noise.astype("<f4").tobytes(), digest_size=8).hexdigest()
