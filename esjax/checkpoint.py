"""Training states on disk; the only file that knows orbax.

    checkpoints/120/seal.json    progress of the run, and a hash of every file of the state
    checkpoints/120/state/       the state, as orbax writes it

A checkpoint gets its step's number as a name when it is complete. One whose files do not agree with its seal is
damaged: reading passes over it for the one before, and writing sets it aside.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from esjax.errors import DiskError, EsjaxError
from esjax.es import TrainState
from esjax.files import write_durably
from esjax.snapshot import leaf_types

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save there

SEAL = "seal.json"
STATE = "state"


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
        """Open the folder for writing; make it if it is not there, and set damaged checkpoints aside."""
        self._folder = folder
        self._keep = keep
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.partial"):
            shutil.rmtree(path)
        for step in kept_steps(folder):
            path = folder / str(step)
            if _damage(path):
                os.replace(path, _unused(folder / f"{step}.damaged"))

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max(kept_steps(self._folder), default=0)

    def save(self, state: TrainState, seconds: float, member_tokens: int) -> None:
        """Write a state; a step that is there already is not written again.

        Raises:
            DiskError: The disk is full, or cannot be written; the checkpoints before stay as they are.
        """
        step = int(state.step)
        path = self._folder / str(step)
        if path.exists():
            return
        partial = path.with_suffix(".partial")
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save((partial / STATE).absolute(), jax.tree.map(np.asarray, state))
            seal = {
                "seconds": seconds,
                "member_tokens": member_tokens,
                "leaves": leaf_types(state),
                "files": _hashes(partial / STATE),
            }
            write_durably(partial / SEAL, json.dumps(seal))
            os.replace(partial, path)
        except (OSError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise DiskError(f"cannot write the checkpoint {str(path)!r}: {_first_line(error)}") from error
        for old in kept_steps(self._folder)[self._keep :]:
            doomed = self._folder / f"{old}.partial"  # a deletion that is cut off leaves no damaged checkpoint
            os.replace(self._folder / str(old), doomed)
            shutil.rmtree(doomed)


def restore_newest(folder: Path, like: TrainState, tell: Callable[[str], None]) -> Restored:
    """Read the newest checkpoint that is whole, see `find_newest`.

    Raises:
        EsjaxError: There is none, or it holds the state of another model.
    """
    restored = find_newest(folder, like, tell)
    if restored is not None:
        return restored
    if kept_steps(folder):
        raise EsjaxError(
            f"all checkpoints in {folder} are damaged; restore one from a copy, or resume the run if it keeps a ledger"
        )
    raise EsjaxError(f"{folder} holds no checkpoint; the run ended before its first one: resume it")


def find_newest(folder: Path, like: TrainState, tell: Callable[[str], None]) -> Restored | None:
    """Read the newest checkpoint that is whole; None: there is none.

    Args:
        folder: The run's checkpoints.
        like: A state of the same structure, shapes and dtypes, with the shardings to restore to.
        tell: Called with a line for each checkpoint that is passed over.

    Raises:
        EsjaxError: It holds the state of another model.
    """
    for step in kept_steps(folder):
        path = folder / str(step)
        damage = _damage(path)
        if not damage:
            return _restore(path, like)
        tell(f"checkpoint {path} is damaged and passed over ({damage})")
    return None


def digest(state: TrainState) -> str:
    """Hash every bit of a state: equal digests, equal states."""
    summary = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(state):
        array = np.asarray(leaf)
        summary.update(f"{array.dtype}{array.shape}".encode())
        summary.update(np.ascontiguousarray(array).tobytes())
    return summary.hexdigest()


def _checkpointer() -> ocp.StandardCheckpointer:
    """Open orbax for this process alone: of several that compute as one, a single one writes."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix="one"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)


def _restore(path: Path, like: TrainState) -> Restored:
    seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
    expected = leaf_types(like)
    strange = [name for name in {**expected, **seal["leaves"]} if expected.get(name) != seal["leaves"].get(name)]
    if strange:
        raise EsjaxError(
            f"{str(path)!r} does not hold the state of the model that its run's settings describe: {strange[0]} is "
            f"{seal['leaves'].get(strange[0])}, not {expected.get(strange[0])}; give a model of one's own "
            "again, or use the esjax that wrote it"
        )
    with _checkpointer() as checkpointer:
        state = checkpointer.restore((path / STATE).absolute(), like)
    return Restored(state, seal["seconds"], seal["member_tokens"])


def kept_steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)


def _damage(path: Path) -> str:
    """Say what is wrong with a checkpoint, or ""."""
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        files, _, _, _ = seal["files"], seal["leaves"], float(seal["seconds"]), int(seal["member_tokens"])
        found = _hashes(path / STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its seal cannot be read: {_first_line(error)}"
    changed = [name for name in sorted({*files, *found}) if files.get(name) != found.get(name)]
    return f"changed since it was written: {changed[0]}" if changed else ""


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in files
    }


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
