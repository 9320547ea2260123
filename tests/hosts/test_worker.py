"""A host goes on whatever it hears or does not hear, and hands in what is right."""

from contextlib import suppress

import numpy as np
import pytest
from hosts_simulation import (
    DELAY,
    KNOWN_ANSWERS,
    QUANTUM,
    RUN,
    Host,
    Simulation,
    check_updates,
    config_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from storms import Sent, body_of, near, one_of_each, spans, volume
from wire_strategies import Strategy

from esjax.config.settings import Config
from esjax.data.delivery import hash_bytes
from esjax.exchange import update_record
from esjax.exchange.update_record import Span, without
from esjax.exchange.values import SLOT_PAIRS, LossExchange, SumExchange
from esjax.hosts.protocol import scoring as scoring_module
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.request_channel import BACK_OFF, BACK_OFF_LONGEST, DEAF, TIMEOUT
from esjax.hosts.protocol.scoring import HAND_IN, SLICE, Scored, Scoring
from esjax.hosts.protocol.tasks import Apply, Build, Done, Failed, Measured, TakeDigest, Value
from esjax.hosts.protocol.transfers import PENDING, Backlog, Download, Sending
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import BEAT, Worker

FIXED = config_of()
BUDGET = config_of(budget=1.0)
FIXED_SUMS = config_of(sums=True)
BUDGET_SUMS = config_of(budget=1.0, sums=True)
all_modes = pytest.mark.parametrize(
    "config", [FIXED, BUDGET, FIXED_SUMS, BUDGET_SUMS], ids=["fixed", "budget", "fixed sums", "budget sums"]
)


def outsider(jitter: float = 0.5) -> Worker:
    return Worker("one", "fake", "fake", KNOWN_ANSWERS, {}, now=0.0, jitter=lambda: jitter)


# Asking.


def test_it_asks_again_and_ever_more_slowly_until_it_is_let_in() -> None:
    worker = outsider()
    times: list[float] = []
    now = 0.0
    while now < 200:
        request = worker.request(now)
        if request is not None:
            assert isinstance(request.message, wire.Join)
            assert request.message.attempt == len(times) + 1
            times.append(now)
        if worker.reconnect:
            worker.reconnected(now)
        now += 0.1
    gaps = np.diff(times)
    assert (gaps >= BACK_OFF).all()
    assert (gaps <= TIMEOUT + BACK_OFF_LONGEST * 1.5 + DEAF).all()
    assert len(times) < 20


def test_a_request_that_was_not_answered_is_made_again() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    host.cut = {"reply"}
    before = len(sim.log)
    sim.run(BEAT + 0.5)
    asked = [message for _, way, _, message in sim.log[before:] if way == "request"]
    sim.run(TIMEOUT)
    again = [message for _, way, _, message in sim.log[before:] if way == "request"]
    assert len(asked) == 1
    assert again == [asked[0]] * 2


def test_its_attempts_to_connect_anew_are_not_many() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    sim.kill()
    sim.run(300)
    assert 3 < host.connection <= 2 * 300 / DEAF
    sim.start()
    sim.run_steps(2, limit=DEAF + 3 * BACK_OFF_LONGEST)


def test_its_patience_is_not_renewed_by_connecting_anew() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    sim.kill()
    since = host.worker.silent_since
    sim.run(100)
    assert host.connection
    assert host.worker.silent_since == pytest.approx(since, abs=1)


def test_one_request_is_under_way_at_a_time() -> None:
    """A ROUTER does not determine which of two requests is answered first."""
    sim = Simulation(config_of(checkpoint_time=2, evaluate_time=2, digest_interval=2))
    under_way = 0

    def fate(direction: str, host: str, message: wire.Message) -> list[float]:
        nonlocal under_way
        under_way += {"request": 1, "reply": -1, "broadcast": 0}[direction]
        assert 0 <= under_way <= 1
        return [0.05]

    sim.fate = fate
    sim.add("a")
    sim.run_steps(20)


def test_it_beats_whatever_its_devices_are_at() -> None:
    sim = Simulation(FIXED)
    sim.add("a", speed=0.1, compile_seconds=50.0)
    sim.run(300)
    times = [at for at, _, _, message in sim.log if isinstance(message, wire.Beat)]
    assert max(np.diff(times)) < 1.5 * BEAT


def test_a_name_that_is_too_long_for_the_wire_is_cut() -> None:
    worker = Worker("x" * 1000, "", "", {}, {}, now=0.0, jitter=lambda: 0.0)
    request = worker.request(0.0)
    assert request is not None
    wire.decode(wire.encode(request), "request")


# Leaving.


def test_who_is_outside_leaves_at_once() -> None:
    worker = outsider()
    worker.request(0.0)
    worker.leave("it was stopped")
    assert worker.request(0.1) is None
    assert worker.left


def test_who_compiles_does_not_wait_for_that() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a", compile_seconds=1000.0)
    sim.run(5)
    host.worker.leave("it was stopped")
    sim.run(1)
    assert host.worker.left
    assert sim.printed("a leaves: it was stopped")


def test_what_fails_on_the_devices_is_said_to_both() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    host.device.do = lambda task: (Failed("the devices failed: " + "x" * 5000), 0.0)  # type: ignore[method-assign]
    sim.run(5)
    assert host.worker.failed.startswith("the devices failed")
    assert host.worker.left
    assert sim.printed("a leaves: the devices failed")


def test_training_that_has_ended_ends_it_without_another_word() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    before = len(sim.log)
    bye = wire.Bye(RUN, 1, True)
    host.worker.receive(Envelope(bye), sim.now)
    assert host.worker.left
    assert host.worker.leaving == "training has ended"
    sim.run(5)
    assert not [message for _, way, _, message in sim.log[before:] if way == "request"]


# A false word.


def test_a_step_that_there_is_not_is_unlearned() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(2)
    host.worker.receive(Envelope(wire.Pulse(RUN, 1, 10**6)), sim.now)
    sim.run_steps(3, limit=60)
    check_updates(sim.updates, FIXED)


@pytest.mark.parametrize("body", [b"", b"junk", b"\0" * 100])
def test_an_update_that_is_none_is_fetched(body: bytes) -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    other = sim.add("b")
    sim.run_steps(2)

    def spoil(direction: str, name: str, frames: list[bytes]) -> list[bytes]:
        return [frames[0], body] if direction == "broadcast" and name == "a" and len(frames) == 2 else frames

    sim.tamper = spoil
    sim.run_steps(5)
    sim.run(2)
    assert host.device.step >= len(sim.ledger) - 1
    assert sim.messages(wire.CatchUp, "a")
    assert not sim.messages(wire.CatchUp, "b")
    assert host.worker.failed == other.worker.failed == ""
    check_updates(sim.updates, FIXED)


def forgeries(host: Host, sim: Simulation) -> Strategy:
    """Make what no coordinator says, but for what a host must believe: that it is turned away, that training has ended,
    that a new coordinator has taken it in, or that pairs are leased to it."""
    joined = host.worker.joined
    assert joined is not None
    step = sim.server.step
    other_slots = st.sampled_from([joined.slot + 1, 7, 1023])
    leases = st.lists(st.tuples(other_slots, st.sampled_from([0, 4, 31]), st.sampled_from([1, 4, 32])), max_size=3)
    fields: dict[str, Strategy] = {
        "run": st.sampled_from([RUN, "", "other"]),
        "incarnation": st.sampled_from([0, 1, 2, 2**32 - 1]),
        "step": near(step),
        "spans": st.just([]),
        "leases": leases,
        "done": st.just(False),
        "rejoin": st.booleans(),
        "digest": st.sampled_from(["", "0", hash_bytes(b"")]),
        "size": st.sampled_from([0, 1, 40, 2**63 - 1]),
        "offset": st.sampled_from([0, 1, 40, 2**63 - 1]),
        "sizes": st.lists(st.sampled_from([0, 1, 40, 2**32 - 1]), max_size=4),
    }
    broadcasts = one_of_each(wire.Broadcast, {**fields, "digest": st.booleans()})
    return broadcasts | one_of_each(wire.Reply, fields, without=(wire.Refused, wire.Welcome))


@all_modes
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_after_a_storm_it_trains_on(config: Config, data: st.DataObject) -> None:
    sim = Simulation(config)
    host = sim.add("a")
    sim.run_steps(3)
    storm = data.draw(
        st.lists(forgeries(host, sim) | st.binary(max_size=20) | st.sampled_from([0.05, 1.0]), max_size=25)
    )
    before = volume(host.worker)
    for weather in storm:
        if isinstance(weather, float):
            sim.run(weather)
            continue
        if isinstance(weather, bytes):
            for kind in ("reply", "broadcast"):
                with suppress(wire.WireError):
                    wire.decode([weather], kind)
            continue
        right = sim.random.choice([b"\0" * 40, b"", *sim.updates])
        host.worker.receive(Envelope(weather.message, body_of(weather, right)), sim.now)
        host.go(sim.now)
    sim.run_steps(3, limit=120)
    check_updates(sim.updates, config)
    assert volume(host.worker) < before + 10_000
    assert not host.worker.left
    assert host.device.made == sorted(set(host.device.made)) or host.device.loaded


@pytest.mark.nightly
def test_a_long_storm_makes_nothing_grow() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(3)
    some: list[Sent] = []

    @settings(max_examples=300, deadline=None, database=None)
    @given(forgeries(host, sim))
    def collect(sent: Sent) -> None:
        some.append(sent)

    collect()
    sizes = []
    for _ in range(6):
        for sent in sim.random.choices(some, k=500):
            right = sim.random.choice([b"\0" * 40, *sim.updates])
            host.worker.receive(Envelope(sent.message, body_of(sent, right)), sim.now)
            host.go(sim.now)
        sizes.append(volume(host.worker))
    assert max(sizes) < 2 * sizes[0] + 10_000
    sim.run_steps(3, limit=120)
    check_updates(sim.updates, FIXED)


def test_before_it_has_joined_nothing_moves_it() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(1)
    some: list[Sent] = []

    @settings(max_examples=200, deadline=None, database=None)
    @given(forgeries(host, sim))
    def collect(sent: Sent) -> None:
        some.append(sent)

    collect()
    worker = outsider()
    worker.request(0.0)
    for sent in some:
        worker.receive(Envelope(sent.message, b""), 0.0)
        assert worker.task() is None
        assert (worker.phase, worker.step, worker.joined) == ("joining", -1, None)


# Its pairs.


def scored(spans: list[Span], seconds: float) -> Scored:
    pairs = update_record.pairs_of(spans).astype(np.float32)
    return Scored(spans, np.stack([pairs, -pairs], axis=1), seconds)


def score_all(scoring: Scoring, speed: float) -> list[list[Span]]:
    """Score slice after slice, at a constant speed."""
    slices = []
    while scoring.has_work:
        spans = scoring.next_slice(speed)
        slices.append(spans)
        scoring.take(scored(spans, sum(count for _, count in spans) / speed), speed, 0.0)
    return slices


def test_slices_are_whole_device_batches_that_fill_a_slice_of_time() -> None:
    scoring = Scoring(3, 4, 8, None, LossExchange())
    scoring.add([(0, 100)])
    assert scoring.next_slice(0.0) == [(0, 8)]
    assert scoring.next_slice(1.0) == [(0, 8)]
    assert scoring.next_slice(17 / SLICE) == [(0, 16)]
    assert scoring.next_slice(1e9) == [(0, 100)]


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 36), st.integers(1, 6)), min_size=1, max_size=6),
    st.floats(0.1, 1000),
    st.integers(0, 8),
)
def test_every_quantum_is_handed_in_whole_and_once(
    quantum: int, device_batch: int, quanta: list[tuple[int, int]], speed: float, short: int
) -> None:
    """The last unit of the population may be smaller, and may come first."""
    end = 37 * quantum - short % quantum
    given_spans = without(
        [(0, end)], without([(0, end)], [(first * quantum, count * quantum) for first, count in quanta])
    )
    scoring = Scoring(0, quantum, device_batch, None, LossExchange())
    scoring.add(given_spans[::-1])
    handed_in: list[Span] = []
    for taken in score_all(scoring, speed):
        for first, count in taken:
            assert first % quantum == 0
            assert count % quantum == 0 or first + count == end
    while (parts := scoring.hand_in(0.0, everything=False)) is not None:
        handed_in += parts.spans
        losses = LossExchange().unpack(parts.spans, "<f4", parts.body)
        assert losses is not None
        np.testing.assert_array_equal(losses[:, 0], update_record.pairs_of(parts.spans))
        scoring.handed_in()
    assert parts is None
    assert sorted(update_record.pairs_of(handed_in)) == sorted(update_record.pairs_of(given_spans))


def test_a_budget_is_kept() -> None:
    for speed in (3.0, 10.0, 1000.0):
        scoring = Scoring(0, 4, 4, 1.0, LossExchange())
        scoring.add([(0, SLOT_PAIRS)])
        pairs = sum(count for spans in score_all(scoring, speed) for _, count in spans)
        assert pairs / speed <= max(1.0, 4 / speed) + 1e-9  # at least one device batch
        assert (pairs + 4) / speed > 1.0
        scoring.add([(0, SLOT_PAIRS)])  # what an answer to an older question says
        assert not scoring.has_work
        parts = scoring.hand_in(0.0, everything=False)
        assert parts is not None
        assert parts.final


def test_losses_are_handed_in_now_and_then() -> None:
    scoring = Scoring(0, 4, 4, None, LossExchange())
    scoring.add([(0, 12)])
    assert scoring.hand_in(100.0, everything=True) is None
    scoring.take(scored([(0, 4)], 0.1), 40.0, now=5.0)
    assert scoring.hand_in(5.0, everything=False) is None
    early = scoring.hand_in(5.0, everything=True)
    assert early is not None
    assert not early.final
    assert scoring.hand_in(5.0 + 1.1 * HAND_IN, everything=False) == early
    scoring.take(scored([(4, 8)], 0.2), 40.0, now=5.1)
    scoring.handed_in()  # only what was offered
    last = scoring.hand_in(5.2, everything=False)
    assert last is not None
    assert (last.spans, last.final) == ([(4, 8)], True)
    scoring.handed_in()
    assert scoring.hand_in(9.0, everything=True) is None


@pytest.mark.parametrize(
    ("module", "name", "limit"),
    [(scoring_module, "MAX_REQUEST", 8 * 8), (scoring_module, "SPAN_LIMIT", 2)],
    ids=["bytes", "spans"],
)
def test_no_more_is_handed_in_than_a_request_holds(
    module: object, name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, limit)
    scoring = Scoring(0, 4, 4, None, LossExchange())
    for first in range(0, 100, 20):
        scoring.add([(first, 4)])
        scoring.take(scored([(first, 4)], 0.1), 40.0, 0.0)
    finals = []
    while (parts := scoring.hand_in(0.0, everything=False)) is not None:
        assert len(parts.spans) <= 2
        assert len(parts.body) <= 8 * 8
        finals.append(parts.final)
        scoring.handed_in()
    assert finals == [False, False, True]


def sums(spans: list[Span], seconds: float) -> Scored:
    """Add up the numbers of the pairs of each span, and count them."""
    values = [[update_record.pairs_of([span]).sum(dtype=np.int64), span[1], 0, 0] for span in spans]
    return Scored(spans, np.array(values, np.int32), seconds)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 36), st.integers(1, 40)), min_size=1, max_size=4),
    st.sampled_from([1.0, 20.0, 50.0, 1000.0]),
    st.sampled_from([None, 3.0]),
    st.lists(st.sampled_from(["score", "offer", "arrive"]), min_size=10, max_size=30),
)
def test_every_pair_is_in_one_sum_of_what_is_handed_in(
    quanta: list[tuple[int, int]], speed: float, budget: float | None, actions: list[str]
) -> None:
    """No sum goes beyond a span that was given out, and one that is under way stays as it is."""
    leases = [(100 * i + first, count) for i, (first, count) in enumerate(quanta)]
    leases += [(sum(leases[-1]), 4)]  # one that begins where another ends
    scoring = Scoring(0, 1, 4, budget, SumExchange(4))
    scoring.add(leases)
    arrived: list[Span] = []
    scored: list[Span] = []
    offered = None
    for action in [*actions, *["score"] * 100, "offer", "arrive"]:
        if action == "score" and scoring.has_work:
            spans = scoring.next_slice(speed)
            scored += spans
            scoring.take(sums(spans, sum(count for _, count in spans) / speed), speed, 0.0)
        elif action == "offer":
            before, offered = offered, scoring.hand_in(0.0, everything=True)
            assert before is None or offered is not None
            if before and offered:
                assert offered.spans[: len(before.spans)] == before.spans
        elif action == "arrive" and offered:
            values = update_record.sums_of(offered.body, len(offered.spans), 4, offered.dtype)
            assert values is not None
            np.testing.assert_array_equal(values, sums(offered.spans, 0.0).values)
            arrived += offered.spans
            offered = None
            scoring.handed_in()
    assert sorted(update_record.pairs_of(arrived)) == sorted(update_record.pairs_of(scored))
    for first, count in arrived:
        assert any(first >= start and first + count <= start + size for start, size in leases)


@pytest.mark.parametrize("speed", [20.0, 1000.0])
def test_a_sum_is_of_no_more_pairs_than_it_has_room_for(monkeypatch: pytest.MonkeyPatch, speed: float) -> None:
    monkeypatch.setattr(SumExchange, "most_pairs", 10)
    scoring = Scoring(0, 3, 3, None, SumExchange(4))
    scoring.add([(0, 39)])
    while scoring.has_work:
        scoring.take(sums(scoring.next_slice(speed), 0.1), speed, 0.0)
    handed_in = scoring.hand_in(0.0, everything=True)
    assert handed_in is not None
    assert max(count for _, count in handed_in.spans) == 9
    assert sum(count for _, count in handed_in.spans) == 39


@pytest.mark.parametrize("config", [FIXED_SUMS, BUDGET_SUMS], ids=["fixed", "budget"])
def test_a_host_hands_in_a_sum_a_second(config: Config) -> None:
    sim = Simulation(config)
    sim.add("a", speed=3 * QUANTUM)  # a unit in each slice, and several in a step
    sim.run_steps(4)
    handed_in = [message for message in sim.messages(wire.Losses) if message.step < 4]
    assert all(len(message.spans) == 1 for message in handed_in)
    assert any(message.spans[0][1] >= 2 * QUANTUM for message in handed_in)
    check_updates(sim.updates, config)


def test_pairs_are_taken_once() -> None:
    scoring = Scoring(0, 4, 4, None, LossExchange())
    scoring.add([(0, 8)])
    scoring.take(scored([(0, 4)], 0.1), 40.0, 0.0)
    scoring.add([(0, 12), (4, 4)])
    assert scoring.next_slice(1e9) == [(4, 4), (8, 4)]


@settings(deadline=None)
@given(spans(), spans())
def test_spans_without_others(some: list[Span], others: list[Span]) -> None:
    some = [(first % 100, count % 50 + 1) for first, count in some]
    others = [(first % 100, count % 50 + 1) for first, count in others]
    left = without(some, others)
    taken = set(update_record.pairs_of(others).tolist())
    assert update_record.pairs_of(left).tolist() == [
        pair for pair in update_record.pairs_of(some).tolist() if pair not in taken
    ]


def test_a_broadcast_that_comes_twice_makes_no_work() -> None:
    sim = Simulation(FIXED)
    sim.fate = lambda direction, host, message: [DELAY, 0.9, 1.8] if isinstance(message, wire.Step) else [DELAY]
    host = sim.add("a")
    sim.run_steps(6)
    assert len(host.device.scored) == len(set(host.device.scored))


def test_a_host_that_lags_behind_hands_in_the_digest_of_the_step_that_was_asked_for() -> None:
    worker = Worker("one", "", "", KNOWN_ANSWERS, {}, now=0.0, jitter=lambda: 0.5, built=True, step=0, text="text")
    worker.request(0.0)
    worker.receive(Envelope(wire.Welcome(RUN, 1, 5, 0, "", 9, "text", 1, 40, 0, 1, 0, QUANTUM, 1, None, 0)), 0.0)
    for step in range(1, 7):
        asked = wire.Step(RUN, 1, step, [], digest=step == 3, measure=0 if step == 5 else None)
        worker.receive(Envelope(asked, update_of(step - 1)), 0.0)
    done = []
    while (task := worker.task()) is not None:
        done.append(type(task).__name__)
        if isinstance(task, Apply):
            worker.finished(Done(worker.step + len(task.updates)), 0.0)
        else:
            worker.finished(Value("digest") if isinstance(task, TakeDigest) else Measured(1.5, 0.5), 0.0)
    assert done == ["Apply", "TakeDigest", "Apply", "Measure", "Apply"]
    reports = []
    while not isinstance((request := worker.request(0.0)).message, wire.Beat):  # type: ignore[union-attr]
        assert request is not None
        reports.append(request.message)
        worker.receive(Envelope(wire.Ok(1, 6, [])), 0.0)
    assert reports == [wire.Digest(5, 3, "digest"), wire.Measured(5, 5, 1.5, 0.5)]


def test_a_slow_result_of_a_closed_step_is_dropped() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.add("b")
    sim.run_steps(2)
    host.device.speed = 0.5
    sim.run_steps(4)
    host.device.speed = 20.0
    sim.run(60)
    assert sim.server.counters["messages no honest host sends"] == 0
    assert next(host for host in sim.server.status(sim.now).hosts if host.name == "a").state == "ready"
    check_updates(sim.updates, FIXED)


# Large things.


def parts_of(data: bytes, digest: str, size: int = 10) -> list[tuple[wire.Part, bytes]]:
    return [(wire.Part(digest, len(data), at), data[at : at + size]) for at in range(0, len(data), size)]


def test_a_download_asks_for_the_missing_parts() -> None:
    data = bytes(range(35))
    download = Download("state", 35)
    for part, body in parts_of(data, hash_bytes(data)):
        request = download.request(7).message
        assert isinstance(request, wire.Fetch)
        assert (request.session, request.offset) == (7, part.offset)
        assert request.digest == ("" if part.offset == 0 else hash_bytes(data))  # of one snapshot
        assert not download.is_whole
        assert download.take(part, body)
    assert download.is_whole
    assert bytes(download.data) == data


@pytest.mark.parametrize(
    "part",
    [
        wire.Part("another", 35, 10),
        wire.Part("right", 36, 10),
        wire.Part("right", 35, 0),
        wire.Part("right", 35, 20),
    ],
    ids=["digest", "size", "again", "gap"],
)
def test_parts_that_do_not_fit_together_are_dropped(part: wire.Part) -> None:
    download = Download("state", 35)
    assert download.take(wire.Part("right", 35, 0), bytes(10))
    assert not download.take(part, bytes(10))


@pytest.mark.parametrize(
    ("size", "body"),
    [(36, bytes(10)), (2**63 - 1, bytes(10)), (35, b""), (5, bytes(10)), (0, b"")],
    ids=["large", "endless", "empty", "longer than it says", "nothing"],
)
def test_a_download_is_not_longer_than_it_may_be(size: int, body: bytes) -> None:
    assert not Download("state", 35).take(wire.Part("digest", size, 0), body)


def test_a_download_with_another_hash_is_dropped() -> None:
    for what, is_taken in (("state", False), ("block", False), ("text", True)):  # that hash is of something else
        download = Download(what, 10)  # type: ignore[arg-type]
        assert download.take(wire.Part("no hash", 10, 0), bytes(10)) == is_taken


def test_a_snapshot_is_sent_in_parts() -> None:
    data = bytes(range(256)) * (5 * wire.PART // 2 // 256)
    sending = Sending(4, data)
    got = bytearray()
    is_last = False
    while not is_last:
        envelope = sending.request(7)
        assert sending.request(7) == envelope  # until it has arrived
        message = envelope.message
        assert isinstance(message, wire.Upload)
        assert (message.step, message.size, message.offset) == (4, len(data), len(got))
        assert message.digest == hash_bytes(data)
        got += envelope.body
        is_last = sending.arrived()
    assert bytes(got) == data


def update_of(step: int) -> bytes:
    header = update_record.UpdateHeader(step, [(0, 4)], 1.0, True, 2.0, 0)
    return update_record.pack_update(update_record.Update(header, np.zeros(4, np.int8)))


def in_one_body(*updates: bytes) -> tuple[list[int], bytes]:
    """Return the sizes of updates, and the updates as one body."""
    return [len(update) for update in updates], b"".join(updates)


def test_updates_wait_for_their_turn() -> None:
    backlog = Backlog()
    backlog.hear(3, update_of(3))
    backlog.hear(5, update_of(5))
    assert 3 in backlog
    assert 4 not in backlog
    assert backlog.run(3, 100) == [update_of(3)]
    assert backlog.run(4, 100) == []
    assert backlog.fill(4, *in_one_body(update_of(4), update_of(5), update_of(6))) == 7
    assert backlog.run(3, 100) == list(map(update_of, (3, 4, 5, 6)))
    assert backlog.run(3, 5) == list(map(update_of, (3, 4)))
    backlog.drop_before(5)
    assert backlog.run(3, 100) == []
    assert backlog.run(5, 100) == list(map(update_of, (5, 6)))


def test_bytes_that_are_not_the_update_of_a_step_are_not_kept() -> None:
    backlog = Backlog()
    backlog.hear(3, update_of(4))
    backlog.hear(3, b"junk")
    assert 3 not in backlog
    assert backlog.fill(3, *in_one_body(update_of(3), update_of(5), update_of(6))) == 4
    assert backlog.run(3, 100) == [update_of(3)]


def test_not_every_update_is_kept() -> None:
    backlog = Backlog()
    for step in range(10 * PENDING):
        backlog.hear(step, update_of(step))
    assert len(backlog.run(0, 10**9)) == PENDING


def test_a_host_that_was_away_for_long_catches_up_in_parts() -> None:
    sim = Simulation(FIXED)
    sim.add("a", speed=2000.0)
    away = sim.add("b")
    sim.run_steps(3)
    away.cut = {"broadcast", "request", "reply"}
    sim.run_steps(6 * PENDING)
    away.cut = set()
    sim.run(DEAF + 2 * BEAT)
    assert away.device.step >= len(sim.ledger) - 2
    assert away.device.made == list(range(away.device.step))
    assert len(sim.messages(wire.CatchUp, "b")) < 20


def test_what_is_built_is_not_built_again() -> None:
    sim = Simulation(FIXED)
    host = sim.add("a")
    sim.run_steps(2)
    built = []
    do = host.device.do

    def watch(task: object) -> object:
        if isinstance(task, Build):
            built.append(task)
        return do(task)  # type: ignore[arg-type]

    host.device.do = watch  # type: ignore[assignment, method-assign]
    for _ in range(3):
        sim.kill()
        sim.start()
        sim.run_steps(2)
    assert not built
    assert host.phases[:4] == ["joining", "compiling", "joining", "ready"]
