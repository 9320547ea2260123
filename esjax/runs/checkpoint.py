"""Training states on disk; the only module that imports orbax.

    checkpoints/120/seal.json    progress of the run, and hashes, see `esjax.runs.seal`
    checkpoints/120/state/       the state, as orbax writes it

A checkpoint is written under a temporary name and renamed to its step when it is complete. A damaged checkpoint is
skipped by readers, who take the one before, and renamed by writers.

Hashes of files do not show that the libraries read what they wrote. So a state is compared by its digest whenever it is
restored, and the first checkpoint of a run, and the first one after a change of the libraries' versions, is read back
before it counts. A difference is an error: it would be found in every other checkpoint, too, so that taking the one
before would only lose steps.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from esjax.errors import EsjaxError
from esjax.models.model import Params
from esjax.replica.snapshot import leaf_types
from esjax.replica.update import TrainState
from esjax.runs.durable import disk_error
from esjax.runs.seal import STATE, Seal, changed_versions, find_damage, hash_files, read_seal, versions
from esjax.texts import first_line

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax reports every save there

ROOM = "room"

LEAF_BYTES, MORE_BYTES = 512, 2**17
"""Bytes on disk beside the arrays themselves, at most: for each leaf, and for the whole checkpoint."""

PLAIN = re.compile(r"[\w/ .,=+@-]*")
"""A path in which orbax gives no character a special meaning."""


class Restored(NamedTuple):
    """A state read from a checkpoint.

    Attributes:
        state: The training state, as it was saved.
        seconds: Training time at that step.
        member_tokens: Tokens scored up to that step, times members.
        is_confirmed: False if a host sent the state, and no other owner's host confirmed it.
    """

    state: TrainState
    seconds: float
    member_tokens: int
    is_confirmed: bool = True

    def doubt(self) -> str:
        """Return a line about a state that was not confirmed, or ""."""
        if self.is_confirmed:
            return ""
        return (
            f"the state of step {int(self.state.step)} came from a host and was not confirmed by one of another token; "
            "esjax replay compares it with the ledger"
        )


class Weights(NamedTuple):
    """The part of a training state that does not depend on the optimizer.

    Attributes:
        step: Steps done, an int32 scalar.
        params: The parameters around which members are perturbed.
        average: The averaged parameters, for evaluation and generation.
    """

    step: PyTree
    params: PyTree
    average: PyTree


class Checkpoints:
    """Writes the checkpoints of a run and keeps the newest ones.

    Attributes:
        beginnings: Returns steps; the first checkpoint at or after each of them is kept as well.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Open the folder for writing; make it if it is missing, and rename damaged checkpoints.

        Args:
            folder: Folder of the checkpoints.
            keep: Number of checkpoints to keep, at least 1.

        Raises:
            EsjaxError: No path to the folder suits orbax, see `_plain_path`.
        """
        self.beginnings: Callable[[], Sequence[int]] = tuple
        self._folder = folder
        self._keep = keep
        folder.mkdir(exist_ok=True)
        with _plain_path(folder):  # fail now, not after the first minute of training
            pass
        for path in folder.glob("*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        for step in kept_steps(folder):
            path = folder / str(step)
            if find_damage(path):
                os.replace(path, _unused(folder / f"{step}.damaged"))
        self._is_read_back = any(read_seal(folder / str(step)).versions == versions() for step in kept_steps(folder))

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints, newest first."""
        return kept_steps(self._folder)

    @property
    def newest(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        return max(self.steps, default=0)

    def path_of(self, step: int) -> Path:
        """Return the path of a checkpoint."""
        return self._folder / str(step)

    def save(self, state: TrainState, seconds: float, member_tokens: int, *, is_confirmed: bool = True) -> None:
        """Write a state, unless its step has a checkpoint already.

        Args:
            state: The training state.
            seconds: Training time so far.
            member_tokens: Tokens scored so far, times members.
            is_confirmed: False for a state of a host that no other owner's host has confirmed.

        Raises:
            DiskError: The disk is full or cannot be written. Older checkpoints are not touched.
            EsjaxError: The checkpoint is read back, and differs from the state.
        """
        step = int(state.step)
        path = self._folder / str(step)
        if path.exists():
            return
        partial = path.with_suffix(".partial")
        arrays = jax.tree.map(np.asarray, state)
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, partial, ignore_errors=True)
            try:
                _see_room(partial, state)
                writer = ocp.StandardCheckpointer(multiprocessing_options=_alone())
                with _plain_path(self._folder) as plain, writer as checkpointer:
                    checkpointer.save(plain / partial.name / STATE, _shared(arrays))
                Seal(
                    seconds,
                    member_tokens,
                    leaf_types(state),
                    hash_files(partial / STATE),
                    digest(arrays),
                    versions(),
                    weights=digest(Weights(arrays.step, arrays.params, arrays.average)),
                    is_unconfirmed=msgspec.UNSET if is_confirmed else True,
                ).write(partial)
                if not self._is_read_back:
                    _read_back(partial, arrays)
                os.replace(partial, path)
            except (OSError, ValueError) as error:
                raise disk_error(f"cannot write the checkpoint {str(path)!r}", error) from error
            undo.pop_all()
        self._is_read_back = True
        needed = {first_since(self.steps, beginning) for beginning in self.beginnings() if beginning}
        for old in [step for step in self.steps[self._keep :] if step not in needed]:
            doomed = self._folder / f"{old}.partial"  # an interrupted deletion leaves no damaged checkpoint
            with suppress(OSError):  # as while another program reads it over NFS; the next start tries again
                os.replace(self._folder / str(old), doomed)
                shutil.rmtree(doomed)


def find_newest(folder: Path, like: TrainState, tell: Callable[[str], None]) -> Restored | None:
    """Read the newest undamaged checkpoint, or return None if there is none.

    Args:
        folder: The run's checkpoints.
        like: A state of the same structure, shapes and dtypes, with the shardings to restore to.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        EsjaxError: The checkpoint holds the state of another model, or the libraries do not restore what was saved.
    """
    path = _newest_whole(folder, tell)
    return None if path is None else restore(path, like)


def restore(path: Path, like: TrainState) -> Restored:
    """Read a whole checkpoint; see `find_newest`."""
    _check_leaves(path, like, lambda name: True)
    return _restore(path, like)


def _restore(path: Path, like: TrainState) -> Restored:
    """Read a checkpoint whose files are whole, and compare the state with the one that was saved."""
    seal = read_seal(path)
    with _comparing(path, seal) as compare:
        state = TrainState(**_restore_fields(path, vars(like)))
        compare(state, seal.digest)
    return Restored(state, seal.seconds, seal.member_tokens, seal.is_unconfirmed is not True)


def _read_back(path: Path, arrays: TrainState) -> None:
    """Compare a checkpoint that was just written with its state, field by field: a second state would take memory."""
    with _comparing(path, read_seal(path)) as compare:
        for name, field in vars(arrays).items():
            compare(_restore_fields(path, {name: field}), digest(field))


def _restore_fields(path: Path, wanted: dict[str, PyTree]) -> dict[str, PyTree]:
    """Read some fields of the state of a checkpoint, with the dtypes, shapes and shardings of those given."""
    found = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    alone = _alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with _plain_path(path) as plain, ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return dict(checkpointer.restore(plain / STATE, args=found))


@contextmanager
def _comparing(path: Path, seal: Seal) -> Iterator[Callable[[PyTree, str], None]]:
    """Give a function that compares arrays with a digest of the seal; "": there is none.

    Raises:
        EsjaxError: They differ, or the body fails in any way but by an `EsjaxError` or an `OSError`.
    """

    def compare(arrays: PyTree, expected: str) -> None:
        if expected and digest(arrays) != expected:
            raise ValueError("it differs from the state that was saved")

    try:
        yield compare
    except (EsjaxError, OSError):
        raise
    except Exception as error:  # of any kind: they come from orbax and from what it is built on
        raise EsjaxError(
            f"the checkpoint {str(path)!r} cannot be restored, though its files are whole: {first_line(error)} "
            f"({changed_versions(seal)}); install the versions of {', '.join(seal.versions) or 'JAX and orbax'} that "
            "wrote it"
        ) from error


def restore_weights(folder: Path, like: Params, tell: Callable[[str], None]) -> Weights:
    """Read the weights of the newest undamaged checkpoint, without the state of the optimizer.

    Args:
        folder: The run's checkpoints.
        like: Parameters of the same structure, shapes and dtypes, with the shardings to restore to.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        EsjaxError: There is no undamaged checkpoint, or it holds the weights of another model, or the libraries do not
            restore what was saved.
    """
    path = _newest_whole(folder, tell)
    if path is None:
        raise _nothing_whole(folder)
    seal = read_seal(path)
    sharding = jax.tree.leaves(like)[0].sharding
    wanted = Weights(jax.ShapeDtypeStruct((), np.int32, sharding=sharding), like, like)
    _check_leaves(path, wanted, lambda name: name.startswith(tuple(f".{part}" for part in Weights._fields)))
    with _comparing(path, seal) as compare:
        weights = Weights(**_restore_fields(path, wanted._asdict()))
        compare(weights, seal.weights or "")
    return weights


def find_oldest(folder: Path, like: TrainState, beginning: int, tell: Callable[[str], None]) -> Restored | None:
    """Read the oldest undamaged checkpoint at or after a step; see `find_newest`."""
    path = _first_whole(folder, lambda: sorted(step for step in kept_steps(folder) if step >= beginning), tell)
    return None if path is None else restore(path, like)


def _newest_whole(folder: Path, tell: Callable[[str], None]) -> Path | None:
    return _first_whole(folder, lambda: kept_steps(folder), tell)


def _first_whole(folder: Path, list_steps: Callable[[], list[int]], tell: Callable[[str], None]) -> Path | None:
    passed: set[int] = set()
    while steps := [step for step in list_steps() if step not in passed]:
        path = folder / str(steps[0])
        damage = find_damage(path)
        if not damage:
            return path
        passed.add(steps[0])
        if path.exists():  # otherwise a running process has just replaced it with a newer one
            tell(f"checkpoint {path} is damaged and passed over ({damage})")
    return None


def _nothing_whole(folder: Path) -> EsjaxError:
    if kept_steps(folder):
        return EsjaxError(
            f"all checkpoints in {folder} are damaged; restore one from a copy, or resume the run if it keeps a ledger"
        )
    return EsjaxError(f"{folder} holds no checkpoint; the run ended before its first one: resume it")


def digest(state: PyTree) -> str:
    """Hash the dtypes, shapes and bits of all leaves of a state, or of a part of one, with BLAKE2b.

    Returns:
        32 hexadecimal digits; equal digests mean equal states.
    """
    summary = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(state):
        array = np.asarray(leaf)
        summary.update(f"{array.dtype}{array.shape}".encode())
        summary.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return summary.hexdigest()


def _shared(arrays: PyTree) -> PyTree:
    """Give numpy arrays to JAX where both can share the memory: orbax copies those of numpy before it writes them.

    In a process group orbax waits for the other processes before it writes arrays of JAX.
    """
    device = jax.local_devices()[0]
    return jax.device_put(arrays, device) if device.platform == "cpu" and jax.process_count() == 1 else arrays


def _alone() -> ocp.options.MultiprocessingOptions:
    """Let orbax not wait for other processes: in a process group, only the first one writes and reads back."""
    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this}, barrier_sync_key_prefix="one")


def _see_room(partial: Path, state: TrainState) -> None:
    """Reserve the space that a state needs, and free it again.

    If a write inside orbax failed, its threads would print hundreds of lines.

    Raises:
        OSError: The disk is full or read-only, or a limit on the size of files is too low.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    leaves = jax.tree.leaves(state)
    size = sum(leaf.nbytes for leaf in leaves) + LEAF_BYTES * len(leaves) + MORE_BYTES
    partial.mkdir(exist_ok=True)
    with (partial / ROOM).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    (partial / ROOM).unlink()


@contextmanager
def _plain_path(folder: Path) -> Iterator[Path]:
    r"""Yield a path to a folder in which orbax gives no character a special meaning.

    Orbax reads `[`, `*` and `?` as a pattern, `\` as `/`, and `gs:` as cloud storage. For such a name, this yields a
    temporary symbolic link.

    Raises:
        EsjaxError: The folder for temporary files has such a name, too.
    """
    whole = folder.absolute()
    if PLAIN.fullmatch(str(whole)):
        yield whole
        return
    with tempfile.TemporaryDirectory(prefix="esjax-") as place:
        link = Path(place) / "folder"
        if not PLAIN.fullmatch(str(link)):
            raise EsjaxError(
                f"no checkpoint can be written in {str(whole)!r}, whose name has special characters; give another "
                "--out, or set TMPDIR to a folder with a plain name"
            )
        link.symlink_to(whole)
        yield link


def first_since(steps: Sequence[int], beginning: int) -> int | None:
    """Return the oldest step at or after `beginning` of which there is a state; None: there is none yet.

    The state of step 0 follows from the seed.
    """
    return min((step for step in steps if step >= beginning), default=None) if beginning else 0


def _check_leaves(path: Path, like: PyTree, counts: Callable[[str], bool]) -> None:
    """Compare the dtypes and shapes of a checkpoint with those of `like`.

    Args:
        path: The checkpoint.
        like: The expected state.
        counts: Returns whether the leaf of a name is compared.

    Raises:
        EsjaxError: They differ.
    """
    expected, kept = leaf_types(like), read_seal(path).leaves
    strange = [name for name in {**expected, **kept} if counts(name) and expected.get(name) != kept.get(name)]
    if strange:
        raise EsjaxError(
            f"{str(path)!r} does not hold the state of the model that its run's settings describe: {strange[0]} is "
            f"{kept.get(strange[0])}, not {expected.get(strange[0])}; give the "
            "custom model again, or use the esjax that wrote it"
        )


def kept_steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, newest first."""
    if not folder.is_dir():
        return []
    return sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)


def _unused(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())
