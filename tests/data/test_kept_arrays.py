"""What is kept of large texts: the same as what was read, and used for the same files and settings alone."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from esjax.config.settings import DataConfig
from esjax.data import corpus as module
from esjax.data import kept_arrays
from esjax.data.corpus import Corpus, load_corpus
from esjax.data.kept_arrays import SWITCH, keep_arrays, kept_path, read_arrays
from esjax.data.vocabulary import Vocabulary

USED = "is not read again"

ARRAYS: dict[str, np.ndarray] = {"a": np.arange(5, dtype=np.uint8), "b": np.arange(3), "none": np.zeros(0, np.uint16)}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text that is large and long unchanged, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(module, "LARGE", 100)
    monkeypatch.setattr(module, "SETTLED", -1.0)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i} é" for i in range(200)))
    return path


def load(path: Path, known: Vocabulary | None = None, **settings: Any) -> Corpus:
    return load_corpus(DataConfig(text=str(path), **({"held_out": 0.3} | settings)), known)


def files(path: Path) -> list[Path]:
    return sorted((path.parent / "cache" / "esjax" / "texts").iterdir())


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_the_second_start_gives_the_same_corpus_and_reads_no_text(
    text: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the vocabulary of the run, as when it is resumed."""
    if kind.startswith("bpe"):
        pytest.importorskip("tokenizers")
    first = load(text, vocabulary=kind)
    assert first.note == ""
    monkeypatch.setattr(module, "_read_corpus", None)
    for known in (None, first.vocabulary):
        second = load(text, known, vocabulary=kind)
        assert USED in second.note
        assert second._replace(train=first.train, held_out=first.held_out, note="") == first
        for one, other in ((second.train, first.train), (second.held_out, first.held_out)):
            np.testing.assert_array_equal(one.stream, other.stream)
            np.testing.assert_array_equal(one.ends, other.ends)
            assert one.stream.dtype == other.stream.dtype


def change_a_letter(path: Path) -> None:
    """Size and time of change, as programs see and set it, stay the same."""
    before = path.stat()
    time.sleep(0.02)  # more than the resolution of the file system's clock
    path.write_text(path.read_text().replace("document 7 ", "document x "))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def put_another_in_its_place(path: Path) -> None:
    other = path.with_name("other.txt")
    other.write_text(path.read_text().replace("document 7 ", "document x "))
    shutil.copystat(path, other)
    other.replace(path)


@pytest.mark.parametrize("change", [change_a_letter, put_another_in_its_place])
def test_a_changed_text_is_read_anew(text: Path, change: Callable[[Path], None]) -> None:
    first = load(text)
    change(text)
    second = load(text)
    assert second.note == ""
    assert second.digest != first.digest


def test_another_file_of_the_folder_is_noticed(text: Path) -> None:
    folder = text.parent / "papers"
    folder.mkdir()
    shutil.copy(text, folder / "one.txt")
    first = load(folder)
    assert USED in load(folder).note
    (folder / "two.txt").write_text("new")
    second = load(folder)
    assert second.note == ""
    assert len(second.files) == len(first.files) + 1


@pytest.mark.parametrize(
    "settings",
    [{"documents": "line"}, {"held_out": 0.1}, {"vocabulary": "byte"}, {"vocab_size": 9}, {"symbols": "document"}],
)
def test_other_settings_read_anew(text: Path, settings: dict[str, Any]) -> None:
    load(text)
    assert load(text, **settings).note == ""
    assert USED in load(text, **settings).note
    assert USED in load(text, window=9).note  # which changes no token


def test_another_vocabulary_reads_anew(text: Path) -> None:
    load(text)
    other = load(text, Vocabulary("char", ("a", "b")))
    assert other.note == ""
    again = load(text, Vocabulary("char", ("a", "b")))
    assert USED in again.note
    for one in (other, again):
        assert one.vocabulary.symbols == ("a", "b")


def test_the_vocabulary_of_a_run_is_not_that_of_the_settings(text: Path) -> None:
    """Also if the run's is kept first."""
    load(text, Vocabulary("char", ("a", "b")))
    assert load(text).vocabulary.symbols[:3] != ("a", "b")
    assert "é" in load(text).vocabulary.symbols


def test_a_file_under_another_name_is_not_used(text: Path) -> None:
    load(text)
    (kept,) = files(text)
    other = text.with_name("other.txt")
    other.write_text("\n\n".join(f"page {i}" for i in range(200)))
    load(other)
    (new,) = set(files(text)) - {kept}
    shutil.copy(kept, new)
    assert load(other).note == ""


def test_a_cache_to_read_only_is_used(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(text)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError))
    assert USED in load(text).note


def test_another_tokenizer_under_the_same_name_is_noticed(text: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = text.with_name("tokenizer.json")
    for number, words in enumerate((("document", "é"), ("document",))):
        model = tokenizers.models.WordLevel({word: i for i, word in enumerate(("?", *words))}, unk_token="?")
        tokenizer.write_text(tokenizers.Tokenizer(model).to_str())
        found = load(text, vocabulary=f"tokenizer:{tokenizer}")
        assert found.note == ""
        assert found.vocabulary.size == 5 - number
        assert USED in load(text, vocabulary=f"tokenizer:{tokenizer}").note


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_read_anew_and_replaced(text: Path, damage: str) -> None:
    first = load(text)
    (kept,) = files(text)
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    second = load(text)
    assert second.note == ""
    np.testing.assert_array_equal(second.train.stream, first.train.stream)
    assert USED in load(text).note


def test_nothing_is_kept_when_it_is_switched_off(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(text)
    monkeypatch.setenv(SWITCH, "off")
    assert load(text).note == ""
    monkeypatch.delenv(SWITCH)
    (kept,) = files(text)
    kept.unlink()
    monkeypatch.setenv(SWITCH, "off")
    load(text)
    assert files(text) == []


def test_nothing_is_kept_of_a_small_text_or_one_that_may_still_change(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", text.stat().st_size + 1)
    load(text)
    monkeypatch.setattr(module, "LARGE", 100)
    monkeypatch.setattr(module, "SETTLED", 1e6)
    load(text)
    assert not (text.parent / "cache").exists()


def test_a_text_that_changes_while_it_is_read_is_not_kept(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = module._read_corpus

    def read_and_change(*given: Any) -> Corpus:
        found = read(*given)
        text.write_text("another\n\n" * 100)
        return found

    monkeypatch.setattr(module, "_read_corpus", read_and_change)
    load(text)
    assert not (text.parent / "cache").exists()


def test_the_oldest_go_when_there_are_too_many(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [kept_path(number) for number in range(3)]
    assert all(paths)
    for number, path in enumerate(paths):
        assert path is not None
        assert keep_arrays(path, ARRAYS, number)
        os.utime(path, (number, number))
    first, second, third = (path for path in paths if path)
    monkeypatch.setattr(kept_arrays, "MOST_BYTES", 2 * first.stat().st_size)
    found = read_arrays(first)  # so it has been used last but one
    assert found is not None
    assert keep_arrays(third, ARRAYS, 2)
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    assert found.about == 0
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype


def test_nothing_is_kept_where_there_is_no_room(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_arrays, "MOST_BYTES", 10)
    path = kept_path("key")
    assert path is not None
    assert not keep_arrays(path, ARRAYS, None)
    monkeypatch.undo()
    path = text / "below a file"
    assert not keep_arrays(path, ARRAYS, None)


def test_what_cannot_be_written_leaves_nothing(text: Path) -> None:
    path = kept_path("key")
    assert path is not None
    with pytest.raises(TypeError, match="JSON"):
        keep_arrays(path, ARRAYS, {1, 2})
    assert files(text) == []
