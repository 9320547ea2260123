"""Options, limits, events and frames of the sockets on both sides.

Only this file, `client.py` and `server.py` import zmq.
"""

import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from esjax.errors import EsjaxError

QUEUE = 1000
"""Most broadcasts that wait for one host, on either side."""

BATCH = 256
"""Most messages of a kind that one call of `poll` returns."""

OVERHEAD = 64
"""Most bytes that ZMTP and CURVE add to a frame."""

EVENTS = 4096
"""Most events of connections that are read at once."""

LINGER = 500
"""Milliseconds that the last messages have to leave when a transport is closed."""

OPTIONS = {
    # The kernel notices within 20 s that the other side has vanished. ZMTP's heartbeats stay off: libzmq 4.3.5 aborts
    # the process when a heartbeat is due on a connection that broke while its input waited for room.
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 10,
    zmq.TCP_KEEPALIVE_INTVL: 3,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 15_000,
    zmq.HANDSHAKE_IVL: 5_000,  # a connection without a handshake is closed after this
    zmq.BACKLOG: 512,
}
"""Options of every socket; times in milliseconds, those of TCP_KEEPALIVE in seconds."""


class Limits(NamedTuple):
    """Limits of messages from the other side."""

    frame: int  # most bytes of a frame
    # Most frames of a message. One connection can make a server hold `frame` times `frames` bytes; without keys up to
    # 32 times as much, in empty frames, which take 64 bytes each
    frames: int


def check_curve() -> None:
    """Check that connections can be encrypted.

    Raises:
        EsjaxError: ZeroMQ was built without CURVE.
    """
    if not zmq.has("curve"):
        raise EsjaxError(
            "keys need CURVE, and this machine's ZeroMQ was built without it; install a pyzmq that has it: pip install "
            "--force-reinstall --only-binary :all: pyzmq"
        )


def new_keypair() -> tuple[str, str]:
    """Make a public and a secret CURVE key, in Z85.

    Raises:
        EsjaxError: ZeroMQ was built without CURVE.
    """
    check_curve()
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def open_socket(context: zmq.Context, kind: int, limits: Limits, options: Mapping[int, int]) -> zmq.SyncSocket:
    """Open a socket with `OPTIONS`, `options` and `limits`."""
    opened = context.socket(kind)
    for option, value in {**OPTIONS, **options, zmq.MAXMSGSIZE: limits.frame + OVERHEAD}.items():
        opened.setsockopt(option, value)
    return opened


def take_message(receiver: zmq.SyncSocket, most: int) -> list[zmq.Frame] | None:
    """Return a message without waiting; None if there is none. Of a longer message, the first `most` + 1 frames."""
    frames: list[zmq.Frame] = []
    with suppress(zmq.Again):
        while True:  # libzmq delivers all frames of a message together
            frame = receiver.recv(zmq.NOBLOCK, copy=False)
            if len(frames) <= most:
                frames.append(frame)
            if not frame.more:
                return frames
    return None


def source_of(frame: zmq.Frame) -> int | None:
    """Return the file descriptor of the connection that sent a frame; None for a peer of ZMTP 1, which has none."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def shut_down(connection: int) -> None:
    """End a connection of a socket that is bound to a path, by its file descriptor; libzmq then closes it."""
    with suppress(OSError):
        end = socket.socket(fileno=connection)
        try:
            if end.family == socket.AF_UNIX:  # else it has ended, and something else has its number
                end.shutdown(socket.SHUT_RDWR)
        finally:
            end.detach()


class Watched:
    """A socket, and the one that receives the events of its connections."""

    def __init__(self, opened: zmq.SyncSocket, events: int) -> None:
        """Watch a socket before it is bound or connected."""
        self.socket = opened
        self.monitor = opened.get_monitor_socket(events, f"inproc://{uuid.uuid4()}")

    def events(self) -> Iterator[tuple[int, int]]:
        """Return the events that have arrived, with their values; at most `EVENTS`."""
        with suppress(zmq.Again):
            for _ in range(EVENTS):
                event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
                yield event["event"], event["value"]

    def close(self) -> None:
        """Close both; the last messages have `LINGER` milliseconds to leave."""
        self.socket.disable_monitor()  # before its reader is closed: libzmq would wait for a reader forever
        self.monitor.close(linger=0)
        self.socket.close(linger=LINGER)
