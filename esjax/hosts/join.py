"""A host that takes part in a run somewhere else."""

import platform
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jax
import optax

from esjax.custom_code import gather
from esjax.errors import EsjaxError
from esjax.hosts import wire
from esjax.hosts.answers import describe_devices, kind_of, noise_answers
from esjax.hosts.client_transport import ClientTransport
from esjax.hosts.crew import IDLE, Crew
from esjax.hosts.engine import Engine
from esjax.hosts.keys import Token, load_token
from esjax.hosts.sockets import Limits
from esjax.hosts.tasks import Failed, Result, Task
from esjax.hosts.worker import Worker
from esjax.interrupts import STOPPING, stop_on_signals
from esjax.member import Loss
from esjax.models.model import ModelFactory
from esjax.own import Own, Reward
from esjax.paths import given_path

LIMITS = Limits(frame=wire.MAX_BODY, frames=wire.FRAMES)

POLL = 0.1
"""Seconds between looks at the clock."""

TASKS = "esjax-tasks"
"""Name of the thread that keeps the devices busy."""

CLOSE, CLOSE_TOGETHER = 1.0, 60.0
"""Seconds that the devices have to finish what they are at, when all is over; those of several processes must, since
none of them can end well before the others."""

FAREWELL = 10.0
"""Seconds to hand in what is scored and to say goodbye."""

QUIET = 5.0
"""Seconds without a word from the coordinator after which a person is told, and nobody is left to say goodbye to."""

DOING: dict[wire.Phase, str] = {"joining": "fetching the run's state", "compiling": "compiling", "ready": "ready"}
"""What a host does in each phase, for people."""


class _SilenceError(EsjaxError):
    """A coordinator that was never heard said nothing for longer than the host is patient."""


def join(
    address: str,
    *,
    token_file: str | Path | None = None,
    name: str | None = None,
    lifetime: float | None = None,
    patience: float = 600.0,
    stay: bool = False,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Take part in a run until it ends, SIGTERM or Ctrl-C comes, or the lifetime is over.

    Args:
        address: tcp://HOST:PORT of the coordinator.
        token_file: What the coordinator's keys let this host in with, if it has keys.
        name: What this host is called; of two of one name the newer counts. None: made up.
        lifetime: Seconds after which the host leaves. None: no such limit.
        patience: Seconds to wait for a coordinator that says nothing.
        stay: When the run has ended, wait for the next one at the address, and take part in that.
        model: The run's own model, if it was given one: the function, or PATH.py:FUNCTION. Of the latter the file has
            to be the same as the coordinator's; code is never sent.
        loss: The same of its own loss.
        reward: The same of its own reward.
        optimizer: The same of its own optimizer.
        tell: Called with each line that a person should see.

    Raises:
        EsjaxError: The coordinator turned the host away, or is not to be reached, or the devices failed.
    """
    if stay and jax.process_count() > 1:
        raise EsjaxError("several processes that are one host take part in one run; leave stay out")
    token = None if token_file is None else load_token(given_path(token_file))
    own = gather(model=model, loss=loss, reward=reward, optimizer=optimizer)
    name = name or f"{platform.node()[:100]}-{secrets.token_hex(3)}"
    ends_at = time.monotonic() + (lifetime if lifetime is not None else float("inf"))
    ended = 0
    try:
        while _take_part(address, token, name, ends_at, patience, stay, own, tell) and stay:
            ended += 1
            tell(f"{name}: waiting for the next run")
    except _SilenceError:
        if not ended:
            raise
        tell(f"{name}: no further run in {patience:.0f} s; left")


def _take_part(
    address: str,
    token: Token | None,
    name: str,
    ends_at: float,
    patience: float,
    stay: bool,
    own: Own,
    tell: Callable[[str], None],
) -> bool:
    """Take part in one run, see `join`.

    Returns:
        Whether the run is over, and not only for this host.
    """
    devices = jax.devices()
    now = time.monotonic()
    worker = Worker(
        name,
        describe_devices(devices)[:128],
        kind_of(devices),
        noise_answers(),
        own.identities(),
        now=now,
        jitter=random.random,
    )
    engine = Engine(own=own, tell=tell)
    crew = Crew(engine)
    if not crew.leads:
        with stop_on_signals():  # the process that leads hears of it, too
            crew.follow()
        return False
    tell(f"{name}: joining {address}")
    with ExitStack() as stack:
        transport = stack.enter_context(ClientTransport(address, token=token, limits=LIMITS))
        asked = stack.enter_context(stop_on_signals())
        hands = _Hands(crew, transport.wake)
        stack.callback(hands.close)
        left_at = float("inf")
        listening = 0
        was_in = False
        said = ""
        while not worker.left:
            now = time.monotonic()
            is_alone = worker.coordinator_stopped or now - worker.silent_since > QUIET
            if asked.is_set():
                worker.leave("it was stopped")
            elif now >= ends_at:
                worker.leave("its lifetime is over")
            worker.tick(now)
            for result in hands.results():
                worker.finished(result, now)
            task = worker.task()
            if task is not None:
                hands.give(task)
            if worker.reconnect:
                if not is_alone:
                    tell(f"{name}: only one of the coordinator's two ports is heard; connecting anew")
                transport.reconnect()
                listening = 0
                worker.reconnected(now)
            was_in = was_in or worker.joined is not None
            if worker.joined and worker.joined.publish_port != listening:
                listening = worker.joined.publish_port
                transport.subscribe(listening)
            request = worker.request(now)
            if request is not None:
                transport.request(wire.encode(request))
            line = _describe(worker, is_alone, patience)
            if line and line != said:
                said = line
                tell(f"{name}: {line}")
            if worker.leaving and left_at == float("inf"):
                left_at = now + (0.0 if is_alone else FAREWELL)
            if now >= left_at:
                break
            if now - worker.silent_since > patience:
                failure = EsjaxError if was_in else _SilenceError
                raise failure(f"no word from {address} for {patience:.0f} s; see that the coordinator runs there")
            received = transport.poll(POLL)
            if received.refused:
                raise EsjaxError(received.refused)
            now = time.monotonic()
            for frames in received.broadcasts:
                _hand_over(worker, frames, "broadcast", now)
            if received.reply is not None:
                _hand_over(worker, received.reply, "reply", now)
            if worker.refused:
                if stay and was_in:  # the goodbye was lost, and this is the next run
                    return True
                raise EsjaxError(worker.refused)
        if worker.failed:
            raise EsjaxError(worker.failed)
        tell(f"{name}: left, {worker.leaving or 'done'}")
        return worker.run_ended


def _describe(worker: Worker, is_alone: bool, patience: float) -> str:
    """Say how the host does, or "" while there is nothing to say."""
    if worker.leaving:
        return STOPPING
    if is_alone:
        what = "the coordinator stopped" if worker.coordinator_stopped else "no word from the coordinator"
        return f"{what}; waiting up to {patience:.0f} s for it, Ctrl-C to leave"
    return DOING[worker.phase] if worker.joined else ""


def _hand_over(worker: Worker, frames: list[bytes], kind: wire.Kind, now: float) -> None:
    try:
        envelope = wire.decode(frames, kind)
    except wire.VersionError as error:
        raise EsjaxError(
            f"the coordinator speaks version {error.version} of the protocol, this host {wire.VERSION}; install the "
            "same esjax on both"
        ) from error
    except wire.WireError:
        return
    worker.receive(envelope, now)


class _Hands:
    """A thread that does tasks one at a time, so that the host can go on talking meanwhile."""

    def __init__(self, crew: Crew, wake: Callable[[], None]) -> None:
        self._crew, self._wake = crew, wake
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name=TASKS)
        self._thread.start()

    def give(self, task: Task) -> None:
        self._tasks.put(task)

    def close(self) -> None:
        """Let the thread end after the task that it is at, if it is at one."""
        self._tasks.put(None)
        self._thread.join(CLOSE if self._crew.size == 1 else CLOSE_TOGETHER)

    def results(self) -> list[Result]:
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=IDLE)
            except queue.Empty:
                self._crew.idle()
                continue
            if task is None:
                self._crew.dismiss()
                return
            try:
                result = self._crew.do(task)
            except Exception as error:  # a model of one's own may raise anything
                result = Failed(f"{type(error).__name__}: {str(error)[:300]}")
            self._results.put(result)
            self._wake()
