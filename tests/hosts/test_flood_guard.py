"""What the guard of the ports lets through, and which connections it closes: limits by hand, with few connections."""

import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext
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
    next_request,
    port_of,
    round_trip,
    send_endlessly,
    server,
    server_of,
    shake_hands,
    stranger,
    token_of,
    until,
)

from esjax.hosts.transport import flood_guard, gate
from esjax.hosts.transport.allowances import Pool, Rates
from esjax.hosts.transport.crowd import Crowd, group_of
from esjax.hosts.transport.flood_guard import BROADCAST_FRAMES, FRAMES, prepare_process
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.link import SMALL
from esjax.hosts.transport.server import Request, ServerTransport
from esjax.hosts.transport.sockets import Limits
from esjax.hosts.transport.zmtp import Stream, ViolationError

__all__ = ["keys", "server"]

READY = b"\x04\x06\x05READY"

REQUEST = more_frames(b"1234") + more_frames(b"")
"""Beginning of a request."""


def connect(server: ServerTransport) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(server)), timeout=PATIENCE)


@pytest.mark.parametrize("step", [1, 2, 7, 64, 10_000])
def test_a_stream_counts_frames_wherever_its_bytes_are_divided(step: int) -> None:
    """By hand: READY, then a message of three frames, one of them long, then the header of an unfinished frame."""
    content = GREETING + READY + more_frames(b"one") + more_frames(bytes(300)) + last_frame(b"") + b"\x02" + bytes(7)
    stream = Stream(largest=300, parts=3)
    for at in range(0, len(content), step):
        stream.follow(content[at : at + step])
    assert (stream.frames, stream.messages, stream.finished, stream.left) == (4, 3, 4, 0)
    assert stream.is_zmtp
    assert stream.is_amid
    stream.follow(b"\x05" + bytes(4))
    assert (stream.frames, stream.left) == (5, 1)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x01\x00", "ZMTP 3"),
        (b"GET / HTTP/1.1", "ZMTP 3"),
        (b"\xff" + bytes(8) + b"\x7e", "ZMTP 3"),
        (b"\xff" + bytes(8) + b"\x7f\x01", "ZMTP 3"),
        (GREETING + b"\x08\x00", "no frame"),
        (GREETING + b"\x02" + struct.pack(">Q", 301), "301 bytes"),
        (GREETING + more_frames(b"") * 3 + last_frame(b""), "more than 3 frames"),
    ],
)
@pytest.mark.parametrize("step", [1, 10_000])
def test_a_stream_that_is_none_of_a_host_is_refused(content: bytes, why: str, step: int) -> None:
    stream = Stream(largest=300, parts=3)
    parts = [content[at : at + step] for at in range(0, len(content), step)]
    with pytest.raises(ViolationError, match=why):
        list(map(stream.follow, parts))


def test_the_largest_group_of_a_crowd_makes_room() -> None:
    crowd: Crowd[str] = Crowd(each=2, most=3)
    assert [crowd.enter("a", "a1"), crowd.enter("a", "a2"), crowd.enter("b", "b1")] == [None, None, None]
    assert crowd.enter("c", "c1") == "a"  # four, and a has the most
    assert crowd.oldest("a") == "a1"
    crowd.leave("a", "a1")
    crowd.leave("a", "a1")  # has left already
    assert crowd.enter("b", "b2") == "b"
    assert crowd.oldest("b") == "b1"
    crowd.leave("b", "b2")
    crowd.leave("c", "c1")
    assert [crowd.enter("d", "d1"), crowd.enter("d", "d2"), crowd.enter("d", "d3")] == [None, "d", "d"]
    assert crowd.idle("d", lambda member: member == "d2") == "d2"
    assert crowd.idle("d", lambda member: False) == "d3"  # the newest


def test_a_network_of_ipv6_counts_as_one_address() -> None:
    assert group_of("192.0.2.7") == group_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert group_of("2001:db8::1") == group_of("2001:db8::ffff:1%eth0") == "2001:db8::/64"
    assert group_of("2001:db8:0:1::1") != group_of("2001:db8::1")


def test_one_address_gets_half_of_the_pool_and_a_stranger_nothing_beyond_a_quarter() -> None:
    pool = Pool(100)
    assert pool.take("a", 25, is_stranger=True)
    assert not pool.take("a", 1, is_stranger=True)
    assert pool.take("a", 25, is_stranger=False)
    assert not pool.take("a", 1, is_stranger=False)
    assert pool.take("b", 30, is_stranger=False)
    assert not pool.take("c", 21, is_stranger=False)
    pool.give_back("a", 10)
    assert pool.take("c", 30, is_stranger=False)
    assert not pool.take("b", 1, is_stranger=False)


def test_handshakes_have_a_rate() -> None:
    """Two at once, then one every half second."""
    rates = Rates(rate=2.0, burst=2.0)
    assert [rates.take("a", at) for at in (0.0, 0.0, 0.1, 0.5, 0.6, 1.1)] == [True, True, False, True, False, True]
    rates.tidy(1.1)
    assert not rates.take("a", 1.1)
    assert rates.take("b", 1.1)
    rates.tidy(100.0)
    assert not rates._left


def test_random_bytes_never_reach_libzmq(server: ServerTransport) -> None:
    """libzmq would take them for ZMTP 1, and a length of up to 2^63 for that of a frame."""
    with client_of(server) as client:
        for port in (port_of(server), server.publish_port):
            with closing(socket.create_connection(("127.0.0.1", port))) as connection:
                connection.sendall(b"\x01\x00" + last_frame(b"hello") * 3)
                until(lambda connection=connection: is_closed(connection))
        round_trip(server, client, [b"unhindered"])
        until(lambda: server.poll(0.01) == [] and server.cut_off == 2)
        assert server.rejected == 0


def test_what_has_many_frames_is_no_request(server: ServerTransport) -> None:
    with closing(stranger(port_of(server))) as odd, client_of(server) as client:
        odd.sendall(more_frames(b"1234") + more_frames(b"") * (2 + LIMITS.frames))
        until(lambda: is_closed(odd))
        round_trip(server, client, [b"unhindered"])


def test_requests_without_a_reply_are_limited_and_a_reply_starts_again(server: ServerTransport) -> None:
    """A request has three frames here; READY counts as one, before the first reply."""
    request = more_frames(b"1234") + more_frames(b"") + last_frame(b"x")
    with closing(stranger(port_of(server))) as hasty:
        for _ in range(3):
            hasty.sendall(request * ((FRAMES - 1) // 3))
            asked: list[Request] = []

            def all_there(asked: list[Request] = asked) -> bool:
                asked.extend(server.poll(0.01))
                return len(asked) == (FRAMES - 1) // 3

            until(all_there)
            assert not is_closed(hasty)
            server.reply(asked[-1], [b"y"])
            hasty.settimeout(PATIENCE)
            assert hasty.recv(1)
        hasty.sendall(request * (FRAMES // 3 + 1))
        until(lambda: is_closed(hasty))


@pytest.mark.parametrize("secret", [False, True])
def test_subscriptions_are_limited(keys: ServerKeys, secret: bool) -> None:
    """A host needs one; libzmq keeps each topic that a connection asks for."""
    token = token_of(keys) if secret else None
    with server_of(keys if secret else None) as server, client_of(server, token) as client:
        listen(server, client)
        greedy = client._links[next(kind for kind in client._links if client._ports[kind] == server.publish_port)]
        for number in range(BROADCAST_FRAMES):
            greedy.socket.subscribe(str(number).encode())
        until(lambda: server.poll(0.01) == [] and server.cut_off >= 1)
        round_trip(server, client, [b"unhindered"])


def test_an_unfinished_handshake_ends_after_its_time(server: ServerTransport) -> None:
    begun = time.monotonic()
    with closing(connect(server)) as silent, closing(connect(server)) as greeted:
        greeted.sendall(GREETING)
        with client_of(server) as client:
            round_trip(server, client, [b"unhindered"])
        until(lambda: is_closed(silent) and is_closed(greeted))
    assert time.monotonic() - begun > 4


RESTING = f"""
{flood_guard.COMMAND.rpartition(";")[0]}
from esjax.hosts.transport import gate
settle = gate.Gate._settle
def settle_and_rest(*words):
    gate.STRANGERS_SHARE = 1e-12
    settle(*words)
gate.Gate._settle = settle_and_rest
main(sys.argv[2])
"""
"""A guard that after the first reply gives strangers next to none of its time."""


def test_row_55_strangers_rest_for_the_time_that_they_took_and_hosts_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood_guard, "COMMAND", RESTING)
    with server_of() as server, client_of(server) as client:
        round_trip(server, client, [b"from now on it is no stranger"])
        with closing(connect(server)) as late:
            late.sendall(GREETING)
            for _ in range(50):
                round_trip(server, client, [b"unhindered"])
            late.settimeout(0.5)
            with pytest.raises(TimeoutError):
                late.recv(1)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServerTransport, list[str]]]:
    """A server that lets an address have 4 connections without a handshake, and 4 with one."""
    monkeypatch.setattr(flood_guard, "HALF_OPEN", 4)
    monkeypatch.setattr(flood_guard, "EACH", 4)
    lines: list[str] = []
    with ServerTransport("tcp://127.0.0.1:0", keys=None, limits=LIMITS, tell=lines.append) as server:
        yield server, lines


def test_row_56_of_idle_connections_the_oldest_are_closed_and_that_is_said_once(
    narrow: tuple[ServerTransport, list[str]],
) -> None:
    server, lines = narrow
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(connect(server))) for _ in range(20)]
        until(lambda: server.poll(0.01) == [] and server.cut_off == 16)
        assert [is_closed(connection) for connection in idle] == [True] * 16 + [False] * 4
        client = stack.enter_context(client_of(server))
        listen(server, client)
        round_trip(server, client, [b"unhindered"])
        (line,) = lines
        assert "127.0.0.1 has more than 4 unfinished handshakes" in line


def test_row_56_of_connections_without_a_reply_the_oldest_makes_room(
    narrow: tuple[ServerTransport, list[str]],
) -> None:
    server, lines = narrow
    with ExitStack() as stack:
        client = stack.enter_context(client_of(server))
        round_trip(server, client, [b"has a reply, and stays"])
        silent = [stack.enter_context(closing(stranger(port_of(server)))) for _ in range(7)]
        round_trip(server, client, [b"unhindered"])
        new = stack.enter_context(client_of(server))
        round_trip(server, new, [b"unhindered"])
        assert [is_closed(connection) for connection in silent] == [True] * 4 + [False] * 3
        until(lambda: server.poll(0.01) == [] and len(lines) == 1)
        assert "127.0.0.1 has more than 4 connections without a reply" in lines[0]


def test_row_56_of_connections_with_replies_an_idle_one_makes_room(narrow: tuple[ServerTransport, list[str]]) -> None:
    server, lines = narrow
    with ExitStack() as stack:
        idle = [stack.enter_context(closing(host_of(server))) for _ in range(4)]
        time.sleep(5.5)  # until they count as idle
        client = stack.enter_context(client_of(server))
        round_trip(server, client, [b"unhindered"])
        assert [is_closed(connection) for connection in idle].count(True) == 1
        until(lambda: server.poll(0.01) == [] and len(lines) == 1)
        assert "127.0.0.1 has more than 4 connections" in lines[0]


def host_of(server: ServerTransport) -> socket.socket:
    """Connect by hand, and get a reply."""
    connection = stranger(port_of(server), b"DEALER")
    connection.sendall(REQUEST + last_frame(b"hello"))
    (asked,) = server.poll(PATIENCE)
    server.reply(asked, [b"reply"])
    reply = b""
    while not reply.endswith(b"reply"):
        reply += connection.recv(100)
    return connection


def test_row_55_unfinished_messages_leave_room_for_others() -> None:
    """60 frames of 4 MiB but for the last byte are 250 MB, and one address has room for 16 MiB of the pool."""
    limits = Limits(2**22, 2)
    begun = more_frames(b"1234") + more_frames(b"") + more_frames(bytes(limits.frame))[:-1]
    prepare_process()
    with (
        ServerTransport("tcp://127.0.0.1:0", keys=None, limits=limits, tell=lambda line: None) as server,
        client_of(server) as client,
        ExitStack() as stack,
    ):
        round_trip(server, client, [b"before"])
        before = memory_of(server)
        for _ in range(60):
            connection = stack.enter_context(closing(stranger(port_of(server), b"DEALER")))
            threading.Thread(target=send_endlessly, args=(connection, begun), daemon=True).start()
        most = 0.0
        for _ in range(20):
            round_trip(server, client, [b"unhindered"])
            most = max(most, memory_of(server) - before)
        assert most < 60
        client.request([bytes(2**20)])  # those that hold the room back lose it
        assert next_request(server, client).frames == [bytes(2**20)]


def test_row_55_a_reply_lets_a_host_read_on_that_waits_for_the_pool() -> None:
    """Others of its address hold all room of the address, and go on too fast to be cut off."""
    limits, held = Limits(2**22, 2), []
    with (
        ServerTransport("tcp://127.0.0.1:0", keys=None, limits=limits, tell=lambda line: None) as server,
        ExitStack() as stack,
    ):
        host = stack.enter_context(closing(host_of(server)))
        for size in [limits.frame] * 4 + [SMALL + 2**17 - 1000]:  # all but about 1,000 bytes of 2^24
            connection = stack.enter_context(closing(host_of(server)))
            connection.sendall(REQUEST + b"\x02" + struct.pack(">Q", size) + b"begun")
            held.append(connection)
        taken: list[Request] = []

        def take_one() -> bool:
            for connection in held:
                connection.sendall(b"x")
            taken.extend(server.poll(0.1))
            return bool(taken)

        client = stack.enter_context(client_of(server))
        round_trip(server, client, [b"the guard has read so far"])
        assert not take_one()  # room is taken at the next bytes
        round_trip(server, client, [b"the guard has read so far"])
        # The guard reads SMALL bytes without the pool: the first request, and not all of the second.
        for number in (b"1", b"2"):
            host.sendall(REQUEST + b"\x02" + struct.pack(">Q", 20_000) + number * 20_000)
        for number in (b"1", b"2"):
            until(take_one)
            (asked,) = taken
            assert asked.frames == [number * 20_000]
            server.reply(asked, [b"so the host reads on"])
            taken.clear()
        assert server.cut_off == 0


def memory_of(server: ServerTransport) -> float:
    """Return the resident memory of this process and the guard, in MB."""
    assert server._guard._process is not None
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    sizes = []
    for pid in (os.getpid(), server._guard._process.pid):
        with open(f"/proc/{pid}/statm") as file:
            sizes.append(int(file.read().split()[1]) * resource.getpagesize() / 1e6)
    return sum(sizes)


def test_the_guard_is_started_again_and_ends_with_its_coordinator() -> None:
    lines: list[str] = []
    with ServerTransport("tcp://127.0.0.1:0", keys=None, limits=LIMITS, tell=lines.append) as server:
        with client_of(server) as client:
            listen(server, client)
            round_trip(server, client, [b"before"])
            process = server._guard._process
            assert process is not None
            os.kill(process.pid, signal.SIGTERM)  # as the end of a group of processes; the guard goes on
            os.kill(process.pid, signal.SIGINT)
            round_trip(server, client, [b"goes on"])
            process.kill()
            client.request([b"after"])
            until(lambda: bool(server.poll(0.01) or client.poll(0.01).reply or lines))
            client.request([b"after"])
            round_trip(server, client, [b"after"])
        assert lines == ["the process that guards the ports ended and was restarted; all hosts connect again"]
        process = server._guard._process
        folder = server._guard._folder
        assert process is not None
    assert process.poll() == 0
    assert not os.path.exists(folder)


@pytest.mark.parametrize("fails", [False, True])
def test_a_gate_leaves_the_folder_for_the_next_one_if_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: bool
) -> None:
    class Once:
        def __init__(self, plan: gate.Plan) -> None:
            pass

        def run(self) -> None:
            if fails:
                raise RuntimeError

    monkeypatch.setattr(gate, "Gate", Once)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    plan = {"control": 0, "folder": str(tmp_path / "sockets"), "doors": []}
    numbers = dict.fromkeys(("frame", "parts", "handshake", "half_open", "each", "most"), 1)
    (tmp_path / "sockets").mkdir()
    with pytest.raises(RuntimeError) if fails else nullcontext():
        gate.main(json.dumps(plan | numbers))
    assert (tmp_path / "sockets").exists() == fails


def test_a_gate_whose_coordinator_has_gone_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    control, far = socket.socketpair()
    with closing(control), socket.create_server(("127.0.0.1", 0)) as listener:
        door = (listener.detach(), str(tmp_path / "gone"), True, 1, 1)
        numbers = dict.fromkeys(("frame", "parts", "handshake", "half_open", "each", "most"), 1)
        plan = {"control": far.detach(), "folder": str(tmp_path), "doors": [door]}
        with pytest.raises(SystemExit, match="1"):
            gate.main(json.dumps(plan | numbers))


def test_a_peer_that_leaves_is_disconnected(server: ServerTransport) -> None:
    with client_of(server) as stays, client_of(server) as leaves:
        staying, leaving = round_trip(server, stays, [b"1"]), round_trip(server, leaves, [b"2"])
        again = round_trip(server, stays, [b"3"])
        assert again.peer == staying.peer != leaving.peer
        assert server.disconnected() == set()
        leaves.close()
        found: set[bytes] = set()

        def known() -> bool:
            server.check()
            found.update(server.disconnected())
            return bool(found)

        until(known)
        assert found == {leaving.peer}
        round_trip(server, stays, [b"4"])
        assert server.disconnected() == set()


def test_descriptors_are_left_for_files() -> None:
    """With 64 files, the coordinator opens more, and 100 connections come."""
    script = """
import resource, sys, socket, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from esjax.hosts.transport.server import Request, ServerTransport
from esjax.hosts.transport.sockets import Limits
lines = []
with ServerTransport("tcp://127.0.0.1:0", keys=None, limits=Limits(65_536, 4), tell=lines.append) as server:
    print(server.address, flush=True)
    until = time.monotonic() + 30
    while time.monotonic() < until and not any("more than" in line for line in lines):
        server.poll(0.1)
        server.check()
    for _ in range(10):
        files = [open("/dev/null") for _ in range(8)]
        [file.close() for file in files]
        server.poll(0.1)
    print(len(lines), *lines, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with ExitStack() as stack:
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        for _ in range(100):
            connection = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
            threading.Thread(target=_try_to_shake_hands, args=(connection,), daemon=True).start()
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "more than" in output
    assert output.count("unfinished handshakes") <= 1, output  # each reason is said once
    assert output.count(" connections,") <= 1, output


def _try_to_shake_hands(connection: socket.socket) -> None:
    try:
        shake_hands(connection, b"DEALER")
    except (OSError, AssertionError):
        return
