"""Small files that are written as a whole."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esjax.errors import DiskError


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file: it is on the disk when this returns, and whoever reads it sees the old or the new one."""
    swap = path.with_name(f"{path.name}.swap")
    with ExitStack() as undo:
        with swap.open("wb") as file:
            undo.callback(swap.unlink)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(swap, path)
        undo.pop_all()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_new_folder(path: Path, files: Mapping[str, str]) -> bool:
    """Make a folder with files in it, or fill an empty one; of several processes that try, one succeeds.

    Args:
        path: The folder.
        files: Contents by name.

    Returns:
        Whether there was no folder, not even an empty one.

    Raises:
        FileExistsError: Something is there, or another process was faster.
        OSError: It cannot be written; what was made so far is removed.
    """
    claim, is_made = path / ".new", True
    with ExitStack() as undo:
        try:
            path.mkdir(parents=True)
            undo.callback(lambda: None if any(path.iterdir()) else path.rmdir())  # what a faster process made stays
        except FileExistsError:
            if not path.is_dir() or any(path.iterdir()):
                raise
            is_made = False
        with claim.open("x"), ExitStack() as claimed:
            claimed.callback(claim.unlink)
            if any(inside != claim for inside in path.iterdir()):
                raise FileExistsError(path)
            for name, content in files.items():
                undo.callback((path / name).unlink, missing_ok=True)
                write_durably(path / name, content)
        undo.pop_all()
    return is_made


def write_new_files(files: Mapping[Path, str | bytes]) -> None:
    """Write files that are not there yet, durably; of several processes that try, one succeeds.

    Raises:
        FileExistsError: One of them is there.
        OSError: One cannot be written; none is left behind.
    """
    with ExitStack() as undo:
        for path in files:
            path.open("xb").close()  # an empty file holds the place
            undo.callback(path.unlink)
        for path, content in files.items():
            write_durably(path, content)
        undo.pop_all()


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
