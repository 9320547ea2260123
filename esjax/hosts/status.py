"""Asks a coordinator how things stand."""

import time
from pathlib import Path

from esjax.errors import EsjaxError
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import load_token
from esjax.hosts.transport.sockets import Limits
from esjax.paths import given_path

PATIENCE = 10.0
"""Seconds to wait for an answer."""


def fetch_status(address: str, token_file: str | Path | None = None, patience: float = PATIENCE) -> wire.Status:
    """Ask a coordinator how things stand.

    Args:
        address: tcp://HOST:PORT.
        token_file: What the coordinator's keys let this host in with, if it has keys.
        patience: Seconds to wait for an answer.

    Raises:
        EsjaxError: It does not answer, or refuses to.
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
    raise EsjaxError(f"no answer from {address} within {patience:.0f} s; see that the coordinator runs there")


def _read(frames: list[bytes], address: str) -> wire.Status:
    try:
        message = wire.decode(frames, "reply").message
    except wire.WireError as error:
        raise EsjaxError(f"{address} answered with no message of this version of esjax: {error}") from error
    if isinstance(message, wire.Refused):
        raise EsjaxError(message.reason)
    if not isinstance(message, wire.Status):
        raise EsjaxError(f"{address} answered something else")
    return message
