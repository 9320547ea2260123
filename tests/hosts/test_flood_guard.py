"""Which connections a flood guard closes, and which it leaves alone."""

import os
import socket
import sys
import time
from collections.abc import Iterator

import pytest

from esjax.hosts.transport.flood_guard import IDLE_BYTES, SCAN_SECONDS, FloodGuard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts a connection's bytes")

MESSAGE = 10_000


class Pair:
    """A connection to a port: both of its ends."""

    def __init__(self, door: socket.socket) -> None:
        self.near = socket.create_connection(door.getsockname())
        self.far, _ = door.accept()
        self.fd = self.far.fileno()

    def send(self, size: int) -> None:
        self.near.sendall(bytes(size))
        while size:
            size -= len(self.far.recv(size))

    def is_cut_off(self) -> bool:
        self.near.settimeout(0.01)
        try:
            return not self.near.recv(1)
        except TimeoutError:
            return False

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.near.close()
        self.far.close()


@pytest.fixture
def door() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield door


@pytest.fixture
def guard(door: socket.socket, clock: list[float]) -> FloodGuard:
    return FloodGuard(door.getsockname()[1], MESSAGE, lambda line: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def look(guard: FloodGuard, clock: list[float]) -> None:
    clock[0] += SCAN_SECONDS
    guard.look()


def test_a_flood_before_the_connection_is_reported_is_cut_off(door: socket.socket, guard: FloodGuard) -> None:
    with Pair(door) as hasty, Pair(door) as busy:
        hasty.send(MESSAGE + IDLE_BYTES + 1)
        busy.send(MESSAGE + IDLE_BYTES + 1)
        guard.emptied([busy.fd])  # messages, and all of them were taken
        guard.accepted(hasty.fd)
        guard.accepted(busy.fd)
        assert (hasty.is_cut_off(), busy.is_cut_off()) == (True, False)
        assert guard.cut_off == 1


def test_what_a_message_may_have_is_allowed_and_no_more(
    door: socket.socket, guard: FloodGuard, clock: list[float]
) -> None:
    with Pair(door) as large, Pair(door) as endless, Pair(door) as silent:
        for pair in (large, endless, silent):
            guard.accepted(pair.fd)
        large.send(MESSAGE + IDLE_BYTES)
        endless.send(MESSAGE + IDLE_BYTES + 1_000)
        look(guard, clock)
        assert [pair.is_cut_off() for pair in (large, endless, silent)] == [False, True, False]
        assert guard.cut_off == 1


def test_what_was_taken_counts_no_more(door: socket.socket, guard: FloodGuard, clock: list[float]) -> None:
    with Pair(door) as pair:
        guard.accepted(pair.fd)
        for _ in range(20):
            pair.send(MESSAGE + IDLE_BYTES)
            guard.emptied({pair.fd})
            look(guard, clock)
        assert guard.cut_off == 0
        pair.send(MESSAGE + IDLE_BYTES + 1_000)
        look(guard, clock)
        assert guard.cut_off == 1


def test_a_descriptor_of_something_else_is_left_alone(
    door: socket.socket, guard: FloodGuard, clock: list[float]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other_door, Pair(other_door) as other:
        with Pair(door) as pair:
            guard.accepted(pair.fd)
            number = pair.fd
        os.dup2(other.fd, number)
        try:
            for _ in range(3):
                other.send(100 * MESSAGE)
                look(guard, clock)
        finally:
            os.close(number)
        assert not other.is_cut_off()
        assert guard.cut_off == 0


def test_a_descriptor_of_no_socket_costs_nothing(door: socket.socket, guard: FloodGuard, clock: list[float]) -> None:
    ends = os.pipe()
    before = sorted(os.listdir("/dev/fd"))
    for _ in range(3):
        for number in (*ends, door.fileno(), 10**6):
            guard.accepted(number)
        look(guard, clock)
    assert sorted(os.listdir("/dev/fd")) == before
    for end in ends:
        os.close(end)


def test_growth_of_the_process_hurries_the_guard(door: socket.socket, guard: FloodGuard, clock: list[float]) -> None:
    with Pair(door) as pair:
        look(guard, clock)
        guard.accepted(pair.fd)
        pair.send(3 * (MESSAGE + IDLE_BYTES))
        guard.look()
        assert guard.cut_off == 0
        ballast = b"x" * 2**28
        guard.look()
        assert guard.cut_off == 1
        assert len(ballast) == 2**28
