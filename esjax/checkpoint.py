"""Training states on disk; the only file that knows orbax.

A checkpoint appears under its step's number when it is complete, and carries a digest that is checked when it is
read, so that a damaged one is passed over for the one before it.
"""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from esjax.errors import EsjaxError
from esjax.es import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save there


class Restored(NamedTuple):
    """A state read back.

    Attributes:
        state: As it was saved.
        seconds: Training time until then, from the first finished step.
        member_tokens: Tokens evaluated until then, times members.
    """

    state: TrainState
    seconds: float
    member_tokens: int


class Checkpoints:
    """The checkpoints of a run, the newest few of them kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Open the folder for writing, and make it if it is not there."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: TrainState, seconds: float, member_tokens: int) -> None:
        """Write a state in the background; a step that is there already is not written again."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        progress = {"seconds": seconds, "member_tokens": member_tokens, "digest": digest(state)}
        self._manager.wait_until_finished()  # orbax would skip a save while another is running
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        )

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_newest(folder: Path, like: TrainState, tell: Callable[[str], None]) -> Restored:
    """Read the newest checkpoint that is whole.

    Args:
        folder: The run's checkpoints.
        like: A state of the same structure, shapes and shardings.
        tell: Called with a line for each checkpoint that is passed over.

    Raises:
        EsjaxError: There is none.
    """
    steps = []
    if folder.is_dir():
        steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    for step in steps:
        try:
            return _restore(folder / str(step), like)
        except Exception as error:  # orbax raises whatever its storage layers raise
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            tell(f"checkpoint {folder / str(step)} is damaged and passed over ({reason})")
    if steps:
        raise EsjaxError(f"all checkpoints in {folder} are damaged; restore one from a copy, or train anew")
    raise EsjaxError(f"{folder} holds no checkpoint; the run ended before its first one: train anew")


def _restore(path: Path, like: TrainState) -> Restored:
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        found: Any = checkpointer.restore(
            path.absolute(),
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()),
        )
    if digest(found.state) != found.progress["digest"]:
        raise ValueError("its digest does not agree")
    return Restored(found.state, found.progress["seconds"], found.progress["member_tokens"])


def digest(state: TrainState) -> str:
    """Hash every bit of a state: equal digests, equal states."""
    summary = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(state):
        array = np.asarray(leaf)
        summary.update(f"{array.dtype}{array.shape}".encode())
        summary.update(np.ascontiguousarray(array).tobytes())
    return summary.hexdigest()
