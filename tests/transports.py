"""Both sides of the wire over real sockets on loopback, and strangers who speak to it in bytes."""

import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esjax.hosts.transport.address import parse_address
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys, Token, load_token
from esjax.hosts.transport.server import Request, ServerTransport
from esjax.hosts.transport.sockets import Limits, new_keypair

LIMITS = Limits(frame=65_536, frames=4)
PATIENCE = 60.0
"""Seconds after which a test gives up; nothing here needs more than a few."""

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a connection's bytes")


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, "nothing happened"


def server_of(keys: ServerKeys | None = None, address: str = "tcp://127.0.0.1:0") -> ServerTransport:
    return ServerTransport(address, keys=keys, limits=LIMITS, tell=lambda line: None)


def client_of(server: ServerTransport, token: Token | None = None) -> ClientTransport:
    return ClientTransport(server.address, token=token, limits=LIMITS)


@pytest.fixture
def server() -> Iterator[ServerTransport]:
    with server_of() as server:
        yield server


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return ServerKeys(tmp_path / "keys", new_keypair, pytest.fail)


def token_of(keys: ServerKeys, name: str = "one") -> Token:
    return load_token(keys.new_token(name, "tcp://127.0.0.1:1"))


def next_request(server: ServerTransport, client: ClientTransport) -> Request:
    """Keep both sides going until the server has a request."""
    requests: list[Request] = []

    def arrived() -> bool:
        received = client.poll(0)
        assert not received.refused
        server.check()
        requests.extend(server.poll(0.01))
        return bool(requests)

    until(arrived)
    (request,) = requests
    return request


def next_reply(client: ClientTransport) -> list[bytes]:
    replies: list[list[bytes]] = []

    def arrived() -> bool:
        received = client.poll(0.1)
        assert not received.refused
        if received.reply is not None:
            replies.append(received.reply)
        return bool(replies)

    until(arrived)
    return replies[0]


def round_trip(server: ServerTransport, client: ClientTransport, frames: list[bytes]) -> Request:
    """Ask, answer with the same frames in reverse, and check what arrives on either side."""
    client.request(frames)
    request = next_request(server, client)
    assert request.frames == frames
    server.reply(request, frames[::-1])
    assert next_reply(client) == frames[::-1]
    return request


def refusal(server: ServerTransport, client: ClientTransport) -> str:
    """Keep both sides going until the client knows that it is refused."""
    client.request([b"let me in"])
    reasons: list[str] = []

    def known() -> bool:
        assert server.poll(0.01) == []
        reasons.append(client.poll(0.01).refused)
        return bool(reasons[-1])

    until(known)
    assert "\n" not in reasons[-1]
    assert server.address in reasons[-1]
    return reasons[-1]


def listen(server: ServerTransport, client: ClientTransport) -> int:
    """Subscribe, and wait until broadcasts arrive; return how many that took."""
    client.subscribe(server.publish_port)
    asked = 0

    def heard() -> bool:
        nonlocal asked
        asked += 1
        server.publish([b"are you there"])
        return bool(client.poll(0.02).broadcasts)

    until(heard)
    until(lambda: not client.poll(0.1).broadcasts)
    return asked


def port_of(server: ServerTransport) -> int:
    return parse_address(server.address).port


GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def shake_hands(connection: socket.socket, kind: bytes) -> socket.socket:
    """Shake hands in plain text as ZMTP has it, byte by byte, in the place of a socket of a kind."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    connection.sendall(GREETING + bytes([4, len(ready)]) + ready)
    answer = b""
    while b"READY" not in answer:
        part = connection.recv(4096)
        assert part, "hung up"
        answer += part
    return connection


def stranger(port: int, kind: bytes = b"REQ") -> socket.socket:
    """Connect to a plain server by hand."""
    return shake_hands(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE), kind)


def last_frame(content: bytes) -> bytes:
    return bytes([0, len(content)]) + content


def more_frames(content: bytes) -> bytes:
    if len(content) < 256:
        return bytes([1, len(content)]) + content
    return b"\x03" + struct.pack(">Q", len(content)) + content


def send_endlessly(connection: socket.socket, content: bytes) -> int | None:
    """Send the same again and again, and say what stopped it."""
    try:
        for _ in range(3000):
            connection.sendall(content)
    except OSError as error:
        return error.errno
    return 0


def is_closed(connection: socket.socket) -> bool:
    """Say whether the other side has hung up."""
    connection.settimeout(0.01)
    try:
        while connection.recv(65_536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True
