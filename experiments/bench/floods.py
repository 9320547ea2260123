"""What floods of a coordinator's ports cost: steps a second, memory, and the time that a new host needs to join.

A coordinator and real hosts train on this machine. Each flood has three phases: before; the flood; and an equal load,
processes that use as much processor time as the flooders did and touch no port. Flooders share the cores and the
address with hosts and coordinator, so the ratio to the equal load shows what the coordinator itself loses. Memory is
the growth of coordinator and guard together, at its peak. A new host joins while the flood goes on: it fetches the
state and hears a broadcast. With keys, flooders that are let in have a token of their own.
"""

import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench import flooders
from bench.coordinator import config_of, simulated_hosts
from bench.report import Report, Row, print_row
from bench.settings import Coordinator, Floods
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.hosts.known_answers import known_answers
from esjax.hosts.local import LocalWorkers
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope, Message
from esjax.hosts.serve import Server, serve
from esjax.hosts.transport.address import parse_address
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys, load_token
from esjax.hosts.transport.sockets import Limits, new_keypair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATIENCE = 60.0
"""Most seconds that a new host waits to join."""


def run(settings: Floods) -> Report:
    """Measure every flood, without and with keys."""
    rows = [*of_coordinator(settings, False), *of_coordinator(settings, True)]
    return Report(rows, partial(plot, rows))


def of_coordinator(settings: Floods, keys: bool) -> list[Row]:
    """Measure the floods of one coordinator."""
    names = settings.keyed if keys else settings.floods
    if not names:
        return []
    config = Config(
        es=EsConfig(population_size=settings.population),
        data=DataConfig(text=settings.text),
        model=GruConfig(hidden_size=16, head_size=16),
    )
    if settings.simulated:
        config = config_of(Coordinator(members=settings.population), "losses")
    with tempfile.TemporaryDirectory() as folder:
        server = serve(
            config,
            Path(folder) / "run",
            bind="tcp://127.0.0.1:0",
            keys=Path(folder) / "keys" if keys else None,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )

        def workers() -> AbstractContextManager[Callable[[], None] | None]:
            if settings.simulated:
                return simulated_hosts(server.address, settings.simulated, server.token)
            given = ["--token-file", str(server.token)] if server.token else []
            these = LocalWorkers(settings.hosts, Path(folder), print, given=given, oversubscribe=True)
            return these.joined(server.address)

        server.while_open = workers
        driver = Driver(server, settings, names)
        for _ in server:
            driver.steps += 1
            if driver.begin():
                break
    return driver.rows


class Driver:
    """Goes through the phases in a thread, while the run takes its steps.

    Attributes:
        steps: Steps so far.
        rows: What was measured.
    """

    def __init__(self, server: Server, settings: Floods, names: Sequence[str]) -> None:
        """Begin with the first step."""
        self.steps = 0
        self.rows: list[Row] = []
        self._server, self._settings, self._names = server, settings, names
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._token: Path | None = None  # of flooders that are let in

    def begin(self) -> bool:
        """Start with the first step; return whether all is measured."""
        if self.steps == 1:
            self._thread.start()
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._rate(min(self._settings.seconds, 15.0))  # hosts compile
        address, token = self._server.address, self._server.token
        ports = (parse_address(address).port, join(self._server)[1])
        if token:
            self._token = ServerKeys(token.parent, new_keypair, print).new_token("greedy", address)
        for name in self._names:
            self.rows.append(print_row(self._measure(name, ports)))

    def _measure(self, name: str, ports: tuple[int, int]) -> Row:
        server, seconds = self._server, self._settings.seconds
        words = ["127.0.0.1", *map(str, ports), *([str(self._token)] if self._token else [])]
        guard = [_guard_seconds()]
        before = self._rate(seconds / 2)
        guard.append(_guard_seconds())
        used = _children()
        with ThreadPoolExecutor() as pool, Memory() as memory, process(name, *words):
            joining = pool.submit(join, server, seconds / 4)
            during = self._rate(seconds)
            guard.append(_guard_seconds())
            joined_after, _ = joining.result()
        share = (_children() - used) / seconds
        with process("burn", f"{min(share, 1.0):.3f}"):
            equal = self._rate(seconds / 2)
        return {
            "keys": "yes" if server.token else "no",
            "flood": name,
            "steps/s before": before,
            "guard ms/step before": 2e3 * (guard[1] - guard[0]) / (before * seconds),
            "rate ÷ before": during / before,
            "rate ÷ equal load": during / equal,
            "flooders' cores": share,
            "guard's cores": (guard[2] - guard[1]) / seconds,
            "memory MB": memory.growth,
            "joined after s": joined_after,
        }

    def _rate(self, seconds: float) -> float:
        """Return the steps a second of the next seconds."""
        steps, started = self.steps, time.perf_counter()
        time.sleep(seconds)
        return max(self.steps - steps, 1e-9) / (time.perf_counter() - started)


class Memory:
    """The growth of this process and of the guard of its ports, in MB.

    Attributes:
        growth: Its peak.
    """

    def __init__(self) -> None:
        """Begin now."""
        self.growth = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(_resident_mb(),), daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self, before: float) -> None:
        while not self._over.wait(0.2):
            self.growth = max(self.growth, _resident_mb() - before)


def _guards() -> list[Path]:
    """List the folders in /proc of the guards of ports among this process's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int(_stat(folder)[1])
            if parent == os.getpid() and b"transport.gate" in (folder / "cmdline").read_bytes():
                found.append(folder)
    return found


def _stat(folder: Path) -> list[str]:
    """Read what /proc says of a process, from its state on."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _resident_mb() -> float:
    """Return the memory of this process and of the guards of its ports."""
    pages = sum(int(_stat(folder)[21]) for folder in [Path("/proc/self"), *_guards()])
    return pages * resource.getpagesize() / 1e6


def _guard_seconds() -> float:
    """Return the processor time of the guards of ports so far."""
    return sum(int(word) for folder in _guards() for word in _stat(folder)[11:13]) / os.sysconf("SC_CLK_TCK")


def _children() -> float:
    """Return the processor time of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def process(*words: str) -> Iterator[None]:
    """Run a flooder until the block ends."""
    started = subprocess.Popen([sys.executable, flooders.__file__, *words], stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        started.kill()
        started.wait()


def join(server: Server, wait: float = 0.0) -> tuple[float, int]:
    """Join as a host does until the state and a broadcast are here, and leave; return seconds, and the second port.

    It begins after `wait` seconds.

    The seconds are infinite if that takes more than `PATIENCE`, or the host gives up.
    """
    token = None if server.token is None else load_token(server.token)
    time.sleep(wait)
    started, size, session, publish_port, wanted = time.perf_counter(), 0, 0, 0, 1
    message: Message = wire.Join(f"guest-{started}", "", "", [*known_answers().items()], [], "", 1, 0)
    with ClientTransport(server.address, token=token, limits=Limits(wire.MAX_BODY, wire.FRAMES)) as client:
        heard, asked = False, -math.inf
        while time.perf_counter() < started + PATIENCE:
            if time.perf_counter() > asked + 5.0 and not (session and size >= wanted):
                client.request(wire.encode(Envelope(message)))
                asked = time.perf_counter()
            received = client.poll(0.1)
            if received.refused:
                break
            heard = heard or bool(received.broadcasts)
            if received.reply is not None:
                reply = wire.decode(received.reply, "reply")
                if isinstance(reply.message, wire.Welcome):
                    session, publish_port = reply.message.session, reply.message.publish_port
                    client.subscribe(publish_port)
                    message = wire.Fetch(session, "state", "", 0)
                elif isinstance(reply.message, wire.Part):
                    wanted, size = reply.message.size, size + len(reply.body)
                    message = wire.Fetch(session, "state", reply.message.digest, size)
                asked = -math.inf
            if heard and size >= wanted:
                client.request(wire.encode(Envelope(wire.Leave(session, ""))))
                client.poll(1.0)
                return time.perf_counter() - started, publish_port
    return math.inf, publish_port


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the ratios."""
    axes = figure.add_subplot()
    names = [f"{row['flood']}{', keys' if row['keys'] == 'yes' else ''}" for row in rows]
    axes.barh(names, [row["rate ÷ equal load"] for row in rows])
    axes.axvline(0.8, color="gray", linewidth=0.5)
    axes.set(xlabel="steps a second ÷ with an equal load that touches no port")
