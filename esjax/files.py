"""Small files that are written as a whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esjax.errors import DiskError


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file: it is on the disk when this returns, and whoever reads it sees the old or the new one."""
    swap = path.with_name(f"{path.name}.swap")
    with swap.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(swap, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is written.

    Raises:
        DiskError: Whatever the system said.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
