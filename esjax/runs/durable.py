"""Durable, atomic writes of small files, and file locks."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from esjax.errors import DiskError, EsjaxError
from esjax.texts import first_line

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers for a full disk and for an exceeded quota."""

LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
"""Error numbers for a file that is missing, is a folder, or lies on a bad block: what it belongs to is damaged."""


def write_durably(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: readers see the old or the new content, which is on the disk when this returns.

    The permissions of the file are `mode`, less those that the process's umask takes away, from its first byte on.
    """
    swap = path.with_name(f"{path.name}.swap")
    swap.unlink(missing_ok=True)
    with ExitStack() as undo:
        with open(os.open(swap, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            undo.callback(swap.unlink)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(swap, path)
        undo.pop_all()
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Put the names of the files in a folder on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_new_folder(path: Path, files: Mapping[str, str]) -> bool:
    """Make a folder with files in it, or fill an empty one. If several processes try, one of them succeeds.

    Args:
        path: The folder.
        files: Contents by name.

    Returns:
        True if the folder was made; False if an empty one was filled.

    Raises:
        FileExistsError: The path exists and is not an empty folder, or another process was faster.
        OSError: The folder cannot be written; what was made so far is removed.
    """
    claim, is_made = path / ".new", True
    with ExitStack() as undo:
        try:
            path.mkdir(parents=True)
            undo.callback(lambda: None if any(path.iterdir()) else path.rmdir())  # keep what a faster process made
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
    """Write new files durably. If several processes try, one of them succeeds.

    Raises:
        FileExistsError: One of the files exists.
        OSError: A file cannot be written; all files made so far are removed.
    """
    with ExitStack() as undo:
        for path in files:
            path.open("xb").close()  # an empty file reserves the name
            undo.callback(path.unlink)
        for path, content in files.items():
            write_durably(path, content)
        undo.pop_all()


def try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Try to lock an open file, without waiting.

    Args:
        file: The file; closing it releases the lock.
        how: `fcntl.LOCK_EX`, or `fcntl.LOCK_SH`, which several processes may hold at once.

    Returns:
        True if this process has the lock now; False if another process holds it.

    Raises:
        EsjaxError: The file system has no locks, or locking failed.
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
    """Turn an OSError in the body into a DiskError that names the file.

    Raises:
        DiskError: The body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise disk_error(f"cannot write {path}", error) from error


def disk_error(what: str, error: OSError | ValueError) -> DiskError:
    """Make the error for a failed write.

    Args:
        what: Start of the message, such as "cannot write x".
        error: An error of the system, or of TensorStore, whose message holds the error number of the system.
    """
    found = re.search(r"OS error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    why = os.strerror(number) if number else first_line(error)
    return DiskError(f"{what}: {why}", remedy(number))


def remedy(number: int | None) -> str:
    """Return what the user has to do about an error number before resuming."""
    return "make room" if number in FULL else "fix that"
