"""The coordinator's side of the transport: a ROUTER socket for requests and an XPUB socket for broadcasts.

Frames are passed on unread.

- A broadcast is dropped silently for a host that is not connected, or that has `QUEUE` broadcasts waiting. The caller
  numbers broadcasts, so that a host notices a gap.
- With keys, both sockets are CURVE servers that let in the keys of `ServerKeys.allowed`. While the authenticator does
  not run, ZAP_ENFORCE_DOMAIN makes libzmq refuse all connections.
- Hosts reach both sockets through the process of a `FloodGuard`, which limits what libzmq does not. What the guard
  cannot see are the keys: connections of a token are counted here, by its requests and subscriptions.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator

from esjax.errors import EsjaxError
from esjax.hosts.transport import sockets
from esjax.hosts.transport.address import parse_address, resolve
from esjax.hosts.transport.flood_guard import FloodGuard
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.token_connections import TokenConnections

EACH_TOKEN = 512
"""Most connections of a token to a port that have sent a request, or have subscribed."""

LOOK_SECONDS = 0.02
"""Least seconds between two looks at the connections, and most while `poll` waits: a look takes as long as three
requests."""

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
"""Events of connections that are looked at."""


class Request(NamedTuple):
    """A message from a host."""

    peer: bytes  # identity of the connection
    number: bytes  # of the request in its connection; its reply needs it
    key: str | None  # public key of the sender, in Z85; None in plain text
    frames: list[bytes]  # the message, 1 to `Limits.frames` frames


class ServerTransport:
    """The coordinator's side. Only `poll` and `close` block, and no message from outside raises an error.

    Attributes:
        address: Address of requests, with the actual port.
        publish_port: Port of broadcasts, on the same host.
        rejected: Number of messages so far without the envelope of a request, or with too many frames.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: ServerKeys | None,
        limits: sockets.Limits,
        tell: Callable[[str], None],
        plain_text_anywhere: bool = False,
        each_token: int = EACH_TOKEN,
    ) -> None:
        """Listen for requests at a port, and publish at the next one.

        Args:
            address: tcp://HOST:PORT; host 0.0.0.0 or [::]: every interface; port 0 or *: any two free ports.
            keys: Keys that are let in. None: every connection, in plain text.
            limits: Limits of messages from hosts.
            tell: Prints a line for the user.
            plain_text_anywhere: Allow plain text at addresses that other machines reach.
            each_token: Most connections of a token to a port that have sent a request, or have subscribed.

        Raises:
            EsjaxError: The address has another form, is not of this machine, or is in use; or plain text is not allowed
                there.
        """
        host, port = parse_address(address)
        interface = resolve("0.0.0.0" if host == "*" else host)
        if keys is None and not interface.is_loopback and not plain_text_anywhere:
            raise EsjaxError(
                f"{address} can be reached from other machines, which without keys can all read along and take part; "
                "give a folder of keys, or allow plain text explicitly"
            )
        if port == 2**16 - 1:
            raise EsjaxError(f"{address} leaves no port after it for broadcasts; give a lower port")
        self.rejected = 0
        self._keys = keys
        self._limits = limits
        self._tell = tell
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._sockets: list[sockets.Watched] = []
        self._each_token = each_token
        self._of_tokens: dict[sockets.Watched, TokenConnections] = {}
        self._crowded: set[str] = set()  # keys that had too many connections
        self._succeeded = 0
        self._peers: dict[int, bytes] = {}  # by file descriptor of the connection
        self._disconnected: set[bytes] = set()
        self._look_at = 0.0
        self._guard = FloodGuard(interface, port, limits, tell, curve=keys is not None)
        self.publish_port = self._guard.ports[1]
        self.address = f"tcp://{f'[{host}]' if ':' in host else host}:{self._guard.ports[0]}"
        try:
            self._start_authenticator()
            # SNDHWM: a host waits for one reply at a time. RCVHWM 0: the guard limits what comes in; with a limit here,
            # a heartbeat from a stranger could abort the process while input waits, see `OPTIONS`.
            # HANDSHAKE_IVL: longer than the guard's 5 s. The guard cuts a handshake off, where libzmq ends it in order,
            # which a host takes for a refusal.
            options: dict[int, int] = {zmq.RCVHWM: 0, zmq.HANDSHAKE_IVL: 10_000}
            self._router = self._bind(zmq.ROUTER, self._guard.endpoints[0], {zmq.SNDHWM: 16, **options})
            # XPUB_VERBOSE: each subscription arrives here as a message, with the key that made it.
            published = {zmq.SNDHWM: sockets.QUEUE, zmq.XPUB_VERBOSE: 1, **options}
            self._publisher = self._bind(zmq.XPUB, self._guard.endpoints[1], published)
            self._guard.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ServerTransport":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def strangers(self) -> int:
        """Number of connections so far that have not finished the handshake."""
        return self._guard.accepted - self._succeeded

    @property
    def cut_off(self) -> int:
        """Number of connections so far that the flood guard closed."""
        return self._guard.cut_off

    def poll(self, timeout: float) -> list[Request]:
        """Return the requests that have arrived, at most `BATCH`; wait `timeout` seconds for the first."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            self._router.socket.poll(int(1000 * min(left, LOOK_SECONDS)))
            requests = self._take_requests()
            if time.monotonic() >= self._look_at:
                self._look()
            if requests or left <= LOOK_SECONDS:
                return requests

    def reply(self, request: Request, frames: Sequence[bytes]) -> None:
        """Answer a request; the reply is dropped if its sender has left or does not read replies."""
        with suppress(zmq.Again):
            self._router.socket.send_multipart([request.peer, request.number, b"", *frames], zmq.NOBLOCK)

    def disconnected(self) -> set[bytes]:
        """Return the peers (see `Request.peer`) whose connections have closed since the last call.

        A connection counts at the next look at the connections; after 20 s if the other machine has vanished.
        """
        left, self._disconnected = self._disconnected, set()
        return left

    def publish(self, frames: Sequence[bytes]) -> None:
        """Send a broadcast to all connected hosts."""
        self._publisher.socket.send_multipart(frames, zmq.NOBLOCK)

    def check(self) -> None:
        """Restart the authenticator if it died, and check the connections; call it every 100 ms to 1 s."""
        if self._authenticator is not None and not self._authenticator.is_alive():
            self._tell("the thread that authenticates hosts died and was restarted; no host could connect meanwhile")
            self._stop_authenticator()
            self._start_authenticator()
        self._look()

    def close(self) -> None:
        """Stop listening; the last messages have `LINGER` milliseconds to leave."""
        for opened in self._sockets:
            opened.close()
        self._sockets.clear()
        self._stop_authenticator()
        self._context.destroy(linger=sockets.LINGER)
        self._guard.close()

    def _bind(self, kind: int, endpoint: str, options: Mapping[int, int]) -> sockets.Watched:
        opened = sockets.open_socket(self._context, kind, self._limits, options)
        watched = sockets.Watched(opened, EVENTS)
        self._sockets.append(watched)
        self._of_tokens[watched] = TokenConnections(self._each_token)
        if self._keys is not None:
            opened.setsockopt(zmq.CURVE_SERVER, 1)
            opened.setsockopt_string(zmq.CURVE_SECRETKEY, self._keys.secret_key)
            opened.setsockopt_string(zmq.ZAP_DOMAIN, _KeyCheck.DOMAIN)
            opened.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        opened.bind(endpoint)
        return watched

    def _start_authenticator(self) -> None:
        if self._keys is not None:
            sockets.check_curve()
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.configure_curve_callback(_KeyCheck.DOMAIN, _KeyCheck(self._keys))
            self._authenticator.start()

    def _stop_authenticator(self) -> None:
        """Stop the authenticator; its method `stop` would wait forever for a thread that died."""
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is None or authenticator.thread is None:
            return
        with suppress(zmq.Again):
            authenticator.pipe.send(b"TERMINATE", zmq.NOBLOCK)
        authenticator.thread.join(timeout=1)
        authenticator.pipe.close()
        authenticator.pipe = None  # type: ignore[assignment]
        authenticator.zap_socket.unbind("inproc://zeromq.zap.01")  # at once; closing would free the name later
        authenticator.stop()

    def _take_requests(self) -> list[Request]:
        requests = []
        for _ in range(sockets.BATCH):
            frames = sockets.take_message(self._router.socket, 3 + self._limits.frames)
            if frames is None:
                break
            peer, source = frames[0].bytes, sockets.source_of(frames[0])
            # ROUTER adds the connection in front; a REQ sends the number of its request, an empty frame, the message.
            enveloped = 4 <= len(frames) <= 3 + self._limits.frames and len(frames[1]) == 4 and len(frames[2]) == 0
            if source is None or not enveloped:
                self.rejected += 1
                continue
            key = self._key_of(frames[0])
            # Look whether an earlier connection with this descriptor has ended: the request may be from that one.
            if self._peers.get(source) == peer or source not in self._look():
                self._peers[source] = peer
                if key is not None and not self._admits(self._router, key, source):
                    continue
            requests.append(Request(peer, frames[1].bytes, key, [frame.bytes for frame in frames[3:]]))
        return requests

    def _take_subscriptions(self) -> Iterator[tuple[str, int]]:
        """Return the key and the connection of each new subscription."""
        for _ in range(sockets.EVENTS):
            frames = sockets.take_message(self._publisher.socket, 1)
            if frames is None:
                return
            source = sockets.source_of(frames[0])
            if source is not None and (key := self._key_of(frames[0])) is not None:
                yield key, source

    def _key_of(self, frame: zmq.Frame) -> str | None:
        """Return the key that sent a frame; None in plain text."""
        return None if self._keys is None else str(frame.get("User-Id"))

    def _admits(self, opened: sockets.Watched, key: str, source: int) -> bool:
        """Count a connection for a key; if the key has too many, close it, and return False."""
        connections = self._of_tokens[opened]
        if source in connections.leaving:
            return False
        if connections.admits(key, source):
            return True
        sockets.shut_down(source)
        if key not in self._crowded:
            assert self._keys is not None, "without keys, none is counted"
            self._crowded.add(key)
            name = self._keys.allowed.get(key, "a revoked key")
            what = f"more than {self._each_token} connections to a port"
            self._tell(f"the token of {name} has {what}: further ones are closed")
        return False

    def _look(self) -> set[int]:
        """Note what has become of connections; return the descriptors of connections for requests that have ended."""
        ended = set[int]()
        self._look_at = time.monotonic() + LOOK_SECONDS
        subscriptions = [*self._take_subscriptions()]  # before the events: whose connection has ended is known then
        for opened in self._sockets:
            connections = self._of_tokens[opened]
            for event, value in opened.events():
                match event:
                    case zmq.EVENT_ACCEPTED:
                        connections.opened(value)
                    case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        self._succeeded += 1
                    case zmq.EVENT_DISCONNECTED:
                        connections.closed(value)
                        if opened is self._router:
                            ended.add(value)
                            if value in self._peers:
                                self._disconnected.add(self._peers.pop(value))
        for key, source in subscriptions:
            self._admits(self._publisher, key, source)
        self._guard.look()
        return ended


class _KeyCheck:
    """Decides for libzmq which keys are let in."""

    DOMAIN = "esjax"

    def __init__(self, keys: ServerKeys) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        try:
            return key.decode("ascii", "replace") in self._keys.allowed
        except Exception:  # would end the thread that asks
            return False
