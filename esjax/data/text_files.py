"""Reads text files as UTF-8, piece by piece, or raises one line that says how to convert the file.

Files packed by gzip or zstd are unpacked while they are read; they are known by their first bytes.
"""

import codecs
import gzip
import hashlib
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from esjax.errors import EsjaxError
from esjax.extras import needing

PIECE = 2**18
"""Bytes that are read at a time: few enough for a core's cache."""

_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte-order marks, the longer ones first, and iconv's names of the encodings."""

_NUL_PLACES = {(1, 3): "UTF-16LE", (0, 2): "UTF-16BE", (1, 2, 3): "UTF-32LE", (0, 1, 2): "UTF-32BE"}
"""Which of each four bytes are often NUL in a text without a byte-order mark, and the encoding that this suggests."""

_OFTEN = 0.05
"""Fraction of NULs that counts as often; spaces and line ends alone give more."""

_OTHER_PACKERS = {
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"PK\x03\x04": ("zip", "unzip"),
}
"""First bytes of files packed in other ways, the name of the format, and the command that unpacks it."""


class FileRecord(NamedTuple):
    """A file of a text as it was read.

    Attributes:
        path: Its path, or the name of a data set.
        bytes: Its size.
        digest: BLAKE2b-128 of its bytes, in hexadecimal.
    """

    path: str
    bytes: int
    digest: str


def read_text(path: Path) -> str:
    r"""Read a whole text file without its byte-order mark; every line ends in \n.

    Raises:
        EsjaxError: See `text_pieces`.
    """
    return "".join(text_pieces(path))


def text_pieces(path: Path, records: list[FileRecord] | None = None) -> Iterator[str]:
    r"""Read a text file piece by piece, without its byte-order mark; every line ends in \n.

    Args:
        path: The file. If it is packed by gzip or zstd, the text is what it unpacks to.
        records: List to which the record of the file is added when it has been read to its end. None: no record.

    Raises:
        EsjaxError: The file cannot be read, is not UTF-8, or holds NUL bytes. Byte positions count from the start of
            the (unpacked) file, its byte-order mark included. Or it is packed by zstd, and the library is missing.
    """
    with _Hashed(_opened(path), path) as raw:
        unpacked, unpack = _unpacked(raw, path)
        text = _decoded(unpacked, path, unpack)
        yield next(text, "").removeprefix("\ufeff")
        yield from text
        if records is not None:
            raw.skip_rest()
            records.append(FileRecord(str(path), raw.size, raw.digest.hexdigest()))


def _decoded(file: io.BufferedIOBase, path: Path, unpack: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    position, first = 0, b""
    while True:
        data = _read(file, path)
        first = first or data
        begun = decoder.getstate()[0]  # the first bytes of a character that the last piece ended in
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            found = f"is not UTF-8 text: {error.reason} at byte {position - len(begun) + error.start}"
            raise EsjaxError(f"{str(path)!r} {found}; {_way_out(path, first, unpack, 'LATIN1')}") from error
        if (nul := data.find(0)) >= 0:
            found = f"holds NUL bytes, the first at byte {position + nul}, as no UTF-8 text does"
            raise EsjaxError(f"{str(path)!r} {found}; {_way_out(path, first, unpack, None)}")
        position += len(data)
        yield line_ends.decode(text, final=not data)
        if not data:
            return


def _opened(path: Path) -> io.RawIOBase:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise EsjaxError(f"cannot read {str(path)!r}: {error.strerror}") from error


class _Hashed(io.RawIOBase):
    """A file, or a pipe, that counts and hashes the bytes that are read from it, from its start to its end."""

    def __init__(self, file: io.RawIOBase, path: Path) -> None:
        self._file, self._path = file, path
        self.size, self.digest = 0, hashlib.blake2b(digest_size=16)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = self._file.readinto(view) or 0
        self.digest.update(view[:count])
        self.size += count
        return count

    def skip_rest(self) -> None:
        """Read on to the end: unpackers need not reach it."""
        while _read(self, self._path):
            pass

    def close(self) -> None:
        self._file.close()
        super().close()


def _unpacked(raw: io.RawIOBase, path: Path) -> tuple[io.BufferedIOBase, str]:
    """Return the unpacked content of a file, and the command that unpacks it, or ""."""
    file = io.BufferedReader(raw, PIECE)
    try:
        start = file.peek(4)
    except OSError as error:
        raise EsjaxError(f"cannot read {str(path)!r}: {error.strerror}") from error
    for magic, (unpack, command) in _UNPACKERS.items():
        if start.startswith(magic):
            return unpack(file), command
    return file, ""


def _gzip(file: io.BufferedIOBase) -> Any:
    return gzip.open(file)


def _zstd(file: io.BufferedIOBase) -> Any:
    with needing("a text packed by zstd", "zstd"):
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    window = zstd.DecompressionParameter.window_log_max  # 27 by default; zstd --long=31 needs more
    return zstd.open(file, options={window: window.bounds()[1]})


_UNPACKERS: dict[bytes, tuple[Callable[[io.BufferedIOBase], Any], str]] = {
    b"\x1f\x8b": (_gzip, "gunzip -k"),
    b"\x28\xb5\x2f\xfd": (_zstd, "unzstd"),
}
"""First bytes of packed files that are unpacked here, none of them UTF-8; and the command that unpacks them."""


def _read(file: io.BufferedIOBase | io.RawIOBase, path: Path) -> bytes:
    try:
        return file.read(PIECE) or b""
    except OSError as error:
        raise EsjaxError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # EOFError, zlib.error, and that of zstd, which is in an optional library
        raise EsjaxError(f"cannot unpack {str(path)!r}: {error}; the file is damaged, make it anew") from error


def _way_out(path: Path, first: bytes, unpack: str, other: str | None) -> str:
    """Return the advice of an error message about a file that is not UTF-8 text.

    Args:
        path: Path of the file.
        first: Its first bytes; for a packed file, those of its content.
        unpack: Command that unpacks the file, or "" if it is not packed.
        other: Encoding to name as an example if none is recognised.
    """
    name, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
    for start, (packer, command) in _OTHER_PACKERS.items():
        if first.startswith(start):
            return f"it is packed by {packer}; unpack it: {command} {name}"
    encoding = next((encoding for mark, encoding in _MARKS.items() if first.startswith(mark)), _guess(first))
    if unpack:
        kind = f"looks like {encoding}" if encoding else "is no UTF-8"
        return f"what it unpacks to {kind}; unpack it ({unpack} {name}), and convert the text or leave it out"
    if encoding:
        command = f"iconv -f {encoding} -t UTF-8 {name} > {new}"
        return f"it looks like {encoding}; convert it and move the old file away: {command}"
    if other:
        return (
            f"convert it from its encoding, such as {other}, and move the old file away: iconv -f {other} -t UTF-8 "
            f"{name} > {new}; or, if it is no text, leave it out"
        )
    return f"leave it out, or take them out and move the old file away: tr -d '\\000' < {name} > {new}"


def _guess(data: bytes) -> str | None:
    """Guess the encoding from the positions of NUL bytes."""
    quarters = [data[place::4] for place in range(4)]
    return _NUL_PLACES.get(tuple(i for i, part in enumerate(quarters) if part.count(0) > _OFTEN * len(part)))
