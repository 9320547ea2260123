"""Arrays in files of the user's cache, so that a large text is read once and not at every start.

A file holds the arrays, then a description as JSON and its length, and at last a hash of all before it. A file whose
hash is wrong is not used.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from esjax.paths import cache_folder

SWITCH = "ESJAX_TEXT_CACHE"
"""Environment variable; "off": nothing is kept, and nothing that was kept is used."""

MOST_BYTES = 16 * 2**30
"""Most bytes of all files; those that have not been used for the longest time go first."""

_HASH = 16

_LENGTH = struct.Struct("<Q")


class Kept(NamedTuple):
    """What a file holds.

    Attributes:
        arrays: Arrays by name, mapped from the file.
        about: Any JSON value.
    """

    arrays: dict[str, ndarray]
    about: Any


def kept_path(key: Any) -> Path | None:
    """Return the file of a key, which is any JSON value; None if nothing is to be kept."""
    folder = cache_folder()
    if folder is None or os.environ.get(SWITCH) == "off":
        return None
    return folder / "texts" / hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def read_arrays(path: Path) -> Kept | None:
    """Read a file; None if there is none, or if it is damaged."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: it is empty
        return None
    end = len(content) - _HASH
    if end < 0 or hashlib.blake2b(memoryview(content)[:end], digest_size=_HASH).digest() != content[end:]:
        return None
    with suppress(OSError):  # the folder may be one to read only
        os.utime(path)
    begin = end - _LENGTH.size
    (length,) = _LENGTH.unpack_from(content, begin)
    listed, about = json.loads(content[begin - length : begin])
    arrays = {name: np.frombuffer(content, kind, count, place) for name, kind, count, place in listed}
    return Kept(arrays, about)


def keep_arrays(path: Path, arrays: dict[str, ndarray], about: Any) -> bool:
    """Write a file, all of it or nothing.

    Args:
        path: Where, see `kept_path`.
        arrays: One-dimensional contiguous arrays by name.
        about: See `Kept`.

    Returns:
        Whether it was written. It is not if it would take more than `MOST_BYTES`, or more than half of the free space.
    """
    size = sum(array.nbytes for array in arrays.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if size > min(MOST_BYTES, shutil.disk_usage(path.parent).free // 2):
            return False
        new = tempfile.NamedTemporaryFile(dir=path.parent, delete=False)  # noqa: SIM115 - closed below
    except OSError:
        return False
    digest, place, listed = hashlib.blake2b(digest_size=_HASH), 0, []
    try:
        with new as file:
            for name, array in arrays.items():
                listed.append((name, array.dtype.str, len(array), place))
                padding = bytes(-array.nbytes % 8)  # arrays begin where their numbers may lie
                for part in (array.data, padding):
                    digest.update(part)
                    file.write(part)
                place += array.nbytes + len(padding)
            description = json.dumps([listed, about]).encode()
            description += _LENGTH.pack(len(description))
            digest.update(description)
            file.write(description + digest.digest())
        os.replace(new.name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(new.name)
        if not isinstance(error, OSError):
            raise
        return False
    _drop_oldest(path.parent)
    return True


def _drop_oldest(folder: Path) -> None:
    found, total = [], 0
    for path in folder.iterdir():
        with suppress(OSError):  # another process may have dropped it
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MOST_BYTES:
            with suppress(OSError):
                path.unlink()
