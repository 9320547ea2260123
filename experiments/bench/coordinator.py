"""Cost of a step for the coordinator by the number of hosts: processor time, and bytes sent and received.

It measures first the state machine alone, with every message as bytes, then a coordinator with real sockets and a
ledger on disk. Hosts are simulated: real state machines with made-up losses. `own ms` is the processor time of the
coordinator's thread, `process ms` that of its whole process with the threads of the network. Hosts on the same cores do
not count.
"""

import multiprocessing
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bench.report import Report, Row
from bench.settings import Coordinator as Settings
from bench.sockets import pass_messages
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig
from esjax.core.shaping import STEPS_PER_DEVIATION
from esjax.data.delivery import PackedText, hash_bytes
from esjax.devices.mesh import cpu_mesh
from esjax.exchange import update_record
from esjax.exchange.gradient_sums import DIFFERENCE_STEPS, LOSS_STEPS, TAIL
from esjax.exchange.values import make_exchange
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.known_answers import known_answers
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Publish, Snapshot, Terms
from esjax.hosts.protocol.tasks import Apply, Build, Built, Done, Load, Result, Score, Scored, Task
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.serve import serve
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import load_token
from esjax.hosts.transport.sockets import Limits
from esjax.models import build_model
from esjax.replica.replica import Replica

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTUM = 32
"""Lease quantum: pairs that stay together on one host."""

VOCABULARY = 100
"""Number of token ids."""

MOST_PAIRS = 2**14
"""Most pairs of a step."""

HOSTS_A_PROCESS = 64
"""Number of simulated hosts in one process."""


def run(settings: Settings) -> Report:
    """Measure every number of hosts."""
    measures = (machine_alone, with_sockets) if settings.sockets else (machine_alone,)
    rows = [
        measure(settings, exchange, hosts)._asdict()
        for exchange in settings.exchange
        for measure in measures
        for hosts in settings.hosts
    ]
    return Report(rows, partial(plot, rows))


class Step(NamedTuple):
    """Cost of a step with one setting."""

    how: str
    exchange: str
    hosts: int
    own_ms: float
    process_ms: float
    step_ms: float
    up_bytes_per_member: float | None
    down_bytes_per_pair: float | None


class FakeDevices:
    """Answers tasks immediately with made-up losses, or gradient sums of this length if it is not 0.

    The values of a pair are the same on every host, so that spot checks find nothing.
    """

    def __init__(self, vector_length: int) -> None:
        """Begin with nothing."""
        self._step = 0
        self._losses, self._walk = _values(vector_length)

    def do(self, task: Task) -> Result:
        """Do a task."""
        if isinstance(task, Build):
            return Built(QUANTUM)
        if isinstance(task, Score):
            pairs = update_record.pairs_of(task.spans)
            values = self._sums(task.spans) if self._walk.size else self._losses[pairs]
            return Scored(values, 1e-5 * len(pairs))
        if isinstance(task, Load):
            self._step = 0
        elif isinstance(task, Apply):
            self._step = update_record.unpack_update(task.updates[-1]).header.step + 1
        return Done(self._step, 1.0, 1.0)

    def _sums(self, spans: Sequence[update_record.Span]) -> np.ndarray:
        """Make up the sums of honest hosts: the gradient grows like the root of the number of pairs."""
        first, pairs = np.array(spans).T
        sums = self._walk[(first + pairs) // QUANTUM] - self._walk[first // QUANTUM]
        sums[:, -TAIL:] = pairs[:, None] * np.array([1, 3 * LOSS_STEPS, DIFFERENCE_STEPS // 10])
        return sums.astype(np.int32)


@cache
def _values(vector_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Make up the losses of all pairs, and the sums over the pairs before each quantum."""
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.1, (MOST_PAIRS, 2)).astype(np.float32)
    walk = rng.normal(0.0, STEPS_PER_DEVIATION * QUANTUM**0.5, (MOST_PAIRS // QUANTUM + 1, vector_length))
    return losses, np.rint(walk).cumsum(axis=0)


def config_of(settings: Settings, exchange: Literal["losses", "sums"]) -> Config:
    """Make the settings of a run without audits, checkpoints and evaluations."""
    return Config(
        es=EsConfig(population_size=settings.members, chunk_pairs=QUANTUM, exchange=exchange),
        data=DataConfig(text="builtin:pydoc"),
        model=GruConfig(hidden_size=8, head_size=8),
        hosts=HostsConfig(digest_interval=10**9),
        checkpoint_time=1e9,
        evaluate_time=1e9,
    )


def machine_alone(settings: Settings, exchange: Literal["losses", "sums"], hosts: int) -> Step:
    """Measure the state machine, and packing and unpacking of messages."""
    config = config_of(settings, exchange)
    replica = Replica(config, build_model(config.model, VOCABULARY), None, cpu_mesh())
    values = make_exchange(replica.vector_length, replica.scale, replica.bounds)
    terms = Terms("bench", 1, QUANTUM, VOCABULARY, {"rademacher": ""}, {}, 1, 1, values)
    text = PackedText(b"text", 4, "digest")
    snapshot = Snapshot(0, b"0", hash_bytes(b"0"))
    rng = np.random.default_rng(0)
    coordinator = Coordinator(config, terms, step=0, now=0.0, rng=rng, text=text, snapshot=snapshot)
    workers = [
        Worker(f"{i}", "", "", {"rademacher": ""}, {}, now=0.0, jitter=lambda: 0.5, built=True, text="digest")
        for i in range(hosts)
    ]
    devices = [FakeDevices(values.vector_length) for i in range(hosts)]
    thread, bytes_of, started, now = 0.0, Counter[str](), 0.0, 0.0
    first = None
    while first is None or coordinator.step < first + settings.steps:
        if first is None and coordinator.step >= 5:
            first, thread, started = coordinator.step, 0.0, time.perf_counter()
            bytes_of.clear()
        published: list[list[bytes]] = []
        for worker, fake in zip(workers, devices, strict=True):
            while (task := worker.task()) is not None:
                worker.finished(fake.do(task), now)
            while (request := worker.request(now)) is not None:
                frames = wire.encode(request)
                bytes_of["up"] += sum(map(len, frames))
                began = time.thread_time()
                reply = wire.encode(coordinator.receive(wire.decode(frames, "request"), now))
                for action in coordinator.drain():
                    if isinstance(action, Publish):
                        published.append(wire.encode(action.envelope))
                thread += time.thread_time() - began
                worker.receive(wire.decode(reply, "reply"), now)
        now += 0.01
        began = time.thread_time()
        coordinator.tick(now)
        for action in coordinator.drain():
            if isinstance(action, Publish):
                published.append(wire.encode(action.envelope))
        thread += time.thread_time() - began
        for frames in published:
            bytes_of["down"] += sum(map(len, frames))
            for worker in workers:
                worker.receive(wire.decode(frames, "broadcast"), now)
    return _step("machine", exchange, settings, hosts, thread, thread, time.perf_counter() - started, bytes_of)


def with_sockets(settings: Settings, exchange: Literal["losses", "sums"], hosts: int) -> Step:
    """Measure a coordinator with a ledger on disk and hosts on the loopback interface."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(settings, exchange)
        server = serve(config, Path(folder) / "run", bind="tcp://127.0.0.1:0", tell=lambda line: None)
        server.while_open = lambda: simulated_hosts(server.address, hosts)
        first, thread, process, started = None, 0.0, 0.0, 0.0
        for info in server:
            ready = sum(host.state == "ready" for host in server.status().hosts) if first is None else hosts
            if first is None and ready == hosts:
                first, thread, process, started = info.step, *_clocks()
            elif first is not None and info.step == first + settings.steps:
                thread, process, wall = (
                    now - then for now, then in zip(_clocks(), (thread, process, started), strict=True)
                )
                break
    return _step("sockets", exchange, settings, hosts, thread, process, wall, None)


def _clocks() -> tuple[float, float, float]:
    return time.thread_time(), time.process_time(), time.perf_counter()


@contextmanager
def simulated_hosts(address: str, hosts: int, token: Path | None = None) -> Iterator[None]:
    """Run simulated hosts in a few processes; a coordinator with keys needs a token file."""
    context = multiprocessing.get_context("spawn")
    sizes = [min(HOSTS_A_PROCESS, hosts - first) for first in range(0, hosts, HOSTS_A_PROCESS)]
    processes = [
        context.Process(target=run_hosts, args=(address, i * HOSTS_A_PROCESS, size, token), daemon=True)
        for i, size in enumerate(sizes)
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_hosts(address: str, first: int, count: int, token_file: Path | None) -> None:
    """Run some simulated hosts until the process is killed."""
    answers = known_answers()
    limits = Limits(wire.MAX_BODY, wire.FRAMES)
    token = load_token(token_file) if token_file else None
    line = []
    for i in range(first, first + count):
        worker = Worker(f"host-{i}", "", "", answers, {}, now=time.monotonic(), jitter=random.random)
        line.append((worker, ClientTransport(address, token=token, limits=limits)))
    devices: dict[str, FakeDevices] = {}
    listening = set[str]()
    while True:
        for worker, transport in line:
            now = time.monotonic()
            while worker.joined and (task := worker.task()) is not None:
                if worker.name not in devices:
                    devices[worker.name] = FakeDevices(worker.joined.vector_length)
                worker.finished(devices[worker.name].do(task), now)
            pass_messages(worker, transport, listening, now)


def _step(
    how: str,
    exchange: str,
    settings: Settings,
    hosts: int,
    thread: float,
    process: float,
    wall: float,
    sent: Counter[str] | None,
) -> Step:
    up = down = None
    if sent is not None:
        up = sent["up"] / settings.steps / settings.members
        down = sent["down"] / settings.steps / (settings.members / 2)
    thread, process, wall = (1e3 * seconds / settings.steps for seconds in (thread, process, wall))
    return Step(how, exchange, hosts, thread, process, wall, up, down)


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the processor time of the coordinator."""
    axes = figure.add_subplot()
    for how, exchange in dict.fromkeys((row["how"], row["exchange"]) for row in rows):
        mine = [row for row in rows if (row["how"], row["exchange"]) == (how, exchange)]
        axes.plot([row["hosts"] for row in mine], [row["own_ms"] for row in mine], "o-", label=f"{how}, {exchange}")
    axes.set(xlabel="hosts", ylabel="the coordinator's ms per step", xscale="log", ylim=(0, None))
    axes.legend()
