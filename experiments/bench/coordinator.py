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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.report import Report, Row
from bench.settings import Coordinator as Settings
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig
from esjax.data.delivery import PackedText, hash_bytes
from esjax.exchange import update_record
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.noise_fingerprint import noise_fingerprints
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Publish, Snapshot, Terms
from esjax.hosts.protocol.tasks import Apply, Build, Built, Done, Load, Result, Score, Scored, Task
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.serve import serve
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.sockets import Limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTUM = 32
"""Lease quantum: pairs that stay together on one host."""

HOSTS_A_PROCESS = 64
"""Number of simulated hosts in one process."""


def run(settings: Settings) -> Report:
    """Measure every number of hosts."""
    measures = (machine_alone, with_sockets) if settings.sockets else (machine_alone,)
    rows = [measure(settings, hosts)._asdict() for measure in measures for hosts in settings.hosts]
    return Report(rows, partial(plot, rows))


class Step(NamedTuple):
    """Cost of a step with one setting."""

    how: str
    hosts: int
    own_ms: float
    process_ms: float
    step_ms: float
    up_bytes_per_member: float | None
    down_bytes_per_pair: float | None


class FakeDevices:
    """Answers tasks immediately with made-up losses."""

    def __init__(self, seed: int) -> None:
        """Begin with nothing."""
        self._step = 0
        self._losses = np.random.default_rng(seed).normal(3.0, 0.1, (2**14, 2)).astype(np.float32)

    def do(self, task: Task) -> Result:
        """Do a task."""
        if isinstance(task, Build):
            return Built(QUANTUM)
        if isinstance(task, Score):
            pairs = sum(count for _, count in task.spans)
            return Scored(self._losses[:pairs], 1e-5 * pairs)
        if isinstance(task, Load):
            self._step = 0
        elif isinstance(task, Apply):
            self._step = update_record.unpack_update(task.updates[-1]).header.step + 1
        return Done(self._step, 1.0, 1.0)


def config_of(settings: Settings) -> Config:
    """Make the settings of a run without audits, checkpoints and evaluations."""
    return Config(
        es=EsConfig(population_size=settings.members, chunk_pairs=QUANTUM),
        data=DataConfig(text="builtin:pydoc"),
        model=GruConfig(hidden_size=8, head_size=8),
        hosts=HostsConfig(digest_interval=10**9),
        checkpoint_time=1e9,
        evaluate_time=1e9,
    )


def machine_alone(settings: Settings, hosts: int) -> Step:
    """Measure the state machine, and packing and unpacking of messages."""
    config = config_of(settings)
    terms = Terms("bench", 1, QUANTUM, 100, {"rademacher": ""}, {}, 1, 1)
    text = PackedText(b"text", 4, "digest")
    snapshot = Snapshot(0, b"0", hash_bytes(b"0"))
    rng = np.random.default_rng(0)
    coordinator = Coordinator(config, terms, step=0, now=0.0, rng=rng, text=text, snapshot=snapshot)
    workers = [
        Worker(f"{i}", "", "", {"rademacher": ""}, {}, now=0.0, jitter=lambda: 0.5, built=True, text="digest")
        for i in range(hosts)
    ]
    devices = [FakeDevices(i) for i in range(hosts)]
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
                began = time.perf_counter()
                reply = wire.encode(coordinator.receive(wire.decode(frames, "request"), now))
                for action in coordinator.drain():
                    if isinstance(action, Publish):
                        published.append(wire.encode(action.envelope))
                thread += time.perf_counter() - began
                worker.receive(wire.decode(reply, "reply"), now)
        now += 0.01
        began = time.perf_counter()
        coordinator.tick(now)
        for action in coordinator.drain():
            if isinstance(action, Publish):
                published.append(wire.encode(action.envelope))
        thread += time.perf_counter() - began
        for frames in published:
            bytes_of["down"] += sum(map(len, frames))
            for worker in workers:
                worker.receive(wire.decode(frames, "broadcast"), now)
    return _step("machine", settings, hosts, thread, thread, time.perf_counter() - started, bytes_of)


def with_sockets(settings: Settings, hosts: int) -> Step:
    """Measure a coordinator with a ledger on disk and hosts on the loopback interface."""
    with tempfile.TemporaryDirectory() as folder:
        server = serve(config_of(settings), Path(folder) / "run", bind="tcp://127.0.0.1:0", tell=lambda line: None)
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
    return _step("sockets", settings, hosts, thread, process, wall, None)


def _clocks() -> tuple[float, float, float]:
    return time.thread_time(), time.process_time(), time.perf_counter()


@contextmanager
def simulated_hosts(address: str, hosts: int) -> Iterator[None]:
    """Run simulated hosts in a few processes."""
    context = multiprocessing.get_context("spawn")
    sizes = [min(HOSTS_A_PROCESS, hosts - first) for first in range(0, hosts, HOSTS_A_PROCESS)]
    processes = [
        context.Process(target=run_hosts, args=(address, i * HOSTS_A_PROCESS, size), daemon=True)
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


def run_hosts(address: str, first: int, count: int) -> None:
    """Run some simulated hosts until the process is killed."""
    fingerprints = noise_fingerprints()
    limits = Limits(wire.MAX_BODY, wire.FRAMES)
    line = []
    for i in range(first, first + count):
        worker = Worker(f"host-{i}", "", "", fingerprints, {}, now=time.monotonic(), jitter=random.random)
        line.append((worker, ClientTransport(address, token=None, limits=limits), FakeDevices(i)))
    listening = set()
    while True:
        for worker, transport, devices in line:
            now = time.monotonic()
            while (task := worker.task()) is not None:
                worker.finished(devices.do(task), now)
            if worker.joined and worker.name not in listening:
                listening.add(worker.name)
                transport.subscribe(worker.joined.publish_port)
            request = worker.request(now)
            if request is not None:
                transport.request(wire.encode(request))
            received = transport.poll(0.0)
            for frames in received.broadcasts:
                worker.receive(wire.decode(frames, "broadcast"), now)
            if received.reply is not None:
                worker.receive(wire.decode(received.reply, "reply"), now)


def _step(
    how: str, settings: Settings, hosts: int, thread: float, process: float, wall: float, sent: Counter[str] | None
) -> Step:
    up = down = None
    if sent is not None:
        up = sent["up"] / settings.steps / settings.members
        down = sent["down"] / settings.steps / (settings.members / 2)
    thread, process, wall = (1e3 * seconds / settings.steps for seconds in (thread, process, wall))
    return Step(how, hosts, thread, process, wall, up, down)


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the processor time of the coordinator."""
    axes = figure.add_subplot()
    for how in dict.fromkeys(row["how"] for row in rows):
        mine = [row for row in rows if row["how"] == how]
        axes.plot([row["hosts"] for row in mine], [row["own_ms"] for row in mine], "o-", label=how)
    axes.set(xlabel="hosts", ylabel="the coordinator's ms per step", xscale="log", ylim=(0, None))
    axes.legend()
