"""Invalid addresses, ports in use, and plain text beyond this machine: one clear line each."""

import re
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from transports import (
    LIMITS,
    client_of,
    keys,
    port_of,
    round_trip,
    server,
    server_of,
    token_of,
)

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.errors import EsjaxError
from esjax.hosts.serve import serve
from esjax.hosts.transport.client import ClientTransport
from esjax.hosts.transport.keys import ServerKeys, Token
from esjax.hosts.transport.server import ServerTransport
from esjax.hosts.transport.sockets import new_keypair

__all__ = ["keys", "server"]


def failure(address: str, keys: ServerKeys | None = None) -> str:
    with pytest.raises(EsjaxError) as caught:
        server_of(keys, address).close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_row_41_a_port_in_use(server: ServerTransport) -> None:
    assert re.search(rf"port {port_of(server)} is in use", failure(server.address))
    before = port_of(server) - 1
    with suppress(OSError), closing(socket.create_server(("127.0.0.1", before))) as place:
        place.close()
        assert re.search(rf"port {before + 1} is in use", failure(f"tcp://127.0.0.1:{before}"))


@pytest.mark.parametrize(
    "address",
    [
        "",
        "127.0.0.1:5555",
        "http://127.0.0.1:5555",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://127.0.0.1:x",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://:5555",
        "tcp://::1:5555",
        "tcp://127.0.0.1:5555/path",
        "tcp://127.0.0.1:5555\n",
        "tcp://127.0.0.1:٣",
        "tcp://some host:5555",
    ],
)
def test_row_41_a_bad_address(address: str) -> None:
    assert "tcp://HOST:PORT" in failure(address)
    with pytest.raises(EsjaxError, match="tcp://HOST:PORT"):
        ClientTransport(address, token=None, limits=LIMITS)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "[::::]"])
def test_row_41_an_unknown_host_name(host: str) -> None:
    assert "cannot find the host" in failure(f"tcp://{host}:5555")
    with pytest.raises(EsjaxError, match="cannot find the host"):
        ClientTransport(f"tcp://{host}:5555", token=None, limits=LIMITS)


def test_row_41_other_addresses_that_cannot_be_used(keys: ServerKeys) -> None:
    assert "not an address of this machine" in failure("tcp://192.0.2.1:0", keys)
    assert "no port after it" in failure("tcp://127.0.0.1:65535")
    with pytest.raises(EsjaxError, match="names no port"):
        ClientTransport("tcp://127.0.0.1:*", token=None, limits=LIMITS)


def test_row_41_a_failed_start_leaves_nothing_behind(keys: ServerKeys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        address = f"tcp://127.0.0.1:{place.getsockname()[1]}"
        before = threading.active_count()
        failure(address, keys)
        assert threading.active_count() == before
    with server_of(keys, address) as server, client_of(server, token_of(keys)) as client:
        round_trip(server, client, [b"hello"])


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://192.0.2.1:5555"])
def test_plain_text_beyond_this_machine_needs_permission(address: str) -> None:
    line = failure(address)
    assert "keys" in line
    assert "plain text" in line


def test_plain_text_anywhere_is_a_choice() -> None:
    with (
        ServerTransport(
            "tcp://0.0.0.0:0", keys=None, limits=LIMITS, tell=pytest.fail, plain_text_anywhere=True
        ) as server,
        ClientTransport(f"tcp://127.0.0.1:{port_of(server)}", token=None, limits=LIMITS) as client,
    ):
        round_trip(server, client, [b"hello"])


def test_keys_allow_every_interface(keys: ServerKeys) -> None:
    with (
        server_of(keys, "tcp://*:*") as server,
        ClientTransport(f"tcp://127.0.0.1:{port_of(server)}", token=token_of(keys), limits=LIMITS) as client,
    ):
        round_trip(server, client, [b"hello"])


def test_a_token_with_invalid_keys_is_named(server: ServerTransport) -> None:
    token = Token(1, "odd", server.address, "#" * 40, "#" * 40, "#" * 40)
    with pytest.raises(EsjaxError, match="'odd' holds no keys"):
        client_of(server, token)


def test_without_curve_there_are_no_keys(
    server: ServerTransport, keys: ServerKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a libzmq that was built without libsodium; nothing is made on the way."""
    token = token_of(keys)
    monkeypatch.setattr("zmq.has", lambda feature: feature != "curve")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    small = Config(data=DataConfig(text=str(text)), model=GruConfig(hidden_size=4), es=EsConfig(population_size=8))
    for act in (
        new_keypair,
        lambda: client_of(server, token),
        lambda: ServerTransport("tcp://127.0.0.1:0", keys=keys, limits=LIMITS, tell=pytest.fail),
        lambda: serve(small, tmp_path / "run", bind="tcp://0.0.0.0:0"),
    ):
        with pytest.raises(EsjaxError, match="keys need CURVE"):
            act()
    assert not (tmp_path / "run").exists()
