"""Ids and back, against counts by hand and Python's own UTF-8."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import UNKNOWN_MARK, Vocabulary, fit_vocabulary, parse_vocabulary

HALVES = st.characters(categories=["Cs"])
"""Halves of surrogate pairs, which are no characters."""

TEXT = st.text(st.characters(codec="utf-8", exclude_characters=UNKNOWN_MARK))

DOCUMENTS = st.lists(st.text(st.characters(codec="utf-8", exclude_characters=UNKNOWN_MARK + "\0")), min_size=1)


def fitted(documents: list[str], vocab_size: int | None = None) -> Vocabulary:
    """Fit characters to documents, in two pieces."""
    pieces = [b"".join(text.encode() + b"\0" for text in part) for part in (documents[:1], documents[1:])]
    return fit_vocabulary("char", pieces, vocab_size)


def test_unknown_and_stop_come_first() -> None:
    assert (UNK, STOP) == (0, 1)


def test_ids_fall_with_frequency_and_ties_rise_with_the_code_point() -> None:
    # c four times, a and b twice, d and é once.
    vocabulary = fitted(["bcéb", "aacdcc"])
    assert vocabulary.symbols == ("c", "a", "b", "d", "é")
    assert vocabulary.size == 7
    np.testing.assert_array_equal(vocabulary.encode("cabdé"), [2, 3, 4, 5, 6])


def test_a_limit_leaves_the_rarest_out() -> None:
    vocabulary = fitted(["aaabbc"], 4)
    assert vocabulary.size == 4
    np.testing.assert_array_equal(vocabulary.encode("abc"), [2, 3, UNK])
    assert vocabulary.decode([2, 3, UNK]) == "ab" + UNKNOWN_MARK


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    assert fitted(["aaabbc"], 100) == fitted(["aaabbc"])


@given(DOCUMENTS, st.integers(3, 20))
def test_a_limit_keeps_the_first_ids(documents: list[str], limit: int) -> None:
    everything = fitted(documents)
    limited = fitted(documents, limit)
    assert limited.size == min(limit, everything.size)
    assert limited.symbols == everything.symbols[: limit - 2]


@given(DOCUMENTS)
def test_what_was_fitted_comes_back_whole(documents: list[str]) -> None:
    vocabulary = fitted(documents)
    for document in documents:
        ids = vocabulary.encode(document)
        assert ids.dtype == np.int32
        assert len(ids) == len(document)
        assert not np.isin(ids, (UNK, STOP)).any()
        assert ids.max(initial=0) < vocabulary.size
        assert vocabulary.decode(ids) == document


@given(TEXT)
def test_bytes_are_those_of_utf8_and_come_back_whole(text: str) -> None:
    vocabulary = fit_vocabulary("byte", [b"a"], 10)
    assert vocabulary.size == 258
    ids = vocabulary.encode(text)
    np.testing.assert_array_equal(ids, [byte + 2 for byte in text.encode()])
    assert vocabulary.decode(ids) == text
    assert vocabulary.unknown(text) == []


@given(st.lists(st.integers(0, 257)))
def test_any_bytes_are_written_as_python_does(ids: list[int]) -> None:
    raw = b"".join(UNKNOWN_MARK.encode() if i == UNK else bytes([i - 2]) for i in ids if i != STOP)
    assert Vocabulary("byte").decode(ids) == raw.decode(errors="replace")


def test_broken_utf8_is_marked() -> None:
    broken = [byte + 2 for byte in "é".encode()[:1] + b"x"]
    assert Vocabulary("byte").decode(broken) == UNKNOWN_MARK + "x"


@given(st.lists(st.one_of(st.sampled_from("ab\0é—𝄞"), st.characters(), HALVES)).map("".join))
def test_any_characters_are_mapped_one_by_one(text: str) -> None:
    """Also NUL and halves of surrogate pairs, which no text of a run holds and a prompt may."""
    symbols = ("—", "b", "é", "𝄞", *map(chr, range(1000, 1400)))
    ids = [symbols.index(character) + 2 if character in symbols else UNK for character in text]
    assert Vocabulary("char", symbols).encode(text).tolist() == ids


def test_stop_is_left_out_of_the_text() -> None:
    assert Vocabulary("char", ("a", "b")).decode([2, STOP, 3, STOP]) == "ab"
    assert Vocabulary("byte").decode([2 + ord("a"), STOP, 2 + ord("b")]) == "ab"


def test_unknown_characters_are_listed_once_in_order() -> None:
    vocabulary = Vocabulary("char", ("a", "b"))
    assert vocabulary.unknown("zaybz y") == ["z", "y", " "]
    np.testing.assert_array_equal(vocabulary.encode("zab"), [UNK, 2, 3])


@pytest.mark.parametrize("vocabulary", [Vocabulary("char", ("a", "b", "c")), Vocabulary("byte")])
def test_its_length_is_the_number_of_ids(vocabulary: Vocabulary) -> None:
    """By hand: UNK, STOP and three characters, or 256 bytes."""
    assert len(vocabulary) == vocabulary.size == (5 if vocabulary.kind == "char" else 258)
    assert parse_vocabulary(vocabulary.stored()) == vocabulary
