"""Steps until spot checks find a host that lies, what its lies cost the run, and what the checks cost.

Every kind of liar takes part in a run with five honest hosts: in a simulation of time, and, if `sockets` says so, over
real sockets without and with CURVE. State machines, losses, gradient sums and updates are real; all hosts of a run use
one replica, since theirs would be equal.
"""

import heapq
import itertools
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.lies import LyingWorker
from bench.report import Report, Row, print_row
from bench.settings import Liars as Settings
from bench.sockets import pass_messages
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig
from esjax.data.corpus import Corpus, load_corpus
from esjax.data.delivery import PackedText, hash_bytes
from esjax.devices.mesh import local_mesh
from esjax.devices.process_group import here
from esjax.exchange.update_record import unpack_update
from esjax.exchange.values import make_exchange
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.known_answers import known_answers
from esjax.hosts.protocol import tasks, wire
from esjax.hosts.protocol.actions import Publish, Snapshot, Terms
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.serve import serve
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys, load_token
from esjax.hosts.transport.sockets import Limits, new_keypair
from esjax.inference.held_out import make_measure
from esjax.inference.language_model import LanguageModel
from esjax.models import build_model
from esjax.replica.replica import Replica

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTUM = 32
"""Pairs of a lease quantum."""

HONEST, NOBODY = 5, "nobody"
"""Number of honest hosts, and the kind of a run without liars."""

DELAY, TICK = 0.002, 0.05
"""Seconds that a message takes, and between looks at the clock, in the simulation."""

SPEED = 400.0
"""Pairs per second of a simulated host."""

LIMIT = 900.0
"""Seconds after which a run over sockets is given up."""


def run(settings: Settings) -> Report:
    """Measure every kind of liar with both exchanges."""
    rows: list[Row] = []
    for exchange in settings.exchanges:
        for how in ("simulation", *settings.sockets):
            honest = None
            for kind in (NOBODY, *settings.kinds):
                row = measure(settings, exchange, kind, how)
                honest = row["held-out"] if kind == NOBODY else honest
                rows.append(print_row({**row, "worse by": row["held-out"] - honest}))
    return Report(rows, partial(plot, rows))


def measure(settings: Settings, exchange: str, kind: str, how: str) -> Row:
    """Train with one kind of liar."""
    names = names_of(kind)
    took = simulate if how == "simulation" else partial(connect, curve=how == "CURVE")
    found, aside, checked, held_out = took(settings, config_of(settings, exchange), kind, names)
    liars = {name for name in names if is_liar(name)}
    return {
        "exchange": exchange,
        "how": how,
        "liar": kind,
        "found after steps": found,
        "liars put aside": f"{len(aside & liars)} of {len(liars)}",
        "honest put aside": len(aside - liars),
        "time for checks": checked,
        "held-out": held_out,
    }


def names_of(kind: str) -> list[str]:
    """Name the hosts of a run; a liar is neither the first nor the last to join."""
    names = [f"honest-{i}" for i in range(HONEST)]
    liars = {NOBODY: 0, "two of one token": 2}.get(kind, 1)
    return names[:2] + [f"liar-{i}" for i in range(liars)] + names[2:]


def is_liar(name: str) -> bool:
    """Return whether a host lies, by its name."""
    return name.startswith("liar")


def config_of(settings: Settings, exchange: str) -> Config:
    """Make the settings of a run without digests, checkpoints and evaluations."""
    es = EsConfig(population_size=settings.population, chunk_pairs=QUANTUM, exchange=exchange)  # type: ignore[arg-type]
    return Config(
        es=es,
        data=DataConfig(text=settings.text),
        model=GruConfig(hidden_size=settings.hidden, head_size=settings.hidden),
        hosts=HostsConfig(digest_interval=10**9),
        checkpoint_time=1e9,
        evaluate_time=1e9,
    )


class Devices:
    """The devices of all hosts of a run: one replica, which is a step ahead as soon as one host is."""

    def __init__(self, config: Config, corpus: Corpus) -> None:
        """Compile nothing yet."""
        self.replica = Replica(config, build_model(config.model, corpus.vocabulary.size), corpus.stream(), local_mesh())
        language_model = LanguageModel(
            build_model(config.model, corpus.vocabulary.size), corpus.vocabulary, local_mesh()
        )
        self._measure = make_measure(language_model, config, corpus.held_out, None)

    @property
    def step(self) -> int:
        """Step of the parameters."""
        return int(self.replica.state.step)

    def held_out(self) -> float:
        """Measure the held-out loss of the averaged parameters."""
        assert self._measure
        return self._measure(here(self.replica.state.average)) or float("nan")

    def do(self, task: tasks.Task, step: int) -> tasks.Result:
        """Do a task of a host whose parameters are of a step; a step that is over is scored with the newest ones."""
        if isinstance(task, tasks.Build):
            return tasks.Built(QUANTUM)
        if isinstance(task, tasks.Score):
            return tasks.Scored(self.replica.score(task.spans), sum(count for _, count in task.spans) / SPEED)
        if isinstance(task, tasks.Measure):
            return tasks.Measured()
        if isinstance(task, tasks.TakeDigest | tasks.TakeSnapshot):
            return tasks.Value(None)
        if isinstance(task, tasks.Load):  # there is only the state of the beginning
            return tasks.Done(0)
        if isinstance(task, tasks.Apply):
            for update in task.updates:
                step = unpack_update(update).header.step + 1
                if step > self.step:
                    self.replica.update(update)
        return tasks.Done(step)


Found = tuple[int | None, set[str], float | None, float]
"""Steps until the last liar was put aside, the hosts that were, share of time for checks, and the held-out loss."""


def worker_of(name: str, kind: str, now: float, **settings: Any) -> Worker:
    """Make a host's state machine."""
    make = partial(LyingWorker, kind) if is_liar(name) else Worker
    return make(name, "", "", known_answers(), {}, now=now, jitter=random.Random(name).random, **settings)


def simulate(settings: Settings, config: Config, kind: str, names: Sequence[str]) -> Found:
    """Train with simulated time: hosts evaluate `SPEED` pairs per second, and messages take `DELAY`."""
    devices = Devices(config, load_corpus(config.data))
    replica = devices.replica
    coordinator = Coordinator(
        config,
        Terms(
            "bench",
            1,
            QUANTUM,
            100,
            known_answers(),
            {},
            1,
            1,
            make_exchange(replica.vector_length, replica.scale),
        ),
        step=0,
        now=0.0,
        rng=np.random.default_rng([settings.seed, *kind.encode()]),
        text=PackedText(b"text", 4, "digest"),
        snapshot=Snapshot(0, b"0", hash_bytes(b"0")),
        with_audits=False,
    )
    workers = {name: worker_of(name, kind, 0.0, built=True, text="digest", device_batch=QUANTUM) for name in names}
    events: list[tuple[float, int, Callable[[float], None]]] = []
    count = itertools.count()

    def at(when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(events, (when, next(count), action))

    def publish(now: float) -> None:
        for action in coordinator.drain():
            if isinstance(action, Publish):
                for worker in workers.values():
                    at(now + DELAY, partial(hear, worker, action.envelope))

    def hear(worker: Worker, envelope: Envelope, now: float) -> None:
        worker.receive(envelope, now)
        go(worker, now)

    def answer(worker: Worker, request: Envelope, now: float) -> None:
        reply = coordinator.receive(request, now, "liars" if is_liar(worker.name) else worker.name)
        publish(now)
        at(now + DELAY, partial(hear, worker, reply))

    def finish(worker: Worker, result: tasks.Result, now: float) -> None:
        worker.finished(result, now)
        go(worker, now)

    def go(worker: Worker, now: float) -> None:
        task = worker.task()
        if task is not None:
            result = devices.do(task, worker.step)
            at(now + (result.seconds if isinstance(result, tasks.Scored) else 0.001), partial(finish, worker, result))
        request = worker.request(now)
        if request is not None:
            at(now + DELAY, partial(answer, worker, request))

    def tick(now: float) -> None:
        coordinator.tick(now)
        publish(now)
        for worker in workers.values():
            go(worker, now)
        at(now + TICK, tick)

    at(0.0, tick)
    now, found, aside = 0.0, None, set[str]()
    while coordinator.step < settings.steps:
        now, _, action = heapq.heappop(events)
        action(now)
        if len(aside) < len(names):
            new = aside_of(coordinator.status(now)) if any(worker.refused for worker in workers.values()) else set()
            found = coordinator.step if new - aside else found
            aside |= new
    return found, aside, coordinator.inspector.seconds / now, devices.held_out()


def aside_of(status: wire.Status) -> set[str]:
    """Name the hosts that are put aside."""
    return {host.name for host in status.hosts if host.state == "put aside"}


def connect(settings: Settings, config: Config, kind: str, names: Sequence[str], *, curve: bool) -> Found:
    """Train over real sockets; the hosts are in one other process."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys" if curve else None
        server = serve(config, Path(folder) / "run", bind="tcp://127.0.0.1:0", keys=keys, tell=lambda line: None)
        tokens: dict[str, Path] = {}
        ours, theirs = multiprocessing.get_context("spawn").Pipe()

        @contextmanager
        def hosts() -> Iterator[None]:
            if keys is not None:
                makers = ServerKeys(keys, new_keypair, print)
                owners = dict.fromkeys("liars" if is_liar(name) else name for name in names)
                paths = {owner: makers.new_token(owner, server.address) for owner in owners}
                tokens.update({name: paths["liars" if is_liar(name) else name] for name in names})
            process = multiprocessing.get_context("spawn").Process(
                target=run_hosts, args=(server.address, config, kind, names, tokens, theirs), daemon=True
            )
            process.start()
            try:
                yield
            finally:
                process.kill()
                process.join()

        server.while_open = hosts
        found, aside, until = None, set[str](), time.monotonic() + LIMIT
        held_out = float("nan")
        for info in server:
            new = aside_of(server.status())
            found = info.step if new - aside else found
            aside |= new
            if info.step >= settings.steps or time.monotonic() > until:
                ours.send("measure")
                held_out = ours.recv()
                break
        return found, aside, None, held_out


def run_hosts(
    address: str, config: Config, kind: str, names: Sequence[str], tokens: dict[str, Path], line: Any
) -> None:
    """Run all hosts of a run until the process is killed; then is when the other side has the held-out loss."""
    devices = Devices(config, load_corpus(config.data))
    limits = Limits(wire.MAX_BODY, wire.FRAMES)
    hosts = [
        (
            worker_of(name, kind, time.monotonic()),
            ClientTransport(address, token=load_token(tokens[name]) if tokens else None, limits=limits),
        )
        for name in names
    ]
    listening = set[str]()
    while True:
        for worker, transport in hosts:
            now = time.monotonic()
            if (task := worker.task()) is not None:
                worker.finished(devices.do(task, worker.step), time.monotonic())
            pass_messages(worker, transport, listening, now)
        if line.poll():
            line.recv()
            line.send(devices.held_out())


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the steps until each kind is found."""
    axes = figure.add_subplot()
    mine = [row for row in rows if row["liar"] != NOBODY]
    labels = [f"{row['liar']}, {row['exchange']}, {row['how']}" for row in mine]
    axes.barh(labels, [row["found after steps"] or np.nan for row in mine])
    axes.set(xlabel="steps until the liar is found")
