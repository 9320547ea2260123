"""Lists of frames over ZeroMQ, between a coordinator and its hosts; the only file that imports zmq.

A coordinator answers requests on a ROUTER and publishes on a PUB; a host asks with a REQ and listens with a SUB. What
the frames say is none of this file's business.

- A request may get lost, and so may its reply: ask again. A newer request takes the place of an unanswered one.
- A broadcast is dropped without a word for a host that is not connected or has `QUEUE` of them waiting: number them, so
  that it sees the gap.
- With keys both sockets of the coordinator are CURVE servers, and only keys that `ServerKeys.allowed` names at that
  moment are let in. While nobody authenticates, ZAP_ENFORCE_DOMAIN has libzmq refuse everybody.
- libzmq limits the size of a frame, but not what it keeps of unfinished messages; `FloodGuard` does.
"""

import errno
import ipaddress
import math
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from esjax.errors import EsjaxError
from esjax.hosts.flood import FloodGuard
from esjax.hosts.keys import ServerKeys, Token

QUEUE = 1000
"""Broadcasts that wait for one host at most, on either side."""

BATCH = 256
"""Messages of a kind that one call of `poll` hands over at most."""

REFUSALS = 5
"""Handshakes in a row that the other side breaks off, before that counts as a refusal."""

OVERHEAD = 64
"""Bytes that ZMTP and CURVE add to a frame at most."""

LOOK_SECONDS = 0.02
"""How often connections are looked at while `poll` waits."""

EVENTS = 4096
"""Events of connections that are taken at once at most."""

LINGER = 500
"""Milliseconds that the last messages have to leave when a transport is closed."""

OPTIONS = {
    # The kernel notices within 20 s that the other side has vanished. ZMTP's own heartbeats stay off: libzmq 4.3.5
    # aborts the process when one is due on a connection that broke while its input waited for room.
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 10,
    zmq.TCP_KEEPALIVE_INTVL: 3,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 15_000,
    zmq.HANDSHAKE_IVL: 5_000,  # as long as a silent stranger is borne
    zmq.BACKLOG: 512,
}
"""Options of every socket, in milliseconds; those of TCP_KEEPALIVE in seconds."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Limits(NamedTuple):
    """How large a message from the other side may be.

    Attributes:
        frame: Bytes of a frame at most.
        frames: Frames of a message at most. One connection can have a server hold `frame` times `frames` bytes; without
            keys up to 32 times that, in frames of no bytes, each of which costs 64.
    """

    frame: int
    frames: int


class Request(NamedTuple):
    """A message from a host.

    Attributes:
        peer: Where its reply goes; different for every request.
        key: Public key of the sender, in Z85; None in plain text.
        frames: What it says; 1 to `Limits.frames`.
    """

    peer: bytes
    key: str | None
    frames: list[bytes]


class Received(NamedTuple):
    """What came from the coordinator.

    Attributes:
        reply: To the newest request; None: not yet.
        broadcasts: In the order of their publication.
        refused: Why this host will never be let in, in one line; "": it may be.
    """

    reply: list[bytes] | None
    broadcasts: list[list[bytes]]
    refused: str


class Address(NamedTuple):
    """A host, by name or IP address, and a port; port 0: any free one."""

    host: str
    port: int


def new_keypair() -> tuple[str, str]:
    """Make a public and a secret CURVE key, in Z85."""
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def parse_address(address: str) -> Address:
    """Take tcp://HOST:PORT apart; an IPv6 host stands in brackets, and * is any free port.

    Raises:
        EsjaxError: It is no such address.
    """
    match = re.fullmatch(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]+)):(\*|\d{1,5})", address, re.ASCII)
    port = 0 if match is None or match[3] == "*" else int(match[3])
    if match is None or port >= 2**16:
        raise EsjaxError(f"{address!r} is no address; give tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    return Address(match[1] or match[2], port)


def is_loopback(address: str) -> bool:
    """Tell whether tcp://HOST:PORT is reached from this machine alone.

    Raises:
        EsjaxError: It is no address, or its host is not found.
    """
    host, _ = parse_address(address)
    return host != "*" and _resolve(host).is_loopback


class ServerTransport:
    """The coordinator's side. Only `poll` and `close` wait, and nothing raises for what others send.

    Attributes:
        address: Where requests are taken, with the real port.
        publish_port: Where broadcasts are published, on the same host.
        rejected: Messages so far without the envelope of a request, or with too many frames.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: ServerKeys | None,
        limits: Limits,
        tell: Callable[[str], None],
        plain_text_anywhere: bool = False,
    ) -> None:
        """Take requests at a port, and publish at the next one.

        Args:
            address: tcp://HOST:PORT; host 0.0.0.0 or [::]: on every interface; port 0 or *: at any two free ports.
            keys: Who is let in; None: anybody, in plain text.
            limits: Of messages from hosts.
            tell: Called with a line that a person should read.
            plain_text_anywhere: Allow plain text beyond this machine.

        Raises:
            EsjaxError: The address is none, not of this machine, or in use; or plain text is not allowed there.
        """
        host, port = parse_address(address)
        interface = _resolve("0.0.0.0" if host == "*" else host)
        if keys is None and not interface.is_loopback and not plain_text_anywhere:
            raise EsjaxError(
                f"{address} can be reached from other machines, where without keys anybody may read along and take "
                "part; give a folder of keys, or allow plain text explicitly"
            )
        if port == 2**16 - 1:
            raise EsjaxError(f"{address} leaves no port after it to publish at; give a lower one")
        self.rejected = 0
        self._keys = keys
        self._limits = limits
        self._tell = tell
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._listeners: list[_Listener] = []
        self._senders: set[int] = set()  # since no request was left
        try:
            self._start_authenticator()
            # Nobody reads more than the reply to one request. What comes in is limited by the guard: where it waits for
            # room (RCVHWM), a heartbeat that a stranger sends along would abort the process, too, see `OPTIONS`.
            self._router = self._listen(zmq.ROUTER, interface, port, {zmq.SNDHWM: 16, zmq.RCVHWM: 0})
            self._publisher = self._listen(zmq.PUB, interface, port and port + 1, {zmq.SNDHWM: QUEUE, zmq.RCVHWM: 0})
        except BaseException:
            self.close()
            raise
        self.address = f"tcp://{f'[{host}]' if ':' in host else host}:{self._router.port}"
        self.publish_port = self._publisher.port

    def __enter__(self) -> "ServerTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def strangers(self) -> int:
        """Connections so far that have not finished the handshake."""
        return sum(listener.accepted - listener.succeeded for listener in self._listeners)

    @property
    def cut_off(self) -> int:
        """Connections so far that were closed for what they sent."""
        return sum(listener.guard.cut_off for listener in self._listeners)

    def poll(self, timeout: float) -> list[Request]:
        """Take the requests that are there, `BATCH` at most.

        Args:
            timeout: Seconds to wait for the first one at most.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            self._router.socket.poll(int(1000 * min(left, LOOK_SECONDS)))
            requests = self._take_requests()
            self._look()
            if requests or left <= LOOK_SECONDS:
                return requests

    def reply(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Answer a request; nothing happens if its sender has left, or reads no replies."""
        with suppress(zmq.Again):
            self._router.socket.send_multipart([peer[:-4], peer[-4:], b"", *frames], zmq.NOBLOCK)

    def publish(self, frames: Sequence[bytes]) -> None:
        """Send to every host that listens."""
        self._publisher.socket.send_multipart(frames, zmq.NOBLOCK)

    def check(self) -> None:
        """See that the door is kept; call it every 100 ms to 1 s, however long a step takes."""
        if self._authenticator is not None and not self._authenticator.is_alive():
            self._tell("the thread that lets hosts in had died; nobody was let in meanwhile, and it is started again")
            self._stop_authenticator()
            self._start_authenticator()
        self._look()

    def close(self) -> None:
        """Stop listening; what was sent last has `LINGER` to leave."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._stop_authenticator()
        self._context.destroy(linger=LINGER)

    def _listen(self, kind: int, interface: IPAddress, port: int, options: Mapping[int, int]) -> "_Listener":
        """Open a socket at a port; port 0: at any free one."""
        opened = _open(self._context, kind, self._limits, {**options, zmq.IPV6: interface.version == 6})
        if self._keys is not None:
            opened.setsockopt(zmq.CURVE_SERVER, 1)
            opened.setsockopt_string(zmq.CURVE_SECRETKEY, self._keys.secret_key)
            opened.setsockopt_string(zmq.ZAP_DOMAIN, _Door.DOMAIN)
            opened.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        at = f"[{interface}]" if interface.version == 6 else str(interface)
        message = self._limits.frames * (self._limits.frame + OVERHEAD) if kind == zmq.ROUTER else 0
        try:
            listener = _Listener(opened, f"tcp://{at}:{port or '*'}", message, self._tell)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise EsjaxError(f"port {port} is in use; stop what uses it, or give another port") from error
            if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
                raise EsjaxError(f"{at} is no address of this machine; give one that is, or 0.0.0.0") from error
            raise EsjaxError(f"cannot listen at port {port} of {at}: {error.strerror}") from error
        self._listeners.append(listener)
        return listener

    def _start_authenticator(self) -> None:
        if self._keys is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.configure_curve_callback(_Door.DOMAIN, _Door(self._keys))
            self._authenticator.start()

    def _stop_authenticator(self) -> None:
        """Stop the authenticator, dead or alive; its own `stop` would wait for a dead one for ever."""
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is None or authenticator.thread is None:
            return
        with suppress(zmq.Again):
            authenticator.pipe.send(b"TERMINATE", zmq.NOBLOCK)
        authenticator.thread.join(timeout=1)
        authenticator.pipe.close()
        authenticator.pipe = None  # type: ignore[assignment]
        authenticator.zap_socket.unbind("inproc://zeromq.zap.01")  # now: closing leaves that for later
        authenticator.stop()

    def _take_requests(self) -> list[Request]:
        requests = []
        for _ in range(BATCH):
            frames = _receive(self._router.socket, 3 + self._limits.frames)
            if frames is None:
                self._router.guard.emptied(self._senders)
                self._senders.clear()
                break
            source = _source(frames[0])
            if source is not None:
                self._senders.add(source)
            # ROUTER puts the connection first; a REQ sends its request's number, an empty frame, and what it says.
            enveloped = 4 <= len(frames) <= 3 + self._limits.frames and len(frames[1]) == 4 and len(frames[2]) == 0
            if source is None or not enveloped:
                self.rejected += 1
                continue
            key = None if self._keys is None else str(frames[0].get("User-Id"))
            peer = frames[0].bytes + frames[1].bytes
            requests.append(Request(peer, key, [frame.bytes for frame in frames[3:]]))
        return requests

    def _look(self) -> None:
        for listener in self._listeners:
            listener.look()


class ClientTransport:
    """A host's side. Only `poll` and `close` wait. A connection that breaks is opened again, ever more slowly."""

    def __init__(self, address: str, *, token: Token | None, limits: Limits) -> None:
        """Begin to connect; a coordinator that is not there yet is waited for.

        Args:
            address: tcp://HOST:PORT.
            token: Lets this host in; None: the coordinator speaks plain text.
            limits: Of messages from the coordinator.

        Raises:
            EsjaxError: The address is none, or its host has no address; or the token holds no keys.
        """
        self._address = address
        self._host, port = parse_address(address)
        if port == 0:
            raise EsjaxError(f"{address} names no port")
        self._ipv6 = _resolve(self._host).version == 6
        self._ports: dict[int, int] = {zmq.REQ: port}
        self._token = token
        self._limits = limits
        self._request: list[bytes] | None = None  # what is not sent yet
        self._shaking: set[int] = set()
        self._breaks, self._let_in, self._refused = 0, False, ""
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._woken.setblocking(False)
        self._context = zmq.Context()
        self._links: dict[int, _Link] = {}
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
        """Ask, once the coordinator is there; an unanswered request is forgotten, and so is its reply."""
        self._request = list(frames)
        self._send_request()

    def subscribe(self, port: int) -> None:
        """Listen to the broadcasts at a port of the coordinator's host, and no longer at the one before.

        Raises:
            EsjaxError: It is no port.
        """
        if not 0 < port < 2**16:
            raise EsjaxError(f"{self._address} publishes at {port}, which is no port; is it a coordinator?")
        self._ports[zmq.SUB] = port
        self._connect(zmq.SUB)

    def reconnect(self) -> None:
        """Connect anew, as if for the first time; a request on its way is forgotten.

        Call it when nothing was heard for long: libzmq does not open a connection again that brought it nonsense.
        """
        self._breaks, self._let_in, self._refused = 0, False, ""
        for kind in self._ports:
            self._connect(kind)

    def poll(self, timeout: float) -> Received:
        """Take what is there, `BATCH` broadcasts at most.

        Args:
            timeout: Seconds to wait for the first thing at most, or for `wake`.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = 0.0 if self._refused else max(deadline - time.monotonic(), 0.0)
            woken = self._wait(left)
            for kind, link in self._links.items():
                for event, value in _events(link.monitor):
                    self._shake_hands(kind, event, value)
            self._send_request()
            reply = self._receive(zmq.REQ)
            broadcasts = []
            for _ in range(BATCH):
                broadcast = self._receive(zmq.SUB)
                if broadcast is None:
                    break
                broadcasts.append(broadcast)
            if reply is not None or broadcasts or self._refused or woken or left == 0:
                return Received(reply, broadcasts, self._refused)

    def wake(self) -> None:
        """Have `poll` return, from any thread; now, or the next time it is called."""
        with suppress(OSError):  # as full as it gets, or closed
            self._waker.send(b"\0")

    def close(self) -> None:
        """Disconnect; what was sent last has `LINGER` to leave."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._context.destroy(linger=LINGER)
        self._waker.close()
        self._woken.close()

    def _wait(self, seconds: float) -> bool:
        """Wait until there is something to do, or to send; say whether `wake` was called."""
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
        """Open the connection of a kind, in the place of the one before."""
        if kind in self._links:
            self._links.pop(kind).close()
        self._shaking.discard(kind)
        first = random.randint(100, 300)  # a hundred hosts do not come back at the same moment
        options: dict[int, int] = {zmq.IPV6: self._ipv6, zmq.RECONNECT_IVL: first, zmq.RECONNECT_IVL_MAX: 16 * first}
        if kind == zmq.REQ:
            # IMMEDIATE: requests wait here, where a newer one replaces them, until the coordinator is there.
            options |= {zmq.REQ_RELAXED: 1, zmq.REQ_CORRELATE: 1, zmq.IMMEDIATE: 1, zmq.SNDHWM: 1}
        else:
            options |= {zmq.RCVHWM: QUEUE}
        connected = _open(self._context, kind, self._limits, options)
        link = _Link(connected, _monitor(connected, zmq.EVENT_ALL))
        self._links[kind] = link
        if kind == zmq.SUB:
            connected.setsockopt(zmq.SUBSCRIBE, b"")
        if self._token is not None:
            try:
                connected.setsockopt_string(zmq.CURVE_SERVERKEY, self._token.server_key)
                connected.setsockopt_string(zmq.CURVE_PUBLICKEY, self._token.public_key)
                connected.setsockopt_string(zmq.CURVE_SECRETKEY, self._token.secret_key)
            except zmq.ZMQError as error:
                raise EsjaxError(f"the token {self._token.name!r} holds no keys; get a new one") from error
        host = f"[{self._host}]" if ":" in self._host else self._host
        connected.connect(f"tcp://{host}:{self._ports[kind]}")

    def _send_request(self) -> None:
        if self._request is not None:
            with suppress(zmq.Again):
                self._links[zmq.REQ].socket.send_multipart(self._request, zmq.NOBLOCK)
                self._request = None

    def _receive(self, kind: int) -> list[bytes] | None:
        """Take a message; None: there is none, or one of too many frames."""
        if kind not in self._links or not self._links[kind].socket.poll(0):  # a REQ without a request must not be read
            return None
        frames = _receive(self._links[kind].socket, self._limits.frames)
        return None if frames is None or len(frames) > self._limits.frames else [frame.bytes for frame in frames]

    def _shake_hands(self, kind: int, event: int, value: int) -> None:
        """Follow the handshakes by libzmq's events, and find out whether they are refused for good."""
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
                    self._refuse("lets nobody in without a token; get a token file, and give it")
                else:
                    self._refuse("speaks plain text, which a token forbids; leave the token out, or mend the address")
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._shaking.discard(kind)
                self._breaks = self._breaks + 1 if value in (errno.EPIPE, errno.ECONNRESET) else 0
                if self._breaks >= REFUSALS and not self._let_in:  # where it was let in before, it will be again
                    why = "wants a token" if self._token is None else "has another key or none"
                    self._refuse(f"breaks off every handshake: it {why}, or is no coordinator; get a token for it")
            case zmq.EVENT_CLOSED:
                self._breaks = 0  # nobody is there, which may change
            case zmq.EVENT_DISCONNECTED if kind in self._shaking:
                self._refuse("is no coordinator; mend the address")  # libzmq gave up, and does not say why

    def _refuse(self, reason: str) -> None:
        self._refused = self._refused or f"{self._address} {reason}"


class _Link(NamedTuple):
    """A connected socket, and the events of its connections."""

    socket: zmq.SyncSocket
    monitor: zmq.SyncSocket

    def close(self) -> None:
        _close(self.socket, self.monitor)


class _Door:
    """Says which keys are let in."""

    DOMAIN = "esjax"

    def __init__(self, keys: ServerKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return key.decode() in self._keys.allowed
        except Exception:  # would end the thread that asks
            return False


class _Listener:
    """A bound socket, and what is known of its connections.

    Attributes:
        socket: The socket.
        port: Where it is bound.
        guard: Closes connections that send too much.
        accepted: Connections so far.
        succeeded: Handshakes so far.
    """

    def __init__(self, bound: zmq.SyncSocket, endpoint: str, message: int, tell: Callable[[str], None]) -> None:
        """Bind a socket.

        Args:
            bound: The socket.
            endpoint: Where; the port may be *.
            message: Bytes of a message at most.
            tell: Called with a line for each connection that is closed.

        Raises:
            zmq.ZMQError: It cannot be bound.
        """
        self.socket = bound
        self._monitor = _monitor(bound, zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        bound.bind(endpoint)
        self.port = int(bound.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.guard = FloodGuard(self.port, message, tell)
        self.accepted = self.succeeded = 0

    def look(self) -> None:
        """Note what happened to connections, and close those that send too much."""
        for event, value in _events(self._monitor):
            if event == zmq.EVENT_ACCEPTED:
                self.accepted += 1
                self.guard.accepted(value)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.succeeded += 1
        self.guard.look()

    def close(self) -> None:
        """Take no more connections; what was sent last has `LINGER` to leave."""
        _close(self.socket, self._monitor)


def _resolve(host: str) -> IPAddress:
    """Find the address of a host; of several, one of IPv4."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise EsjaxError(f"cannot find the host {host!r}; correct its name, or give its IP address") from error
    return min((ipaddress.ip_address(address[0]) for *_, address in found), key=lambda ip: ip.version)


def _open(context: zmq.Context, kind: int, limits: Limits, options: Mapping[int, int]) -> zmq.SyncSocket:
    opened = context.socket(kind)
    for option, value in {**OPTIONS, **options, zmq.MAXMSGSIZE: limits.frame + OVERHEAD}.items():
        opened.setsockopt(option, value)
    return opened


def _receive(receiver: zmq.SyncSocket, most: int) -> list[zmq.Frame] | None:
    """Take a message without waiting; None: there is none. Of one with more frames, the first `most` + 1 are kept."""
    frames: list[zmq.Frame] = []
    with suppress(zmq.Again):
        while True:  # all frames of a message are there, or none is
            frame = receiver.recv(zmq.NOBLOCK, copy=False)
            if len(frames) <= most:
                frames.append(frame)
            if not frame.more:
                return frames
    return None


def _source(frame: zmq.Frame) -> int | None:
    """Find the file descriptor of the connection that brought a frame; None: of a peer of ZMTP 1, which has no name."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def _monitor(watched: zmq.SyncSocket, events: int) -> zmq.SyncSocket:
    """Open a socket that receives the events of another one."""
    return watched.get_monitor_socket(events, f"inproc://{uuid.uuid4()}")


def _close(watched: zmq.SyncSocket, monitor: zmq.SyncSocket) -> None:
    watched.disable_monitor()  # before its reader goes: libzmq would wait for one for ever
    monitor.close(linger=0)
    watched.close(linger=LINGER)


def _events(monitor: zmq.SyncSocket) -> Iterator[tuple[int, int]]:
    """Take the events that are there, and their values; `EVENTS` at most."""
    with suppress(zmq.Again):
        for _ in range(EVENTS):
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            yield event["event"], event["value"]
