"""Texts of other people: what is not printable is escaped, wherever they are shown."""

import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from command_line import terminal
from recorded import make

from esjax.runs.reader import read_run
from esjax.terminal import print_text
from esjax.texts import PROSE, legible
from esjax.watch.trackers import JsonLines, _indented, tracked_run


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("grace-1 é 漢 C:\\new", "grace-1 é 漢 C:\\new"),
        ("one\nerror: forged\r", "one\\nerror: forged\\r"),
        ("\x1b[2J\x07\x9b1m\x7f", "\\x1b[2J\\x07\\x9b1m\\x7f"),
        ("\u202egnp.exe\u2028\u200b", "\\u202egnp.exe\\u2028\\u200b"),
        (os.fsdecode(b"caf\xe9 \xc3\xa9"), "caf\\udce9 é"),
        ("\U000e0041", "\\U000e0041"),  # a tag, which no terminal shows
    ],
)
def test_what_is_not_printable_is_escaped(text: str, escaped: str) -> None:
    assert legible(text) == escaped
    assert legible(text).isprintable()


def test_prose_keeps_its_lines_and_the_joiners_of_its_letters() -> None:
    text = "First Citizen:\n\tمی‌خواهم\xa0»\u3000"
    assert legible(text, PROSE) == text
    assert legible(text + "\x1b[2J\r", PROSE) == text + "\\x1b[2J\\r"


def test_what_a_model_writes_cannot_control_a_terminal_and_is_whole_in_a_file(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w", newline="") as file, redirect_stdout(file):
        print_text("a\r\n\x1b[2Jb")
    assert (tmp_path / "file").read_bytes() == b"a\r\n\x1b[2Jb\n"
    with terminal() as (stream, shown):
        with redirect_stdout(stream):
            print_text("a\r\n\x1b[2Jb")
        assert shown("b\r\n") == "a\r\n\\x1b[2Jb\r\n"  # the terminal adds a return to each line feed


def test_a_sample_holds_neither_control_characters_nor_the_beginning_of_another_sample(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", done=4)
    tracker = JsonLines(folder, pytest.fail)
    tracker.start(tracked_run(folder, {}, 4))
    tracker.sample(2, "first")
    tracker.sample(4, "--- step 1\nforged\x1b[2J\n--- step 3\n")
    tracker.close()
    found = [(sample.step, sample.text) for sample in read_run(folder.path).samples]
    assert found == [(2, "first"), (4, "\\--- step 1\nforged\\x1b[2J\n\\--- step 3")]


def test_no_line_of_a_block_of_code_begins_before_it() -> None:
    """A carriage return alone begins a line of Markdown, too."""
    assert _indented("a\n<b>\r# c") == "    a\n    <b>\\r# c\n"
