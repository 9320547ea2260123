"""What both sides of the wire may count on, over real sockets on loopback."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest
from transports import (
    LIMITS,
    PATIENCE,
    client_of,
    keys,
    last_frame,
    listen,
    next_reply,
    next_request,
    only_linux,
    port_of,
    round_trip,
    server,
    server_of,
    shake_hands,
    stranger,
    token_of,
    until,
)

from esjax.errors import EsjaxError
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.server import ServerTransport
from esjax.hosts.transport.sockets import BATCH, QUEUE

__all__ = ["keys", "server"]


def test_a_request_gets_its_reply(server: ServerTransport) -> None:
    with client_of(server) as client:
        assert round_trip(server, client, [b"one", b"", b"three"]).key is None
        assert round_trip(server, client, [bytes(LIMITS.frame)] * LIMITS.frames).key is None


def test_with_keys_a_request_carries_its_key(keys: ServerKeys) -> None:
    one, two = token_of(keys, "one"), token_of(keys, "two")
    with server_of(keys) as server, client_of(server, one) as first, client_of(server, two) as second:
        for _ in range(2):
            assert round_trip(server, first, [b"1"]).key == one.public_key
            assert round_trip(server, second, [bytes(LIMITS.frame)]).key == two.public_key


@pytest.mark.parametrize("secret", [False, True])
def test_broadcasts_arrive_in_order_and_whole(keys: ServerKeys, secret: bool) -> None:
    token = token_of(keys) if secret else None
    with server_of(keys if secret else None) as server, client_of(server, token) as client:
        listen(server, client)
        sent = [[bytes([number]), b"", bytes(1000)] for number in range(50)]
        for frames in sent:
            server.publish(frames)
        heard: list[list[bytes]] = []

        def all_heard() -> bool:
            heard.extend(client.poll(0.1).broadcasts)
            return len(heard) >= len(sent)

        until(all_heard)
        assert heard == sent


def test_a_newer_request_takes_the_place_of_an_unanswered_one(server: ServerTransport) -> None:
    with client_of(server) as client:
        client.request([b"old"])
        old = next_request(server, client)
        client.request([b"new"])
        new = next_request(server, client)
        assert new.frames == [b"new"]
        server.reply(old, [b"to old"])
        server.reply(new, [b"to new"])
        assert next_reply(client) == [b"to new"]
        server.reply(old, [b"to old"])
        round_trip(server, client, [b"and again"])


def test_requests_to_an_absent_coordinator_do_not_pile_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"tcp://127.0.0.1:{place.getsockname()[1]}"
    with ClientTransport(address, token=None, limits=LIMITS) as client:
        for number in range(20):
            client.request([b"%d" % number])
            assert client.poll(0.01).refused == ""
        with server_of(address=address) as server:
            assert next_request(server, client).frames == [b"19"]


def test_a_client_comes_back_to_a_restarted_coordinator() -> None:
    with server_of() as server, client_of(server) as client:
        address = server.address
        round_trip(server, client, [b"before"])
        server.close()
        with server_of(address=address) as again:
            listen(again, client)
            round_trip(again, client, [b"after"])


def test_reconnect_starts_afresh(server: ServerTransport) -> None:
    with client_of(server) as client:
        listen(server, client)
        client.request([b"lost"])
        lost = next_request(server, client)
        client.reconnect()
        server.reply(lost, [b"too late"])
        round_trip(server, client, [b"asked again"])
        deadline = time.monotonic() + PATIENCE
        while not client.poll(0.02).broadcasts:
            server.publish([b"are you there"])
            assert time.monotonic() < deadline


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def test_what_is_replaced_is_closed(server: ServerTransport) -> None:
    with client_of(server) as client:
        listen(server, client)
        before = open_files()
        for _ in range(10):
            client.reconnect()
            client.subscribe(server.publish_port)
        listen(server, client)

        def few() -> bool:
            server.check()
            return open_files() <= before + 4

        until(few)


def test_closing_leaves_nothing_open(keys: ServerKeys) -> None:
    token = token_of(keys)
    before = open_files()
    with server_of(keys) as server, client_of(server, token) as client:
        listen(server, client)
        round_trip(server, client, [b"hello"])
    assert open_files() <= before


@pytest.mark.parametrize("port", [-1, 0, 2**16, 2**32])
def test_what_is_no_port_is_not_listened_to(server: ServerTransport, port: int) -> None:
    with client_of(server) as client:
        with pytest.raises(EsjaxError, match=f"{port}, which is no port"):
            client.subscribe(port)
        round_trip(server, client, [b"as before"])


def test_subscribing_again_leaves_the_port_before(server: ServerTransport) -> None:
    with server_of() as other, client_of(server) as client:
        listen(server, client)
        client.subscribe(other.publish_port)

        def heard_the_other() -> bool:
            server.publish([b"one"])
            other.publish([b"other"])
            heard = client.poll(0.02).broadcasts
            assert [b"one"] not in heard
            return bool(heard)

        until(heard_the_other)


def test_a_slow_host_misses_broadcasts_notices_it_and_delays_no_other(server: ServerTransport) -> None:
    with client_of(server) as slow:
        asked = listen(server, slow)
        sent = 5 * QUEUE
        for number in range(sent):
            server.publish([struct.pack("<I", number), bytes(20_000)])
        numbers: list[int] = []

        def drained() -> bool:
            heard = slow.poll(0.2).broadcasts
            assert len(heard) <= BATCH
            numbers.extend(struct.unpack("<I", frames[0])[0] for frames in heard)
            return not heard

        until(drained)
        assert numbers == sorted(set(numbers))
        # Broadcasts that were read count in the queue until ZeroMQ reports them as read, which it does now and then.
        assert QUEUE - asked <= len(numbers) < sent
        server.publish([b"goes on"])
        assert slow.poll(PATIENCE).broadcasts == [[b"goes on"]]


def test_a_slow_host_outlives_its_coordinator() -> None:
    with server_of() as server, client_of(server) as slow:
        address = server.address
        listen(server, slow)
        for _ in range(5 * QUEUE):
            server.publish([bytes(20_000)])
        server.close()
        assert slow.poll(PATIENCE).broadcasts
        until(lambda: not slow.poll(0.2).broadcasts)
        with server_of(address=address) as again:
            listen(again, slow)
            round_trip(again, slow, [b"as before"])


def test_a_reply_to_one_who_left_is_ignored(server: ServerTransport) -> None:
    with client_of(server) as client:
        client.request([b"bye"])
        request = next_request(server, client)
    server.reply(request, [b"who?"])
    server.reply(request._replace(peer=b"\0\1\2\3\4"), [b"never seen"])
    with client_of(server) as client:
        round_trip(server, client, [b"hello"])


def test_wake_ends_a_poll_from_another_thread(server: ServerTransport) -> None:
    with client_of(server) as client:
        waker = threading.Timer(0.1, client.wake)
        waker.start()
        begun = time.monotonic()
        client.poll(PATIENCE)
        assert time.monotonic() - begun < PATIENCE / 2
        waker.join()
        for _ in range(1000):  # more than the buffer between the threads holds
            client.wake()
        client.poll(PATIENCE)
        round_trip(server, client, [b"still works"])
    client.wake()


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with server_of(address="tcp://[::1]:0") as server, client_of(server) as client:
        assert server.address.startswith("tcp://[::1]:")
        listen(server, client)
        round_trip(server, client, [b"hello"])


def test_a_name_is_an_address(keys: ServerKeys) -> None:
    with server_of(address="tcp://localhost:0") as server, client_of(server) as client:
        round_trip(server, client, [b"hello"])


def test_the_last_broadcast_is_heard(server: ServerTransport) -> None:
    with client_of(server) as client:
        listen(server, client)
        server.publish([b"the end", bytes(LIMITS.frame)])
        server.close()
        assert client.poll(PATIENCE).broadcasts == [[b"the end", bytes(LIMITS.frame)]]


EXIT_SCRIPT = """
import sys
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.sockets import Limits
with ClientTransport(sys.argv[1], token=None, limits=Limits(100, 2)) as client:
    client.subscribe(1)
    client.request([bytes(50_000_000)])
    client.poll(0.3)
print("closed", flush=True)
left_open = ClientTransport(sys.argv[1], token=None, limits=Limits(100, 2))
left_open.request([b"hello"])
"""


@pytest.mark.parametrize("there", ["no listener", "silence", "a server that reads no requests"])
def test_exit_does_not_wait_for_a_coordinator(there: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"tcp://127.0.0.1:{place.getsockname()[1]}"
        if there == "no listener":
            place.close()
        elif there != "silence":
            threading.Thread(target=lambda: shake_hands(place.accept()[0], b"ROUTER"), daemon=True).start()
        ended = subprocess.run(
            [sys.executable, "-c", EXIT_SCRIPT, address], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    assert (ended.returncode, ended.stdout) == (0, "closed\n"), ended.stderr


def test_closing_twice_does_nothing() -> None:
    server = server_of()
    client = client_of(server)
    for _ in range(2):
        client.close()
        server.close()


@only_linux
def test_row_05_the_kernel_notices_a_dead_connection_within_20_seconds(server: ServerTransport) -> None:
    with client_of(server) as client:
        round_trip(server, client, [b"hello"])
        listen(server, client)
        gate = server._guard._process
        assert gate is not None
        gate.send_signal(signal.SIGSTOP)  # so that the connections come here
        for listener in server._guard._listeners:
            with socket.create_connection(listener.getsockname()), accept(listener) as tcp:
                assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle, interval, count = (
                    tcp.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert idle + interval * count <= 20
                assert 0 < tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 20_000
        gate.send_signal(signal.SIGCONT)


def accept(listener: socket.socket) -> socket.socket:
    assert select.select([listener], [], [], PATIENCE)[0]
    return listener.accept()[0]


@pytest.mark.parametrize("at", ["router", "publisher"])
def test_row_05_a_connection_that_breaks_under_load_harms_no_other(server: ServerTransport, at: str) -> None:
    # With ZMTP heartbeats, or a high-water mark for what comes in, libzmq 4.3.5 aborts here.
    port, kind = (port_of(server), b"DEALER") if at == "router" else (server.publish_port, b"SUB")
    ping = bytes([4, 7]) + b"\x04PING\0\0"
    for _ in range(5):
        with closing(stranger(port, kind)) as broken:
            broken.sendall(last_frame(b"\x01") * 500 + ping + last_frame(b"\x01") * 500)
            time.sleep(0.02)
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.1)
    with client_of(server) as client:
        listen(server, client)
        round_trip(server, client, [b"unhindered"])
