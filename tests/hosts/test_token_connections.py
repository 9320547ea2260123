"""How many connections a token has: counts by hand, over real sockets on loopback."""

import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import zmq
from transports import (
    LIMITS,
    PATIENCE,
    client_of,
    keys,
    listen,
    next_request,
    round_trip,
    token_of,
    until,
)

from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.server import Request, ServerTransport

__all__ = ["keys"]

LINE = "the token of one has more than 3 connections to a port: further ones are closed"


def go_on(clients: list[ClientTransport], seconds: float) -> None:
    """Let clients send and receive for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for client in clients:
            client.poll(0.01)


@pytest.fixture
def narrow(keys: ServerKeys) -> Iterator[tuple[ServerTransport, list[str]]]:
    """A server that lets each token have three connections to a port, and the lines that it prints."""
    lines: list[str] = []
    with (
        ServerTransport("tcp://127.0.0.1:0", keys=keys, limits=LIMITS, tell=lines.append, each_token=3) as server,
        client_of(server, token_of(keys, "first")) as first,
    ):
        # The guard asks the socket for its greeting first; a request that is seen with the end of that is not counted.
        round_trip(server, first, [b"hello"])
        yield server, lines


def test_a_token_has_so_many_connections_at_most(keys: ServerKeys, narrow: tuple[ServerTransport, list[str]]) -> None:
    server, lines = narrow
    one, two = token_of(keys, "one"), token_of(keys, "two")
    with ExitStack() as stack:
        others = [stack.enter_context(client_of(server, two)) for _ in range(3)]
        mine = [stack.enter_context(client_of(server, one)) for _ in range(4)]
        kept = [round_trip(server, client, [b"hello"]) for client in (*others, *mine[:3])]
        assert not lines
        mine[3].request([b"one too many"])

        def told() -> bool:
            mine[3].poll(0.01)
            assert server.poll(0.01) == []
            return bool(lines)

        until(told)
        for client in (*others, *mine[:3]):
            round_trip(server, client, [b"unhindered"])
        assert not {request.peer for request in kept} & server.disconnected()
        mine[0].close()
        counts = server._of_tokens[server._router]._counts

        def has_room() -> bool:
            server.check()
            return counts[one.public_key] == 2

        until(has_room)
        mine[3].request([b"there is room"])
        next_request(server, mine[3])
        assert lines == [LINE]


def test_requests_that_wait_together_close_no_more_connections_than_are_too_many(
    keys: ServerKeys, narrow: tuple[ServerTransport, list[str]]
) -> None:
    server, lines = narrow
    token = token_of(keys, "one")
    with ExitStack() as stack:
        clients = [stack.enter_context(client_of(server, token)) for _ in range(4)]
        for client in clients:
            client.request([b"all at once"])
        go_on(clients, 1.0)  # until all requests wait
        requests: list[Request] = []

        def arrived() -> bool:
            for client in clients:
                client.poll(0)
            requests.extend(server.poll(0.01))
            return len(requests) >= 3 and bool(lines)

        until(arrived)
        assert len({request.peer for request in requests}) == 3
        assert server._of_tokens[server._router]._counts[token.public_key] == 3


def test_of_a_connection_beyond_the_limit_no_request_is_taken(
    keys: ServerKeys, narrow: tuple[ServerTransport, list[str]]
) -> None:
    server, lines = narrow
    token = token_of(keys, "one")
    with ExitStack() as stack:
        for _ in range(3):
            round_trip(server, stack.enter_context(client_of(server, token)), [b"hello"])
        context = stack.enter_context(zmq.Context())
        dealer = stack.enter_context(context.socket(zmq.DEALER))
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt_string(zmq.CURVE_SERVERKEY, token.server_key)
        dealer.setsockopt_string(zmq.CURVE_PUBLICKEY, token.public_key)
        dealer.setsockopt_string(zmq.CURVE_SECRETKEY, token.secret_key)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.connect(server.address)
        for number in range(10):
            dealer.send_multipart([struct.pack(">I", number), b"", b"again"])
        until(lambda: server.poll(0.01) == [] and bool(lines))
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            assert server.poll(0.01) == []
        assert lines == [LINE]


def test_connections_that_have_ended_are_not_counted(
    keys: ServerKeys, narrow: tuple[ServerTransport, list[str]]
) -> None:
    server, lines = narrow
    token = token_of(keys, "one")
    for _ in range(2):
        with ExitStack() as stack:
            for client in [stack.enter_context(client_of(server, token)) for _ in range(3)]:
                client.request([b"and away"])
                client.subscribe(server.publish_port)
                go_on([client], 0.5)
        time.sleep(0.2)  # until the connections have ended; nothing was read so far
        assert server.poll(PATIENCE)

        def none_left() -> bool:
            server.poll(0.01)
            return not any(connections._counts[token.public_key] for connections in server._of_tokens.values())

        until(none_left)
    assert not lines


def test_a_token_has_so_many_subscriptions_at_most(keys: ServerKeys, narrow: tuple[ServerTransport, list[str]]) -> None:
    server, lines = narrow
    one, two = token_of(keys, "one"), token_of(keys, "two")
    with ExitStack() as stack:
        honest = stack.enter_context(client_of(server, two))
        mine = [stack.enter_context(client_of(server, one)) for _ in range(4)]
        for client in (honest, *mine[:3]):
            listen(server, client)
            server.check()
        assert not lines
        mine[3].subscribe(server.publish_port)

        def told() -> bool:
            server.check()
            mine[3].poll(0.01)
            return bool(lines)

        until(told)
        assert lines == [LINE]
        server.publish([b"to those who stay"])
        for client in (honest, *mine[:3]):
            until(lambda client=client: [b"to those who stay"] in client.poll(0.1).broadcasts)
        counts = server._of_tokens[server._publisher]._counts
        assert counts == {one.public_key: 3, two.public_key: 1}
