"""Who is refused at the coordinator's port, and what does no harm there; rows are those of the list of faults."""

import errno
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from transports import (
    GREETING,
    LIMITS,
    PATIENCE,
    client_of,
    is_closed,
    keys,
    last_frame,
    listen,
    more_frames,
    next_reply,
    only_linux,
    port_of,
    refusal,
    round_trip,
    send_endlessly,
    server,
    server_of,
    stranger,
    token_of,
    until,
)

from esjax.hosts.transport.address import parse_address
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys, Token
from esjax.hosts.transport.server import ServerTransport
from esjax.hosts.transport.sockets import new_keypair

__all__ = ["keys", "server"]


def test_row_14_strangers_are_counted_and_cost_the_others_nothing(server: ServerTransport) -> None:
    ports = [port_of(server), server.publish_port]
    garbage = os.urandom(10_000)
    with client_of(server) as client:
        listen(server, client)
        silent = [socket.create_connection(("127.0.0.1", port)) for port in ports for _ in range(3)]
        strangers = 0
        for _ in range(10):
            for port in ports:
                for _ in range(10):
                    socket.create_connection(("127.0.0.1", port)).close()
                for content in (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", garbage, GREETING + garbage, b"\0" * 9):
                    with closing(socket.create_connection(("127.0.0.1", port))) as connection:
                        connection.sendall(content)
                strangers += 14
            round_trip(server, client, [b"unhindered"])
            server.publish([b"as before"])
            assert client.poll(PATIENCE).broadcasts == [[b"as before"]]
        until(lambda: server.poll(0.01) == [] and server.strangers >= strangers + len(silent))
        for connection in silent:
            connection.close()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(last_frame(b"no envelope"), id="no envelope"),
        pytest.param(more_frames(b"1234") + last_frame(b""), id="nothing said"),
        pytest.param(more_frames(b"") + last_frame(b"hello"), id="no number"),
        pytest.param(more_frames(b"12345") + more_frames(b"") + last_frame(b"hello"), id="long number"),
        pytest.param(more_frames(b"1234") + more_frames(b"x") + last_frame(b"hello"), id="no empty frame"),
    ],
)
def test_row_14_what_is_no_request_is_counted(server: ServerTransport, content: bytes) -> None:
    with closing(stranger(port_of(server))) as odd, client_of(server) as client:
        for count in range(1, 4):
            odd.sendall(content)
            until(lambda count=count: server.poll(0.01) == [] and server.rejected >= count)
        assert server.rejected == 3
        round_trip(server, client, [b"unhindered"])
        odd.sendall(more_frames(b"1234") + more_frames(b"") + 3 * more_frames(b"") + last_frame(b"four"))
        assert server.poll(PATIENCE)[0].frames == [b"", b"", b"", b"four"]
        assert server.rejected == 3


def test_row_15_a_giant_frame_ends_its_connection(server: ServerTransport) -> None:
    for port, kind in ((port_of(server), b"REQ"), (server.publish_port, b"SUB")):
        with closing(stranger(port, kind)) as giant, client_of(server) as client:
            giant.sendall(b"\x02" + struct.pack(">Q", 10 * LIMITS.frame))
            until(lambda giant=giant: is_closed(giant))
            round_trip(server, client, [b"unhindered"])


SERVE_SCRIPT = """
import sys, threading
from esjax.hosts.transport.server import ServerTransport
from esjax.hosts.transport.sockets import Limits
lines = []
with ServerTransport("tcp://127.0.0.1:0", keys=None, limits=Limits(65_536, 4), tell=lines.append) as server:
    print(server.address, server.publish_port, flush=True)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    while not over.is_set():
        for request in server.poll(0.1):
            server.reply(request, request.frames)
        server.check()
    threading.Event().wait(1)
    server.check()
    print(server.cut_off, *lines, sep="\\n", flush=True)
"""


def peak_memory(pid: int) -> int:
    """Read how large a process ever was, in MB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) // 1000


@only_linux
def test_row_15_an_endless_message_is_cut_off_and_memory_stays_bounded() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        address, publish_port = process.stdout.readline().split()
        port = parse_address(address).port
        with ClientTransport(address, token=None, limits=LIMITS) as client:
            for kind, at, content in (
                (b"DEALER", port, more_frames(bytes(LIMITS.frame)) * 16),
                (b"DEALER", port, more_frames(b"") * 50_000),  # 9 GB in memory
                (b"SUB", int(publish_port), more_frames(bytes(LIMITS.frame)) * 16),
            ):
                before = peak_memory(process.pid)
                with closing(stranger(at, kind)) as endless:
                    assert send_endlessly(endless, content) in (errno.EPIPE, errno.ECONNRESET)
                assert peak_memory(process.pid) - before < 1000  # of 3000 MB that it was ready to send
                client.request([b"unhindered"])
                assert next_reply(client) == [b"unhindered"]
        ended, _ = process.communicate("", timeout=PATIENCE)
        assert ended.splitlines()[0] == "3"
        assert ended.count("127.0.0.1 was cut off") == 3
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("polled", [True, False])
@only_linux
def test_row_15_more_requests_than_are_taken_are_cut_off(server: ServerTransport, polled: bool) -> None:
    request = more_frames(b"1234") + more_frames(b"") + last_frame(b"x")
    with closing(stranger(port_of(server))) as hasty, client_of(server) as client:
        thread = threading.Thread(target=send_endlessly, args=(hasty, request * 10_000), daemon=True)
        thread.start()

        def is_cut_off() -> bool:
            server.poll(0.01) if polled else server.check()
            return server.cut_off == 1

        until(is_cut_off)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        client.request([b"unhindered"])

        def is_served() -> bool:  # however much is left of what the other one sent
            for asked in server.poll(0.01):
                server.reply(asked, asked.frames)
            return client.poll(0.01).reply == [b"unhindered"]

        until(is_served)


@only_linux
def test_row_15_endless_subscriptions_are_cut_off(server: ServerTransport) -> None:
    with closing(stranger(server.publish_port, b"SUB")) as greedy, client_of(server) as client:
        topics = b"".join(last_frame(b"\x01" + struct.pack("<I", number)) for number in range(10_000))
        thread = threading.Thread(target=send_endlessly, args=(greedy, topics), daemon=True)
        thread.start()

        def is_cut_off() -> bool:
            server.publish([b"libzmq takes subscriptions in now"])
            server.check()
            return server.cut_off == 1

        until(is_cut_off)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        round_trip(server, client, [b"unhindered"])


def test_row_15_large_messages_that_end_are_no_flood(keys: ServerKeys) -> None:
    with server_of(keys) as server, client_of(server, token_of(keys)) as client:
        for number in range(50):
            round_trip(server, client, [bytes([number]) + bytes(LIMITS.frame - 1)] * LIMITS.frames)
        assert server.cut_off == 0


def test_row_18_an_unknown_client_key_is_refused(tmp_path: Path, keys: ServerKeys) -> None:
    public, secret = new_keypair()
    unknown = Token(1, "unknown", "tcp://127.0.0.1:1", keys.public_key, public, secret)
    with server_of(keys) as server, client_of(server, token_of(keys)) as known, client_of(server, unknown) as client:
        assert "does not know this token's key" in refusal(server, client)
        assert client.poll(PATIENCE).refused  # at once, and for good
        round_trip(server, known, [b"unhindered"])


def test_row_18_a_wrong_server_key_is_refused(keys: ServerKeys) -> None:
    right = token_of(keys)
    wrong = Token(1, "wrong", right.address, new_keypair()[0], right.public_key, right.secret_key)
    with server_of(keys) as server, client_of(server, wrong) as client:
        assert "another key" in refusal(server, client)


def test_row_18_plain_text_is_refused_where_keys_are_asked_for(keys: ServerKeys) -> None:
    with server_of(keys) as server, client_of(server) as client:
        assert "token" in refusal(server, client)


def test_row_18_a_token_is_refused_where_plain_text_is_spoken(server: ServerTransport, keys: ServerKeys) -> None:
    with client_of(server, token_of(keys)) as client:
        assert re.search("plain text|another key or none", refusal(server, client))  # as fast as either side is


@pytest.mark.parametrize("secret", [False, True])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + bytes(100)])
def test_row_18_what_is_no_coordinator_is_refused(keys: ServerKeys, secret: bool, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"tcp://127.0.0.1:{place.getsockname()[1]}"

        def answer_all() -> None:
            """Answer and hang up in order: with words unread, the connection would be reset, which is no refusal."""
            with suppress(OSError):
                while True:
                    with closing(place.accept()[0]) as connection, suppress(ConnectionError):
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        while connection.recv(1000):
                            pass

        threading.Thread(target=answer_all, daemon=True).start()
        with ClientTransport(address, token=token_of(keys) if secret else None, limits=LIMITS) as client:
            until(lambda: "not a coordinator" in client.poll(0.1).refused)
        place.shutdown(socket.SHUT_RDWR)


def test_an_absent_or_silent_coordinator_is_no_refusal(keys: ServerKeys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"tcp://127.0.0.1:{place.getsockname()[1]}"
        with ClientTransport(address, token=token_of(keys), limits=LIMITS) as client:
            assert client.poll(0.5).refused == ""
        place.close()
        with ClientTransport(address, token=token_of(keys, "two"), limits=LIMITS) as client:
            assert client.poll(0.5).refused == ""


def two_ports() -> socket.socket:
    """Listen at a port and leave the next one free. Below 32,768 no connection takes one of them meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port + 1)).close()
            return socket.create_server(("127.0.0.1", port))


@pytest.mark.parametrize("secret", [False, True])
def test_row_55_handshakes_that_are_cut_off_are_no_refusal(keys: ServerKeys, secret: bool) -> None:
    """A coordinator cuts connections off during a flood. Reference: it lets the same host in afterwards."""
    with two_ports() as place:
        port = place.getsockname()[1]
        token = token_of(keys) if secret else None
        with ClientTransport(f"tcp://127.0.0.1:{port}", token=token, limits=LIMITS) as client:
            place.settimeout(0.01)
            cut_off = 0
            while cut_off < 8:
                assert client.poll(0.01).refused == ""
                with suppress(TimeoutError):
                    connection = place.accept()[0]
                    connection.settimeout(PATIENCE)
                    assert connection.recv(1)  # the handshake has begun
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.close()
                    cut_off += 1
            place.close()
            with server_of(keys if secret else None, f"tcp://127.0.0.1:{port}") as server:
                round_trip(server, client, [b"let in"])


def test_row_19_a_revoked_key_is_known_at_its_next_message(tmp_path: Path, keys: ServerKeys) -> None:
    token = token_of(keys)
    with server_of(keys) as server, client_of(server, token) as client:
        request = round_trip(server, client, [b"before"])
        assert request.key in keys.allowed
        # Another process revokes it.
        ServerKeys(tmp_path / "keys", new_keypair, pytest.fail).revoke_token("one")
        request = round_trip(server, client, [b"after"])
        assert request.key == token.public_key
        assert request.key not in keys.allowed
        client.reconnect()
        assert "revoked" in refusal(server, client)


def test_row_20_no_host_is_let_in_while_the_authenticator_is_dead(
    keys: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    deaths: list[object] = []
    monkeypatch.setattr(threading, "excepthook", deaths.append)
    token = token_of(keys)
    with (
        ServerTransport("tcp://127.0.0.1:0", keys=keys, limits=LIMITS, tell=lines.append) as server,
        client_of(server, token) as early,
    ):
        round_trip(server, early, [b"before"])
        for round_number in range(1, 6):
            authenticator = server._authenticator
            assert authenticator is not None
            monkeypatch.setattr(authenticator, "handle_zap_message", None)  # calling it raises
            with client_of(server, token) as client:
                client.request([b"let me in"])
                until(lambda authenticator=authenticator: not authenticator.is_alive())
                for _ in range(5):
                    assert server.poll(0.05) == []
                    assert client.poll(0.05) == (None, [], "")
                round_trip(server, early, [b"unhindered"])
                server.check()
                assert len(lines) == round_number
                client.reconnect()
                round_trip(server, client, [b"let me in"])
        assert len(deaths) == 5


def test_row_20_a_handshake_without_any_authenticator_is_refused(keys: ServerKeys) -> None:
    with server_of(keys) as server:
        server._stop_authenticator()
        with client_of(server, token_of(keys)) as client:
            client.request([b"let me in"])
            for _ in range(10):
                assert server.poll(0.05) == []
                assert client.poll(0.05).reply is None


def test_row_20_trouble_with_the_keys_does_not_kill_the_authenticator(
    keys: ServerKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = token_of(keys)
    with server_of(keys) as server:
        monkeypatch.setattr(ServerKeys, "allowed", property(lambda keys: 1 // 0))
        with client_of(server, token) as client:
            assert "does not know" in refusal(server, client)
        monkeypatch.undo()
        with client_of(server, token) as client:
            round_trip(server, client, [b"let me in"])
