"""Reads a text file as UTF-8, or raises one line that says how to convert the file."""

import shlex
from pathlib import Path

from esjax.errors import EsjaxError

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

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
"""First bytes of compressed files, the name of the format, and the command that unpacks it."""


def read_text(path: Path) -> str:
    r"""Read a text file without its byte-order mark; every line ends in \n.

    Raises:
        EsjaxError: The file cannot be read, is not UTF-8, or holds NUL bytes. Byte positions count from the start of
            the file, its byte-order mark included.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EsjaxError(f"cannot read {str(path)!r}: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        found = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise EsjaxError(f"{str(path)!r} {found}; {_way_out(path, data, 'LATIN1')}") from error
    if "\0" in text:
        found = f"holds NUL bytes, the first at byte {data.index(0)}, as no UTF-8 text does"
        raise EsjaxError(f"{str(path)!r} {found}; {_way_out(path, data, None)}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _way_out(path: Path, data: bytes, other: str | None) -> str:
    """Return the advice of an error message about a file that is not UTF-8 text.

    Args:
        path: Path of the file.
        data: Content of the file.
        other: Encoding to name as an example if none is recognised.
    """
    name, new = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    for start, (packer, unpack) in _PACKED.items():
        if data.startswith(start):
            return f"it is packed by {packer}; unpack it: {unpack} {name}"
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), _guess(data))
    if encoding:
        return f"it looks like {encoding}; convert it: iconv -f {encoding} -t UTF-8 {name} > {new}"
    if other:
        return (
            f"convert it from its encoding, such as {other}: iconv -f {other} -t UTF-8 {name} > {new}; or, if it is no "
            "text, leave it out"
        )
    return f"leave it out, or take them out: tr -d '\\000' < {name} > {new}"


def _guess(data: bytes) -> str | None:
    """Guess the encoding from the positions of NUL bytes."""
    quarters = [data[place::4] for place in range(4)]
    return _NUL_PLACES.get(tuple(i for i, part in enumerate(quarters) if part.count(0) > _OFTEN * len(part)))
