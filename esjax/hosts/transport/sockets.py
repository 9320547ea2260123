"""What the sockets of both sides have in common: options, limits, events, frames.

This file and those of the two transports are the only ones that import zmq.
"""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

from esjax.errors import EsjaxError

QUEUE = 1000
"""Broadcasts that wait for one host at most, on either side."""

BATCH = 256
"""Messages of a kind that one call of `poll` hands over at most."""

OVERHEAD = 64
"""Bytes that ZMTP and CURVE add to a frame at most."""

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


class Limits(NamedTuple):
    """How large a message from the other side may be.

    Attributes:
        frame: Bytes of a frame at most.
        frames: Frames of a message at most. One connection can have a server hold `frame` times `frames` bytes; without
            keys up to 32 times that, in frames of no bytes, each of which costs 64.
    """

    frame: int
    frames: int


def check_curve() -> None:
    """See that connections can be encrypted.

    Raises:
        EsjaxError: ZeroMQ was built without CURVE.
    """
    if not zmq.has("curve"):
        raise EsjaxError(
            "keys need CURVE, without which this machine's ZeroMQ was built; install a pyzmq that has it, such as pip "
            "install --force-reinstall --only-binary :all: pyzmq"
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
    """Open a socket with the options of all, and with its own."""
    opened = context.socket(kind)
    for option, value in {**OPTIONS, **options, zmq.MAXMSGSIZE: limits.frame + OVERHEAD}.items():
        opened.setsockopt(option, value)
    return opened


def take_message(receiver: zmq.SyncSocket, most: int) -> list[zmq.Frame] | None:
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


def source_of(frame: zmq.Frame) -> int | None:
    """Find the file descriptor of the connection that brought a frame; None: of a peer of ZMTP 1, which has no name."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def watch(watched: zmq.SyncSocket, events: int) -> zmq.SyncSocket:
    """Open a socket that receives the events of another one."""
    return watched.get_monitor_socket(events, f"inproc://{uuid.uuid4()}")


def close_watched(watched: zmq.SyncSocket, monitor: zmq.SyncSocket) -> None:
    """Close a socket and the one that receives its events; what was sent last has `LINGER` to leave."""
    watched.disable_monitor()  # before its reader goes: libzmq would wait for one for ever
    monitor.close(linger=0)
    watched.close(linger=LINGER)


def take_events(monitor: zmq.SyncSocket) -> Iterator[tuple[int, int]]:
    """Take the events that are there, and their values; `EVENTS` at most."""
    with suppress(zmq.Again):
        for _ in range(EVENTS):
            event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
            yield event["event"], event["value"]
