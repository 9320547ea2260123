"""Asks a coordinator for the status of its run."""

import time
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from esjax.errors import EsjaxError
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import load_token
from esjax.hosts.transport.sockets import Limits
from esjax.paths import given_path
from esjax.texts import legible

Row = TypeVar("Row", wire.Status, wire.HostStatus)

PATIENCE = 10.0
"""Seconds to wait for an answer."""


def fetch_status(address: str, token_file: str | Path | None = None, patience: float = PATIENCE) -> wire.Status:
    """Ask a coordinator for the status of its run and hosts.

    Args:
        address: tcp://HOST:PORT of the coordinator.
        token_file: Token file for a coordinator with keys. None: it has no keys.
        patience: Seconds to wait for an answer.

    Returns:
        The status; characters of its texts that are not printable are escaped.

    Raises:
        EsjaxError: The coordinator does not answer in time, or refuses the request.
    """
    token = None if token_file is None else load_token(given_path(token_file))
    until = time.monotonic() + patience
    with ClientTransport(address, token=token, limits=Limits(wire.MAX_HEADER, wire.FRAMES)) as transport:
        transport.request(wire.encode(Envelope(wire.AskStatus())))
        while time.monotonic() < until:
            received = transport.poll(0.1)
            if received.refused:
                raise EsjaxError(received.refused)
            if received.reply is not None:
                return _read(received.reply, address)
    raise EsjaxError(f"no answer from {address} within {patience:.0f} s; check that the coordinator runs there")


def _read(frames: list[bytes], address: str) -> wire.Status:
    try:
        message = wire.decode(frames, "reply").message
    except wire.WireError as error:
        raise EsjaxError(
            f"the answer from {address} cannot be read ({error}); check that a coordinator of this version of esjax "
            "runs there"
        ) from error
    if isinstance(message, wire.Refused):
        raise EsjaxError(legible(message.reason))
    if not isinstance(message, wire.Status):
        raise EsjaxError(f"{address} answered with a {type(message).__name__}; check that it is a coordinator")
    counters = {legible(reason): count for reason, count in message.counters.items()}
    rewards = {legible(name): mean for name, mean in message.rewards.items()}
    hosts = [_legible(host) for host in message.hosts]
    return structs.replace(_legible(message), hosts=hosts, counters=counters, rewards=rewards)


def _legible(row: Row) -> Row:
    texts = {name: legible(value) for name, value in structs.asdict(row).items() if isinstance(value, str)}
    return structs.replace(row, **texts)
