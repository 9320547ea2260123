"""Columns of tables against cells written out by hand."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.config.settings import DataConfig
from esjax.data.corpus import load_corpus
from esjax.data.sources import Documents, locate, open_text
from esjax.data.tables import read_column
from esjax.errors import EsjaxError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CELLS = ["plain", 'a "quoted", one', "two\nlines\n\nand a paragraph", " spaces "]
"""Texts of a column."""

CSV = 'id,text\r\n1,plain\r\n2,"a ""quoted"", one"\r\n3,"two\r\nlines\r\n\r\nand a paragraph"\r\n4,\r\n5, spaces \r\n'
"""The texts as the standard RFC 4180 writes them, by hand; one cell is empty."""

JSON_LINES = "".join(json.dumps({"id": i, "text": cell}) + "\n" for i, cell in enumerate([*CELLS, None, ""]))


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def cells(source: str, documents: Documents = "auto") -> list[str]:
    return list(open_text(source, documents))


def refused(source: str) -> str:
    with pytest.raises(EsjaxError) as caught:
        cells(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd.compress])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", CSV),
        ("t.csv", "\ufeff" + CSV.replace("\r\n", "\n")),
        ("t.jsonl", JSON_LINES),
        ("t.ndjson", JSON_LINES.replace("\n", "\n\n")),
    ],
)
def test_a_cell_is_a_document(tmp_path: Path, name: str, content: str, pack: Callable[[bytes], bytes]) -> None:
    ending = {bytes: "", gzip.compress: ".gz", zstd.compress: ".zst"}[pack]
    assert cells(write(tmp_path / (name + ending), pack(content.encode())) + "#text") == CELLS


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@given(rows=st.lists(st.tuples(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), st.integers())))
def test_a_csv_file_is_read_as_the_standard_library_writes_it(
    tmp_path_factory: pytest.TempPathFactory, mark: str, rows: list[tuple[str, int]]
) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=mark).writerows([("a text", "number"), *rows])
    path = tmp_path_factory.mktemp("csv") / "t.tsv"
    write(path, file.getvalue())
    assert list(read_column(path, "a text", [])) == [text for text, _ in rows]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_of_one_column_a_cell_is_the_line_or_in_quotes(tmp_path: Path, name: str) -> None:
    """By hand."""
    content = 'text\nHello, world; all\n"a ""quoted"", one"\n"two\nlines"\n'
    assert cells(write(tmp_path / name, content) + "#text") == ["Hello, world; all", 'a "quoted", one', "two\nlines"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_name_of_a_column_may_hold_line_ends_and_other_marks(tmp_path: Path, mark: str) -> None:
    """By hand."""
    path = tmp_path / "t.csv"
    write(path, f'id{mark}"a text,\nor; none\t"\n1{mark}one\n2{mark}two\n')
    assert list(read_column(path, "a text,\nor; none\t", [])) == ["one", "two"]
    write(path, f'id{mark}"a text,\nor; none\t"\n1{mark}one\n2{mark}two{mark}three\n')
    with pytest.raises(EsjaxError, match=r"^line 4 of "):
        list(read_column(path, "id", []))


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", CELLS),
        ("paragraph", [*CELLS[:2], "two\nlines", "and a paragraph", CELLS[3]]),
        ("line", [*CELLS[:2], "two", "lines", "and a paragraph", CELLS[3]]),
    ],
)
def test_cells_are_cut_if_the_settings_say_so(tmp_path: Path, documents: Documents, expected: list[str]) -> None:
    assert cells(write(tmp_path / "t.csv", CSV) + "#text", documents) == expected


def test_a_folder_or_a_glob_of_tables_is_read_in_order_without_other_files(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "text\nb\n")
    write(tmp_path / "a" / "a.jsonl", '{"text": "a"}\n')
    write(tmp_path / "README.md", "no table")
    assert cells(f"{tmp_path}#text") == ["a", "b"]
    assert cells(f"{tmp_path}/**/*#text") == ["a", "b"]
    assert cells(f"{tmp_path}/*.csv#text") == ["b"]


def test_a_file_with_exactly_this_name_is_no_column(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", CSV)
    assert cells(write(tmp_path / "t.csv#text", "a text")) == ["a text"]


def test_a_glob_below_a_folder_with_a_hash_is_no_column(tmp_path: Path) -> None:
    write(tmp_path / "c#/t.txt", "a text")
    assert cells(f"{tmp_path}/c#/*.txt") == ["a text"]


def test_a_row_of_json_without_the_column_is_left_out(tmp_path: Path) -> None:
    assert cells(write(tmp_path / "t.jsonl", '{"id": 1}\n{"text": "a"}\n') + "#text") == ["a"]


def test_a_table_without_a_column_is_a_text_and_a_line_says_so(tmp_path: Path) -> None:
    source = write(tmp_path / "t.csv", "text\na\n")
    loaded = open_text(source, "line")
    assert list(loaded) == ["text", "a"]
    assert f"{source}#COLUMN" in loaded.note
    assert "\n" not in loaded.note


def test_a_parquet_table_needs_a_column(tmp_path: Path) -> None:
    source = write(tmp_path / "t.parquet", b"PAR1")
    with pytest.raises(EsjaxError, match=r"Parquet table and no text; name a column of it: .*t\.parquet#COLUMN"):
        open_text(source, "auto")


def test_the_folder_of_a_column_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("t.csv#a b") == str(tmp_path / "t.csv#a b")


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("t.csv", "id,body\n1,a\n", r"no column 'text'; it has 'id', 'body'"),
        ("t.csv", "id;body\n1;a\n", r"no column 'text'; it has 'id', 'body'"),
        ("t.csv", "", "no column 'text'; it has none"),
        ("t.csv", 'text\n"a" b\n', "'line end' expected after '\"' at line 2"),
        ("t.csv", 'id,text\n"1" b,a\n', "line 2"),
        ("t.csv", '"id" a,text\n1,a\n', "line 1; mend its quotes"),
        ("t.csv", "id,text\n1,Hello, world\n", "line 2 of .* has 3 cells, and the first row 2"),
        ("t.tsv", "text\na\tb\n", "line 2 of .* has 2 cells"),
        ("t.csv", 'text\na\n"b\n', "unexpected end of data"),
        ("t.jsonl", '{"body": "a"}\n{"id": 1}\n', "it has 'body', 'id'"),
        ("t.csv", "a" * 200_000 + "\n", "no column 'text'"),
        ("t.jsonl", '{"text": "a"}\n{"text"\n', "line 2 of"),
        ("t.json", '[\n{"text": "a"}]\n', r"jq -c '\.\[\]'"),
        ("t.json", "[1]\n", "no JSON object"),
        ("t.jsonl", '{"text": ["a"]}\n', "line 1 of .* holds list"),
        ("t.jsonl", '{"text": "\\u0000"}\n', "NUL"),
        ("t.jsonl", '{"text": "\\ud800"}\n', "surrogate"),
        ("t.txt", "text\n", "no table by its name"),
        ("t.csv", "text\n\xe9".encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: str | bytes, found: str) -> None:
    path = write(tmp_path / name, content)
    message = refused(f"{path}#text")
    assert path in message
    with pytest.raises(EsjaxError, match=found):
        cells(f"{path}#text")


def test_a_folder_without_a_table_is_told_the_endings(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "text")
    assert ".csv" in refused(f"{tmp_path}#text")


def test_a_long_cell_is_read_and_the_limit_of_the_process_is_put_back(tmp_path: Path) -> None:
    before, long = csv.field_size_limit(), "a" * 200_000
    assert cells(write(tmp_path / "t.csv", f"text\n{long}\n") + "#text") == [long]
    assert csv.field_size_limit() == before


def test_a_damaged_packed_table_is_named(tmp_path: Path) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {"t.csv.gz": gzip.compress, "t.csv.zst": zstd.compress}
    for name, pack in packers.items():
        packed = pack(b"text\n" + bytes(range(32, 127)) * 50)
        path = write(tmp_path / name, packed[:-9])
        assert f"cannot unpack {path!r}" in refused(f"{path}#text")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary<values=string, indices=int32>"])
def test_a_column_of_a_parquet_file(tmp_path: Path, kind: str) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    types = {"string": pyarrow.string(), "large_string": pyarrow.large_string()}
    column = pyarrow.array([*CELLS, None, ""], types.get(kind, pyarrow.string()))
    column = column if kind in types else column.dictionary_encode()
    table = pyarrow.table({"id": range(len(CELLS) + 2), "text": column})
    path = tmp_path / "t.parquet"
    parquet.write_table(table, path, row_group_size=2)
    assert cells(f"{path}#text") == CELLS
    assert "holds int" in refused(f"{path}#id")
    assert "it has 'id', 'text'" in refused(f"{path}#body")
    corpus = load_corpus(DataConfig(text=f"{path}#text", held_out=0.0))
    assert [(file.path, file.bytes) for file in corpus.files] == [(str(path), path.stat().st_size)]
    write(path, path.read_bytes()[:-9])
    assert "as Parquet" in refused(f"{path}#text")
