"""Small files that are written as a whole."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from esjax.errors import DiskError, EsjaxError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a system says of a disk, or of a person's share of it, that is full."""


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


def try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Claim the lock of an open file, without waiting.

    Args:
        file: The file; closing it gives the lock free.
        how: `fcntl.LOCK_EX`, or `fcntl.LOCK_SH`, which several may hold at once.

    Returns:
        Whether it was free; if not, another process holds it.

    Raises:
        EsjaxError: The file system has no locks, or fails.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN, and EACCES of some network file systems
        return False
    except OSError as error:
        raise EsjaxError(
            f"cannot lock {file.name}: {error.strerror}; use a folder on a file system with file locks (Lustre has "
            "them if it is mounted with -o flock)"
        ) from error
    return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in what goes wrong while it is written.

    Raises:
        DiskError: Whatever the system said.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error


def disk_error(what: str, error: OSError | ValueError) -> DiskError:
    """Make the error for something that cannot be written.

    Args:
        what: Such as "cannot write x".
        error: From the system, or from TensorStore, in whose words the system's number stands.
    """
    found = re.search(r"OS error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    why = os.strerror(number) if number else (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return DiskError(f"{what}: {why}", remedy(number))


def remedy(number: int | None) -> str:
    """Say what a person does about an error of the system, by its number, before going on."""
    return "make room" if number in FULL else "mend that"
