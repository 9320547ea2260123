"""Keys that are let in, the content of token files, and the errors about unusable ones."""

import json
import multiprocessing
import os
import re
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from esjax.errors import EsjaxError
from esjax.hosts.transport.keys import FORMAT, ServerKeys, Token, load_token

ADDRESS = "tcp://coordinator.example:5555"

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")


def key_maker() -> Callable[[], tuple[str, str]]:
    numbers = count()
    return lambda: (f"public.{next(numbers):033}", f"secret.{next(numbers):033}")


def keys_in(folder: Path) -> ServerKeys:
    return ServerKeys(folder, key_maker(), pytest.fail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "keys"


@pytest.fixture
def keys(folder: Path) -> ServerKeys:
    return keys_in(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def line(error: pytest.ExceptionInfo[EsjaxError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_coordinator_keeps_its_key_pair(folder: Path, keys: ServerKeys) -> None:
    again = ServerKeys(folder, pytest.fail, pytest.fail)
    assert (again.public_key, again.secret_key) == (keys.public_key, keys.secret_key)
    assert keys.public_key.startswith("public.")
    assert keys.secret_key.startswith("secret.")


def test_a_token_lets_its_key_in(folder: Path, keys: ServerKeys) -> None:
    assert keys.allowed == {}
    path = keys.new_token("lab-1.a_B", ADDRESS)
    token = load_token(path)
    assert (token.name, token.address, token.server_key) == ("lab-1.a_B", ADDRESS, keys.public_key)
    assert keys.allowed == {token.public_key: "lab-1.a_B"}
    assert keys_in(folder).allowed == keys.allowed
    assert token.secret_key not in (folder / "allowed.json").read_text()


def test_every_file_is_its_owners_alone(folder: Path, keys: ServerKeys) -> None:
    before = os.umask(0)
    try:
        path = keys.new_token("one", ADDRESS)
    finally:
        os.umask(before)
    assert mode(folder) == 0o700
    assert {mode(file) for file in (path, folder / "coordinator.json", folder / "allowed.json")} == {0o600}
    assert not list(folder.glob("*.swap"))


def test_a_revoked_key_is_let_in_no_more(keys: ServerKeys) -> None:
    one, two = (load_token(keys.new_token(name, ADDRESS)) for name in ("one", "two"))
    keys.revoke_token("one")
    assert keys.allowed == {two.public_key: "two"}
    assert one.public_key != load_token(keys.new_token("one", ADDRESS)).public_key


def test_row_19_what_another_process_changes_is_seen_at_once(folder: Path, keys: ServerKeys) -> None:
    other = keys_in(folder)
    for round_number in range(20):
        path = other.new_token(f"host-{round_number}", ADDRESS)
        assert list(keys.allowed) == [load_token(path).public_key]
        other.revoke_token(f"host-{round_number}")
        assert keys.allowed == {}


def test_the_allow_list_is_read_only_when_it_changed(
    folder: Path, keys: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.new_token("one", ADDRESS)
    allowed = keys.allowed
    monkeypatch.setattr(Path, "read_bytes", pytest.fail)
    assert keys.allowed is allowed


def make_tokens(folder: Path, name: str) -> None:
    keys = keys_in(folder)
    for number in range(10):
        keys.new_token(f"{name}-{number}", ADDRESS)


def test_tokens_made_at_the_same_time_all_count(folder: Path, keys: ServerKeys) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_tokens, args=(folder, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 2}', "\0" * 99, None])
def test_an_allow_list_that_cannot_be_read_lets_no_host_in(folder: Path, damage: str | None) -> None:
    lines: list[str] = []
    keys = ServerKeys(folder, key_maker(), lines.append)
    keys.new_token("one", ADDRESS)
    assert list(keys.allowed.values()) == ["one"]
    good = (folder / "allowed.json").read_bytes()
    if damage is None:
        (folder / "allowed.json").unlink()
    else:
        (folder / "allowed.json").write_text(damage)
    for _ in range(3):
        assert keys.allowed == {}
    assert len(lines) == 1
    assert "allowed.json" in lines[0]
    (folder / "allowed.json").write_bytes(good)
    (folder / "allowed.json").chmod(0o600)
    assert list(keys.allowed.values()) == ["one"]


@pytest.mark.parametrize("name", [".", "allowed.json", "coordinator.json"])
def test_nobody_is_let_in_while_keys_are_open_to_others(folder: Path, name: str) -> None:
    """Neither time nor size of a file changes with its mode."""
    lines: list[str] = []
    keys = ServerKeys(folder, key_maker(), lines.append)
    keys.new_token("one", ADDRESS)
    assert list(keys.allowed.values()) == ["one"]
    path = folder / name
    closed = mode(path)
    path.chmod(closed | 0o040)
    assert keys.allowed == keys.allowed == {}
    (told,) = lines
    assert told.startswith("no host is let in: ")
    assert told.endswith(f"close it: chmod {closed:o} {path}")
    with pytest.raises(EsjaxError, match="chmod"):
        keys.new_token("two", ADDRESS)
    path.chmod(closed)
    assert list(keys.allowed.values()) == ["one"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../one", "a/b", "/one", "-one", ".one", "one two", "é", "a\n", "a" * 65]
)
def test_an_invalid_name_is_refused(folder: Path, keys: ServerKeys, name: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    for use in (lambda: keys.new_token(name, ADDRESS), lambda: keys.revoke_token(name)):
        with pytest.raises(EsjaxError, match="cannot be the name of a token") as caught:
            use()
        line(caught)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_taken_name_is_refused(keys: ServerKeys) -> None:
    path = keys.new_token("one", ADDRESS)
    before = path.read_bytes()
    with pytest.raises(EsjaxError, match="already; revoke it first") as caught:
        keys.new_token("one", ADDRESS)
    line(caught)
    assert path.read_bytes() == before


def test_revoking_what_is_not_there_names_what_is(keys: ServerKeys) -> None:
    with pytest.raises(EsjaxError, match="there are: none"):
        keys.revoke_token("three")
    for name in ("two", "one"):
        keys.new_token(name, ADDRESS)
    with pytest.raises(EsjaxError, match="there are: one, two"):
        keys.revoke_token("three")


def test_a_token_whose_making_was_cut_off_can_be_revoked(folder: Path, keys: ServerKeys) -> None:
    path = keys.new_token("one", ADDRESS)
    keys.revoke_token("one")
    path.write_text("half")
    with pytest.raises(EsjaxError, match="revoke it first"):
        keys.new_token("one", ADDRESS)
    keys.revoke_token("one")
    assert load_token(keys.new_token("one", ADDRESS)).name == "one"


def test_secrets_are_not_shown(keys: ServerKeys) -> None:
    token = load_token(keys.new_token("one", ADDRESS))
    for shown in (repr(token), str(token), f"{token}", repr(keys), repr([token])):
        assert "secret" not in shown
    assert "one" in repr(token)


# Files that are no good


@pytest.fixture
def path(keys: ServerKeys) -> Path:
    return keys.new_token("one", ADDRESS)


def refused(path: Path) -> str:
    with pytest.raises(EsjaxError) as caught:
        load_token(path)
    assert str(path) in line(caught)
    return line(caught)


def test_row_41_a_missing_token(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none")
    assert "File name too long" in refused(tmp_path / ("x" * 300))


@needs_permissions
def test_row_41_an_unreadable_token(path: Path) -> None:
    path.chmod(0)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o602, 0o610])
def test_a_token_open_to_others_is_refused(path: Path, bits: int) -> None:
    path.chmod(bits)
    assert f"chmod 600 {path}" in refused(path)
    path.chmod(0o400)
    assert load_token(path).name == "one"


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "token", "\udcff", "{}", '{"format": 1}', "[" * 100_000])
def test_a_file_that_is_no_token(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert "is no esjax token" in refused(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "esjax coordinator"),
        ("name", 1),
        ("address", None),
        ("server_key", "short"),
        ("public_key", "é" * 40),
        ("secret_key", "k" * 41),
        ("secret_key", "k" * 39 + "\n"),
        ("secret_key", "k" * 40 + "\n"),
    ],
)
def test_a_token_with_a_damaged_field(path: Path, field: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert "is no esjax token" in refused(path)


def test_other_files_of_the_folder_are_no_tokens(folder: Path, keys: ServerKeys) -> None:
    for name in ("coordinator.json", "allowed.json"):
        assert "is no esjax token" in refused(folder / name)


@pytest.mark.parametrize("version", [FORMAT + 1, "one", None])
def test_a_token_of_another_version_names_both(path: Path, version: object) -> None:
    path.write_text(json.dumps({"format": version, "anything": "else"}))
    assert re.search(rf"format {version}, not {FORMAT}", refused(path))


def test_a_path_that_is_not_a_file_is_no_token(tmp_path: Path, path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no esjax token" in refused(tmp_path / "pipe")
    assert "is no esjax token" in refused(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**40)
    assert "is no esjax token" in refused(path)


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(EsjaxError, match=f"chmod 700 {tmp_path}") as caught:
        keys_in(tmp_path)
    line(caught)
    assert list(tmp_path.iterdir()) == []


def test_row_41_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "keys", tmp_path / ("x" * 300)):
        with pytest.raises(EsjaxError, match="cannot use the folder of keys") as caught:
            keys_in(folder)
        line(caught)


@needs_permissions
def test_row_41_a_folder_that_cannot_be_written(folder: Path, keys: ServerKeys) -> None:
    folder.chmod(0o500)
    with pytest.raises(EsjaxError, match="cannot write"):
        keys.new_token("one", ADDRESS)


@pytest.mark.parametrize("name", ["coordinator.json", "allowed.json"])
def test_a_damaged_folder_is_named_and_left_alone(folder: Path, keys: ServerKeys, name: str) -> None:
    (folder / name).write_text("half")
    with pytest.raises(EsjaxError, match=name) as caught:
        keys_in(folder)
    line(caught)
    assert (folder / name).read_text() == "half"


def test_a_write_that_is_cut_off_leaves_the_old_file(
    folder: Path, keys: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = load_token(keys.new_token("one", ADDRESS))

    def full_disk(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(EsjaxError, match="No space left on device"):
        keys.new_token("two", ADDRESS)
    monkeypatch.undo()
    assert keys.allowed == {token.public_key: "one"}
    assert load_token(keys.new_token("two", ADDRESS)).name == "two"


def test_a_token_made_by_hand_is_valid() -> None:
    assert Token(FORMAT, "n", ADDRESS, "k" * 40, "k" * 40, "k" * 40) == Token(
        format=FORMAT, name="n", address=ADDRESS, server_key="k" * 40, public_key="k" * 40, secret_key="k" * 40
    )


def test_of_several_that_open_new_keys_at_once_one_makes_the_first_token(tmp_path: Path) -> None:
    for attempt in range(5):
        folder = tmp_path / f"keys {attempt}"
        start = threading.Barrier(4)

        def open_them(number: int, folder: Path = folder, start: threading.Barrier = start) -> str:
            start.wait()
            return ServerKeys(folder, key_maker(), pytest.fail, ("hosts", f"{ADDRESS}{number}")).public_key

        with ThreadPoolExecutor(4) as pool:
            (public_key,) = set(pool.map(open_them, range(4)))
        token = load_token(folder / "hosts.token")
        assert token.server_key == public_key
        assert keys_in(folder).allowed == {token.public_key: "hosts"}


def test_keys_that_are_there_get_no_first_token(folder: Path, keys: ServerKeys) -> None:
    again = ServerKeys(folder, pytest.fail, pytest.fail, ("hosts", ADDRESS))
    assert again.allowed == keys.allowed == {}
