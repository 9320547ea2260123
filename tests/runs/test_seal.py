"""A seal that changed is a damaged checkpoint, and a state that comes back otherwise than it was saved is an error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import restore, save, state_at, steps_in

from esjax.errors import EsjaxError
from esjax.runs import checkpoint
from esjax.runs.checkpoint import Checkpoints, find_newest, restore_weights
from esjax.runs.seal import find_damage, versions


def test_row_63_any_flipped_bit_of_a_seal_is_found(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "1" / "seal.json"
    whole = path.read_bytes()
    assert find_damage(tmp_path / "1") == ""
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 7
        path.write_bytes(changed)
        assert find_damage(tmp_path / "1"), bytes(changed[max(place - 9, 0) : place + 9])


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"files": []}', b"[" * 10**6])
def test_row_63_a_seal_of_anything_is_passed_over_and_said(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "seal.json").write_bytes(content)
    step, told = restore(tmp_path)
    assert step == 1
    assert "2 is damaged and passed over (its seal cannot be read" in told[0]
    assert len(told) == 1
    save(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]


def test_an_earlier_seal_is_read(tmp_path: Path) -> None:
    """It has neither a hash of itself, nor the digest of the state, nor versions."""
    save(tmp_path, 1)
    path = tmp_path / "1" / "seal.json"
    fields = json.loads(path.read_text())
    assert fields["versions"]["jax"] == jax.__version__
    path.write_text(json.dumps({name: fields[name] for name in ("seconds", "member_tokens", "leaves", "files")}))
    assert restore(tmp_path) == (1, [])
    assert restore_weights(tmp_path, state_at(0).params, pytest.fail).step == 1


def one_bit_off(params: Any) -> Any:
    """Change the last bit of one number."""
    leaves, structure = jax.tree.flatten(params)
    bits = np.array(leaves[0])
    bits.view(np.uint32).reshape(-1)[-1] ^= 1
    return jax.tree.unflatten(structure, [jnp.asarray(bits), *leaves[1:]])


def fail(params: Any) -> Any:
    raise KeyError("a bug of the library")


@pytest.fixture
def restores(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Any], Any]]:
    """What happens to the weights of each state that is restored, in turn; those left show how many were restored."""
    changes: list[Callable[[Any], Any]] = []
    really, change = ocp.Checkpointer.restore, lambda params: params

    def changed(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal change
        found = really(self, *given, **named)
        if "step" in found:  # the first field: another state begins
            change = changes.pop(0)
        return {**found, "params": change(found["params"])} if "params" in found else found

    monkeypatch.setattr(ocp.Checkpointer, "restore", changed)
    return changes


@pytest.mark.parametrize(("change", "why"), [(one_bit_off, "differs from the state"), (fail, "a bug of the library")])
def test_the_first_checkpoint_is_read_back_before_it_counts(
    tmp_path: Path, restores: list[Callable[[Any], Any]], change: Callable[[Any], Any], why: str
) -> None:
    restores += [change, lambda params: params]
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(EsjaxError, match=rf"'.*' cannot be restored, though its files are whole: .*{why}.* install"):
        checkpoints.save(state_at(1), 0.0, 0)
    assert list(tmp_path.iterdir()) == []
    for step in (1, 2, 3):
        checkpoints.save(state_at(step), 0.0, 0)
    save(tmp_path, 4)  # a second start with the same libraries
    assert restores == []


def test_after_a_change_of_the_libraries_a_checkpoint_is_read_back(
    tmp_path: Path, restores: list[Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    restores.append(lambda params: params)
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "versions", lambda: {**versions(), "orbax-checkpoint": "99"})
    restores.append(one_bit_off)
    with pytest.raises(EsjaxError, match="differs from the state"):
        save(tmp_path, 2)
    assert steps_in(tmp_path) == [1]


def test_a_restored_state_is_compared_with_the_one_that_was_saved(
    tmp_path: Path, restores: list[Callable[[Any], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no damage: the files are whole, and another version of the libraries may read them."""
    restores.append(lambda params: params)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "versions", lambda: {**versions(), "tensorstore": "0.1.2"})
        save(tmp_path, 1, 2)
    restores.append(one_bit_off)
    now = versions()["tensorstore"]
    with pytest.raises(EsjaxError, match=rf"2' cannot be restored.*\(tensorstore 0\.1\.2, now {now}\); install the"):
        find_newest(tmp_path, state_at(0), pytest.fail)
    assert steps_in(tmp_path) == [1, 2]


def test_weights_alone_are_compared_with_those_that_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    like = state_at(0).params
    assert restore_weights(tmp_path, like, pytest.fail).step == 1
    really = ocp.Checkpointer.restore

    def changed(self: Any, *given: Any, **named: Any) -> Any:
        found = really(self, *given, **named)
        return {**found, "average": one_bit_off(found["average"])}

    monkeypatch.setattr(ocp.Checkpointer, "restore", changed)
    with pytest.raises(
        EsjaxError, match=r"1' cannot be restored, though its files are whole: it differs .* install the"
    ):
        restore_weights(tmp_path, like, pytest.fail)


def test_a_state_that_no_other_host_confirmed_is_said_to_be_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(state_at(1), 0.0, 0, is_confirmed=False)
    assert find_damage(tmp_path / "1") == ""
    restored = find_newest(tmp_path, state_at(0), pytest.fail)
    assert restored is not None
    assert "the state of step 1 came from a host and was not confirmed" in restored.doubt()
    checkpoints.save(state_at(2), 0.0, 0)
    restored = find_newest(tmp_path, state_at(0), pytest.fail)
    assert restored is not None
    assert restored.doubt() == ""
