"""Documents in stores: the same in memory and on the disk, and as one document after another."""

import hashlib
import tempfile
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.config.settings import DataConfig
from esjax.data import corpus as corpus_module
from esjax.data import documents as module
from esjax.data import sources, text_files
from esjax.data.corpus import Corpus, load_corpus
from esjax.data.documents import Documents, Store, TextStore, encode_documents
from esjax.data.packing import pack_stream
from esjax.data.sources import _cut, split_documents
from esjax.data.tables import _lines
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary, documents_of, fit_vocabulary
from esjax.errors import EsjaxError

TEXTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))


@pytest.mark.parametrize("kind", ["char", "byte"])
@given(texts=TEXTS)
def test_the_stream_is_that_of_one_document_after_another(kind: Any, texts: list[str]) -> None:
    chosen = Vocabulary(kind, ("a", "b", "é") if kind == "char" else ())
    encoded = [chosen.encode(text) for text in texts]
    store = TextStore()
    store.add(text.encode() for text in texts)
    found = encode_documents(store, chosen)
    np.testing.assert_array_equal(found.stream, pack_stream(encoded))
    assert found.tokens == sum(len(document) + 1 for document in encoded)
    assert [document.tolist() for document in found] == [document.tolist() for document in encoded]
    assert [document.tolist() for document in found[1:]] == [document.tolist() for document in encoded[1:]]


@pytest.mark.parametrize("in_memory", [1, 100, 2**20])
def test_a_store_gives_back_what_was_written(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)
    monkeypatch.setattr(module, "PIECE", 20)
    texts = [f"document {i}" * (i % 5 + 1) for i in range(100)]
    store, numbers = TextStore(), Store()
    for text in texts:
        store.add([text.encode()])
        numbers.write(np.arange(len(text)))
    assert [document for piece in store.pieces() for document in documents_of(piece)] == texts
    assert len(store) == sum(len(text) + 1 for text in texts)
    np.testing.assert_array_equal(numbers.array(np.int64), np.concatenate([np.arange(len(text)) for text in texts]))


def test_a_folder_for_temporary_files_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at all")
    with pytest.raises(EsjaxError, match=r"'/nowhere/at all'.* TMPDIR"):
        Store().write(b"text")


@given(st.text("ab \t\n", max_size=40), st.lists(st.integers(0, 40)))
def test_a_text_in_pieces_is_cut_like_the_whole(text: str, places: list[int]) -> None:
    cuts = [0, *sorted(places), len(text)]
    pieces = [text[begin:end] for begin, end in pairwise(cuts)]
    for documents in ("file", "line", "paragraph"):
        found, whole = (list(chain.from_iterable(_cut(given, documents))) for given in (pieces, [text]))
        assert found == whole


def test_lines_and_runs_of_blank_lines_of_many_pieces_are_read() -> None:
    """Joined anew for each piece, they would take minutes."""
    line = ["x" * 1000] * 10_000
    assert list(_lines(["a", *line, "b\n"])) == ["a" + "x" * 10_000_000 + "b\n"]
    assert list(chain.from_iterable(_cut(["a", *["\n" * 1000] * 3000, "b"], "paragraph"))) == ["a", "b"]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("wrong", [b"\xff and after", b"\0 and after", b"\xc3"])
def test_a_place_in_a_file_is_counted_over_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, wrong: bytes
) -> None:
    """Five characters of two bytes come before it; some pieces end within one."""
    monkeypatch.setattr(text_files, "PIECE", piece)
    path = tmp_path / "text.txt"
    path.write_bytes("é".encode() * 5 + wrong)
    with pytest.raises(EsjaxError, match=r"at byte 10[;,]"):
        corpus_of(path)


def corpus_of(path: Path, **settings: Any) -> Corpus:
    return load_corpus(DataConfig(text=str(path), **settings))


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_a_text_larger_than_memory_is_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Pieces of 7 bytes end within characters, lines and blank lines."""
    path = tmp_path / "text.txt"
    path.write_bytes("".join(f"é document\r\n{i}, ünd\r\n \r\n" for i in range(300)).encode())
    whole = corpus_of(path, vocabulary=kind, held_out=0.3)
    for where, name, value in [
        (text_files, "PIECE", 7),
        (module, "IN_MEMORY", 50),
        (module, "PIECE", 30),
        (sources, "BATCH", 30),
    ]:
        monkeypatch.setattr(where, name, value)
    pieces = corpus_of(path, vocabulary=kind, held_out=0.3)
    assert pieces._replace(train=whole.train, held_out=whole.held_out) == whole
    for one, other in ((pieces.train, whole.train), (pieces.held_out, whole.held_out)):
        np.testing.assert_array_equal(one.stream, other.stream)
        assert one.stream.dtype == other.stream.dtype
        assert len(one) == len(other)


def test_a_corpus_is_what_its_documents_say(tmp_path: Path) -> None:
    """Everything by hand: the hash of the documents as first published, and the splits encoded one by one."""
    path = tmp_path / "text.txt"
    texts = [f"document {i}" for i in range(50)]
    path.write_text("\n\n".join(texts))
    corpus = corpus_of(path, held_out=0.3)
    train, held_out = (
        [document.decode() for document in part] for part in split_documents([text.encode() for text in texts], 0.3)
    )
    assert corpus.vocabulary == fit_vocabulary("char", [text.encode() for text in train], None)
    assert corpus.digest == hashlib.blake2b("\0".join(texts).encode(), digest_size=16).hexdigest()
    assert [corpus.vocabulary.decode(document) for document in corpus.train] == train
    assert [document.tolist() for document in corpus.held_out] == [
        corpus.vocabulary.encode(document).tolist() for document in held_out
    ]
    assert corpus.held_out_bytes == sum(len(text) + 1 for text in held_out)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert corpus.files == ((str(path), path.stat().st_size, digest),)


@given(st.lists(st.lists(st.integers(2, 9), max_size=8), min_size=1), st.integers(1, 30))
def test_a_spread_has_at_most_its_limit_of_tokens_from_all_over(rows: list[list[int]], limit: int) -> None:
    encoded = [np.array(row, np.int32) for row in rows]
    ends = np.cumsum([len(row) + 1 for row in rows])
    documents = Documents(pack_stream(encoded).astype(np.uint8), ends)
    found = documents.spread(limit)
    if documents.tokens <= limit:
        assert found is documents
        return
    assert 0 < sum(len(document) + 1 for document in found) <= limit + 1
    place = 0  # each is the beginning of a document, in their order
    for document in found:
        while rows[place][: len(document)] != document.tolist():
            place += 1
        place += 1


@pytest.mark.parametrize("limit", [4_000, 4_001, 20_000, 30_000, 45_000])
def test_a_spread_takes_its_limit_from_all_parts_of_the_text(limit: int) -> None:
    """Documents of 1 to 99 tokens with their STOPs, the longer ones in the second half: both have their share."""
    lengths = np.concatenate([np.tile(np.arange(0, 41), 20), np.tile(np.arange(40, 99), 10)])
    encoded = [np.full(length, place, np.int32) for place, length in enumerate(lengths, start=2)]
    documents = Documents(pack_stream(encoded), np.cumsum(lengths + 1))
    found = documents.spread(limit)
    taken = np.zeros(len(lengths))
    for document in filter(len, found):
        taken[document[0] - 2] = len(document)
    shares = [
        part.sum() / whole.sum() for part, whole in zip(*(np.array_split(x, 2) for x in (taken, lengths)), strict=True)
    ]
    assert 0.8 * limit < sum(len(document) + 1 for document in found) <= limit + 1
    assert max(shares) < 2 * min(shares)


def test_a_long_document_leaves_room_for_the_others() -> None:
    lengths = [10_000, *[10] * 500]
    encoded = [np.full(length, place, np.int32) for place, length in enumerate(lengths, start=2)]
    documents = Documents(pack_stream(encoded), np.cumsum(np.array(lengths) + 1))
    found = documents.spread(3_200)
    assert len(found[0]) == 100
    assert sum(map(len, found[1:])) > 2_000


def test_bits_per_byte_are_those_of_the_documents_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of é have two bytes a character, those of e have one; the measured ones are decoded one by one."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("eé"[i % 3 == 0] * (i % 17 + 1) + str(i) for i in range(400)))
    corpus = corpus_of(path, held_out=0.5)
    whole = corpus.bits_of_a_nat
    assert whole == pytest.approx(corpus.held_out.tokens / corpus.held_out_bytes / np.log(2))
    monkeypatch.setattr(corpus_module, "MOST_MEASURED", 300)
    texts = [corpus.vocabulary.decode(document) for document in corpus.measured]
    expected = sum(len(text) + 1 for text in texts) / sum(len(text.encode()) + 1 for text in texts) / np.log(2)
    assert corpus.bits_of_a_nat == pytest.approx(expected)
    assert corpus.bits_of_a_nat != pytest.approx(whole)


@pytest.mark.parametrize(("settings", "ratio"), [({"vocab_size": 5}, 0.9), ({"vocabulary": "byte"}, 1.0)])
def test_bits_per_byte_count_no_replacement_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], ratio: float
) -> None:
    """A decoded UNK has three bytes. By hand: a document and its end are 9 characters, 10 bytes."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"{i:06d}aé" for i in range(400)))
    corpus = corpus_of(path, held_out=0.5, **settings)
    monkeypatch.setattr(corpus_module, "MOST_MEASURED", 300)
    assert corpus.measured is not corpus.held_out
    assert corpus.bits_of_a_nat == pytest.approx(ratio / np.log(2))


def test_a_document_may_hold_stops(tmp_path: Path) -> None:
    """As those of a tokenizer whose special tokens the text names."""
    stream = np.array([STOP, 5, STOP, 6, STOP, STOP], np.uint8)
    documents = Documents(stream, np.array([4, 5]))
    assert [document.tolist() for document in documents] == [[5, STOP, 6], []]
