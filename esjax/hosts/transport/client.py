"""A host's side of the transport: a REQ socket for requests and a SUB socket for broadcasts.

Frames are passed on unread. A request or its reply may get lost; the caller sends it again. A newer request replaces
one without a reply.
"""

import errno
import math
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq

from esjax.errors import EsjaxError
from esjax.hosts.transport import sockets
from esjax.hosts.transport.address import parse_address, resolve
from esjax.hosts.transport.keys import Token

REFUSALS = 5
"""Handshakes in a row that the other side ends in order before this counts as a refusal. Those that are cut off do not
count: a coordinator cuts connections off during a flood, and its refusals end in order."""


class Received(NamedTuple):
    """Messages from the coordinator."""

    reply: list[bytes] | None  # reply to the newest request; None: none so far
    broadcasts: list[list[bytes]]  # broadcasts, in the order in which they were published
    refused: str  # why the coordinator refuses this host for good, in one line, or ""


class ClientTransport:
    """A host's side. Only `poll` and `close` block. A broken connection is opened again, at growing intervals."""

    def __init__(self, address: str, *, token: Token | None, limits: sockets.Limits) -> None:
        """Begin to connect; the coordinator may start later.

        Args:
            address: tcp://HOST:PORT.
            token: Token that lets this host in. None: the coordinator uses plain text.
            limits: Limits of messages from the coordinator.

        Raises:
            EsjaxError: The address has another form or names no port, its host is not found, or the token holds no
                valid keys.
        """
        self._address = address
        self._host, port = parse_address(address)
        if port == 0:
            raise EsjaxError(f"{address} names no port; give that of the coordinator, such as 5555")
        self._ipv6 = resolve(self._host).version == 6
        self._ports: dict[int, int] = {zmq.REQ: port}
        self._token = token
        self._limits = limits
        self._request: list[bytes] | None = None  # not sent yet
        self._shaking: set[int] = set()
        self._breaks, self._let_in, self._refused = 0, False, ""
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._context = zmq.Context()
        self._links: dict[int, sockets.Watched] = {}
        try:
            self.reconnect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ClientTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, frames: Sequence[bytes]) -> None:
        """Send a request when the coordinator is connected; it replaces one without a reply."""
        self._request = list(frames)
        self._send_request()

    def subscribe(self, port: int) -> None:
        """Listen to broadcasts at a port of the coordinator's host, in place of an earlier port.

        Raises:
            EsjaxError: The port is not between 1 and 65,535.
        """
        if not 0 < port < 2**16:
            raise EsjaxError(
                f"{self._address} publishes at {port}, which is no port; check that a coordinator runs there"
            )
        self._ports[zmq.SUB] = port
        self._connect(zmq.SUB)

    def reconnect(self) -> None:
        """Replace all connections by new ones; the open request is dropped.

        Call this after a long silence: libzmq does not reopen a connection that it closed for a protocol error.
        """
        self._breaks, self._let_in, self._refused = 0, False, ""
        for kind in self._ports:
            self._connect(kind)

    def poll(self, timeout: float) -> Received:
        """Return the messages that have arrived, at most `BATCH` broadcasts; wait up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            left = 0.0 if self._refused else max(deadline - time.monotonic(), 0.0)
            woken = self._wait(left)
            for kind, link in self._links.items():
                for event, value in link.events():
                    self._shake_hands(kind, event, value)
            self._send_request()
            reply = self._receive(zmq.REQ)
            broadcasts = []
            for _ in range(sockets.BATCH):
                broadcast = self._receive(zmq.SUB)
                if broadcast is None:
                    break
                broadcasts.append(broadcast)
            if reply is not None or broadcasts or self._refused or woken or left == 0:
                return Received(reply, broadcasts, self._refused)

    def wake(self) -> None:
        """Let `poll` return, now or at its next call; may be called from any thread."""
        with suppress(OSError):  # full, which wakes as well, or closed
            self._waker.send(b"\0")

    def close(self) -> None:
        """Disconnect; the last messages have `LINGER` milliseconds to leave."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.destroy(linger=sockets.LINGER)
        self._waker.close()
        self._woken.close()

    def _wait(self, seconds: float) -> bool:
        """Wait until a message arrives or can be sent; return whether `wake` was called."""
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        for kind, link in self._links.items():
            sends = kind == zmq.REQ and self._request is not None
            poller.register(link.socket, zmq.POLLIN | (zmq.POLLOUT if sends else 0))
            poller.register(link.monitor, zmq.POLLIN)
        poller.poll(math.ceil(1000 * seconds))
        with suppress(BlockingIOError):
            return bool(self._woken.recv(4096))
        return False

    def _connect(self, kind: int) -> None:
        """Open the connection of a kind of socket, in place of an earlier one."""
        if kind in self._links:
            self._links.pop(kind).close()
        self._shaking.discard(kind)
        first = random.randint(100, 300)  # random, so that many hosts do not reconnect at the same moment
        options: dict[int, int] = {zmq.IPV6: self._ipv6, zmq.RECONNECT_IVL: first, zmq.RECONNECT_IVL_MAX: 16 * first}
        if kind == zmq.REQ:
            # IMMEDIATE: requests wait here, where a newer one replaces them, until the coordinator is connected.
            options |= {zmq.REQ_RELAXED: 1, zmq.REQ_CORRELATE: 1, zmq.IMMEDIATE: 1, zmq.SNDHWM: 1}
        else:
            options |= {zmq.RCVHWM: sockets.QUEUE}
        connected = sockets.open_socket(self._context, kind, self._limits, options)
        self._links[kind] = sockets.Watched(connected, zmq.EVENT_ALL)
        if kind == zmq.SUB:
            connected.setsockopt(zmq.SUBSCRIBE, b"")
        if self._token is not None:
            sockets.check_curve()
            try:
                connected.setsockopt_string(zmq.CURVE_SERVERKEY, self._token.server_key)
                connected.setsockopt_string(zmq.CURVE_PUBLICKEY, self._token.public_key)
                connected.setsockopt_string(zmq.CURVE_SECRETKEY, self._token.secret_key)
            except zmq.ZMQError as error:
                raise EsjaxError(f"the token {self._token.name!r} holds no keys; get a new token") from error
        host = f"[{self._host}]" if ":" in self._host else self._host
        connected.connect(f"tcp://{host}:{self._ports[kind]}")

    def _send_request(self) -> None:
        if self._request is not None:
            with suppress(zmq.Again):
                self._links[zmq.REQ].socket.send_multipart(self._request, zmq.NOBLOCK)
                self._request = None

    def _receive(self, kind: int) -> list[bytes] | None:
        """Return a message; None if there is none, or if it has too many frames."""
        if kind not in self._links or not self._links[kind].socket.poll(0):  # a REQ without a request must not be read
            return None
        frames = sockets.take_message(self._links[kind].socket, self._limits.frames)
        return None if frames is None or len(frames) > self._limits.frames else [frame.bytes for frame in frames]

    def _shake_hands(self, kind: int, event: int, value: int) -> None:
        """Track the handshakes by libzmq's events, to detect a refusal."""
        match event:
            case zmq.EVENT_CONNECTED:
                self._shaking.add(kind)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._shaking.discard(kind)
                self._breaks, self._let_in = 0, True
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refuse("does not know this token's key: it was revoked, or is not for it; get a new token")
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                if self._token is None:
                    self._refuse("requires a token; get a token file from there, and give it")
                else:
                    self._refuse(
                        "uses plain text, and a token requires encryption; correct the address or leave it out"
                    )
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._shaking.discard(kind)
                if value != errno.ECONNRESET:
                    self._breaks = self._breaks + 1 if value == errno.EPIPE else 0
                if self._breaks >= REFUSALS and not self._let_in:  # after one success it is not a refusal
                    why = "requires a token" if self._token is None else "has another key or none"
                    self._refuse(f"breaks off every handshake: it {why}, or is not a coordinator; get a token for it")
            case zmq.EVENT_CLOSED:
                self._breaks = 0  # nothing listens there yet
            case zmq.EVENT_DISCONNECTED if kind in self._shaking:
                self._refuse("is not a coordinator; correct the address")  # libzmq gave up without a reason

    def _refuse(self, reason: str) -> None:
        self._refused = self._refused or f"{self._address} {reason}"
