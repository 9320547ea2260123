"""What is damaged below a state is passed over, and what is behind the horizon is dropped: no other update is lost.

The reference is the list of what was appended.
"""

import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checkpoints import state_at, steps_in
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax.errors import EsjaxError
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.horizon import is_cut_due
from esjax.runs.ledger import DIGEST, UPDATE, Ledger, Record, beginning, read
from esjax.runs.records import HEAD

SIZE = 17 + 3
"""Bytes of a record."""


def payload(step: int) -> bytes:
    return b"u%02d" % (step % 100)


def opened(path: Path, tell: Callable[[str], Any] = pytest.fail, start: int | None = None) -> closing[Ledger]:
    return closing(Ledger.open(path, tell, start))


def append(ledger: Ledger, *steps: int) -> None:
    for step in steps:
        ledger.append(UPDATE, step, payload(step))


def cut(horizon: int, ledger: Ledger, checkpoints: Checkpoints) -> None:
    if is_cut_due(horizon, ledger.beginnings[-1], checkpoints):
        ledger.begin_part()


def steps_of(path: Path, start: int | None = None) -> list[int]:
    records = list(read(path, start))
    assert [record.payload for record in records] == [payload(record.step) for record in records]
    return [record.step for record in records]


def offset(step: int) -> int:
    return len(HEAD) + SIZE * step


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of ten updates."""
    with opened(tmp_path / "ledger") as ledger:
        append(ledger, *range(10))
    return tmp_path / "ledger"


@pytest.mark.parametrize("step", [0, 3, 5])
@pytest.mark.parametrize("byte", range(SIZE))
def test_row_63_damage_below_the_state_is_passed_over_and_said(path: Path, step: int, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset(step) + byte] ^= 1 << byte % 8
    path.write_bytes(content)
    assert steps_of(path, 6) == [6, 7, 8, 9]
    assert beginning(path, 6) == step + 1
    told: list[str] = []
    with opened(path, told.append, 6) as ledger:
        assert (ledger.first, ledger.next) == (step + 1, 10)
        assert ledger.updates(step, 1000) == []
        assert ledger.updates(step + 1, 1000) == [payload(later) for later in range(step + 1, 10)]
        append(ledger, 10)
    assert told == [
        f"the ledger {str(path)!r} is damaged at byte {offset(step)}: it is below the newest checkpoint, so it is "
        "passed over"
    ]
    assert path.read_bytes()[: len(content)] == content
    assert steps_of(path, step + 1) == [*range(step + 1, 11)]
    for start in (None, step):
        for use in (lambda start=start: list(read(path, start)), lambda start=start: Ledger.open(path, print, start)):
            with pytest.raises(EsjaxError, match=f"damaged at byte {offset(step)}; restore it from a copy"):
                use()


def test_damage_after_the_state_is_an_error_also_if_only_a_digest_follows(path: Path) -> None:
    with opened(path) as ledger:
        ledger.append(DIGEST, 10, b"a digest")
    content = bytearray(path.read_bytes())
    content[offset(9) + 18] ^= 1
    path.write_bytes(content)
    for use in (lambda: list(read(path, 6)), lambda: Ledger.open(path, pytest.fail, 6)):
        with pytest.raises(EsjaxError, match=f"damaged at byte {offset(9)}; restore it from a copy"):
            use()
    assert list(read(path, 10)) == [Record(DIGEST, 10, b"a digest")]


def test_row_63_a_tail_that_was_lost_below_the_state_is_passed_over_and_said(path: Path) -> None:
    """Updates 7 and later are torn off, and the state is of step 9."""
    path.write_bytes(path.read_bytes()[: offset(7) + 5])
    assert steps_of(path, 9) == []
    told: list[str] = []
    with opened(path, told.append, 9) as ledger:
        assert (ledger.first, ledger.next, ledger.updates(6, 1000)) == (9, 9, [])
        append(ledger, 9, 10)
        assert ledger.updates(9, 1000) == [payload(9), payload(10)]
    assert told[0].startswith(f"the ledger {str(path)!r} ends at step 7, and the newest checkpoint is of step 9; ")
    assert "its 5 bytes are cut off" in told[1]
    told.clear()
    with opened(path, told.append, 10) as ledger:
        assert (ledger.first, ledger.next) == (9, 11)
    assert told == [
        f"the ledger {str(path)!r} has step 9 at byte {offset(7)}, where step 7 belongs: it is below the newest "
        "checkpoint, so it is passed over"
    ]
    assert beginning(path, 9) == 9
    with pytest.raises(EsjaxError, match="where step 7 belongs; restore it from a copy"):
        list(read(path, 8))


def test_without_updates_a_ledger_is_whole_from_the_state_on(path: Path) -> None:
    path.write_bytes(HEAD)
    assert (beginning(path, 0), beginning(path, 9)) == (0, 9)


def test_a_ledger_that_begins_after_the_state_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger", start=5) as ledger:
        append(ledger, 5, 6)
    assert steps_of(tmp_path / "ledger", 5) == [5, 6]
    with pytest.raises(EsjaxError, match="begins at step 5, and the newest whole checkpoint is of step 4; restore"):
        Ledger.open(tmp_path / "ledger", pytest.fail, 4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 4), max_size=12), st.booleans())
def test_a_new_file_drops_the_one_before_the_last(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], again: bool
) -> None:
    """Each number is of updates, after which a file begins; perhaps it is opened again every time."""
    path = tmp_path_factory.mktemp("run") / "ledger"
    ledger, firsts = Ledger.open(path, pytest.fail), [0]
    for length in lengths:
        append(ledger, *range(ledger.next, ledger.next + length))
        ledger.begin_part()
        firsts = [*firsts[-1:], ledger.next]
        if again:
            ledger.close()
            ledger = Ledger.open(path, pytest.fail, ledger.next)
    expected = [*range(firsts[0], ledger.next)]
    assert steps_of(path) == expected
    assert ledger.beginnings == firsts
    assert ledger.updates(firsts[0], 10**6) == [payload(step) for step in expected]
    assert all(
        ledger.updates(step, 10**6) == [payload(later) for later in range(step, ledger.next)] for step in expected
    )
    ledger.close()


@pytest.mark.parametrize("torn", [None, 0, 7])
def test_a_crash_while_a_file_begins_loses_nothing(path: Path, torn: int | None) -> None:
    """The first file is replaced already; the next one is not there, or lacks a part of its head."""
    with opened(path) as ledger:
        ledger.begin_part()
        append(ledger, 10, 11)
        ledger.begin_part()
    second = path.with_name("ledger.next")
    second.unlink()
    if torn is not None:
        second.write_bytes(HEAD[:torn])
    assert steps_of(path) == [10, 11]
    with opened(path, start=11) as ledger:
        assert (ledger.first, ledger.next) == (10, 12)
        append(ledger, 12)
    assert steps_of(path) == [10, 11, 12]


def test_a_reader_finds_consecutive_updates_while_files_are_dropped(path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with opened(path) as ledger:
            while not stop.is_set():
                append(ledger, ledger.next)
                ledger.begin_part()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            found = steps_of(path)
            assert found == [*range(found[0], found[0] + len(found))] if found else True
    finally:
        stop.set()
        writer.join()


def test_the_horizon_bounds_the_ledger_and_keeps_a_state_to_begin_at(tmp_path: Path) -> None:
    """Every twelfth step is saved; some states arrive late, as those of hosts do."""
    horizon, interval = 20, 12
    checkpoints, dropped = Checkpoints(tmp_path / "checkpoints", 2), 0
    with opened(tmp_path / "ledger") as ledger:
        checkpoints.beginnings = lambda: ledger.beginnings
        for step in range(150):
            append(ledger, step)
            late = (step // interval) % 4
            if step % interval == late and step > late:
                checkpoints.save(state_at(step - late), 0.0, 0)
                cut(horizon, ledger, checkpoints)
                base = min([one for one in steps_in(tmp_path / "checkpoints") if one >= ledger.first])
                begins = 0 if ledger.first == 0 else base
                assert begins == 0 or checkpoints.newest - begins >= horizon
                assert ledger.next - ledger.first <= 2 * horizon + 3 * interval
                assert steps_of(tmp_path / "ledger", base) == [*range(base, step + 1)]
                dropped += ledger.first > dropped
        assert len(checkpoints.steps) <= 2 + 2
    assert dropped >= 3


def test_a_damaged_state_is_no_reason_to_drop_updates(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", 9)
    with opened(tmp_path / "ledger") as ledger:
        append(ledger, *range(4))
        checkpoints.save(state_at(4), 0.0, 0)
        cut(4, ledger, checkpoints)  # begins the second file at step 4
        append(ledger, *range(4, 8))
        checkpoints.save(state_at(8), 0.0, 0)
        (tmp_path / "checkpoints" / "4" / "seal.json").write_text("")
        cut(4, ledger, checkpoints)
        assert (ledger.first, ledger.beginnings) == (0, [0, 4])
