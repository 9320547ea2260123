r"""The append-only record of every update; with the first state, it is enough to replay the run.

The file is "esjax ledger 1\n" and then records, little-endian:
    magic, CRC-32 of all that follows, kind (uint8), step (uint32), bytes of the payload (uint32), the payload

Kinds are 1 for an update, 2 for a digest, and 3 for an update with the training time: its payload begins with the
seconds (float64). Runs write kind 3; older ledgers hold updates of kind 1 and can be read.

A record is on the disk before `append` returns, so a crash can tear the last record only. Opening a ledger checks every
CRC: this takes seconds for a million records, and finds damage before a host downloads the damaged record.
"""

import contextlib
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, NamedTuple

from esjax.errors import EsjaxError
from esjax.runs.durable import remedy

UPDATE: Final = 1
"""Kind of a record of an update, which takes the run from `step` to `step + 1`."""

DIGEST: Final = 2
"""Kind of a record of the digest, in ASCII, of the state after `step` steps."""

MAX_PAYLOAD = 2**26
"""Most bytes of a payload: four for each of 16 million pairs, the most whose sum is exact."""

_HEAD = b"esjax ledger 1\n"
_MAGIC = b"\xe5JX\n"
_HEADER = struct.Struct("<4sIBII")
_TIMED = 3  # kind of an update with its training time, which comes first in the payload
_SECONDS = struct.Struct("<d")
_SUMMED = 8  # the CRC covers the record from this byte on
_STRIDE = 2**20

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


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


class Ledger:
    """A ledger open for appending. The lock of the run folder excludes other writers."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Wrap an open file; use `Ledger.open`."""
        self._path = path
        self._descriptor = descriptor
        self._end = len(_HEAD)
        self._first = 0
        self._seconds = 0.0
        self._offsets = array("Q")  # of the update of each step

    @classmethod
    def open(cls, path: Path, tell: Callable[[str], None]) -> "Ledger":
        """Open a ledger, or make a new one, and cut off a torn or damaged last record.

        Args:
            path: The file.
            tell: Called with a line if a record is cut off.

        Raises:
            EsjaxError: The file cannot be opened, is no ledger of this version, or is damaged before its end.
        """
        try:
            ledger = cls(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            try:
                ledger._begin()
                ledger._read_index(tell)
            except BaseException:
                ledger.close()
                raise
        except OSError as error:
            raise EsjaxError(f"cannot open the ledger {str(path)!r}: {error.strerror}") from error
        return ledger

    def close(self) -> None:
        """Close the file; all records are on the disk already."""
        os.close(self._descriptor)

    @property
    def first(self) -> int:
        """Step of the first update; 0 if there is none."""
        return self._first

    @property
    def next(self) -> int:
        """Step of the next update; 0 for an empty ledger, whose first update may have any step."""
        return self._first + len(self._offsets)

    @property
    def seconds(self) -> float:
        """Training time of the last update that records it; 0.0 if none does."""
        return self._seconds

    def append(self, kind: Literal[1, 2], step: int, payload: bytes, seconds: float | None = None) -> None:
        """Append a record; it is on the disk when this returns.

        Args:
            kind: `UPDATE` or `DIGEST`.
            step: See `Record`; below 2^32.
            payload: Any bytes, at most `MAX_PAYLOAD`.
            seconds: Training time at an update; None leaves it out.

        Raises:
            EsjaxError: The disk is full or fails, the payload is too long, or an update does not follow the last
                one. The ledger is unchanged.
        """
        if kind == UPDATE and self._offsets and step != self.next:
            raise EsjaxError(
                f"the ledger {str(self._path)!r} goes on with step {self.next}, not {step}; resume from a checkpoint "
                "of the same run, or move the ledger away to begin another one"
            )
        if len(payload) > MAX_PAYLOAD:
            raise EsjaxError(
                f"step {step} has a record of {len(payload):,} bytes, and the ledger {str(self._path)!r} takes "
                f"{MAX_PAYLOAD:,} at most; lower the population"
            )
        record = Record(kind, step, payload, seconds)
        try:
            _write(self._descriptor, _to_bytes(record), self._end)
            _sync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # otherwise `open` cuts it off
                os.ftruncate(self._descriptor, self._end)
            raise EsjaxError(
                f"cannot write the ledger {str(self._path)!r}: {error.strerror}; training stops, nothing is lost; "
                f"{remedy(error.errno)} and resume"
            ) from error
        self._add(record)

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        """Read the payloads of consecutive updates.

        Args:
            from_step: Step of the first update. If the ledger does not hold it, the result is empty.
            limit_bytes: Most bytes of all payloads together. The first payload is returned whatever its length.

        Raises:
            EsjaxError: A record is damaged.
        """
        payloads: list[bytes] = []
        if from_step < self._first:
            return payloads
        for index in range(from_step - self._first, len(self._offsets)):
            record = _record_at(self._descriptor, self._offsets[index], self._end)
            if record is None:
                raise _damaged(self._path, self._offsets[index])
            limit_bytes -= len(record.payload)
            if payloads and limit_bytes < 0:
                break
            payloads.append(record.payload)
        return payloads

    def _begin(self) -> None:
        """Write the head of a new file, or complete a torn head."""
        head = os.pread(self._descriptor, len(_HEAD), 0)
        if head != _HEAD and _HEAD.startswith(head):
            _write(self._descriptor, _HEAD, 0)
            os.fsync(self._descriptor)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # so that the name of the file is on the disk, too
            finally:
                os.close(folder)

    def _read_index(self, tell: Callable[[str], None]) -> None:
        size = os.fstat(self._descriptor).st_size
        for record in _records(self._path, self._descriptor, size):
            self._add(record)
        if self._end < size:
            os.ftruncate(self._descriptor, self._end)
            _sync(self._descriptor)
            tell(
                f"the last record of the ledger {str(self._path)!r} is torn or damaged; its {size - self._end} bytes "
                f"are cut off, and the ledger goes on with step {self.next}"
            )

    def _add(self, record: Record) -> None:
        if record.kind == UPDATE:
            if not self._offsets:
                self._first = record.step
            self._offsets.append(self._end)
        if record.seconds is not None:
            self._seconds = record.seconds
        self._end += record.size


def read(path: Path) -> Iterator[Record]:
    """Read a ledger from its start, up to a torn or damaged end. Another process may be writing it.

    Raises:
        EsjaxError: The file cannot be read, is no ledger of this version, or is damaged before its end.
    """
    try:
        with path.open("rb") as file:
            yield from _records(path, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise EsjaxError(f"cannot read the ledger {str(path)!r}: {error.strerror}") from error


def _records(path: Path, descriptor: int, size: int) -> Iterator[Record]:
    """Yield the records before a torn or damaged end."""
    if not _HEAD.startswith(os.pread(descriptor, len(_HEAD), 0)):
        raise EsjaxError(f"{str(path)!r} is no ledger of this version of esjax; move it away or restore it from a copy")
    offset, due = len(_HEAD), None
    while record := _record_at(descriptor, offset, size):
        if record.kind not in (UPDATE, DIGEST):
            raise EsjaxError(
                f"the ledger {str(path)!r} has a record of the unknown kind {record.kind} at byte {offset}; use the "
                "newer esjax that wrote it"
            )
        if record.kind == UPDATE:
            if due is not None and record.step != due:
                raise EsjaxError(
                    f"the ledger {str(path)!r} has step {record.step} at byte {offset}, where step {due} belongs; "
                    "restore it from a copy"
                )
            due = record.step + 1
        yield record
        offset += record.size
    if _any_record_after(descriptor, offset, size):
        raise _damaged(path, offset)


def _record_at(descriptor: int, offset: int, size: int) -> Record | None:
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


def _any_record_after(descriptor: int, offset: int, size: int) -> bool:
    """Return whether a whole record begins anywhere after an offset."""
    for start in range(offset + 1, size, _STRIDE):
        data = os.pread(descriptor, _STRIDE + len(_MAGIC) - 1, start)
        found = data.find(_MAGIC)
        while found >= 0:
            if _record_at(descriptor, start + found, size):
                return True
            found = data.find(_MAGIC, found + 1)
    return False


def _to_bytes(record: Record) -> bytes:
    kind, payload = record.kind, record.payload
    if record.seconds is not None:
        kind, payload = _TIMED, _SECONDS.pack(record.seconds) + payload
    summed = _HEADER.pack(_MAGIC, 0, kind, record.step, len(payload))[_SUMMED:] + payload
    return _MAGIC + zlib.crc32(summed).to_bytes(4, "little") + summed


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data`; a nearly full disk may take only a part at first."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _damaged(path: Path, offset: int) -> EsjaxError:
    return EsjaxError(f"the ledger {str(path)!r} is damaged at byte {offset}; restore it from a copy")
