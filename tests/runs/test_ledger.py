"""What was appended is read back, whatever tears, fills or kills it; damage is cut off at the end and said elsewhere.

The reference is the list of what was appended, and the file format packed by hand.
"""

import errno
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.errors import EsjaxError
from esjax.runs import ledger as ledger_module
from esjax.runs.ledger import DIGEST, MAX_PAYLOAD, UPDATE, Ledger, Record, read

HEAD = b"esjax ledger 1\n"
RECORDS = [
    Record(UPDATE, 5, b"first"),
    Record(UPDATE, 6, b""),
    Record(DIGEST, 7, b"0123456789abcdef"),
    Record(UPDATE, 7, bytes(range(256)), 1.5),
    Record(UPDATE, 8, b"last", 2.25),
]
"""As they are today and were before the clock came: some updates have their seconds, and some have none."""

UPDATES = [record.payload for record in RECORDS if record.kind == UPDATE]


def packed(record: Record) -> bytes:
    """Pack a record by hand."""
    kind, payload = record.kind, record.payload
    if record.seconds is not None:
        kind, payload = 3, struct.pack("<d", record.seconds) + payload
    body = struct.pack("<BII", kind, record.step, len(payload)) + payload
    return b"\xe5JX\n" + struct.pack("<I", zlib.crc32(body)) + body


def write(path: Path, records: list[Record], tail: bytes = b"") -> None:
    path.write_bytes(HEAD + b"".join(map(packed, records)) + tail)


def opened(path: Path, tell: Callable[[str], None] = pytest.fail) -> closing[Ledger]:
    return closing(Ledger.open(path, tell))


def append(ledger: Ledger, records: list[Record]) -> None:
    for kind, step, payload, seconds in records:
        ledger.append(DIGEST if kind == DIGEST else UPDATE, step, payload, seconds)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        append(ledger, RECORDS)
    return path


def refused(path: Path) -> str:
    """See that a ledger is refused by both ways of reading it, and is left as it is: what is said."""
    before = path.read_bytes() if path.is_file() else None
    messages = []
    for use in (lambda: Ledger.open(path, pytest.fail), lambda: list(read(path))):
        with pytest.raises(EsjaxError) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        messages.append(str(caught.value))
    assert (path.read_bytes() if path.is_file() else None) == before
    return messages[0]


def test_records_are_read_back_in_order(path: Path) -> None:
    assert list(read(path)) == RECORDS


def test_the_file_holds_what_the_format_says(path: Path) -> None:
    assert path.read_bytes() == HEAD + b"".join(map(packed, RECORDS))


def test_a_ledger_packed_by_hand_is_read(tmp_path: Path) -> None:
    write(tmp_path / "ledger", RECORDS)
    assert list(read(tmp_path / "ledger")) == RECORDS
    with opened(tmp_path / "ledger") as ledger:
        assert ledger.updates(5, 1000) == UPDATES


def test_a_new_ledger_is_empty(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger") as ledger:
        assert (ledger.first, ledger.next, ledger.seconds, ledger.updates(0, 1000)) == (0, 0, 0.0, [])
    assert list(read(tmp_path / "ledger")) == []


def test_the_index_after_reopening_is_the_index_before(path: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "again") as before:
        append(before, RECORDS)
        with opened(path) as after:
            assert (after.first, after.next) == (before.first, before.next) == (5, 9)
            assert after.seconds == before.seconds == 2.25
            for step in range(-2, 12):
                assert after.updates(step, 1000) == before.updates(step, 1000)


def test_updates_from_each_step_on(path: Path) -> None:
    with opened(path) as ledger:
        for step in range(5, 9):
            assert ledger.updates(step, 1000) == UPDATES[step - 5 :]
        assert [ledger.updates(step, 1000) for step in (-1, 0, 4, 9, 10, 2**40)] == [[]] * 6


def test_updates_keep_to_the_limit_but_for_the_first(path: Path) -> None:
    assert [len(payload) for payload in UPDATES] == [5, 0, 256, 4]
    with opened(path) as ledger:
        counts = {limit: len(ledger.updates(5, limit)) for limit in (0, 4, 5, 260, 261, 264, 265)}
        assert counts == {0: 1, 4: 1, 5: 2, 260: 2, 261: 3, 264: 3, 265: 4}
        assert ledger.updates(7, 1) == [UPDATES[2]]
        assert ledger.updates(6, 0) == [b""]


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(0, 2**32 - 13), st.integers(0, 150))
def test_any_payloads_come_back(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], first: int, limit: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "ledger"
    with opened(path) as ledger:
        append(ledger, [Record(UPDATE, first + i, payload) for i, payload in enumerate(payloads)])
        for i in range(len(payloads)):
            got = ledger.updates(first + i, limit)
            assert got == payloads[i : i + len(got)]
            assert len(got) == 1 or sum(map(len, got)) <= limit
            rest = payloads[i : i + len(got) + 1]
            assert len(rest) == len(got) or sum(map(len, rest)) > limit  # no more would have fitted


@pytest.mark.parametrize("step", [0, 4, 5, 8, 10])
def test_a_gap_or_a_repetition_is_refused_and_nothing_written(path: Path, step: int) -> None:
    before = path.read_bytes()
    with opened(path) as ledger:
        with pytest.raises(EsjaxError, match=f"goes on with step 9, not {step};"):
            ledger.append(UPDATE, step, b"wrong")
        assert path.read_bytes() == before
        ledger.append(UPDATE, 9, b"right")
    assert list(read(path)) == [*RECORDS, Record(UPDATE, 9, b"right")]


@pytest.mark.parametrize("step", [5, 7, 9])
def test_a_ledger_that_skips_or_repeats_a_step_is_refused(tmp_path: Path, step: int) -> None:
    path = tmp_path / "ledger"
    write(path, [*RECORDS[:2], Record(UPDATE, 6 if step == 7 else step, b""), *RECORDS[2:]])
    assert "where step 7 belongs" in refused(path)


def test_the_longest_payload_fits_and_a_longer_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_PAYLOAD >= 2 * 2**31 // 127 // 2  # two bytes for each pair of the largest exact population
    monkeypatch.setattr(ledger_module, "MAX_PAYLOAD", 10)
    with opened(tmp_path / "ledger") as ledger:
        ledger.append(UPDATE, 0, b"x" * 10)
        with pytest.raises(EsjaxError, match="11 bytes"):
            ledger.append(UPDATE, 1, b"x" * 11)
    assert list(read(tmp_path / "ledger")) == [Record(UPDATE, 0, b"x" * 10)]


def goes_on(path: Path, kept: list[Record], cut: int) -> None:
    """See that the end is cut off and said, and that the ledger goes on from there."""
    told: list[str] = []
    assert list(read(path)) == kept  # before anything is mended
    with opened(path, told.append) as ledger:
        assert len(told) == 1
        assert str(path) in told[0]
        assert f"{cut} bytes" in told[0]
        step = ledger.next
        ledger.append(UPDATE, step, b"new")
    assert list(read(path)) == [*kept, Record(UPDATE, step, b"new")]
    assert path.read_bytes() == HEAD + b"".join(map(packed, [*kept, Record(UPDATE, step, b"new")]))


def test_row_33_a_last_record_torn_at_any_byte_is_cut_off_and_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    last = packed(RECORDS[-1])
    for length in range(1, len(last)):
        write(path, RECORDS[:-1], last[:length])
        goes_on(path, RECORDS[:-1], length)


def test_row_33_a_first_record_torn_at_any_byte_is_cut_off_and_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    only = packed(Record(UPDATE, 0, b"only"))
    for length in range(1, len(only)):
        write(path, [], only[:length])
        goes_on(path, [], length)


def test_row_33_any_flipped_bit_in_the_last_record_is_found_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    last = packed(RECORDS[-1])
    for bit in range(8 * len(last)):
        changed = bytearray(last)
        changed[bit // 8] ^= 1 << bit % 8
        write(path, RECORDS[:-1], bytes(changed))
        goes_on(path, RECORDS[:-1], len(last))


def test_row_33_an_end_of_zeros_is_cut_off(tmp_path: Path) -> None:
    """After a power cut a file may have its new length without the new bytes."""
    write(tmp_path / "ledger", RECORDS, bytes(3000))
    goes_on(tmp_path / "ledger", RECORDS, 3000)


def test_any_flipped_bit_in_the_middle_is_an_error_that_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    whole = HEAD + b"".join(map(packed, RECORDS))
    begin, end = len(HEAD) + len(packed(RECORDS[0])), len(whole) - len(packed(RECORDS[-1]))
    begins = [len(HEAD) + sum(len(packed(record)) for record in RECORDS[:i]) for i in range(len(RECORDS))]
    for byte in range(begin, end):
        changed = bytearray(whole)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        message = refused(path)
        offset = max(begin for begin in begins if begin <= byte)
        assert f"damaged at byte {offset};" in message
        assert "restore it from a copy" in message


def test_bytes_lost_from_the_middle_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    whole = HEAD + b"".join(map(packed, RECORDS))
    path.write_bytes(whole[:40] + whole[50:])
    assert "damaged at byte" in refused(path)


@pytest.mark.parametrize("gap", [0, *range(2**20 - 40, 2**20), 3 * 2**20])
def test_a_whole_record_is_found_however_far_behind_the_damage(tmp_path: Path, gap: int) -> None:
    """Also where the search, which reads a stride at a time, meets a record between two strides."""
    decoys = packed(RECORDS[0])[:-1] + b"\xe5JX\n"
    write(tmp_path / "ledger", RECORDS[:1], decoys + bytes(gap) + packed(RECORDS[1]))
    assert f"damaged at byte {len(HEAD) + len(packed(RECORDS[0]))};" in refused(tmp_path / "ledger")


def test_the_clock_goes_on_where_a_torn_record_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    write(path, RECORDS[:-1], packed(RECORDS[-1])[:-1])
    with opened(path, lambda line: None) as ledger:
        assert (ledger.next, ledger.seconds) == (8, 1.5)


@pytest.mark.parametrize("kind", [0, 4, 255])
def test_a_record_of_an_unknown_kind_is_an_error(tmp_path: Path, kind: int) -> None:
    write(tmp_path / "ledger", [*RECORDS, Record(kind, 9, b"from the future")])
    assert f"unknown kind {kind}" in refused(tmp_path / "ledger")


@pytest.mark.parametrize("content", [b"esjax ledger 2\n" + packed(RECORDS[0]), b"a poem", b"\0" * 100])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger").write_bytes(content)
    assert "no ledger of this version" in refused(tmp_path / "ledger")


def test_a_ledger_torn_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for length in range(len(HEAD)):
        path.write_bytes(HEAD[:length])
        assert list(read(path)) == []
        with opened(path) as ledger:
            append(ledger, RECORDS)
        assert list(read(path)) == RECORDS


def test_a_folder_is_no_ledger(tmp_path: Path) -> None:
    assert "directory" in refused(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none" / "ledger")
    with pytest.raises(EsjaxError, match="No such file"):
        list(read(tmp_path / "ledger"))


def test_a_record_that_changes_under_an_open_ledger_is_an_error(path: Path) -> None:
    with opened(path) as ledger:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"last", b"lost"))
        with pytest.raises(EsjaxError, match="damaged at byte"):
            ledger.updates(5, 1000)
        assert ledger.updates(5, 5) == UPDATES[:2]


def test_a_ledger_is_read_while_it_grows(path: Path) -> None:
    with opened(path) as ledger:
        records = read(path)
        assert next(records) == RECORDS[0]
        ledger.append(UPDATE, 9, b"later")
        assert list(records) == RECORDS[1:]  # what was there when reading began
        assert list(read(path)) == [*RECORDS, Record(UPDATE, 9, b"later")]


def test_a_record_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger"
    synced: list[bytes] = []
    monkeypatch.setattr(ledger_module, "_sync", lambda descriptor: synced.append(path.read_bytes()))
    with opened(path) as ledger:
        for record in RECORDS:
            append(ledger, [record])
            assert synced[-1] == path.read_bytes()
    assert len(synced) == len(RECORDS)
    assert synced[-1] == HEAD + b"".join(map(packed, RECORDS))


def test_a_new_file_and_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    for _ in range(2):  # an old one is not
        with opened(tmp_path / "ledger"):
            pass
        assert synced == [(tmp_path / "ledger").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_row_31_a_disk_that_fails_leaves_the_ledger_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    def fail(descriptor: int, data: bytes = b"", offset: int = 0) -> int:
        if operation == "write" and len(data) > 20:
            return pwrite(descriptor, data[:20], offset)  # a part still fits
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pwrite = os.pwrite
    before = path.read_bytes()
    with opened(path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(*(os, "pwrite") if operation == "write" else (ledger_module, "_sync"), fail)
            with pytest.raises(EsjaxError) as caught:
                ledger.append(UPDATE, 9, b"x" * 100)
        assert str(caught.value) == (
            f"cannot write the ledger {str(path)!r}: No space left on device; training stops, nothing is lost; "
            "make room and resume"
        )
        assert path.read_bytes() == before
        assert ledger.updates(5, 1000) == UPDATES
        ledger.append(UPDATE, 9, b"space again")
    assert list(read(path)) == [*RECORDS, Record(UPDATE, 9, b"space again")]


def run(program: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)


FILL = """
import resource, sys
from pathlib import Path
from esjax.errors import EsjaxError
from esjax.runs.ledger import UPDATE, Ledger

path = Path(sys.argv[1])
ledger = Ledger.open(path, print)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    for step in range(1000):
        ledger.append(UPDATE, step, bytes([step]) * 300)
except EsjaxError as error:
    print(error)
    print(step, ledger.next, path.stat().st_size, len(ledger.updates(0, 10**6)))
"""


def test_row_31_the_kernel_refuses_to_let_the_file_grow(tmp_path: Path) -> None:
    """A limit of the file's size ends a write as a full disk does: a part is taken, and then there is an error."""
    path = tmp_path / "ledger"
    output, _ = run(FILL, path).communicate(timeout=60)
    fitting = (10_000 - len(HEAD)) // len(packed(Record(UPDATE, 0, bytes(300))))
    assert output.splitlines() == [
        f"cannot write the ledger {str(path)!r}: File too large; training stops, nothing is lost; fix that and resume",
        f"{fitting} {fitting} {len(HEAD) + fitting * 317} {fitting}",
    ]
    assert [record.payload for record in read(path)] == [bytes([step]) * 300 for step in range(fitting)]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of 64 KiB; skip where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a disk can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is of Linux")
def test_row_31_on_a_full_disk_nothing_is_lost_and_it_goes_on_when_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path):
        path = tmp_path / "ledger"
        (tmp_path / "ballast").write_bytes(bytes(2**14))
        with opened(path) as ledger:
            records = [Record(UPDATE, step, bytes([step]) * 1000) for step in range(100)]
            with pytest.raises(EsjaxError, match="No space left on device; training stops, nothing is lost"):
                append(ledger, records)
            done = ledger.next
            assert 0 < done < 64
            assert path.stat().st_size == len(HEAD) + 1017 * done
            assert [record.step for record in read(path)] == list(range(done))
            (tmp_path / "ballast").unlink()
            ledger.append(UPDATE, done, b"space again")
        assert [record.step for record in read(path)] == list(range(done + 1))


APPEND = """
import itertools, sys
from pathlib import Path
from esjax.runs.ledger import UPDATE, Ledger

ledger = Ledger.open(Path(sys.argv[1]), lambda line: None)
for step in itertools.count(ledger.next):
    ledger.append(UPDATE, step, step.to_bytes(4, "little") * (step % 5000))
    print(step, flush=True)
"""


def test_a_ledger_that_was_killed_holds_every_update_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    acknowledged = -1
    for round_ in range(5):
        process = run(APPEND, path)
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                acknowledged = int(line)
                if acknowledged >= 40 * (round_ + 1):
                    process.send_signal(signal.SIGKILL)
        process.wait()
        records = list(read(path))
        assert len(records) in (acknowledged + 1, acknowledged + 2)  # one may lack its acknowledgement only
        for step, record in enumerate(records):
            assert record == Record(UPDATE, step, step.to_bytes(4, "little") * (step % 5000))
