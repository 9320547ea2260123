"""Streams, windows and lanes, against arrays by hand and a plain reference."""

import math
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.packing import check_stream, draw_windows, follow_windows, pack_lanes, pack_stream
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.replica.streams import WINDOWS

DOCUMENTS = st.lists(
    st.lists(st.sampled_from([0, 2, 3, 4, 5]), max_size=12).map(lambda ids: np.array(ids, np.int32)), min_size=1
)


def seeds_of(pairs: int, step: int = 0) -> jnp.ndarray:
    return pair_seeds(stream_seed(7, WINDOWS), jnp.int32(step), jnp.arange(pairs))


def test_a_stream_has_a_stop_before_the_first_and_after_each_document() -> None:
    documents = [np.array([2, 3], np.int32), np.array([4], np.int32)]
    stream = pack_stream(documents)
    np.testing.assert_array_equal(stream, [STOP, 2, 3, STOP, 4, STOP])
    assert stream.dtype == np.int32


def test_every_window_is_a_run_of_the_stream() -> None:
    # Every token is its own position, so a run is a row of successors.
    windows = np.asarray(draw_windows(jnp.arange(50), seeds_of(20), 3, 6))
    assert windows.shape == (20, 3, 6)
    np.testing.assert_array_equal(windows - windows[:, :, :1], np.broadcast_to(np.arange(6), (20, 3, 6)))
    assert windows.min() >= 0
    assert windows.max() < 50


def test_windows_hold_the_streams_own_tokens() -> None:
    stream = jnp.array([1, 5, 1, 7, 7, 3, 1, 9], jnp.int32)
    positions = np.asarray(draw_windows(jnp.arange(8), seeds_of(20), 2, 3))
    windows = np.asarray(draw_windows(stream, seeds_of(20), 2, 3))
    np.testing.assert_array_equal(windows, np.asarray(stream)[positions])


def test_equal_seeds_draw_equal_windows_and_others_do_not() -> None:
    stream = jnp.arange(10_000)
    first = np.asarray(draw_windows(stream, seeds_of(8), 2, 4))
    np.testing.assert_array_equal(first, draw_windows(stream, seeds_of(8), 2, 4))
    # 16 starts among 9997: that another step draws one of them again in the same place has odds of 16 / 9997.
    assert not (first == np.asarray(draw_windows(stream, seeds_of(8, step=1), 2, 4))).any()


def test_a_pairs_windows_are_drawn_from_its_seed_alone() -> None:
    stream = jnp.arange(10_000)
    many = np.asarray(draw_windows(stream, seeds_of(8), 2, 4))
    for pair, seed in enumerate(seeds_of(8)):
        np.testing.assert_array_equal(many[pair : pair + 1], draw_windows(stream, seed[None], 2, 4))


def test_the_sequences_of_a_pair_are_different_windows() -> None:
    starts = np.asarray(draw_windows(jnp.arange(10_000), seeds_of(100), 2, 4))[:, :, 0]
    # Equal by chance with odds of 1/9997 each.
    assert np.count_nonzero(starts[:, 0] == starts[:, 1]) <= 1


def test_every_start_from_the_first_to_the_last_is_equally_likely() -> None:
    draws, choices = 2000, 4
    starts = Counter(np.asarray(draw_windows(jnp.arange(5 + choices - 1), seeds_of(draws), 1, 5))[:, 0, 0].tolist())
    assert set(starts) == set(range(choices))
    # Binomial counts; beyond five standard deviations lies less than a millionth.
    bound = 5 * math.sqrt(draws * (1 / choices) * (1 - 1 / choices))
    assert all(abs(count - draws / choices) < bound for count in starts.values())


def test_windows_that_follow_read_the_stream_on_and_on() -> None:
    """Every token is its own position: steps put together are runs of successors, also past the end of the text."""
    steps = [follow_windows(jnp.arange(50), seeds_of(20), 3, 6, jnp.int32(step)) for step in range(20)]
    whole = np.concatenate(steps, axis=2)
    np.testing.assert_array_equal(whole, (whole[:, :, :1] + np.arange(120)) % 50)
    assert len(np.unique(whole[:, :, 0])) > 30


@pytest.mark.parametrize("step", [10**6 + 3, 2**31 - 1])
def test_windows_follow_each_other_after_many_steps(step: int) -> None:
    """Reference: integers of any size."""
    first, later = (follow_windows(jnp.arange(50), seeds_of(20), 3, 6, jnp.int32(number)) for number in (0, step))
    np.testing.assert_array_equal(later, (np.asarray(first) + step * 6 % 50) % 50)


def test_a_stream_as_long_as_a_window_is_the_window() -> None:
    windows = draw_windows(jnp.arange(5), seeds_of(3), 1, 5)
    np.testing.assert_array_equal(windows, np.broadcast_to(np.arange(5), (3, 1, 5)))


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    check_stream(17, 17)
    with pytest.raises(EsjaxError, match="16 tokens") as caught:
        check_stream(16, 17)
    check_stream(2**31 - 1, 17)
    with pytest.raises(EsjaxError, match=r"data\.block_tokens"):
        check_stream(2**31, 17)
    assert "17" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(DOCUMENTS)
def test_a_stream_is_the_documents_and_their_stops(documents: list[np.ndarray]) -> None:
    expected = [STOP]
    for document in documents:
        expected += [*document.tolist(), STOP]
    assert pack_stream(documents).tolist() == expected


@given(DOCUMENTS)
def test_lanes_hold_every_document_once_and_whole(documents: list[np.ndarray]) -> None:
    lanes = pack_lanes(documents)
    found: list[tuple[int, ...]] = []
    for tokens, scored in zip(lanes.tokens.tolist(), lanes.scored.tolist(), strict=True):
        length = sum(scored)
        assert scored == [True] * length + [False] * (len(scored) - length)
        document: list[int] = []  # a lane starts at the start of a document
        for token in tokens[:length]:
            if token == STOP:
                found.append(tuple(document))
                document = []
            else:
                document.append(token)
        assert document == []  # and ends with a STOP
        assert set(tokens[length:]) <= {STOP}
    assert Counter(found) == Counter(tuple(document.tolist()) for document in documents)


@given(DOCUMENTS)
def test_lanes_are_as_many_as_the_longest_document_leaves_full_and_even(documents: list[np.ndarray]) -> None:
    lanes = pack_lanes(documents)
    total, longest = sum(len(d) + 1 for d in documents), max(len(d) + 1 for d in documents)
    assert len(lanes.tokens) == max(1, total // longest)
    # The last document of the longest lane went to the then shortest one, which was no longer than the mean.
    assert lanes.tokens.shape[1] <= total / len(lanes.tokens) + longest


def test_lanes_by_hand() -> None:
    lanes = pack_lanes([np.array(ids, np.int32) for ids in ([2], [3, 4, 5], [6, 7])])
    # Lengths with STOP: 2, 4, 3. Two lanes fit; the longest first, each to the shortest lane.
    np.testing.assert_array_equal(lanes.tokens, [[3, 4, 5, STOP, STOP], [6, 7, STOP, 2, STOP]])
    np.testing.assert_array_equal(lanes.scored, [[True] * 4 + [False], [True] * 5])
