"""Soak test: trains with hosts that are killed, stopped and cut off at random, then replays the run.

    python experiments/soak.py --seconds 120 --seed 1

It starts real processes on this machine: a coordinator, which is killed and restarted as well, and hosts that connect
through a relay, which drops connections or one direction of them. At the end one process replays the ledger; its digest
must equal that of the last checkpoint (fault 42). Linux only.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

COORDINATOR, RELAY = "127.0.0.1", "127.0.0.2"
"""Loopback addresses. The relay listens on the same ports as the coordinator, at the second address."""

SMALL = [
    "gru",
    *("--model.hidden-size", "8", "--model.head-size", "8"),
    *("--es.population-size", "256", "--es.chunk-pairs", "8", "--data.window", "16"),
    *("--checkpoint-time", "5", "--evaluate-time", "5", "--hosts.digest-interval", "50"),
]
"""Settings of a small, quick run."""


STEPS_AFTER = 10
"""Steps that must follow the last fault."""

PATIENCE = 120.0
"""Most seconds for the run to recover from the last fault, and to end."""


@dataclass(frozen=True)
class Soak:
    """Train with hosts that come and go, and check that the ledger rebuilds the weights."""

    seconds: float = 120.0
    """Seconds during which faults happen."""

    hosts: int = 3
    """Number of hosts at a time."""

    seed: int = 0
    """Seed of the sequence of faults."""

    text: str = "builtin:pydoc"
    """Text to train on."""

    folder: Path | None = None
    """Folder for the run. None: a temporary one."""

    def run(self) -> dict[str, object]:
        """Run the test; return its counts and whether the replay agrees."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _soak(self, self.folder)
        with tempfile.TemporaryDirectory() as folder:
            return _soak(self, Path(folder))


def _soak(soak: Soak, folder: Path) -> dict[str, object]:
    dice = random.Random(soak.seed)
    counts: Counter[str] = Counter()
    coordinator = _Coordinator(folder, soak.text)
    relay = _Relay(coordinator.port)
    hosts = [_Host(folder, coordinator.port, number) for number in range(soak.hosts)]
    number = soak.hosts
    ends = time.monotonic() + soak.seconds
    try:
        while time.monotonic() < ends:
            time.sleep(dice.uniform(0.5, 4.0))
            fault = dice.choices(list(FAULTS), list(FAULTS.values()))[0]
            counts[fault] += 1
            victim = dice.choice(hosts)
            if fault == "kill a host":
                victim.process.kill()
            elif fault == "terminate a host":
                victim.process.terminate()
            elif fault == "stop a host for a while":
                victim.pause(dice.uniform(0.5, 6.0))
            elif fault == "cut all connections":
                relay.cut(dice.uniform(0.0, 3.0))
            elif fault == "lose one direction":
                relay.deafen(dice.uniform(0.5, 5.0))
            elif fault == "kill the coordinator":
                coordinator.restart()
            for i, host in enumerate(hosts):
                if host.process.poll() is not None:
                    hosts[i] = _Host(folder, coordinator.port, number)
                    number += 1
        relay.heal()
        coordinator.goes_on()
        steps = coordinator.finish()
    finally:
        for host in hosts:
            host.end()
        coordinator.end()
        relay.close()
    replayed = subprocess.run(_esjax("replay", str(folder / "run")), capture_output=True, text=True)
    return {
        "seconds": soak.seconds,
        "hosts_started": number,
        "steps": steps,
        "faults": dict(counts),
        "replay": replayed.stdout.strip() or replayed.stderr.strip(),
        "agrees": replayed.returncode == 0,
    }


FAULTS = {
    "kill a host": 3,
    "terminate a host": 1,
    "stop a host for a while": 3,
    "cut all connections": 2,
    "lose one direction": 1,
    "kill the coordinator": 1,
}
"""The faults and their relative frequencies."""


class _Coordinator:
    """`esjax serve` as a process that can be restarted."""

    def __init__(self, folder: Path, text: str) -> None:
        self._run, self._log = folder / "run", (folder / "coordinator.log").open("ab")
        self.process = self._start("--out", str(self._run), "--data.text", text, *SMALL, port=_free_port())

    def _start(self, *words: str, port: int) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            _esjax("serve", *words, "--bind", f"tcp://{COORDINATOR}:{port}"),
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("esjax join"):
            raise RuntimeError(f"the coordinator did not start, see {self._log.name}")
        self.port = int(line.split()[2].rsplit(":", 1)[1])
        return process

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = self._start("--resume", str(self._run), port=self.port)

    def goes_on(self) -> None:
        """Wait until `STEPS_AFTER` more steps are done."""
        enough, ends = self.steps() + STEPS_AFTER, time.monotonic() + PATIENCE
        while self.steps() < enough:
            if time.monotonic() > ends:
                raise RuntimeError(f"{PATIENCE:.0f} s after the last fault no {STEPS_AFTER} steps were done")
            time.sleep(0.1)

    def finish(self) -> int:
        """Stop the coordinator by a signal; return the number of steps."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        assert self.process.returncode == 0, f"the coordinator ended with {self.process.returncode}"
        return self.steps()

    def steps(self) -> int:
        """Count the steps done so far."""
        whole, _, _ = (self._run / "metrics.jsonl").read_text().rpartition("\n")
        return int(json.loads(whole.splitlines()[-1])["step"]) if whole else 0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class _Host:
    """`esjax join` as a process."""

    def __init__(self, folder: Path, port: int, number: int) -> None:
        self._log = (folder / f"host-{number}.log").open("ab")
        self.process = subprocess.Popen(
            _esjax("join", f"tcp://{RELAY}:{port}", "--name", f"host-{number}"),
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        )

    def pause(self, seconds: float) -> None:
        self.process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._go_on).start()

    def _go_on(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self._go_on()
        self.process.kill()
        self.process.wait()
        self._log.close()


class _Relay:
    """Passes bytes between hosts and the coordinator, except during a fault."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._links: set[asyncio.StreamWriter] = set()
        self._closed_until = self._deaf_until = 0.0
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        for listening in (port, port + 1):
            asyncio.run_coroutine_threadsafe(self._listen(listening), self._loop).result()

    async def _listen(self, port: int) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if time.monotonic() < self._closed_until:
                writer.close()
                return
            try:
                there, back = await asyncio.open_connection(COORDINATOR, port)
            except OSError:
                writer.close()
                return
            self._links |= {writer, back}
            await asyncio.gather(self._pass(reader, back, False), self._pass(there, writer, True))
            self._links -= {writer, back}

        await asyncio.start_server(connected, RELAY, port)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_host: bool) -> None:
        try:
            while data := await reader.read(2**16):
                while to_host and time.monotonic() < self._deaf_until:
                    await asyncio.sleep(0.05)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def cut(self, seconds: float) -> None:
        """Drop all connections and refuse new ones for some seconds."""
        self._closed_until = time.monotonic() + seconds
        self._loop.call_soon_threadsafe(self._drop)

    def _drop(self) -> None:
        for link in self._links:
            link.close()

    def deafen(self, seconds: float) -> None:
        """Pass nothing to the hosts for some seconds."""
        self._deaf_until = time.monotonic() + seconds

    def heal(self) -> None:
        self._closed_until = self._deaf_until = 0.0

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def _free_port() -> int:
    """Find a free port whose next port is free as well, starting at a number that differs between processes."""
    for port in range(20_000 + os.getpid() % 10_000, 65_000, 2):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for at in (port, port + 1):
                stack.enter_context(socket.socket()).bind((COORDINATOR, at))
            return port
    raise RuntimeError("no two ports side by side are free")


def _esjax(*words: str) -> list[str]:
    return [sys.executable, "-m", "esjax", *words]


if __name__ == "__main__":
    result = tyro.cli(Soak).run()
    print(json.dumps(result))
    sys.exit(0 if result["agrees"] else 1)
