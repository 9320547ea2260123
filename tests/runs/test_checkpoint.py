"""What is saved comes back bit by bit, and what is damaged is passed over and said."""

import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import newest, random_bits, restore, save, state_at, steps_in

from esjax.errors import DiskError, EsjaxError
from esjax.runs import checkpoint, seal
from esjax.runs.checkpoint import Checkpoints, digest, find_newest, restore_weights
from esjax.runs.durable import disk_error


def truncate(checkpoint: Path) -> None:
    """Cut every file of the arrays in half, as a full disk or a power cut may."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit_of_the_weights(checkpoint: Path) -> None:
    weights = np.asarray(state_at(int(checkpoint.name)).params["matrix"]).tobytes()
    found = [path for path in checkpoint.rglob("*") if path.is_file() and weights in path.read_bytes()]
    assert found  # the weights lie there as they are
    for path in found:
        content = bytearray(path.read_bytes())
        content[content.index(weights) + 400] ^= 1
        path.write_bytes(content)


def forge_the_seal(checkpoint: Path) -> None:
    path = checkpoint / "seal.json"
    seal = json.loads(path.read_text())
    path.write_text(json.dumps({**seal, "files": dict.fromkeys(seal["files"], "0" * 32)}))


def add_a_file(checkpoint: Path) -> None:
    (checkpoint / "state" / "stranger").write_text("")


def test_a_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    save(tmp_path, 7)
    restored = newest(tmp_path, state_at(0), pytest.fail)
    saved = state_at(7)
    structures: list[Any] = [jax.tree.structure(state) for state in (restored.state, saved)]
    assert structures[0] == structures[1]
    for left, right in zip(jax.tree.leaves(restored.state), jax.tree.leaves(saved), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    assert (restored.seconds, restored.member_tokens) == (1.75, 7000)


def test_shapes_alone_are_enough_to_read_a_state(tmp_path: Path) -> None:
    save(tmp_path, 7)
    like = jax.eval_shape(lambda: state_at(0))
    assert digest(newest(tmp_path, like, pytest.fail).state) == digest(state_at(7))


def test_the_digest_sees_every_bit_and_every_leaf() -> None:
    state = state_at(1)
    digests = {digest(state), digest(replace(state, step=jnp.int32(2)))}
    for params, where in ((state.params, "params"), (state.average, "average")):
        for name, leaf in params.items():
            bits = np.array(leaf)
            bits.view(np.uint32).reshape(-1)[-1] ^= 1
            changes: dict[str, Any] = {where: {**params, name: jnp.asarray(bits)}}
            digests.add(digest(replace(state, **changes)))
    assert len(digests) == 6
    assert digest(state) == digest(state_at(1))


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 5, 8, keep=2)
    assert steps_in(tmp_path) == [5, 8]
    assert restore(tmp_path) == (8, [])


def test_a_run_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == [2, 3]


def test_the_tenth_step_is_newer_than_the_ninth(tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    assert restore(tmp_path) == (10, [])


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    save(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    save(tmp_path, 4, 4)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert restore(tmp_path) == (4, [])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "changed"),
        (flip_a_bit_of_the_weights, "changed"),
        (forge_the_seal, "changed"),
        (add_a_file, "stranger"),
    ],
)
def test_row_32_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "3")
    step, told = restore(tmp_path)
    assert step == 2
    assert len(told) == 1
    assert str(tmp_path / "3") in told[0]
    assert reason in told[0]
    assert "\n" not in told[0]


def test_a_checkpoint_that_lost_a_part_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "seal.json").unlink()
    step, told = restore(tmp_path)
    assert step == 1
    assert len(told) == 1


@pytest.mark.parametrize("step", [2, 3])
def test_training_on_from_before_a_damaged_checkpoint_is_saved(tmp_path: Path, step: int) -> None:
    """What is trained after 1, with 3 damaged, must be kept, at a step before the damaged one and at its own."""
    save(tmp_path, 1, 3)
    truncate(tmp_path / "3")
    assert restore(tmp_path)[0] == 1
    save(tmp_path, step)
    assert restore(tmp_path)[0] == step


def test_a_damaged_checkpoint_is_set_aside_and_kept(tmp_path: Path) -> None:
    for _ in range(2):
        save(tmp_path, 1, 3)
        truncate(tmp_path / "3")
    save(tmp_path, 4)
    assert steps_in(tmp_path) == [1, 4]
    assert (tmp_path / "3.damaged" / "state").is_dir()
    assert (tmp_path / "3.damaged.1" / "state").is_dir()


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS while another program reads it; it is gone after the next start."""
    remove, held = shutil.rmtree, [OSError(errno.ENOTEMPTY, "Directory not empty")]

    def remove_unless_held(path: Path, **settings: Any) -> None:
        if path.name == "1.partial" and held:
            raise held.pop()
        remove(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", remove_unless_held)
    run = Checkpoints(tmp_path, 1)
    for step in (1, 2):
        run.save(state_at(step), step / 4, step * 1000)
    assert not held
    assert restore(tmp_path) == (2, [])
    assert (tmp_path / "1.partial").exists()
    Checkpoints(tmp_path, 1)
    assert not (tmp_path / "1.partial").exists()


def test_a_failed_save_leaves_the_ones_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path, 1)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EsjaxError, match="No space left"):
        checkpoints.save(state_at(2), 0.0, 0)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    assert restore(tmp_path) == (1, [])


def test_a_full_disk_is_one_error_and_no_word_of_a_library(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of the files' size ends a write as a full disk does."""
    save(tmp_path, 1)
    large = replace(state_at(2), params={"matrix": jnp.asarray(random_bits(np.random.default_rng(0), (300, 300)))})
    checkpoints = Checkpoints(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DiskError) as caught:
            checkpoints.save(large, 0.0, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"cannot write the checkpoint {str(tmp_path / '2')!r}: File too large"
    assert (capfd.readouterr().err, caplog.records) == ("", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    checkpoints.save(large, 0.0, 0)  # with room again
    assert steps_in(tmp_path) == [2]


IN_TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing "params/0" in OCDBT database: Failed writing: "x/d/6e" [OS error '
    f"{errno.ENOSPC}: ENOSPC No space left on device]\nmore"
)


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (OSError(errno.ENOSPC, "full"), os.strerror(errno.ENOSPC), "make room"),
        (OSError(errno.EDQUOT, "full"), os.strerror(errno.EDQUOT), "make room"),
        (ValueError(IN_TENSORSTORE), os.strerror(errno.ENOSPC), "make room"),
        (OSError(errno.EROFS, "read"), os.strerror(errno.EROFS), "fix that"),
        (ValueError("a strange leaf\nmore"), "a strange leaf", "fix that"),
    ],
)
def test_room_helps_a_full_disk_alone(error: OSError | ValueError, said: str, remedy: str) -> None:
    made = disk_error("cannot write x", error)
    assert (str(made), made.remedy) == (f"cannot write x: {said}", remedy)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_what_cannot_be_looked_at_is_not_called_damaged(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(folder: Path) -> dict[str, str]:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("esjax.runs.seal.hash_files", refuse)
        for look in (lambda: Checkpoints(tmp_path, 1), lambda: restore(tmp_path)):
            with pytest.raises(EsjaxError, match=f"cannot read the checkpoint .*: {os.strerror(number)}"):
                look()
    assert restore(tmp_path) == (1, [])


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        forge_the_seal(tmp_path / step)
    told: list[str] = []
    with pytest.raises(EsjaxError, match="damaged") as caught:
        restore_weights(tmp_path, state_at(0).params, told.append)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [str(tmp_path / step) in line for step, line in zip("21", told, strict=True)] == [True, True]


@pytest.mark.parametrize("exists", [True, False])
def test_no_checkpoint_is_an_error(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path if exists else tmp_path / "none"
    with pytest.raises(EsjaxError, match="no checkpoint"):
        restore_weights(folder, state_at(0).params, pytest.fail)
    assert find_newest(folder, state_at(0), pytest.fail) is None


def test_a_half_written_checkpoint_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    half = tmp_path / "3.partial"  # what a save is called until it is complete
    shutil.copytree(tmp_path / "2", half)
    truncate(half)
    assert restore(tmp_path) == (2, [])
    save(tmp_path, 3)
    assert restore(tmp_path) == (3, [])
    assert not half.exists()


def test_a_state_of_another_shape_is_not_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = state_at(0)
    wider = replace(other, params={**other.params, "vector": jnp.zeros(6)})
    with pytest.raises(EsjaxError, match="does not hold the state of the model"):
        newest(tmp_path, wider, pytest.fail)


@pytest.mark.parametrize("name", ["a[1]", "back\\slash", "st*r", "gs:", "q?", "new\nline", "%s {x} é"])
def test_every_name_of_a_folder_is_read_letter_by_letter(tmp_path: Path, name: str) -> None:
    """The same checkpoint is whole under a plain name, too, and no other folder was made or read."""
    (tmp_path / "a1" / "checkpoints").mkdir(parents=True)
    (tmp_path / name / "checkpoints").mkdir(parents=True)
    save(tmp_path / name / "checkpoints", 3)
    assert restore(tmp_path / name / "checkpoints") == (3, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a1", name])
    assert not any((tmp_path / "a1/checkpoints").iterdir())
    (tmp_path / name).rename(tmp_path / "plain")
    assert restore(tmp_path / "plain" / "checkpoints") == (3, [])


def test_a_name_that_nothing_plain_can_stand_for_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a[1]"))
    with pytest.raises(EsjaxError, match="set TMPDIR"):
        Checkpoints(tmp_path / "a[1]" / "checkpoints", 3)


def test_a_checkpoint_that_a_run_deletes_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpoints(tmp_path, 1)
    run.save(state_at(1), 1 / 4, 1000)
    look = seal.find_damage

    def look_after_the_run_went_on(path: Path) -> str:
        if path.name == "1":
            run.save(state_at(2), 2 / 4, 2000)
        return look(path)

    monkeypatch.setattr(checkpoint, "find_damage", look_after_the_run_went_on)
    assert restore(tmp_path) == (2, [])
