"""Paths as a person gives them, against what a shell makes of them."""

import os
import pwd
import shutil
from pathlib import Path

import pytest

from esjax.errors import EsjaxError
from esjax.paths import given_path
from esjax.texts import legible


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and a home beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("runs/x", "here/runs/x"),
        (Path("runs/x"), "here/runs/x"),
        ("~", "home"),
        ("~/x y", "home/x y"),
        (Path("~/x"), "home/x"),
        ("./~", "here/~"),
        ("x/~", "here/x/~"),
        ("~nobody.of.that.name", "here/~nobody.of.that.name"),
        ("../x", "here/../x"),
        *((name, f"here/{name}") for name in ("a[1]", "back\\slash", "gs:", "a:b", "-x", "%s", "$x", "a\nb", "é😀")),
    ],
)
def test_a_path_is_whole_and_letter_by_letter(here: Path, given: str | Path, meant: str) -> None:
    whole = given_path(given)
    assert str(whole) == f"{here.parent}/{meant}"
    assert given_path(whole) == whole


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "is empty"),
        ("gs://bucket/run", "is a URL"),
        ("file:///tmp/run", "is a URL"),
        ("a\0b", "NUL"),
        (os.fsdecode(b"caf\xe9"), "not UTF-8"),
    ],
)
def test_what_is_no_path_is_refused_in_one_line(here: Path, given: str, said: str) -> None:
    with pytest.raises(EsjaxError, match=said) as caught:
        given_path(given)
    assert str(caught.value).isprintable()


def test_without_a_home_no_folder_is_called_like_its_sign(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(EsjaxError, match="set HOME"):
        given_path("~/x")


def test_a_working_folder_that_is_gone_is_said(here: Path) -> None:
    shutil.rmtree(here)
    with pytest.raises(EsjaxError, match="the working folder is gone"):
        given_path("x")


def test_names_on_disk_can_be_printed() -> None:
    assert legible(os.fsdecode(b"caf\xe9 \xc3\xa9")) == "caf\\udce9 é"
