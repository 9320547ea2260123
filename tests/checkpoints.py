"""States of random bits, saved and read back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esjax.replica.update import TrainState, init_state
from esjax.runs.checkpoint import Checkpoints, Restored, digest, find_newest


def random_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw floats of any bits but NaN: nothing that a compressor could shorten."""
    bits = rng.integers(0, 2**32, shape, np.uint32)
    floats = bits.view(np.float32)
    floats[np.isnan(floats)] = -0.0
    return floats


def state_at(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"matrix": random_bits(rng, (40, 30)), "vector": random_bits(rng, (5,))}
    optimizer = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(optax.constant_schedule(0.1)))
    state = init_state(jax.tree.map(jnp.asarray, params), optimizer)
    average = {name: jnp.asarray(random_bits(rng, leaf.shape)) for name, leaf in params.items()}
    return replace(state, step=jnp.int32(step), average=average)


def save(folder: Path, *steps: int, keep: int = 3) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(state_at(step), step / 4, step * 1000)


def newest(folder: Path, like: TrainState, tell: Callable[[str], Any]) -> Restored:
    found = find_newest(folder, like, tell)
    assert found is not None
    return found


def restore(folder: Path) -> tuple[int, list[str]]:
    """Read the newest whole checkpoint and see that it is what was saved: its step, and what was told."""
    told: list[str] = []
    restored = newest(folder, state_at(0), told.append)
    step = int(restored.state.step)
    assert digest(restored.state) == digest(state_at(step))
    assert (restored.seconds, restored.member_tokens) == (step / 4, step * 1000)
    return step, told


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
