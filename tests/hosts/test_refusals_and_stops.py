"""What a person meets who runs hosts: refusals, what the port turns down, and stops in order; as real processes."""

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import asdict
from processes import TEXT, Fleet, fleet, steps_done, wait_until
from transports import last_frame, more_frames, next_reply, send_endlessly, stranger

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.corpus import load_corpus
from esjax.errors import EsjaxError
from esjax.hosts import join, status
from esjax.hosts.join import LIMITS
from esjax.hosts.known_answers import known_answers
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope, Message
from esjax.hosts.serve import _make_replica, serve
from esjax.hosts.status import fetch_status
from esjax.hosts.transport.client import ClientTransport
from esjax.models.custom import Custom
from esjax.page.server import ask_hosts
from esjax.training.replay import replay

__all__ = ["fleet"]


def test_row_15_the_status_counts_what_the_port_turns_down(fleet: Fleet) -> None:
    fleet.serve()
    at = int(fleet.address.rsplit(":", 1)[1])

    def counters() -> dict[str, int]:
        return fetch_status(fleet.address).counters

    with (
        closing(socket.create_connection(("127.0.0.1", at))),
        closing(stranger(at)) as odd,
        closing(stranger(at)) as mad,
    ):
        odd.sendall(last_frame(b"no request"))
        threading.Thread(target=send_endlessly, args=(mad, more_frames(b"") * 10_000), daemon=True).start()
        expected = {"connections without a handshake", "messages without an envelope"}
        if sys.platform == "linux":
            expected.add("connections cut off")
        wait_until(lambda: counters().keys() == expected)  # the idle connection is cut off after 5 s, too


def test_row_18_a_stranger_is_refused_and_told_why(fleet: Fleet) -> None:
    fleet.serve("--keys", str(fleet.run / "keys"))
    token = fleet.run / "keys" / "hosts.token"
    assert token.stat().st_mode & 0o077 == 0
    stranger = fleet.join("stranger")
    assert stranger.ends() == 2
    assert "Traceback" not in stranger.output
    assert "token" in stranger.output.splitlines()[-1]
    assert ask_known(fleet, token)
    assert ask_hosts(fleet.run) == {"hosts": [], "note": "no host has joined yet"}  # the page finds the token itself


def ask_known(fleet: Fleet, token: Path) -> bool:
    asked = subprocess.run(
        [sys.executable, "-m", "esjax", "status", fleet.address, "--token-file", str(token), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(asked.stdout)["hosts"] == []


def test_row_19_a_revoked_host_is_dropped(fleet: Fleet) -> None:
    keys = fleet.folder / "keys"
    fleet.serve("--keys", str(keys))
    host = fleet.join("guest", "--token-file", str(keys / "hosts.token"))
    wait_until(lambda: steps_done(fleet.run) >= 2)
    assert [one["name"] for one in ask_hosts(fleet.run)["hosts"]] == ["guest"]  # wherever the keys are
    subprocess.run([sys.executable, "-m", "esjax", "token", "revoke", str(keys), "hosts"], check=True)
    assert host.ends() == 2
    assert "revoked" in host.output


def test_row_65_no_text_of_a_host_breaks_or_forges_a_line(fleet: Fleet) -> None:
    """A name that is not printable is refused anyway; markup and a note are shown as they are, or as escapes."""
    server = fleet.serve()
    name, device = "[red]mallory[/red]:car:", "[link=x]<b>$x$</b>"
    note, escaped = "a\nerror: forged\x1b[2J\u202e", r"a\nerror: forged\x1b[2J\u202e"
    with ClientTransport(fleet.address, token=None, limits=LIMITS) as client:

        def ask(message: Message) -> Message:
            client.request(wire.encode(Envelope(message)))
            return wire.decode(next_reply(client), "reply").message

        welcome = ask(wire.Join(name, device, "cpu", list(known_answers().items()), [], "", 5, 1))
        assert isinstance(welcome, wire.Welcome)
        ask(wire.Beat(welcome.session, welcome.incarnation, 0, "joining", 1, note))
        server.wait_for(f"{name} joins: {device}\n{name}: {escaped}\n")
        (host,) = fetch_status(fleet.address).hosts
        assert (host.name, host.device, host.note) == (name, device, escaped)
        assert ask_hosts(fleet.run)["hosts"][0]["note"] == escaped
        shown = subprocess.run(
            [sys.executable, "-m", "esjax", "status", fleet.address], capture_output=True, text=True, check=True
        ).stdout
        assert [line for line in shown.splitlines() if escaped in line and f"{name} " in line and device in line]
        assert len(shown.splitlines()) == 3  # the run, the heads of the columns, the host
        ask(wire.Leave(welcome.session, note))
        server.wait_for(f"{name} leaves: {escaped}\n")


def test_row_65_what_a_coordinator_says_is_one_printable_line() -> None:
    said = "no\nerror: forged\x1b[2J"
    with pytest.raises(EsjaxError) as caught:
        status._read(wire.encode(Envelope(wire.Refused(said))), "tcp://127.0.0.1:1")
    assert str(caught.value) == r"no\nerror: forged\x1b[2J"
    odd = wire.HostStatus(said, 0, said, said, 0, 0.0, 0.0, said, 0.0, said)
    sent = wire.Status(said, 1, 0, None, None, None, None, {said: 0.5}, 0.0, True, None, [odd], {said: 1})
    found = status._read(wire.encode(Envelope(sent)), "")
    texts = [
        found.run,
        *found.counters,
        *found.rewards,
        *(value for value in asdict(found.hosts[0]).values() if isinstance(value, str)),
    ]
    assert len(texts) == 8
    assert {*texts} == {r"no\nerror: forged\x1b[2J"}


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGINT])
def test_rows_36_and_37_a_host_that_is_stopped_leaves_in_order(fleet: Fleet, number: signal.Signals) -> None:
    server = fleet.serve()
    host = fleet.join("guest")
    wait_until(lambda: steps_done(fleet.run) >= 2)
    host.send(number)
    assert host.ends() == 0
    server.wait_for("guest leaves: it was stopped")
    assert "Traceback" not in host.output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_rows_36_and_37_a_coordinator_that_is_stopped_keeps_a_checkpoint(
    fleet: Fleet, number: signal.Signals, lenient_promotion: None
) -> None:
    server = fleet.serve("--checkpoint-time", "1000")
    host = fleet.join("one")
    wait_until(lambda: steps_done(fleet.run) >= 5)
    server.send(number)
    assert server.ends() == 0
    assert "Traceback" not in server.output
    newest = max(int(path.name) for path in (fleet.run / "checkpoints").iterdir())
    assert newest == steps_done(fleet.run) >= 5
    assert replay(fleet.run).agrees
    host.wait_for("; waiting up to 600 s for it, Ctrl-C to leave")  # its goodbye may be lost, its silence is not
    assert host.popen.poll() is None
    host.send(number)
    assert host.ends() == 0
    assert host.output.endswith("one: left, it was stopped\n")
    _, _, last_words = host.output.partition("; waiting up to")
    assert "ready" not in last_words


def test_a_host_that_stays_fails_when_the_run_that_it_is_in_falls_silent(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that it took part in before is made up."""
    really, ended = join._take_part, iter([True])
    monkeypatch.setattr(join, "_take_part", lambda *arguments: next(ended, False) or really(*arguments))
    server = fleet.serve("--optim.optimizer", "sgd")  # strict promotion refuses optax's Adam

    def tell(line: str) -> None:
        if line == "one: ready":
            server.popen.kill()

    with pytest.raises(EsjaxError, match=f"no word from {fleet.address} for 5 s"):
        join.join(fleet.address, name="one", stay=True, patience=5.0, tell=tell)


def test_row_34_a_second_coordinator_of_a_run_is_refused(fleet: Fleet) -> None:
    fleet.serve()
    second = fleet.start("serve", "--resume", str(fleet.run), "--bind", "tcp://127.0.0.1:0")
    assert second.ends() == 2
    assert "being trained by another process" in second.output


def test_row_41_a_port_in_use_is_one_clear_line(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        server = fleet.start("serve", "--out", str(fleet.run), "--data.text", "builtin:pydoc", "--bind", bind)
        assert server.ends() == 2
    assert "Traceback" not in server.output
    assert "in use" in server.output


@pytest.mark.parametrize(("pairing", "most"), [("antithetic", 2**24 - 2**8), ("split", 2**23 - 2**7)])
def test_a_population_whose_update_is_too_large_for_a_message_is_refused(pairing: str, most: int) -> None:
    """A byte a pair, or two, of the 2^24 that a frame holds, less 256 for its header."""

    def make(pairs: int) -> None:
        es = EsConfig(population_size=2 * pairs, pairing=pairing, exchange="losses", space="full")  # type: ignore[arg-type]
        config = Config(data=DataConfig(text=str(TEXT)), model=GruConfig(hidden_size=4, head_size=4), es=es)
        _make_replica(config, load_corpus(config.data), Custom())

    make(most)
    with pytest.raises(EsjaxError, match=r"an update would hold .* weights, and 16,776,960 are the most"):
        make(most + 1)


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_port_that_is_taken_leaves_no_run(tmp_path: Path, is_there: bool) -> None:
    """The port is known to be taken only when there are keys, which lie in the folder."""
    out = tmp_path / "run"
    if is_there:
        out.mkdir()
    config = Config(data=DataConfig(text=str(TEXT)), model=GruConfig(hidden_size=4, head_size=8), steps=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EsjaxError, match="is in use"):
            next(iter(serve(config, out, bind=address, keys=out / "keys")))
        assert [*tmp_path.rglob("*")] == ([out] if is_there else [])
        # What another process has begun to train meanwhile is not touched.
        server = serve(config, out, bind=address)
        (out / "checkpoints").mkdir()
        with pytest.raises(EsjaxError, match="is in use"):
            next(iter(server))
        assert (out / "run.json").exists()
