"""The append-only record of every update; with the first state, it is enough to replay the run.

    ledger          records from the first step that is kept, see `esjax.runs.records`
    ledger.next     the records after these, if the run keeps a horizon, see `esjax.runs.horizon`

A record is on the disk before `append` returns, so a crash can tear the last record only. Opening a ledger checks every
CRC: this takes seconds for a million records, and finds damage before a host downloads the damaged record.

A ledger is read for a state at some step, from which on it must be whole. Below that step, damage and missing updates
are passed over: the state, from a checkpoint, already contains them. What comes before such a break is of no more use.
"""

import contextlib
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

from esjax.errors import EsjaxError
from esjax.runs.durable import remedy, sync_folder, writing
from esjax.runs.records import DIGEST, HEAD, MAX_PAYLOAD, UPDATE, Record, next_record, record_at, to_bytes, write

__all__ = ["DIGEST", "MAX_PAYLOAD", "UPDATE", "Ledger", "Record", "read"]

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync


class _Place(NamedTuple):
    """Where a record begins: the number of the file, and the offset in it."""

    part: int
    offset: int


class _Part:
    """An open file of a ledger, for appending."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.end = len(HEAD)
        self.first = 0
        self.offsets = array("Q")  # of the update of each step from `first` on

    def begin(self) -> None:
        """Write the head of a new file, or complete a torn head."""
        head = os.pread(self.descriptor, len(HEAD), 0)
        if head != HEAD and HEAD.startswith(head):
            write(self.descriptor, HEAD, 0)
            os.fsync(self.descriptor)
            sync_folder(self._path.parent)  # so that the name of the file is on the disk, too


class Ledger:
    """A ledger open for appending. The lock of the run folder excludes other writers."""

    def __init__(self, path: Path) -> None:
        """Use `Ledger.open`."""
        self._path = path
        self._parts: list[_Part] = []
        self._next: int | None = None
        self._seconds = 0.0

    @classmethod
    def open(cls, path: Path, tell: Callable[[str], None], start: int | None = None) -> "Ledger":
        """Open a ledger, or make a new one, and cut off a torn or damaged last record.

        Args:
            path: The file.
            tell: Called with a line if a record is cut off, or if something below `start` is passed over.
            start: Step of the state that later updates belong to, and from which on the ledger must be whole. None: it
                must be whole from its beginning on.

        Raises:
            EsjaxError: The file cannot be opened, is no ledger of this version, is damaged before its end, or lacks
                updates from `start` on.
        """
        ledger = cls(path)
        try:
            with ExitStack() as undo:
                undo.callback(ledger.close)
                ledger._parts = [_Part(one) for one in (path, _second(path)) if one == path or one.exists()]
                for part in ledger._parts:
                    part.begin()
                ledger._read_index(tell, start)
                undo.pop_all()
        except OSError as error:
            raise EsjaxError(f"cannot open the ledger {str(path)!r}: {error.strerror}") from error
        return ledger

    def close(self) -> None:
        """Close the files; all records are on the disk already."""
        for part in self._parts:
            os.close(part.descriptor)

    @property
    def first(self) -> int:
        """Step of the first update; that of the next one if there is none."""
        return min((part.first for part in self._parts if part.offsets), default=self.next)

    @property
    def next(self) -> int:
        """Step of the next update; 0 for an empty ledger, whose first update may have any step."""
        return self._next or 0

    @property
    def seconds(self) -> float:
        """Training time of the last update that records it; 0.0 if none does."""
        return self._seconds

    @property
    def beginnings(self) -> list[int]:
        """Step of the first update of each file, or of the update that will be its first."""
        return [part.first if part.offsets else self.next for part in self._parts]

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
        if kind == UPDATE and self._next is not None and step != self._next:
            raise EsjaxError(
                f"the ledger {str(self._path)!r} goes on with step {self.next}, not {step}; resume from a checkpoint "
                "of the same run, or move the ledger away to begin another one"
            )
        if len(payload) > MAX_PAYLOAD:
            raise EsjaxError(
                f"step {step} has a record of {len(payload):,} bytes, and the ledger {str(self._path)!r} takes "
                f"{MAX_PAYLOAD:,} at most; lower the population"
            )
        record, part = Record(kind, step, payload, seconds), self._parts[-1]
        try:
            write(part.descriptor, to_bytes(record), part.end)
            _sync(part.descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # otherwise `open` cuts it off
                os.ftruncate(part.descriptor, part.end)
            raise EsjaxError(
                f"cannot write the ledger {str(self._path)!r}: {error.strerror}; training stops, nothing is lost; "
                f"{remedy(error.errno)} and resume"
            ) from error
        self._add(part, part.end, record)

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        """Read the payloads of consecutive updates.

        Args:
            from_step: Step of the first update. If the ledger does not hold it, the result is empty.
            limit_bytes: Most bytes of all payloads together. The first payload is returned whatever its length.

        Raises:
            EsjaxError: A record is damaged.
        """
        payloads: list[bytes] = []
        if from_step < self.first:
            return payloads
        for part in self._parts:
            for index in range(max(from_step - part.first, 0), len(part.offsets)):
                record = record_at(part.descriptor, part.offsets[index], part.end)
                if record is None:
                    raise _damaged(self._path, part.offsets[index])
                limit_bytes -= len(record.payload)
                if payloads and limit_bytes < 0:
                    return payloads
                payloads.append(record.payload)
        return payloads

    def begin_part(self) -> None:
        """Go on in a new file. Of two files, the first one is dropped.

        Raises:
            DiskError: The folder cannot be written. The ledger is whole all the same.
        """
        second = _second(self._path)
        with writing(second):
            if len(self._parts) == 2:
                os.replace(second, self._path)
                os.close(self._parts.pop(0).descriptor)
            part = _Part(second)
            part.begin()
        self._parts.append(part)

    def _read_index(self, tell: Callable[[str], None], start: int | None) -> None:
        last = self._parts[-1]
        size = os.fstat(last.descriptor).st_size
        for place, record in _records(self._path, [part.descriptor for part in self._parts], start, tell):
            self._add(self._parts[place.part], place.offset, record)
        if start and self.next < start:
            if self._next is not None:
                tell(
                    f"the ledger {str(self._path)!r} ends at step {self.next}, and the newest checkpoint is of step "
                    f"{start}; training goes on from there, and a replay can begin there"
                )
            self._forget()
            self._next = start
        if last.end < size:
            os.ftruncate(last.descriptor, last.end)
            _sync(last.descriptor)
            tell(
                f"the last record of the ledger {str(self._path)!r} is torn or damaged; its {size - last.end} bytes "
                f"are cut off, and the ledger goes on with step {self.next}"
            )

    def _add(self, part: _Part, offset: int, record: Record) -> None:
        if record.kind == UPDATE:
            if record.step != self._next:
                self._forget()
            if not part.offsets:
                part.first = record.step
            part.offsets.append(offset)
            self._next = record.step + 1
        if record.seconds is not None:
            self._seconds = record.seconds
        part.end = offset + record.size

    def _forget(self) -> None:
        """Leave out the updates so far, after which some are missing."""
        for part in self._parts:
            part.offsets = array("Q")


def read(path: Path, start: int | None = None) -> Iterator[Record]:
    """Read a ledger up to a torn or damaged end. Another process may be writing it.

    Args:
        path: The file.
        start: Step of the state for which it is read, see `Ledger.open`; records of earlier steps are left out. None:
            read it from its beginning on.

    Raises:
        EsjaxError: The file cannot be read, is no ledger of this version, is damaged before its end, or lacks updates
            from `start` on.
    """
    return (record for record in _read(path, start) if start is None or record.step >= start)


def beginning(path: Path, start: int) -> int:
    """Return the step from which on a ledger is whole, for a state at `start`; see `Ledger.open`."""
    first, due = 0, None
    for record in _read(path, start):
        if record.kind == UPDATE:
            first = first if record.step == due else record.step
            due = record.step + 1
    return first if due is not None and due >= start else start


def _read(path: Path, start: int | None) -> Iterator[Record]:
    try:
        with ExitStack() as stack:
            for _, record in _records(path, _open_all(path, stack), start, lambda line: None):
                yield record
    except OSError as error:
        raise EsjaxError(f"cannot read the ledger {str(path)!r}: {error.strerror}") from error


def _second(path: Path) -> Path:
    return path.with_name(f"{path.name}.next")


def _open_all(path: Path, stack: ExitStack) -> list[int]:
    """Open the files of a ledger while another process may drop the first one."""
    while True:
        with ExitStack() as opened:
            files = [opened.enter_context(path.open("rb"))]
            with contextlib.suppress(FileNotFoundError):
                files.append(opened.enter_context(_second(path).open("rb")))
            if os.path.samestat(os.fstat(files[0].fileno()), path.stat()):
                stack.enter_context(opened.pop_all())
                return [file.fileno() for file in files]


def _records(
    path: Path, descriptors: Sequence[int], start: int | None, tell: Callable[[str], None]
) -> Iterator[tuple[_Place, Record]]:
    """Yield the records before a torn or damaged end, and their places; what is below `start` is passed over."""
    due: int | None = None
    broken: EsjaxError | None = None
    for number, descriptor in enumerate(descriptors):
        if not HEAD.startswith(os.pread(descriptor, len(HEAD), 0)):
            raise EsjaxError(
                f"{str(path)!r} is no ledger of this version of esjax; move it away or restore it from a copy"
            )
        size, offset = os.fstat(descriptor).st_size, len(HEAD)
        while offset < size:
            record = record_at(descriptor, offset, size)
            if record is None:
                after = next_record(descriptor, offset, size)
                if after is None and number == len(descriptors) - 1:
                    break
                broken = broken or _damaged(path, offset)
                if start is None or (due or 0) > start:
                    raise broken
                offset = size if after is None else after
                continue
            if record.kind not in (UPDATE, DIGEST):
                raise EsjaxError(
                    f"the ledger {str(path)!r} has a record of the unknown kind {record.kind} at byte {offset}; use "
                    "the newer esjax that wrote it"
                )
            if record.kind == UPDATE:
                _check(path, record.step, due, start, offset, broken, tell)
                broken, due = None, record.step + 1
            yield _Place(number, offset), record
            offset += record.size


def _check(
    path: Path,
    step: int,
    due: int | None,
    start: int | None,
    offset: int,
    broken: EsjaxError | None,
    tell: Callable[[str], None],
) -> None:
    """Check that an update follows the one before, or that what is missing is below `start`."""
    is_gap = due is not None and step != due
    if is_gap and broken is None:
        broken = EsjaxError(
            f"the ledger {str(path)!r} has step {step} at byte {offset}, where step {due} belongs; restore it from a "
            "copy"
        )
    if start is not None and step > start and (due is None or is_gap):
        newest = f"the newest whole checkpoint is of step {start}" if start else "no checkpoint is whole"
        way = f", or move the ledger away to go on from step {start}" if start else ""
        raise broken or EsjaxError(
            f"the ledger {str(path)!r} begins at step {step}, and {newest}; restore a later checkpoint or the ledger "
            f"from a copy{way}"
        )
    if broken is not None:
        if start is None or (due is not None and step < due):
            raise broken
        tell(f"{str(broken).rpartition(';')[0]}: it is below the newest checkpoint, so it is passed over")


def _damaged(path: Path, offset: int) -> EsjaxError:
    return EsjaxError(f"the ledger {str(path)!r} is damaged at byte {offset}; restore it from a copy")
