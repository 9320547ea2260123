"""Columns of tables in files: CSV, JSON lines and Parquet. Each cell is a text."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Any

from esjax.data.text_files import FileRecord, text_pieces
from esjax.errors import EsjaxError
from esjax.extras import needing

LONGEST_CELL = 2**31 - 1
"""Characters that a cell of a CSV file may have."""

MOST_NAMED = 100
"""Most columns that an error lists."""

Reader = Callable[[Path, str, list[FileRecord]], Iterator[str]]


def is_table(path: Path) -> bool:
    """Return whether the name of a file says that it is a table."""
    return _ending(path) in READERS


def read_column(path: Path, column: str, records: list[FileRecord]) -> Iterator[str]:
    r"""Read a column of a table, row by row. Empty cells are left out; every line ends in \n.

    Args:
        path: A file whose name ends in one of `READERS`; also packed by gzip or zstd, but for Parquet.
        column: Name of the column.
        records: List to which the record of the file is added when it has been read.

    Raises:
        EsjaxError: It is no such table, it has no such column, or a cell holds something other than text.
    """
    reader = READERS.get(_ending(path))
    if reader is None:
        raise EsjaxError(
            f"{str(path)!r} has no column {column!r}: it is no table by its name; tables end in "
            f"{', '.join(READERS)}, and data.text without #{column} reads it as text"
        )
    return reader(path, column, records)


def check_cell(value: object, where: str) -> str:
    """Return the text of a cell; "" for a missing one.

    Args:
        value: Any value.
        where: Where it is, for the error.

    Raises:
        EsjaxError: It is no text, or a text that UTF-8 cannot hold, or that holds NUL.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise EsjaxError(f"{where} holds {type(value).__name__} {str(value)[:40]!r}, no text; name a column of texts")
    if "\0" in value:
        raise EsjaxError(f"{where} holds a NUL character, as no text does; take it out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EsjaxError(f"{where} holds half a surrogate pair, which is no character; take it out") from error
    return value.replace("\r\n", "\n").replace("\r", "\n") if "\r" in value else value


def no_column(source: str, column: str, there: Sequence[str]) -> EsjaxError:
    """Return the error about a column that is not there."""
    return EsjaxError(f"{source!r} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}")


def _ending(path: Path) -> str:
    """Return the ending of a file's name, without that of a packer."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in (".gz", ".zst") else path.suffix.lower()


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    begun: list[str] = []  # a line, piece by piece: joined once, at its end
    for piece in pieces:
        whole, end, last = piece.rpartition("\n")
        if end:
            for line in "".join((*begun, whole)).split("\n"):
                yield line + "\n"
            begun = []
        begun.append(last)
    if rest := "".join(begun):
        yield rest


def _csv(path: Path, column: str, records: list[FileRecord]) -> Iterator[str]:
    """Read a CSV file (RFC 4180) whose fields are separated by commas, semicolons or tabs, as its first row says.

    If the first row holds none of them, there is one column: of a .tsv file, up to a tab, and of others the whole line.
    """
    lines, *copies = tee(_lines(text_pieces(path, records)), 4)
    longest, line = csv.field_size_limit(LONGEST_CELL), 1  # the limit is of the process, and is put back
    try:
        headers = {mark: _header(copies.pop(), mark) for mark in ",;\t"}
        mark = max(headers, key=lambda mark: (column in headers[mark], len(headers[mark])))
        if len(headers[mark]) < 2:
            mark = "\t" if _ending(path) == ".tsv" else _NO_MARK
        rows = csv.reader(lines, delimiter=mark, strict=True)
        names = next(rows, [])
        if column not in names:
            raise no_column(str(path), column, names)
        place = names.index(column)
        line = rows.line_num + 1
        for row in rows:
            if len(row) > len(names):
                raise EsjaxError(
                    f"line {line} of {str(path)!r} has {len(row)} cells, and the first row {len(names)}; put "
                    f"quotes around a cell that holds {mark!r}"
                )
            line = rows.line_num + 1  # of the next row
            if row[place:]:
                yield row[place]
    except csv.Error as error:
        reason = str(error).replace(_NO_MARK, "line end")
        raise EsjaxError(f"cannot read {str(path)!r} as CSV: {reason} at line {line}; mend its quotes") from error
    finally:
        csv.field_size_limit(longest)


_NO_MARK = "\0"
"""A character that no text holds, see `text_pieces`."""


def _header(lines: Iterator[str], mark: str) -> list[str]:
    """Read the first row; empty if `mark` does not separate its fields."""
    try:
        return next(csv.reader(lines, delimiter=mark, strict=True), [])
    except csv.Error:
        return []


def _json_lines(path: Path, column: str, records: list[FileRecord]) -> Iterator[str]:
    keys: dict[str, None] = {}
    for number, line in enumerate(_lines(text_pieces(path, records)), 1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EsjaxError(f"{where} is not JSON: {error}; {_ONE_A_LINE}") from error
        if not isinstance(row, dict):
            raise EsjaxError(f"{where} is no JSON object; {_ONE_A_LINE}")
        keys |= dict.fromkeys(row)
        if cell := check_cell(row.get(column), f"{where}, column {column!r},"):
            yield cell
    if keys and column not in keys:
        raise no_column(str(path), column, list(keys)[:MOST_NAMED])


_ONE_A_LINE = "write one object a line, as jq -c '.[]' does"


def _parquet(path: Path, column: str, records: list[FileRecord]) -> Iterator[str]:
    with needing("a Parquet table", "datasets"):
        import pyarrow
        import pyarrow.parquet
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            records.append(FileRecord(str(path), file.tell(), digest.hexdigest()))
            table: Any = pyarrow.parquet.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise no_column(str(path), column, table.schema_arrow.names)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for number, value in enumerate(batch.column(column).to_pylist(), number + 1):  # noqa: B020
                    if cell := check_cell(value, f"row {number} of {str(path)!r}, column {column!r},"):
                        yield cell
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise EsjaxError(f"cannot read {str(path)!r} as Parquet: {reason}; give the path of a whole file") from error


READERS: dict[str, Reader] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}
"""Endings of tables' names."""
