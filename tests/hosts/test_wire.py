"""What messages become on their way, and what is no message."""

import math
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_strategies import kinds_of, messages

from esjax.exchange import update_record
from esjax.exchange.gradient_sums import TAIL
from esjax.exchange.values import LossExchange
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope
from esjax.rewards.calls import LONGEST_NAME, MOST_NAMES

UNIONS: dict[wire.Kind, Any] = {"request": wire.Request, "reply": wire.Reply, "broadcast": wire.Broadcast}
KINDS = [(kind, message) for kind, union in UNIONS.items() for message in kinds_of(union)]
every_kind = pytest.mark.parametrize(("kind", "message"), KINDS, ids=[message.__name__ for _, message in KINDS])
a_few = settings(max_examples=15, deadline=None)  # of each message
PACK = msgspec.msgpack.encode
START = wire.MARK + bytes([wire.VERSION])


def same(one: object, two: object) -> bool:
    """Compare values, of which NaN is one."""
    if isinstance(one, float) and isinstance(two, float):
        return one == two or (math.isnan(one) and math.isnan(two))
    if isinstance(one, msgspec.Struct):
        return type(one) is type(two) and same(msgspec.structs.astuple(one), msgspec.structs.astuple(two))
    if isinstance(one, dict) and isinstance(two, dict):
        return same([*one.items()], [*two.items()])
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


@every_kind
@a_few
@given(data=st.data(), body=st.binary(max_size=40))
def test_a_message_arrives_as_it_was_sent(
    kind: wire.Kind, message: type[wire.Message], data: st.DataObject, body: bytes
) -> None:
    sent = Envelope(data.draw(messages(message)), body)
    frames = wire.encode(sent)
    assert len(frames) == (2 if body else 1)
    arrived = wire.decode(frames, kind)
    assert same(arrived.message, sent.message)
    assert arrived.body == body


@every_kind
@a_few
@given(data=st.data())
def test_a_message_is_of_one_kind(kind: wire.Kind, message: type[wire.Message], data: st.DataObject) -> None:
    frames = wire.encode(Envelope(data.draw(messages(message))))
    for other in UNIONS.keys() - {kind}:
        with pytest.raises(wire.WireError):
            wire.decode(frames, other)


@every_kind
@a_few
@given(data=st.data())
def test_a_message_with_a_field_too_many_or_too_few_is_none(
    kind: wire.Kind, message: type[wire.Message], data: st.DataObject
) -> None:
    fields = msgspec.msgpack.decode(wire.encode(Envelope(data.draw(messages(message))))[0][len(START) :])
    with pytest.raises(wire.WireError):
        wire.decode([START + PACK([*fields, 0])], kind)
    needed = sum(field.required for field in msgspec.structs.fields(message))
    if needed:
        with pytest.raises(wire.WireError):
            wire.decode([START + PACK(fields[:needed])], kind)


@settings(deadline=None)
@given(st.sampled_from(list(UNIONS)), st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_a_message_or_an_error(kind: wire.Kind, frames: list[bytes]) -> None:
    for start in (b"", START):
        try:
            envelope = wire.decode([start + frame for frame in frames], kind)
        except wire.WireError:
            continue
        assert isinstance(envelope.message, UNIONS[kind])


@every_kind
@a_few
@given(data=st.data())
def test_any_change_of_a_message_is_a_message_or_an_error(
    kind: wire.Kind, message: type[wire.Message], data: st.DataObject
) -> None:
    header = bytearray(wire.encode(Envelope(data.draw(messages(message))))[0])
    at = data.draw(st.integers(0, len(header) - 1))
    change = data.draw(st.sampled_from(["byte", "cut", "insert"]))
    if change == "byte":
        header[at] = data.draw(st.integers(0, 255))
    elif change == "cut":
        del header[at:]
    else:
        header[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    with suppress(wire.WireError):
        wire.decode([bytes(header)], kind)


@pytest.mark.parametrize(
    "frames", [[], [b"a"] * 3, [START + PACK(["ask_status"])] * 3], ids=["none", "3", "3 good ones"]
)
def test_the_number_of_frames_is_limited(frames: list[bytes]) -> None:
    with pytest.raises(wire.WireError, match=f"{len(frames)} frames"):
        wire.decode(frames, "request")


def test_sizes_are_limited() -> None:
    good = START + PACK(["ask_status"])
    assert wire.decode([good, bytes(wire.MAX_BODY)], "request").body == bytes(wire.MAX_BODY)
    with pytest.raises(wire.WireError, match="too long"):
        wire.decode([good, bytes(wire.MAX_BODY + 1)], "request")
    for kind, limit in (("request", wire.MAX_REQUEST_HEADER), ("reply", wire.MAX_HEADER)):
        with pytest.raises(wire.WireError, match="too long"):
            wire.decode([START.ljust(limit + 1)], kind)  # type: ignore[arg-type]


def test_the_longest_messages_fit() -> None:
    """The coordinator never says anything that hosts would take for no message."""
    far, long, high = "ä" * 128, 2**63 - 1, 2**32 - 1
    host = wire.HostStatus(far, high, far, far, high, 1e300, 1e300, far, 1e300, "ä" * wire.NOTE)
    rewards = {f"{number:ä>{LONGEST_NAME}}": 1e300 for number in range(MOST_NAMES)}
    status = wire.Status(
        far,
        high,
        high,
        1e300,
        1e300,
        1e300,
        1e300,
        rewards,
        1e300,
        True,
        high,
        [host] * 1024,
        dict.fromkeys([far], long),
    )
    spans = [(2**31 - 1, 2**31 - 1)] * update_record.SPAN_LIMIT
    leases = [(high, *span) for span in spans]
    for kind, message in [
        ("reply", status),
        ("reply", wire.Updates(high, [high] * 2**14)),
        ("reply", wire.Ok(high, high, spans, ["digest", "upload", "measure"], True)),
        ("broadcast", wire.Step(far, high, high, leases, True, high, high)),
        (
            "request",
            wire.Losses(long, high, high, spans, True, far, 1e300, 1e300, [("ä" * 64, -1e300, 2**31 - 1)] * 16),
        ),
        ("request", wire.Join(far, far, far, [(far, far)] * 16, [(far, far)] * 16, far, long, high)),
    ]:
        assert wire.decode(wire.encode(Envelope(message)), kind).message == message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "start",
    [b"", b"\xe5", wire.MARK, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\x80\x05\x95"],
    ids=["empty", "half a mark", "mark", "browser", "TLS", "pickle"],
)
def test_row_14_what_others_say_is_no_message(start: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode([start], "request")


def test_another_version_is_named() -> None:
    with pytest.raises(wire.VersionError) as caught:
        wire.decode([wire.MARK + bytes([wire.VERSION + 1]) + b"anything"], "request")
    assert caught.value.version == wire.VERSION + 1


# Updates.

SPANS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 20)), max_size=5)
HEADERS = messages(update_record.UpdateHeader, spans=SPANS, vector_length=st.just(0), dtype=st.just("|i1"))


@settings(deadline=None)
@given(HEADERS, st.data())
def test_an_update_is_read_as_it_was_written(header: update_record.UpdateHeader, data: st.DataObject) -> None:
    count = header.halves * sum(count for _, count in header.spans) if header.applied else 0
    weights = np.frombuffer(data.draw(st.binary(min_size=count, max_size=count)), np.int8)
    if header.halves == 2:
        weights = weights.reshape(-1, 2)
    packed = update_record.pack_update(update_record.Update(header, weights))
    read = update_record.unpack_update(packed)
    assert same(read.header, header)
    np.testing.assert_array_equal(read.weights, weights)
    assert update_record.is_update(packed, header.step)
    assert not update_record.is_update(packed, header.step + 1)
    for damaged in (packed[:-1], packed + b"\0", packed[1:], b"\xff" * 4 + packed[4:]):
        assert not update_record.is_update(damaged, header.step)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_update_or_an_error(data: bytes) -> None:
    try:
        update_record.unpack_update(data)
    except update_record.UpdateError:
        assert not update_record.is_update(data, 0)


def test_an_update_of_a_pair_costs_a_byte() -> None:
    header = update_record.UpdateHeader(2**32 - 1, [(0, 8192)], 1 / 3, True, 2.5, 8192, slope=1 / 7)
    assert len(update_record.pack_update(update_record.Update(header, np.zeros(8192, np.int8)))) <= 8192 + 60


def test_an_update_of_before_pairs_had_halves_is_still_read() -> None:
    packed = msgspec.msgpack.encode([7, [(0, 3)], 0.5, True, 2.0, 0, 0, "|i1"])
    read = update_record.unpack_update(len(packed).to_bytes(4, "little") + packed + b"\x01\xff\x02")
    assert (read.header.step, read.header.halves, read.weights.tolist()) == (7, 1, [1, -1, 2])
    assert read.header.slope == 0


def test_pairs_of_spans_are_listed_in_their_order() -> None:
    assert update_record.pairs_of([(5, 2), (0, 3)]).tolist() == [5, 6, 0, 1, 2]
    assert update_record.pairs_of([(2**32 - 2, 2)]).tolist() == [2**32 - 2, 2**32 - 1]
    assert update_record.pairs_of([]).tolist() == []


INT32 = st.integers(-(2**31) + 1, 2**31 - 1)


@settings(deadline=None)
@given(
    st.lists(INT32 | st.integers(-(2**15), 2**15) | st.integers(-128, 128), min_size=1),
    st.lists(INT32, min_size=TAIL, max_size=TAIL),
)
def test_a_sum_takes_as_few_bytes_as_hold_its_gradient(gradient: list[int], tail: list[int]) -> None:
    header = update_record.UpdateHeader(3, [(0, 8)], 0.5, True, None, 0, len(gradient) + TAIL)
    packed = update_record.pack_update(update_record.Update(header, np.array(gradient + tail, np.int64)))
    read = update_record.unpack_update(packed)
    assert read.weights.tolist() == gradient + tail
    most = max(map(abs, gradient))
    assert np.dtype(read.header.dtype).itemsize == (1 if most < 2**7 else 2 if most < 2**15 else 4)
    with pytest.raises(update_record.UpdateError):
        update_record.unpack_update(packed[:-1])


def test_sums_are_read_by_their_number() -> None:
    sums = np.arange(12, dtype=np.int64).reshape(2, 6) - 3
    dtype, body = update_record.pack_sums(sums)
    assert dtype == "|i1"
    assert len(body) == 2 * (3 + 4 * TAIL)
    np.testing.assert_array_equal(update_record.sums_of(body, 2, 6, dtype), sums)
    for spans, vector_length, other in (
        (0, 6, "|i1"),
        (2, 5, "|i1"),
        (3, 6, "|i1"),
        (2, 2**70, "|i1"),
        (2, 2, "|i1"),
        (2, 6, "<i2"),
        (2, 6, "<f4"),
        (2, 6, "O"),
    ):
        assert update_record.sums_of(body, spans, vector_length, other) is None


def test_sums_of_nothing_are_none_at_all() -> None:
    found = update_record.sums_of(b"", 0, 6, "<i4")
    assert found is not None
    assert found.shape == (0, 6)


def test_losses_are_read_by_their_number() -> None:
    losses = np.arange(6, dtype="<f4").reshape(3, 2)
    read = LossExchange().unpack([(0, 3)], "<f4", losses.tobytes())
    assert read is not None
    np.testing.assert_array_equal(read, losses)
    for pairs in (0, 2, 4, 2**70):
        assert LossExchange().unpack([(0, pairs)], "<f4", losses.tobytes()) is None
