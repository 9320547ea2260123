"""A run with a coordinator and hosts whose clock, network and devices are scripted.

State machines and bytes are the real ones. A replica is a running hash of the updates that it made, so that two are
equal only if they made the same ones in the same order; the losses of a pair follow from that hash, so that they are
right only if the replica is. Where sums are exchanged, what a pair adds to one follows from its losses.
"""

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from esjax.averages import NamedMean
from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig
from esjax.core.shaping import LARGEST_LOSS, shape
from esjax.data.delivery import PackedText, hash_bytes
from esjax.exchange import update_record
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, LOSS_STEPS, TAIL
from esjax.exchange.values import make_exchange
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.protocol import tasks, wire
from esjax.hosts.protocol.actions import Closed, Publish, Record, RecordDigest, Snapshot, Store, Tell, Terms
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import Worker

TICK = 0.2
"""Seconds between looks at the clock; messages and results are looked at as they come."""

DELAY = 0.001
"""Seconds that a message takes."""

QUANTUM = 4
RUN = "run"
TEXT = b"all the text"
KNOWN_ANSWERS = {"rademacher": "1234"}
STATE_BYTES = 40
FIRST_STATE = b"\0" * STATE_BYTES
VECTOR_LENGTH = 3 + TAIL
"""Length of a sum."""

SCALE = 0.25
OF_HOST = ("key", "make_worker", "kind", "known_answers", "custom")

Twist = Callable[[np.ndarray, np.ndarray], np.ndarray]
Fate = Callable[[str, str, wire.Message], Sequence[float]]
"""`(direction, host, message) -> delay of each copy`; the directions are request, reply and broadcast."""

Tamper = Callable[[str, str, list[bytes]], list[bytes]]


def config_of(
    *,
    population: int = 64,
    budget: float | None = None,
    spot_check: float = 0.03,
    digest_interval: int = 1000,
    checkpoint_time: float = 1e6,
    evaluate_time: float = 1e6,
    block_interval: int | None = None,
    sums: bool = False,
    split: bool = False,
    reward: RewardConfig | None = None,
    init: str | None = None,
) -> Config:
    blocks = None if block_interval is None else 64
    return Config(
        init=init,
        reward=reward or RewardConfig(),
        checkpoint_time=checkpoint_time,
        evaluate_time=evaluate_time,
        data=DataConfig(block_tokens=blocks, new_tokens_interval=block_interval or 1),
        es=EsConfig(
            population_size=population,
            time_per_step=budget,
            exchange="sums" if sums else "losses",
            pairing="split" if split else "antithetic",
            pairs_per_window=3,
        ),
        hosts=HostsConfig(spot_check=spot_check, digest_interval=digest_interval),
    )


LOSSES = config_of()


def hash_state(state: bytes) -> str:
    return hashlib.blake2b(state, digest_size=8).hexdigest()


def step_of(state: bytes) -> int:
    return int.from_bytes(state[:8], "little")


def next_state(state: bytes, update: bytes) -> bytes:
    """Make an update: the step, and a hash of all that was done."""
    return (step_of(state) + 1).to_bytes(8, "little") + hashlib.blake2b(
        state + update, digest_size=STATE_BYTES - 8
    ).digest()


def losses_of(state: bytes, pairs: np.ndarray) -> np.ndarray:
    """Score pairs, with numbers between 2 and 3 that cannot be guessed."""
    start = int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "little")
    x: np.ndarray = (pairs.astype(np.uint64)[:, None] * 2 + np.arange(2, dtype=np.uint64)) + np.uint64(start)
    with np.errstate(over="ignore"):  # splitmix64
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (2.0 + (x >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


def sum_of(losses: np.ndarray) -> np.ndarray:
    """Add up some pairs, as `esjax.replica.estimators.partial_sums` does; three numbers are the gradient."""
    losses = losses[(np.abs(losses) < LARGEST_LOSS).all(axis=1)].astype(np.float64)
    difference = losses[:, 0] - losses[:, 1]
    columns = [np.sign(difference), 1e5 * difference, 1e5 * (losses[:, 0] - 2.5), np.ones(len(losses))]
    columns += [LOSS_STEPS * losses.mean(axis=1), DIFFERENCE_STEPS * np.abs(difference)]
    return np.rint(columns).sum(axis=1).astype(np.int32)


def values_of(
    config: Config, state: bytes, spans: Sequence[update_record.Span], twist: Twist | None = None
) -> np.ndarray:
    """Do what a run asks for with some pairs: score them, or add up each span."""

    def score(pairs: np.ndarray) -> np.ndarray:
        losses = losses_of(state, pairs)
        return twist(losses, pairs) if twist else losses

    if config.es.exchange == "losses":
        return score(update_record.pairs_of(spans))
    return np.stack([sum_of(score(update_record.pairs_of([span]))) for span in spans])


def body_of(values: np.ndarray) -> bytes:
    """Turn losses, or sums as "<i4", into the body of `wire.Losses`."""
    if values.dtype == np.float32:
        return values.tobytes()
    return values[:, :-TAIL].tobytes() + values[:, -TAIL:].tobytes()


def check_updates(
    updates: Sequence[bytes], config: Config, twist: Twist | None = None, state: bytes = FIRST_STATE
) -> None:
    """Check that each update follows from honest losses of the pairs that it names, beginning with a state."""
    for step, payload in enumerate(updates, step_of(state)):
        header = update_record.unpack_update(payload).header
        assert header.step == step
        values = values_of(config, state, header.spans, twist)
        numbers: np.ndarray
        if config.es.exchange == "sums":
            numbers = values.sum(axis=0, dtype=np.int64)
            concluded = make_exchange(VECTOR_LENGTH, SCALE).conclude(numbers[None], header.spans, config.es)
            _, scale, loss, void_pairs, trouble, slope = concluded[:6]
            assert (header.loss, header.vector_length) == (loss, VECTOR_LENGTH)
        else:
            pairs = update_record.pairs_of(header.spans)
            windows = pairs // 3 if config.es.pairing == "split" else None
            shaped = shape(values, config.es.shaping, config.es.deviation, windows)
            numbers, scale, void_pairs, slope = shaped[:4]
            trouble = shaped.trouble
        assert payload == update_record.pack_update(
            update_record.Update(header, numbers if header.applied else numbers[:0])
        )
        assert (header.scale, header.void_pairs, header.applied) == (scale, void_pairs, not trouble)
        assert header.slope == slope
        state = next_state(state, payload)


class Device:
    """What computes, at a scripted speed."""

    def __init__(
        self,
        *,
        speed: float = 20.0,
        device_batch: int = QUANTUM,
        compile_seconds: float = 0.5,
        load_seconds: float = 0.001,
        measure_seconds: float = 0.2,
        snapshot_bytes: int = STATE_BYTES,
        twist: Twist | None = None,
        has_start: bool = False,
        seconds_of: Callable[[int], float] | None = None,
        rewards: Callable[[np.ndarray], dict[str, float]] | None = None,
    ) -> None:
        """Set up.

        Args:
            speed: Pairs per second.
            device_batch: See `Worker`.
            compile_seconds: Time of `Build`.
            load_seconds: Time of `Load`.
            measure_seconds: Time of `Measure`.
            snapshot_bytes: Size of a snapshot.
            twist: Changes losses.
            has_start: Whether it has the weights that the run starts from.
            seconds_of: Time to score so many pairs, if `speed` does not say it; calls of a reward end one by one.
            rewards: Means of the rewards that have names, from losses.
        """
        self.config = LOSSES
        self.speed, self.device_batch, self.twist, self.snapshot_bytes = speed, device_batch, twist, snapshot_bytes
        self.compile_seconds, self.load_seconds, self.measure_seconds = compile_seconds, load_seconds, measure_seconds
        self.has_start = has_start
        self.seconds_of = seconds_of or (lambda pairs: pairs / self.speed)
        self.rewards = rewards or (lambda losses: {})
        self.state = FIRST_STATE
        self.block: bytes | None = None
        self.hung = False
        self.scored: list[tuple[int, int]] = []  # step and pair
        self.loaded: list[int] = []  # steps of snapshots
        self.made: list[int] = []  # updates
        self.blocks_used: dict[int, bytes | None] = {}

    @property
    def step(self) -> int:
        return step_of(self.state)

    def do(self, task: tasks.Task) -> tuple[tasks.Result, float]:
        """Do a task; return the result and the seconds that it takes."""
        if isinstance(task, tasks.Build):
            if task.text != TEXT or task.text_digest != hash_bytes(TEXT):
                return tasks.Failed("the text has another hash"), 0.0
            return tasks.Built(self.device_batch, 0 if self.has_start else -1), self.compile_seconds
        if isinstance(task, tasks.Load):
            self.state = task.snapshot[:STATE_BYTES]
            self.loaded.append(self.step)
            return tasks.Done(self.step), self.load_seconds
        if isinstance(task, tasks.UseBlock):
            self.block = task.tokens
        elif isinstance(task, tasks.Apply):
            for update in task.updates:
                assert update_record.unpack_update(update).header.step == self.step, "an update out of order"
                self.made.append(self.step)
                self.state = next_state(self.state, update)
            return tasks.Done(self.step, 1.0, 2.0), 0.001
        elif isinstance(task, tasks.Score):
            pairs = update_record.pairs_of(task.spans)
            self.scored += [(self.step, int(pair)) for pair in pairs]
            self.blocks_used[self.step] = self.block
            seconds = self.seconds_of(len(pairs))
            values = values_of(self.config, self.state, task.spans, self.twist)
            means = [NamedMean(name, mean, len(pairs)) for name, mean in self.rewards(values).items()]
            return tasks.Scored(values, seconds, means), seconds
        elif isinstance(task, tasks.TakeDigest):
            return tasks.Value(hash_state(self.state)), 0.001
        elif isinstance(task, tasks.TakeSnapshot):
            return tasks.Value(self.state.ljust(self.snapshot_bytes, b"+")), 0.001
        elif isinstance(task, tasks.Measure):
            return tasks.Measured(1.0 + 1 / (1 + self.step)), self.measure_seconds
        return tasks.Done(self.step), 0.001


class Host:
    """A machine that takes part.

    Attributes:
        running: False: it was stopped, and neither hears nor says anything.
        cut: Directions in which nothing arrives.
    """

    def __init__(
        self,
        sim: "Simulation",
        name: str,
        device: Device,
        key: str | None = None,
        make_worker: Callable[..., Worker] = Worker,
        **worker: Any,
    ) -> None:
        self.name, self.device, self.key = name, device, key
        self.running = True
        self.cut: set[str] = set()
        self.connection = 0
        self.asked = 0  # number of the last request
        self.phases: list[str] = []
        self._sim = sim
        self._done: list[tasks.Result] = []
        self._scoring = (0.0, 1.0, 0)  # beginning and seconds of the last task that scores, and its pairs
        self._calls = 0  # before that task
        settings: dict[str, Any] = {
            "device": "fake",
            "kind": "fake",
            "known_answers": KNOWN_ANSWERS,
            "custom": {},
            **worker,
        }
        self.worker = make_worker(name, **settings, now=sim.now, jitter=sim.random.random)

    @property
    def over(self) -> bool:
        return bool(self.worker.left or self.worker.refused)

    def go(self, now: float) -> None:
        """Do what a process does whenever it looks."""
        worker = self.worker
        if not self.running or self.over:
            return
        if self._sim.config.writes and not self.device.hung:
            began, seconds, pairs = self._scoring
            worker.calls = self._calls + int(pairs * min((now - began) / seconds, 1.0))
        worker.tick(now)
        if self._done and not self.device.hung:
            worker.finished(self._done.pop(), now)
        task = worker.task()
        if task is not None:
            result, seconds = self.device.do(task)
            if isinstance(task, tasks.Score):
                self._calls += self._scoring[2]
                self._scoring = now, seconds, sum(count for _, count in task.spans)
            self._sim.at(now + seconds, lambda: self._finish(result))
        if worker.reconnect:
            self.connection += 1
            worker.reconnected(now)
        request = worker.request(now)
        if request is not None:
            self.asked += 1
            self._sim.send_request(self, request)
        if not self.phases or self.phases[-1] != worker.phase:
            self.phases.append(worker.phase)

    def _finish(self, result: tasks.Result) -> None:
        self._done.append(result)
        self.go(self._sim.now)

    def hear(self, frames: list[bytes], kind: wire.Kind, now: float) -> None:
        if self.running and not self.over:
            self.worker.receive(wire.decode(frames, kind), now)
            self.go(now)


class Simulation:
    """Everything.

    Attributes:
        ledger: What was recorded: steps and updates.
        digests: What was recorded beside: steps and digests.
        checkpoints: Every snapshot that was stored.
        lines: What was printed.
        printed_at: By line: number of updates when it was last printed.
        fate: What becomes of each message.
        log: Every message that was sent, with its time, direction and host.
    """

    def __init__(self, config: Config | None = None, seed: int = 0, snapshot_bytes: int = STATE_BYTES) -> None:
        self.config = config or config_of()
        self.now = 0.0
        self.random = random.Random(seed)
        self.hosts: dict[str, Host] = {}
        self.ledger: list[tuple[int, bytes]] = []
        self.digests: list[tuple[int, str]] = []
        first = FIRST_STATE.ljust(snapshot_bytes, b"+")
        self.checkpoints = [Snapshot(0, first, hash_bytes(first))]
        self.lines: list[str] = []
        self.printed_at: dict[str, int] = {}
        self.closed: list[Closed] = []
        self.fate: Fate = lambda direction, host, message: [DELAY]
        self.tamper: Tamper = lambda direction, host, frames: frames
        self.crash_after_record: int | None = None
        self.log: list[tuple[float, str, str, wire.Message]] = []
        self.bytes_sent: dict[str, int] = {"request": 0, "reply": 0, "broadcast": 0}
        self.store_fails = False
        self.store_seconds = 0.0
        self.is_storing = False
        self.revoked: set[str] = set()
        self.trusted: str | None = None  # key of the trusted token
        self.text = TEXT
        self.incarnation = 0
        self.measured = False  # whether a held-out loss is kept when it starts
        self.snapshot_bytes = snapshot_bytes
        self._seed = seed
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._count = itertools.count()
        self.coordinator: Coordinator | None = None
        self.start()

    # The coordinator.

    @property
    def server(self) -> Coordinator:
        assert self.coordinator is not None
        return self.coordinator

    @property
    def updates(self) -> list[bytes]:
        return [payload for _, payload in self.ledger]

    @property
    def first(self) -> int:
        """Number of the first update; see `esjax.hosts.protocol.actions.History`."""
        return self.ledger[0][0] if self.ledger else 0

    def start(self) -> None:
        """Start the coordinator, or start it again from what was kept."""
        self.incarnation += 1
        data = self.config.data
        block = None if data.block_tokens is None else (lambda number: bytes([number % 256]) * 64)
        self.coordinator = Coordinator(
            self.config,
            Terms(
                RUN,
                self.incarnation,
                QUANTUM,
                100,
                KNOWN_ANSWERS,
                {},
                publish_port=1,
                state_bytes=self.snapshot_bytes,
                exchange=make_exchange(
                    VECTOR_LENGTH if self.config.es.exchange == "sums" else 0, SCALE, tolerance=self.config.tolerance
                ),
            ),
            step=len(self.ledger),
            now=self.now,
            rng=np.random.default_rng([self._seed, self.incarnation]),
            text=PackedText(self.text, len(self.text), hash_bytes(self.text)),
            snapshot=self.checkpoints[-1],
            history=_History(self.ledger),
            last_update=self.ledger[-1][1] if self.ledger else b"",
            block=block,
            measured=self.measured,
            trusted=self.trusted,
        )

    def kill(self) -> None:
        """Kill the coordinator, and lose what is on its way."""
        self.coordinator = None

    def _answer(self, host: Host, frames: list[bytes], connection: int, number: int) -> None:
        if self.coordinator is None:
            return
        if host.key in self.revoked:
            reply = self.coordinator.refuse_key(host.key, self.now)
        else:
            try:
                peer = f"{host.name} {connection}".encode()
                reply = self.coordinator.receive(wire.decode(frames, "request"), self.now, host.key, peer)
            except wire.VersionError as error:
                reply = self.coordinator.refuse_version(error.version)
        if not self.carry_out():
            return
        self._send("reply", host, reply, lambda frames: self._reply(host, frames, connection, number))

    def carry_out(self) -> bool:
        """Do what the coordinator wants done, in order; return False if that is where it is killed."""
        for action in self.server.drain():
            if isinstance(action, Record):
                assert action.step == len(self.ledger)
                self.ledger.append((action.step, action.payload))
                if action.step == self.crash_after_record:
                    self.kill()
                    return False
            elif isinstance(action, Publish):
                for host in self.hosts.values():
                    if host.worker.joined is not None:
                        self._broadcast(host, action.envelope)
            elif isinstance(action, RecordDigest):
                self.digests.append((action.step, action.digest))
            elif isinstance(action, Store):
                assert not self.is_storing, "two checkpoints are written at once"
                if self.store_seconds:
                    self.is_storing = True
                    self.at(self.now + self.store_seconds, partial(self._store, action))
                else:
                    self._store(action)
            elif isinstance(action, Closed):
                self.closed.append(action)
                if action.notice:
                    self.lines.append(action.notice)
            elif isinstance(action, Tell):
                self.lines.append(action.line)
                self.printed_at[action.line] = len(self.ledger)
        return True

    # The network.

    def send_request(self, host: Host, envelope: Envelope) -> None:
        connection, number = host.connection, host.asked
        self._send("request", host, envelope, lambda frames: self._answer(host, frames, connection, number))

    def _reply(self, host: Host, frames: list[bytes], connection: int, number: int) -> None:
        if connection == host.connection and number == host.asked:  # else it answers an older request
            host.hear(frames, "reply", self.now)

    def _broadcast(self, host: Host, envelope: Envelope) -> None:
        connection = host.connection

        def arrive(frames: list[bytes]) -> None:
            if connection == host.connection:
                host.hear(frames, "broadcast", self.now)

        self._send("broadcast", host, envelope, arrive)

    def _send(self, direction: str, host: Host, envelope: Envelope, arrive: Callable[[list[bytes]], None]) -> None:
        frames = self.tamper(direction, host.name, wire.encode(envelope))
        self.log.append((self.now, direction, host.name, envelope.message))
        self.bytes_sent[direction] += sum(map(len, frames))
        for delay in self.fate(direction, host.name, envelope.message):
            self.at(self.now + delay, lambda: None if direction in host.cut else arrive(frames))

    # Time.

    def add(self, name: str, device: Device | None = None, **settings: Any) -> Host:
        """Start a host; `settings` are of `Device`, of `Host`, or of `Worker`."""
        of_host = {key: settings.pop(key) for key in OF_HOST if key in settings}
        settings = {"snapshot_bytes": self.snapshot_bytes, **settings}
        host = self.hosts[name] = Host(self, name, device or Device(**settings), **of_host)
        host.device.config = self.config
        return host

    def _store(self, action: Store) -> None:
        """Write a checkpoint, as the server loop does."""
        self.is_storing = False
        audits, snapshot = self.server.audits, action.snapshot
        if hash_state(snapshot.data[:STATE_BYTES]) != action.digest:
            audits.is_false(snapshot)
        elif self.store_fails:
            audits.not_stored(snapshot)
        else:
            self.checkpoints.append(snapshot)
            audits.stored(snapshot)

    def kill_host(self, name: str) -> Host:
        """End a host without a word."""
        host = self.hosts.pop(name)
        host.running = False
        return host

    def disconnect(self, *hosts: Host) -> None:
        """Let the coordinator know that the connections of hosts were closed."""
        self.server.disconnected({f"{host.name} {host.connection}".encode() for host in hosts}, self.now)
        self.carry_out()

    def at(self, time: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time, next(self._count), action))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, or less of it if `until` comes true."""
        end = self.now + seconds
        while self.now < end - 1e-9 and not until():
            tick = self.now + TICK
            while self._events and self._events[0][0] <= tick:
                time, _, action = heapq.heappop(self._events)
                self.now = max(self.now, time)
                action()
            self.now = tick
            if self.coordinator is not None:
                self.coordinator.tick(self.now)
                self.carry_out()
            for host in list(self.hosts.values()):
                host.go(self.now)

    def run_steps(self, steps: int, limit: float = 300.0) -> None:
        """Run until so many more steps are done."""
        end = len(self.ledger) + steps
        self.run(limit, lambda: len(self.ledger) >= end)
        assert len(self.ledger) >= end, f"only {len(self.ledger)} of {end} steps: {self.lines[-5:]}"

    def messages(self, kind: type[wire.Message], host: str | None = None) -> list[Any]:
        """List the messages of a kind that were sent, from or to a host."""
        return [message for _, _, name, message in self.log if isinstance(message, kind) and host in (None, name)]

    def printed(self, words: str) -> bool:
        return any(words in line for line in self.lines)


class _History:
    """See `esjax.hosts.protocol.actions.History`."""

    def __init__(self, ledger: list[tuple[int, bytes]]) -> None:
        self._ledger = ledger

    @property
    def first(self) -> int:
        return self._ledger[0][0] if self._ledger else 0

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        found: list[bytes] = []
        for _, payload in self._ledger[from_step - self.first :]:
            limit_bytes -= len(payload)
            if found and limit_bytes < 0:
                break
            found.append(payload)
        return found
