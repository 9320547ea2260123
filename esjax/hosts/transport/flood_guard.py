"""Connections that send more than anybody takes.

libzmq limits the size of a frame, but keeps the frames of an unfinished message however many they are, and messages
that nobody took yet. So the bytes of each connection are counted here, and one that has sent more than a message since
all of its messages were taken is closed.
"""

import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

SCAN_SECONDS = 1.0
"""How often the bytes of every connection are counted at least."""

SCAN_GROWTH = 8192
"""KiB more than ever before in the process's memory that have them counted at once."""

IDLE_BYTES = 16_384
"""What a connection may send beside messages: handshake, subscriptions."""

TCP_INFO_BYTES = 136
"""Size of Linux's struct tcp_info up to and with tcpi_bytes_received."""


class _Connection(NamedTuple):
    """A connection when all of its messages were taken.

    Attributes:
        peer: Its other end.
        received: Bytes that it had brought.
    """

    peer: tuple
    received: int


class FloodGuard:
    """Counts the bytes of a port's connections, which somebody else opens and closes at any moment.

    The kernel does the counting, and only Linux tells the result; elsewhere no connection is closed.

    Attributes:
        cut_off: Connections closed so far.
    """

    def __init__(self, port: int, message: int, tell: Callable[[str], None]) -> None:
        """Begin with no connection.

        Args:
            port: The local one.
            message: Bytes of a message at most, as they are sent.
            tell: Called with a line for each connection that is closed.
        """
        self.cut_off = 0
        self._port = port
        self._message = message
        self._tell = tell
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._emptied: set[int] = set()
        self._scanned = 0.0
        self._peak = 0

    def accepted(self, fd: int) -> None:
        """Note a new connection, by its file descriptor; it may have sent a flood before anybody heard of it."""
        self._connections.pop(fd, None)
        self._count(fd, begun=0)

    def emptied(self, fds: Iterable[int]) -> None:
        """Note that connections sent messages, and that all of these were taken."""
        self._emptied.update(fds)

    def look(self) -> None:
        """Count the bytes of all connections if it is time, or if the process has grown."""
        now = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now >= self._scanned + SCAN_SECONDS or peak >= self._peak + SCAN_GROWTH:
            self._scanned, self._peak = now, peak
            for fd in list(self._connections):
                self._count(fd)
            self._emptied.clear()

    def _count(self, fd: int, begun: int | None = None) -> None:
        """Count the bytes of a connection, and close it if they are too many; forget it if it is gone.

        Args:
            fd: Its file descriptor.
            begun: Bytes of one that is not known yet which do not count. None: all that it has brought by now.
        """
        connection = self._connections.pop(fd, None)
        if sys.platform != "linux":
            return
        with suppress(OSError), _borrowed(fd) as tcp:
            peer = tcp.getpeername()
            if tcp.getsockname()[1:2] != (self._port,):
                return  # the number has come to stand for something else
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            (received,) = struct.unpack_from("=Q", info, TCP_INFO_BYTES - 8)
            if fd in self._emptied:
                connection = _Connection(peer, received)
            elif connection is None or connection.peer != peer:
                connection = _Connection(peer, received if begun is None else begun)
            waiting = received - connection.received
            if waiting <= self._message + IDLE_BYTES:
                self._connections[fd] = connection
                return
            # With a reset when its owner closes it, so that the other side does not go on trying.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            tcp.shutdown(socket.SHUT_RDWR)
            self.cut_off += 1
            self._tell(f"{peer[0]} was cut off: it sent {waiting:,} bytes more than were taken")


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Look at a socket of somebody else's, who may close it meanwhile.

    Raises:
        OSError: The number stands for none.
    """
    custom = os.dup(fd)
    try:
        tcp = socket.socket(fileno=custom)
    except OSError:
        os.close(custom)
        raise
    with tcp:
        yield tcp
