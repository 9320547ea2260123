"""`join`: a host that takes part in the run of a coordinator."""

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
from esjax.flags import names_of_changed
from esjax.hosts.executor import Background, Executor, Places
from esjax.hosts.known_answers import known_answers
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.worker import Worker
from esjax.hosts.rounding import rounding_kind
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import Token, load_token
from esjax.hosts.transport.sockets import Limits
from esjax.models.custom import Custom, Reward, Tool
from esjax.models.custom.code import load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.signals import STOPPING, started, starting, stop_on_signals
from esjax.watch.summary import describe_kinds

LIMITS = Limits(frame=wire.MAX_BODY, frames=wire.FRAMES)

POLL = 0.1
"""Seconds to wait for messages before time limits are checked."""

FAREWELL, EARLY_FAREWELL = 10.0, 2.0
"""Seconds that a leaving host has to send its scored losses and a goodbye, and a goodbye before it is ready."""

QUIET = 5.0
"""Seconds without a message from the coordinator after which the host prints that, and leaves without a goodbye."""

DOING: dict[wire.Phase, str] = {"joining": "fetching the run's state", "compiling": "compiling", "ready": "ready"}
"""What a host prints in each phase."""


class _SilenceError(EsjaxError):
    """No message came from the coordinator within `patience`, and the host had not joined before."""


def join(
    address: str,
    *,
    token_file: str | Path | None = None,
    name: str | None = None,
    lifetime: float | None = None,
    patience: float = 600.0,
    stay: bool = False,
    init: str | Path | None = None,
    prompts: str | Path | None = None,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Take part in a run until it ends, SIGTERM or Ctrl-C comes, or the lifetime is over.

    Args:
        address: tcp://HOST:PORT of the coordinator.
        token_file: Token file that lets this host in. None: the coordinator has no keys.
        name: Name of this host; of two hosts with one name the newer one counts. None: a random name.
        lifetime: Seconds after which the host leaves. None: no limit.
        patience: Seconds to wait for a coordinator that does not answer.
        stay: Whether to wait for the next run at the address when a run has ended, and take part in that, too.
        init: Weights that the run starts from, if it starts from given ones: a run folder or a file, see the setting
            `init`. None: the place that the settings of the run name.
        prompts: Prompts of the run, if it has a reward in Python and they lie elsewhere here. None: the place that the
            settings of the run name.
        model: The custom model, if the run has one: the function, or PATH.py:FUNCTION with a copy of the coordinator's
            file. Code is never sent.
        loss: The custom loss, if the run has one; given like the model.
        reward: The custom reward, if the run has one; given like the model.
        tool: The tool, if the run has one; given like the model.
        optimizer: The custom optimizer, if the run has one: an optax transformation, or PATH.py:FUNCTION.
        tell: Prints a line for the user.

    Raises:
        EsjaxError: The coordinator refuses the host or cannot be reached, the devices failed, or the weights or the
            prompts that the run needs are not here.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    join_with(
        custom,
        address,
        token_file=token_file,
        name=name,
        lifetime=lifetime,
        patience=patience,
        stay=stay,
        init=init,
        prompts=prompts,
        tell=tell,
    )


def join_with(
    custom: Custom,
    address: str,
    *,
    token_file: str | Path | None = None,
    name: str | None = None,
    lifetime: float | None = None,
    patience: float = 600.0,
    stay: bool = False,
    init: str | Path | None = None,
    prompts: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """`join`, given all custom parts."""
    if stay and jax.process_count() > 1:
        raise EsjaxError("a host of several processes takes part in a single run; leave out stay")
    token = None if token_file is None else load_token(given_path(token_file))
    places = Places(None if init is None else given_path(init), None if prompts is None else str(prompts))
    name = name or f"{platform.node()[:100]}-{secrets.token_hex(3)}"
    ends_at = time.monotonic() + (lifetime if lifetime is not None else float("inf"))
    ended = 0
    try:
        while _take_part(address, token, name, ends_at, patience, stay, places, custom, tell) and stay:
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
    places: Places,
    custom: Custom,
    tell: Callable[[str], None],
) -> bool:
    """Take part in one run, see `join`.

    Returns:
        Whether the run has ended for all hosts.
    """
    devices = jax.devices()
    now = time.monotonic()
    worker = Worker(
        name,
        f"{describe_kinds(devices)}, {platform.node()}"[:128],
        rounding_kind(jax.local_devices()[0]),
        known_answers(),
        custom.identities(),
        now=now,
        jitter=random.random,
        flags=names_of_changed(),
    )
    executor = Executor(custom=custom, places=places, tell=tell)
    if not leads():
        with stop_on_signals(), starting():  # process 0 gets the signal, too, and ends the others
            executor.follow()
        return False
    with ExitStack() as stack:
        asked = stack.enter_context(stop_on_signals())
        tell(f"{name}: joining {address}")
        transport = stack.enter_context(ClientTransport(address, token=token, limits=LIMITS))
        if jax.process_count() > 1:  # the others may not follow yet, and cannot be waited for
            stack.enter_context(starting())
        background = stack.enter_context(Background(executor, transport.wake))
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
            worker.calls = background.calls
            worker.tick(now)
            for result in background.results():
                worker.finished(result, now)
            task = worker.task()
            if task is not None:
                background.give(task)
            if worker.reconnect:
                if not is_alone:
                    tell(f"{name}: only one of the coordinator's two ports answers; reconnecting")
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
            if worker.phase == "ready":
                started()
            line = _describe(worker, is_alone, patience)
            if line and line != said:
                said = line
                tell(f"{name}: {line}")
            if worker.leaving and left_at == float("inf"):
                left_at = now + (0.0 if is_alone else FAREWELL if worker.phase == "ready" else EARLY_FAREWELL)
            if now >= left_at:
                break
            if now - worker.silent_since > patience:
                failure = EsjaxError if was_in else _SilenceError
                raise failure(f"no word from {address} for {patience:.0f} s; check that the coordinator runs there")
            received = transport.poll(POLL)
            if received.refused:
                raise EsjaxError(received.refused)
            now = time.monotonic()
            for frames in received.broadcasts:
                _hand_over(worker, frames, "broadcast", now)
            if received.reply is not None:
                _hand_over(worker, received.reply, "reply", now)
            if worker.refused:
                if stay and was_in:  # the goodbye got lost, and the next run has begun
                    return True
                raise EsjaxError(worker.refused)
        if worker.failed:
            raise EsjaxError(worker.failed)
        tell(f"{name}: left, {worker.leaving or 'done'}")
        return worker.run_ended


def _describe(worker: Worker, is_alone: bool, patience: float) -> str:
    """Return the line that describes the host's phase; "" if there is nothing to print."""
    if worker.leaving:
        return STOPPING
    if is_alone:
        what = "the coordinator stopped" if worker.coordinator_stopped else "no word from the coordinator"
        return f"{what}; waiting up to {patience:.0f} s for it, Ctrl-C to leave"
    if worker.joined:
        return DOING[worker.phase]
    return f"{worker.waiting}; waiting, Ctrl-C to leave" if worker.waiting else ""


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
