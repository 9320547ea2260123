"""Data sets of Hugging Face, by the library datasets: from the Hub, or from a folder in its layout.

The library keeps what it fetched on the disk and maps it from there, so a data set may be larger than memory, and needs
the network once.
"""

import hashlib
import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from esjax.data.tables import check_cell, no_column
from esjax.data.text_files import FileRecord
from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.paths import given_path

PREFIX = "hf:"
"""Beginning of a text's name that means a data set."""

_FORM = "hf:NAME[:CONFIG][:SPLIT][#COLUMN]"

_ROWS = 1024
"""Rows that are read at a time."""


class DatasetName(NamedTuple):
    """The parts of `hf:NAME[:CONFIG][:SPLIT][#COLUMN]`.

    Attributes:
        name: Name on the Hub, or a folder, which begins with `/`, `.` or `~`.
        parts: What follows the name: nothing, a configuration or a split, or both.
        column: Name of the column, or None.
    """

    name: str
    parts: tuple[str, ...]
    column: str | None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine."""
        return self.name.startswith(("/", ".", "~"))

    def __str__(self) -> str:
        """Return the whole name."""
        return PREFIX + ":".join((self.name, *self.parts)) + ("" if self.column is None else f"#{self.column}")


def parse_name(source: str) -> DatasetName:
    """Take the name of a data set apart. Colons within brackets belong to a split: `hf:NAME:train[:1000]`.

    Raises:
        EsjaxError: It has another form.
    """
    name, mark, column = source.removeprefix(PREFIX).partition("#")
    name, *parts = re.split(r":(?![^\[]*\])", name)
    if not name or len(parts) > 2 or not all(parts) or (mark and not column):
        raise EsjaxError(f"{source!r} names no data set; its form is {_FORM}")
    return DatasetName(name, tuple(parts), column or None)


def locate_dataset(source: str) -> str:
    """Make the folder of a data set absolute; the name of one on the Hub stays as it is.

    Raises:
        EsjaxError: The name has another form, or the path is not valid.
    """
    found = parse_name(source)
    return str(found._replace(name=str(given_path(found.name)))) if found.is_folder else str(found)


def read_dataset(source: str, records: list[FileRecord]) -> Iterator[str]:
    r"""Read a column of a data set, row by row. Empty cells are left out; every line ends in \n.

    Args:
        source: `hf:NAME[:CONFIG][:SPLIT][#COLUMN]`; the split is train unless named, and the column is text, or the
            only one that holds text.
        records: List to which a record of the cells is added when all have been read.

    Raises:
        EsjaxError: The library is missing, the Hub cannot be reached, or there is no such data set, split or column.
    """
    found = parse_name(source)
    rows = _load(found)
    texts = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    if found.column is not None and found.column not in rows.features:
        raise no_column(source, found.column, list(rows.features))
    column = found.column or ("text" if "text" in texts else texts[0] if len(texts) == 1 else None)
    if column is None:
        there = ", ".join(map(repr, rows.features))
        raise EsjaxError(f"{source!r} has several columns of text, or none: {there}; name one, as {source}#COLUMN")
    digest, size, number = hashlib.blake2b(digest_size=16), 0, 0
    try:
        for batch in rows.select_columns([column]).iter(batch_size=_ROWS):
            for number, value in enumerate(batch[column], number + 1):  # noqa: B020
                if cell := check_cell(value, f"row {number} of {source!r}, column {column!r},"):
                    encoded = cell.encode() + b"\0"
                    digest.update(encoded)
                    size += len(encoded)
                    yield cell
    except UnicodeDecodeError as error:
        where = f"after row {number} of {source!r}, column {column!r}"
        raise EsjaxError(f"{where}: {error.reason}, so it is not UTF-8; write it anew") from error
    records.append(FileRecord(str(found._replace(column=column)), size, digest.hexdigest()))


_STRINGS = ("string", "large_string")


def _load(found: DatasetName) -> Any:
    with needing("a text hf:...", "datasets"):
        import datasets
    # It logs every attempt to reach the Hub, twice; the error below says it once.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    name = str(given_path(found.name)) if found.is_folder else found.name
    if found.is_folder and not given_path(name).is_dir():
        raise EsjaxError(f"there is no folder {name!r}; for a data set on the Hub, leave out its first character")
    try:
        config, split = (*found.parts, None, None)[:2]
        if len(found.parts) == 1 and config not in datasets.get_dataset_config_names(name):
            config, split = None, config
        return datasets.load_dataset(name, config, split=split or "train")
    except ConnectionError as error:
        raise EsjaxError(
            f"cannot reach the Hub of Hugging Face for {found}; go online once, so that the data set is kept on this "
            "machine, or copy its files here and name them: data.text PATH#COLUMN, or hf:/PATH"
        ) from error
    except Exception as error:  # the library raises many kinds, also those of HTTP libraries
        reason = " ".join(str(error).split())
        raise EsjaxError(f"cannot load {found}: {reason}; its form is {_FORM}") from error
