"""Programs that flood a coordinator's ports until they are killed.

python flooders.py FLOOD HOST PORT PUBLISH_PORT [TOKEN]

TOKEN is the token file for a coordinator with keys. Floods of strangers use its server key alone.
"""

import os
import random
import resource
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

FRAME = 2**22
"""Bytes of an unfinished frame: the most that a host may send."""

AT_ONCE = 32
"""Connections that are opened before those that are open are served."""


class Flood(NamedTuple):
    """Connections that send the same, and are opened again when they are closed.

    Attributes:
        connections: Number of connections at a time to each port.
        ports: Which of the two ports: 0 requests, 1 broadcasts.
        hello: What each of them sends first.
        once: What it sends after the other side's READY, or at once if there is no `hello`.
        again: What it sends after that, without end; empty: it waits.
        hangs_up: Whether a connection is closed when it is open.
    """

    connections: int
    ports: Sequence[int]
    hello: bytes = b""
    once: bytes = b""
    again: bytes = b""
    hangs_up: bool = False


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """Return the greeting of ZMTP 3.0."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def plain(kind: bytes) -> bytes:
    """Return greeting and handshake without keys, in the place of a socket of a kind."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return greeting() + bytes([4, len(ready)]) + ready


def frame(content: bytes, more: bool = False) -> bytes:
    """Return a frame."""
    if len(content) < 256:
        return bytes([more, len(content)]) + content
    return bytes([2 | more]) + struct.pack(">Q", len(content)) + content


def subscriptions() -> Flood:
    """One connection subscribes to ever more topics."""
    topics = b"".join(frame(b"\x01" + random.randbytes(4)) for _ in range(200_000))
    return Flood(1, [1], plain(b"SUB"), again=topics)


def random_bytes() -> Flood:
    """Four connections to each port send random bytes, which begin as ZMTP 1 does."""
    return Flood(4, [0, 1], once=b"\x01\x00", again=os.urandom(2**20))


def unfinished_frames() -> Flood:
    """600 connections send a frame of 4 MiB but for its last byte."""
    begun = frame(b"1234", more=True) + frame(b"", more=True) + frame(bytes(FRAME))[:-1]
    return Flood(600, [0], plain(b"DEALER"), begun)


def half_open() -> Flood:
    """1,500 connections to each port send a greeting and no more."""
    return Flood(1500, [0, 1], greeting())


def idle() -> Flood:
    """1,500 connections to each port send nothing."""
    return Flood(1500, [0, 1])


def silent_hosts() -> Flood:
    """1,500 connections to each port finish the handshake and send no more."""
    return Flood(1500, [0, 1], plain(b"DEALER"))


def connects() -> Flood:
    """Connections to both ports are opened and closed as fast as they can be."""
    return Flood(16, [0, 1], hangs_up=True)


def requests() -> Flood:
    """Sixteen connections send small requests without waiting for replies."""
    return Flood(16, [0], plain(b"DEALER"), again=(frame(b"1234", True) + frame(b"", True) + frame(b"request")) * 5000)


FLOODS: dict[str, Callable[[], Flood]] = {
    "subscriptions": subscriptions,
    "random bytes": random_bytes,
    "unfinished frames": unfinished_frames,
    "half-open handshakes": half_open,
    "idle connections": idle,
    "silent hosts": silent_hosts,
    "connects": connects,
    "requests": requests,
}


class Sender:
    """One connection of a flood."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Begin to connect."""
        self.address = address
        self.socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        self.socket.setblocking(False)
        self.socket.connect_ex(address)
        self.sent = -1  # of `once` and `again`; -1: still the handshake

    def send(self, flood: Flood) -> bool:
        """Send more; return whether it can send yet more."""
        if self.sent < 0:
            self.socket.send(flood.hello)  # fits into the empty buffer
            self.sent = 0 if not flood.hello else -1
            return not flood.hello
        with suppress(BlockingIOError):
            while self.sent < len(flood.once):
                self.sent += self.socket.send(memoryview(flood.once)[self.sent : self.sent + 2**18])
            while flood.again:
                at = (self.sent - len(flood.once)) % len(flood.again)
                self.sent += self.socket.send(memoryview(flood.again)[at : at + 2**18])
        return bool(flood.again) or self.sent < len(flood.once)

    def receive(self) -> bool:
        """Receive more; return whether it can send now.

        Raises:
            OSError: The other side has closed.
        """
        part = self.socket.recv(2**16)
        if not part:
            raise ConnectionError
        if self.sent < 0 and b"READY" in part:
            self.sent = 0
            return True
        return False


def run(flood: Flood, addresses: Sequence[tuple[str, int]]) -> None:
    """Flood until killed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    selector = selectors.DefaultSelector()
    closed = [addresses[port] for port in flood.ports for _ in range(flood.connections)]
    random.shuffle(closed)
    while True:
        for _ in range(min(AT_ONCE, len(closed))):
            sender = Sender(closed.pop())
            selector.register(sender.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, sender)
        for key, events in selector.select(0.01):
            sender = key.data
            try:
                if events & selectors.EVENT_WRITE and not sender.send(flood):
                    selector.modify(sender.socket, selectors.EVENT_READ, sender)
                if events & selectors.EVENT_READ and sender.receive():
                    selector.modify(sender.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, sender)
                if flood.hangs_up:
                    raise ConnectionError
            except BlockingIOError:
                continue
            except OSError:
                selector.unregister(sender.socket)
                sender.socket.close()
                closed.append(sender.address)
        if not flood.again and not flood.hangs_up:
            time.sleep(0.01)  # as many connections a second as matter, not as the processor allows


def hello(token_file: str) -> bytes:
    """Return greeting and HELLO of a host with CURVE; libzmq takes the same HELLO as often as it comes."""
    import zmq

    from esjax.hosts.transport.keys import load_token

    token = load_token(Path(token_file))
    with socket.create_server(("127.0.0.1", 0)) as place, zmq.Context() as context, context.socket(zmq.REQ) as host:
        host.linger = 0
        host.curve_serverkey, host.curve_publickey, host.curve_secretkey = (
            key.encode() for key in (token.server_key, token.public_key, token.secret_key)
        )
        host.connect(f"tcp://127.0.0.1:{place.getsockname()[1]}")
        with place.accept()[0] as connection:
            connection.sendall(greeting(b"CURVE")[:32] + b"\x01" + bytes(31))
            found = b""
            while len(found) < 64 + 2 + 200:
                found += connection.recv(4096)
    return found


def token_subscriptions(address: str, publish_address: str, token_file: str) -> None:
    """A host with a token subscribes to ever more topics."""
    while True:
        with closing(_connected("SUB", publish_address, token_file)) as host:
            for _ in range(100_000):
                host.subscribe(random.randbytes(8))


def fetches(address: str, publish_address: str, token_file: str) -> None:
    """Eight connections of a joined host fetch the state, with ten requests on the way at a time."""
    import zmq

    from esjax.hosts.known_answers import known_answers
    from esjax.hosts.protocol import wire
    from esjax.hosts.protocol.wire import Envelope

    joining = wire.Join("greedy", "", "", [*known_answers().items()], [], "", random.getrandbits(32), 0)
    hosts = [_connected("DEALER", address, token_file) for _ in range(8)]
    hosts[0].send_multipart([b"\0\0\0\0", b"", *wire.encode(Envelope(joining))])
    reply = wire.decode(hosts[0].recv_multipart()[2:], "reply").message
    if not isinstance(reply, wire.Welcome):
        raise SystemExit(f"not let in: {reply}")
    request = [b"\0\0\0\0", b"", *wire.encode(Envelope(wire.Fetch(reply.session, "text", reply.text_digest, 0)))]
    poller = zmq.Poller()
    for host in hosts:
        poller.register(host, zmq.POLLIN)
        for _ in range(10):
            host.send_multipart(request)
    while True:
        for host, _ in poller.poll():
            host.recv_multipart()
            host.send_multipart(request)


def _connected(kind: str, address: str, token_file: str) -> Any:
    """Connect a socket, with a token if the file is not ""."""
    import zmq

    from esjax.hosts.transport.keys import load_token

    made: Any = zmq.Context.instance().socket(getattr(zmq, kind))
    made.linger = 0
    if token_file:
        token = load_token(Path(token_file))
        made.curve_serverkey, made.curve_publickey, made.curve_secretkey = (
            key.encode() for key in (token.server_key, token.public_key, token.secret_key)
        )
    made.connect(address)
    return made


HOSTS = {"subscriptions of a token holder": token_subscriptions, "fetches": fetches}
"""Floods of hosts that are let in."""


def burn(share: float) -> None:
    """Use a share of a core without touching a port."""
    while True:
        until = time.perf_counter() + 0.01 * share
        while time.perf_counter() < until:
            pass
        time.sleep(0.01 * (1 - share))


def main(name: str, host: str, port: str, publish_port: str, token_file: str = "") -> None:
    """Flood until killed."""
    if name in HOSTS:
        HOSTS[name](f"tcp://{host}:{port}", f"tcp://{host}:{publish_port}", token_file)
    else:
        made = FLOODS[name]()
        if token_file and made.hello:
            made = made._replace(hello=hello(token_file))
        run(made, [(host, int(port)), (host, int(publish_port))])


if __name__ == "__main__":
    if sys.argv[1] == "burn":
        burn(float(sys.argv[2]))
    else:
        main(*sys.argv[1:])
