"""What is unpacked is what was packed or one error, and blocks are runs of the stream, drawn evenly.

The references are the arrays that went in, the format packed by hand, and counts.
"""

import bz2
import contextlib
import hashlib
import math
import struct
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.config.settings import DataConfig
from esjax.data import delivery
from esjax.data.corpus import load_corpus
from esjax.data.delivery import PackedText, TextPayload, pack_text, token_block, unpack_text
from esjax.data.packing import pack_stream
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary, fit_vocabulary
from esjax.errors import EsjaxError

DOCUMENTS = [np.array(ids, np.int32) for ids in ([2, 3, 3], [0], [4, 2])]
HELD_OUT = [np.array(ids, np.int32) for ids in ([3, 2], [4])]
CONTENT = struct.pack("<QQQ", 1, 10, 0) + bytes([1, 2, 3, 3, 1, 0, 1, 4, 2, 1]) + bytes([1, 3, 2, 1, 4, 1])
VOCAB = 5


def packed(content: bytes) -> PackedText:
    """Pack any content by hand."""
    return PackedText(bz2.compress(content), len(content), hashlib.blake2b(content, digest_size=16).hexdigest())


def refused(text: PackedText, vocab_size: int = VOCAB) -> str:
    with pytest.raises(EsjaxError) as caught:
        unpack_text(*text, vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bytes_are_what_the_format_says() -> None:
    assert pack_text(pack_stream(DOCUMENTS), HELD_OUT) == packed(CONTENT)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_a_text_comes_back_in_the_smallest_type(largest: int, dtype: type) -> None:
    document = [np.array([2, largest], np.int32)]
    for train, held_out in ((DOCUMENTS, document), (document, HELD_OUT)):
        text = unpack_text(*pack_text(pack_stream(train), held_out), largest + 1)
        assert text.stream.dtype == dtype
        np.testing.assert_array_equal(text.stream, pack_stream(train))
        assert [ids.tolist() for ids in text.held_out] == [ids.tolist() for ids in held_out]
        assert {ids.dtype for ids in text.held_out} == {np.dtype(np.int32)}


IDS = st.lists(st.sampled_from([0, 2, 3, 300, 70_000]), max_size=6).map(lambda ids: np.array(ids, np.int32))


@given(st.lists(IDS, max_size=5), st.lists(IDS, max_size=5))
def test_any_documents_come_back(documents: list[np.ndarray], held_out: list[np.ndarray]) -> None:
    text = unpack_text(*pack_text(pack_stream(documents), held_out), 70_001)
    np.testing.assert_array_equal(text.stream, pack_stream(documents))
    assert [document.tolist() for document in text.held_out] == [document.tolist() for document in held_out]


def test_a_whole_corpus_comes_back() -> None:
    corpus = load_corpus(DataConfig(text="builtin:pydoc"))
    sent = pack_text(pack_stream(corpus.train), corpus.held_out)
    text = unpack_text(*sent, corpus.vocabulary.size)
    np.testing.assert_array_equal(text.stream, pack_stream(corpus.train))
    assert len(text.held_out) == len(corpus.held_out)
    for got, document in zip(text.held_out, corpus.held_out, strict=True):
        np.testing.assert_array_equal(got, document)
    assert len(sent.data) < sent.size / 4


def test_a_vocabulary_comes_back_beside_the_text() -> None:
    pytest.importorskip("tokenizers")
    for vocabulary in (
        Vocabulary("byte"),
        Vocabulary("char", ("ß", "\0")),
        fit_vocabulary("bpe:260", [b"ab ab"], None),
    ):
        text = unpack_text(*pack_text(pack_stream(DOCUMENTS), HELD_OUT, vocabulary), VOCAB)
        assert text.vocabulary == vocabulary
        np.testing.assert_array_equal(text.stream, pack_stream(DOCUMENTS))
        assert [ids.tolist() for ids in text.held_out] == [ids.tolist() for ids in HELD_OUT]


@pytest.mark.parametrize("stored", [b"{", b'{"kind": "words"}', b"\xff", b"[" * 100_000], ids=range(4))
def test_a_vocabulary_that_cannot_be_read_is_refused(stored: bytes) -> None:
    content = struct.pack("<QQQ", 1, 10, len(stored)) + CONTENT[24:] + stored
    assert "a vocabulary that cannot be read" in refused(packed(content))
    assert "packed in no way" in refused(packed(struct.pack("<QQQ", 1, 10, 2**40) + CONTENT[24:]))


def test_a_block_is_sent_as_a_text_without_held_out_documents() -> None:
    block = token_block(pack_stream(DOCUMENTS), 0, 0, 4)
    text = unpack_text(*pack_text(block, []), VOCAB)
    np.testing.assert_array_equal(text.stream, block)
    assert text.held_out == []


def test_equal_texts_have_equal_bytes_whatever_their_type() -> None:
    stream = pack_stream(DOCUMENTS)
    assert pack_text(stream.astype(np.uint8), HELD_OUT) == pack_text(stream.astype(np.int64), HELD_OUT)


def test_row_40_another_text_is_refused_by_its_hash() -> None:
    ours, theirs = packed(CONTENT), packed(CONTENT.replace(b"\x04", b"\x00"))
    assert ours.size == theirs.size
    message = refused(theirs._replace(digest=ours.digest))
    assert ours.digest in message
    assert theirs.digest in message
    assert "hash" in message


def test_row_40_text_of_another_vocabulary_is_refused() -> None:
    assert "the token 4" in refused(packed(CONTENT), vocab_size=4)
    assert isinstance(unpack_text(*packed(CONTENT), 5), TextPayload)


@pytest.mark.parametrize("change", [-len(CONTENT), -1, 1, 2**20])
def test_a_text_of_another_size_is_refused(change: int) -> None:
    text = packed(CONTENT)
    assert "bytes" in refused(text._replace(size=text.size + change))


@pytest.mark.parametrize("size", [-(2**70), -1, 0, 2**32 + 1, 2**63, 2**70])
def test_a_size_that_no_text_has_is_refused(size: int) -> None:
    assert "is not taken" in refused(packed(CONTENT)._replace(size=size))


def test_a_bomb_is_refused_in_little_memory() -> None:
    plain = 2**28
    bomb = bz2.compress(bytes(plain))
    assert len(bomb) < 1000
    tracemalloc.start()
    try:
        message = refused(PackedText(bomb, 10_000, ""))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "10,000 bytes" in message
    assert peak < 2**20 < plain


def test_a_text_cut_off_anywhere_is_refused() -> None:
    text = packed(CONTENT)
    for length in range(len(text.data)):
        refused(text._replace(data=text.data[:length]))
    refused(text._replace(data=text.data + b"\0"))
    refused(text._replace(data=text.data * 2))


@given(st.integers(0, 8 * len(packed(CONTENT).data) - 1))
def test_a_text_with_a_flipped_bit_is_refused_or_the_same(bit: int) -> None:
    """A few bits of bz2's own carry nothing."""
    data = bytearray(packed(CONTENT).data)
    data[bit // 8] ^= 1 << bit % 8
    changed = packed(CONTENT)._replace(data=bytes(data))
    with contextlib.suppress(EsjaxError):
        text = unpack_text(*changed, VOCAB)
        np.testing.assert_array_equal(text.stream, list(CONTENT[24:34]))


@given(st.binary(max_size=100), st.integers(0, 200))
def test_arbitrary_bytes_are_refused(data: bytes, size: int) -> None:
    refused(PackedText(data, size, ""))


@given(st.binary(max_size=60), st.sampled_from([0, 1, 2, 3, 4, 8, 2**63]), st.integers(0, 70) | st.just(2**64 - 1))
def test_any_content_that_somebody_sealed_is_refused_or_a_text(tokens: bytes, itemsize: int, length: int) -> None:
    try:
        text = unpack_text(*packed(struct.pack("<QQQ", itemsize, length, 0) + tokens), VOCAB)
    except EsjaxError:
        return
    # A text, then, whose tokens are those that were sent.
    again = np.concatenate([text.stream, pack_stream(text.held_out)]).astype(f"<u{itemsize}")
    assert again.tobytes() == tokens
    assert len(text.stream) == length
    assert all(ids.max(initial=0) < VOCAB for ids in (text.stream, *text.held_out))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (CONTENT[:24], "no held-out"),
        (CONTENT[:24] + CONTENT[25:], "no held-out"),
        (CONTENT[:-1], "no held-out"),
        (struct.pack("<QQQ", 1, 2**64 - 1, 0) + CONTENT[24:], "no held-out"),
        (struct.pack("<QQQ", 3, 2, 0) + CONTENT[24:], "no way"),
        (struct.pack("<QQQ", 4, 2, 0) + CONTENT[24:-1], "no way"),
        (b"", "is not taken"),
    ],
)
def test_content_that_is_no_text_is_refused(content: bytes, what: str) -> None:
    assert what in refused(packed(content))


def test_a_text_too_large_to_send_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "MAX_BYTES", len(CONTENT))
    assert pack_text(pack_stream(DOCUMENTS), HELD_OUT).size == len(CONTENT)
    with pytest.raises(EsjaxError, match=r"data\.block_tokens"):
        pack_text(pack_stream(DOCUMENTS), [*HELD_OUT, np.array([], np.int32)])


def test_a_block_is_a_run_of_the_stream() -> None:
    stream = np.arange(1000, dtype=np.uint16)
    for block in range(50):
        drawn = token_block(stream, 3, block, 10)
        assert drawn.dtype == stream.dtype
        np.testing.assert_array_equal(drawn, np.arange(drawn[0], drawn[0] + 10))


def test_a_block_is_named_by_seed_and_number() -> None:
    stream = np.arange(2**31 - 1, 2**31 + 10**6)
    names = [(seed, block) for seed in (0, 1, 2**32 - 1) for block in (0, 1, 2, 2**32)]
    starts = {token_block(stream, seed, block, 5)[0] for seed, block in names}
    assert len(starts) == len(names)  # equal by chance with odds of 66 in a million
    again = [token_block(stream, seed, block, 5)[0] for seed, block in names]
    assert set(again) == starts


def test_a_block_starts_where_the_hash_says() -> None:
    digest = hashlib.blake2b(struct.pack("<QQ", 7, 4), digest_size=16).digest()
    start = sum(byte << 8 * i for i, byte in enumerate(digest)) % 91
    np.testing.assert_array_equal(token_block(np.arange(100), 7, 4, 10), np.arange(start, start + 10))


def test_every_start_from_the_first_to_the_last_is_equally_likely() -> None:
    draws, choices = 2000, 4
    starts = Counter(int(token_block(np.arange(5 + choices - 1), 0, block, 5)[0]) for block in range(draws))
    assert set(starts) == set(range(choices))
    # Binomial counts; beyond five standard deviations lies less than a millionth.
    bound = 5 * math.sqrt(draws * (1 / choices) * (1 - 1 / choices))
    assert all(abs(count - draws / choices) < bound for count in starts.values())


@pytest.mark.parametrize("block_tokens", [4, 5, 100])
def test_a_stream_that_is_no_longer_than_a_block_is_the_block(block_tokens: int) -> None:
    stream = np.array([STOP, 2, 3, STOP])
    np.testing.assert_array_equal(token_block(stream, 1, 2, block_tokens), stream)
