r"""The records of a ledger, as bytes in a file.

The file is "esjax ledger 1\n" and then records, little-endian:
    magic, CRC-32 of all that follows, kind (uint8), step (uint32), bytes of the payload (uint32), the payload

Kinds are 1 for an update, 2 for a digest, and 3 for an update with the training time: its payload begins with the
seconds (float64). Runs write kind 3; older ledgers hold updates of kind 1 and can be read.
"""

import os
import struct
import zlib
from typing import Final, NamedTuple

UPDATE: Final = 1
"""Kind of a record of an update, which takes the run from `step` to `step + 1`."""

DIGEST: Final = 2
"""Kind of a record of the digest, in ASCII, of the state after `step` steps."""

MAX_PAYLOAD = 2**26
"""Most bytes of a payload: more than the weights of 16 million pairs, the most whose sum is exact."""

HEAD = b"esjax ledger 1\n"
"""The first bytes of a file."""

_MAGIC = b"\xe5JX\n"
_HEADER = struct.Struct("<4sIBII")
_TIMED = 3  # kind of an update with its training time, which comes first in the payload
_SECONDS = struct.Struct("<d")
_SUMMED = 8  # the CRC covers the record from this byte on
_STRIDE = 2**20


class Record(NamedTuple):
    """One record.

    Attributes:
        kind: `UPDATE` or `DIGEST`.
        step: Steps done before the update, or when the digest was taken.
        payload: Any bytes, at most `MAX_PAYLOAD`.
        seconds: Training time when the update was recorded; None if it is not in the record.
    """

    kind: int
    step: int
    payload: bytes
    seconds: float | None = None

    @property
    def size(self) -> int:
        """Bytes of the record in the file."""
        return _HEADER.size + (0 if self.seconds is None else _SECONDS.size) + len(self.payload)


def record_at(descriptor: int, offset: int, size: int) -> Record | None:
    """Read the record at an offset of a file of `size` bytes; None if there is no whole record."""
    header = os.pread(descriptor, _HEADER.size, offset)
    if len(header) < _HEADER.size:
        return None
    magic, crc, kind, step, length = _HEADER.unpack(header)
    if magic != _MAGIC or length > min(MAX_PAYLOAD + _SECONDS.size, size - offset - _HEADER.size):
        return None
    payload = os.pread(descriptor, length, offset + _HEADER.size)
    if zlib.crc32(payload, zlib.crc32(header[_SUMMED:])) != crc:
        return None
    if kind == _TIMED and length >= _SECONDS.size:
        return Record(UPDATE, step, payload[_SECONDS.size :], *_SECONDS.unpack_from(payload))
    return Record(kind, step, payload)


def next_record(descriptor: int, offset: int, size: int) -> int | None:
    """Return where the first whole record after an offset begins, or None if there is none."""
    for start in range(offset + 1, size, _STRIDE):
        data = os.pread(descriptor, _STRIDE + len(_MAGIC) - 1, start)
        found = data.find(_MAGIC)
        while found >= 0:
            if record_at(descriptor, start + found, size):
                return start + found
            found = data.find(_MAGIC, found + 1)
    return None


def to_bytes(record: Record) -> bytes:
    """Return a record as it lies in the file."""
    kind, payload = record.kind, record.payload
    if record.seconds is not None:
        kind, payload = _TIMED, _SECONDS.pack(record.seconds) + payload
    summed = _HEADER.pack(_MAGIC, 0, kind, record.step, len(payload))[_SUMMED:] + payload
    return _MAGIC + zlib.crc32(summed).to_bytes(4, "little") + summed


def write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data`; a nearly full disk may take only a part at first."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
