"""Closes connections that send more than a message of unread data.

libzmq limits the size of a frame, but neither the number of frames in an unfinished message nor the number of unread
messages. This guard counts the bytes of each connection. It closes a connection that has sent more than one message's
size since all of its messages were read.
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
"""Most seconds between two counts of all connections' bytes."""

SCAN_GROWTH = 8192
"""Growth of the process's peak memory, in KiB, that causes a count at once."""

IDLE_BYTES = 16_384
"""Bytes that a connection may send besides messages, for handshake and subscriptions."""

TCP_INFO_BYTES = 136
"""Size of Linux's struct tcp_info up to and including tcpi_bytes_received."""


class _Connection(NamedTuple):
    """A connection at the time when all of its messages had been read."""

    peer: tuple  # address of the other end
    received: int  # bytes received from it until then


class FloodGuard:
    """Counts the bytes of a port's connections, which libzmq opens and closes in its threads.

    The counts come from the Linux kernel; on other systems no connection is closed.

    Attributes:
        cut_off: Connections closed so far.
    """

    def __init__(self, port: int, message: int, tell: Callable[[str], None]) -> None:
        """Set up without connections; `message` is the most bytes of a message on the wire."""
        self.cut_off = 0
        self._port = port
        self._message = message
        self._tell = tell
        self._connections: dict[int, _Connection] = {}  # by file descriptor
        self._emptied: set[int] = set()
        self._scanned = 0.0
        self._peak = 0

    def accepted(self, fd: int) -> None:
        """Note a new connection by its file descriptor; all bytes that it has sent so far count."""
        self._connections.pop(fd, None)
        self._count(fd, begun=0)

    def emptied(self, fds: Iterable[int]) -> None:
        """Note that all messages of these connections have been read."""
        self._emptied.update(fds)

    def look(self) -> None:
        """Count the bytes of all connections if `SCAN_SECONDS` are over, or if the process's memory has grown."""
        now = time.monotonic()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now >= self._scanned + SCAN_SECONDS or peak >= self._peak + SCAN_GROWTH:
            self._scanned, self._peak = now, peak
            for fd in list(self._connections):
                self._count(fd)
            self._emptied.clear()

    def _count(self, fd: int, begun: int | None = None) -> None:
        """Count the unread bytes of a connection, and close it if there are too many; drop it if it is closed.

        Of an unknown connection, the bytes after the first `begun` count; None: those from now on.
        """
        connection = self._connections.pop(fd, None)
        if sys.platform != "linux":
            return
        with suppress(OSError), _borrowed(fd) as tcp:
            peer = tcp.getpeername()
            if tcp.getsockname()[1:2] != (self._port,):
                return  # the descriptor now belongs to another file
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
            # LINGER 0 sends a reset when libzmq closes the socket, so that the other side stops sending.
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            tcp.shutdown(socket.SHUT_RDWR)
            self.cut_off += 1
            self._tell(f"{peer[0]} was cut off: it sent {waiting:,} bytes more than were taken")


@contextmanager
def _borrowed(fd: int) -> Iterator[socket.socket]:
    """Open a duplicate of libzmq's socket, which stays valid if libzmq closes the original.

    Raises:
        OSError: The descriptor is not an open socket.
    """
    duplicate = os.dup(fd)
    try:
        tcp = socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise
    with tcp:
        yield tcp
