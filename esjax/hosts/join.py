"""A host that takes part in a run somewhere else."""

import platform
import random
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jax
import optax

from esjax.devices.process_group import leads
from esjax.errors import EsjaxError
from esjax.hosts.executor import Executor
from esjax.hosts.noise_fingerprint import describe_devices, kind_of, noise_fingerprints
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import Token, load_token
from esjax.hosts.transport.sockets import Limits
from esjax.models.custom import Custom, Reward
from esjax.models.custom_code import gather
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.signals import STOPPING, stop_on_signals

LIMITS = Limits(frame=wire.MAX_BODY, frames=wire.FRAMES)

POLL = 0.1
"""Seconds between looks at the clock."""

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
    custom = gather(model=model, loss=loss, reward=reward, optimizer=optimizer)
    name = name or f"{platform.node()[:100]}-{secrets.token_hex(3)}"
    ends_at = time.monotonic() + (lifetime if lifetime is not None else float("inf"))
    ended = 0
    try:
        while _take_part(address, token, name, ends_at, patience, stay, custom, tell) and stay:
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
    custom: Custom,
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
        noise_fingerprints(),
        custom.identities(),
        now=now,
        jitter=random.random,
    )
    executor = Executor(custom=custom, tell=tell)
    if not leads():
        with stop_on_signals():  # the process that leads hears of it, too
            executor.follow()
        return False
    tell(f"{name}: joining {address}")
    with ExitStack() as stack:
        transport = stack.enter_context(ClientTransport(address, token=token, limits=LIMITS))
        asked = stack.enter_context(stop_on_signals())
        background = stack.enter_context(executor.in_background(transport.wake))
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
            for result in background.results():
                worker.finished(result, now)
            task = worker.task()
            if task is not None:
                background.give(task)
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
