"""Coordinator and hosts as real processes on the loopback interface; rows are those of the list of faults."""

import http.client
import signal
import socket
import urllib.request

import numpy as np
import pytest
from processes import SMALL, TEXT, Fleet, Process, alone, fleet, steps_done, updates, wait_until

from esjax import resume
from esjax.hosts.status import fetch_status
from esjax.runs.checkpoint import kept_steps
from esjax.runs.reader import read_run
from esjax.training.replay import replay

__all__ = ["fleet"]


def test_two_hosts_train_as_one_process_does_and_their_run_goes_on_alone(fleet: Fleet, lenient_promotion: None) -> None:
    """Whichever host scored a pair: the same shaped weights and the same state."""
    server = fleet.serve("--steps", "25")
    hosts = [fleet.join("one"), fleet.join("two")]
    assert [server.ends(), *(host.ends() for host in hosts)] == [0, 0, 0]
    expected_updates, expected_digest = alone(fleet, 25)
    assert updates(fleet.run) == expected_updates
    replayed = replay(fleet.run)
    assert replayed.agrees
    assert replayed.compared >= 1
    assert replayed.digest == expected_digest
    assert "held-out" in server.output
    for _ in resume(fleet.run, steps=30):
        pass
    assert updates(fleet.run) == alone(fleet, 30)[0]
    assert replay(fleet.run).agrees


def test_rows_01_02_14_and_38_happen_to_one_run_and_change_nothing(fleet: Fleet, lenient_promotion: None) -> None:
    """After each of them training goes on; in the end the updates are those of one process that did nothing else."""
    # The held-out loss of a silent host is waited for, so there is only the first one.
    settings = ("--evaluate-time", "1000", "--es.population-size", "512", "--es.chunk-pairs", "32")
    server = fleet.serve(*settings, "--metrics-port", "0", "--track", "tensorboard")
    one, two, three = (fleet.join(name) for name in ("one", "two", "three"))
    see_metrics_of_three_hosts(fleet, server)
    pester(fleet)
    two.send(signal.SIGSTOP)  # row 38
    wait_for_steps(fleet, 20)
    three.send(signal.SIGKILL)  # row 1
    wait_for_steps(fleet, 20)
    two.send(signal.SIGCONT)
    wait_until(lambda: states(fleet, "one", "two") == ["ready", "ready"])
    wait_until(lambda: max(kept_steps(fleet.run / "checkpoints"), default=0) > 0)
    server.send(signal.SIGKILL)  # row 2
    server.ends()
    before = updates(fleet.run)
    again = fleet.serve_again()
    wait_until(lambda: states(fleet, "one", "two") == ["ready", "ready"])
    wait_for_steps(fleet, 10)
    again.send(signal.SIGTERM)
    assert again.ends() == 0
    assert [host.popen.poll() for host in (one, two)] == [None, None]
    for coordinator in (server, again):
        assert "Traceback" not in coordinator.output
    after = updates(fleet.run)
    assert after[: len(before)] == before
    assert after == alone(fleet, len(after))[0]
    assert replay(fleet.run).agrees
    view = read_run(fleet.run)  # the last update may have been written, and its line not
    np.testing.assert_array_equal(view.metrics["member_tokens"], view.metrics["step"] * 512 * 8)  # members, window
    assert (np.diff(view.metrics["seconds"]) >= 0).all()
    assert list((fleet.run / "tensorboard").glob("*tfevents*"))


def see_metrics_of_three_hosts(fleet: Fleet, server: Process) -> None:
    """See that rows and metrics have the number of hosts."""
    server.wait_for("metrics at ")
    address = server.output.split("metrics at ")[1].split(",")[0]

    def scrape() -> str:
        return urllib.request.urlopen(address, timeout=60).read().decode()

    wait_until(lambda: "\nesjax_hosts 3.0\n" in scrape())
    assert urllib.request.urlopen(address.replace("metrics", "healthz"), timeout=60).status == 200
    assert "\nesjax_held_out " in scrape()
    wait_for_steps(fleet, 2)
    hosts = set(read_run(fleet.run).metrics["hosts"])
    assert 3 in hosts <= {1, 2, 3}


def pester(fleet: Fleet) -> None:
    """Be a browser, a scan and a socket that says nothing or nonsense: row 14."""
    at = int(fleet.address.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", at)):
        for _ in range(20):
            socket.create_connection(("127.0.0.1", at)).close()
        for request in (f"http://127.0.0.1:{at}/", f"http://127.0.0.1:{at}/index.html"):
            with pytest.raises((http.client.HTTPException, OSError)):
                urllib.request.urlopen(request, timeout=0.3)
        with socket.create_connection(("127.0.0.1", at)) as rude:
            rude.sendall(np.random.default_rng(0).bytes(10_000))
        wait_for_steps(fleet, 20)


def wait_for_steps(fleet: Fleet, more: int) -> None:
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + more)


def states(fleet: Fleet, *names: str) -> list[str]:
    found = {host.name: host.state for host in fetch_status(fleet.address).hosts}
    return [found.get(name, "") for name in names]


def all_ready(fleet: Fleet, count: int) -> bool:
    return [host.state for host in fetch_status(fleet.address).hosts].count("ready") == count


@pytest.mark.nightly
def test_row_01_a_killed_host_changes_nothing_of_split_pairs_and_blocks(fleet: Fleet, lenient_promotion: None) -> None:
    """Pairs of a window share one half of their noise; tokens come in blocks, which hosts ask for."""
    words = ["--es.pairing", "split", "--es.pairs-per-window", "3"]
    server = fleet.serve(*words, "--data.block-tokens", "500", "--data.new-tokens-interval", "4")
    fleet.join("survivor")
    victim = fleet.join("victim")
    wait_until(lambda: steps_done(fleet.run) >= 5 and all_ready(fleet, 2))
    victim.send(signal.SIGKILL)
    wait_for_steps(fleet, 20)
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    assert "Traceback" not in server.output
    found = updates(fleet.run)
    assert found == alone(fleet, len(found))[0]
    assert replay(fleet.run).agrees


@pytest.mark.nightly
def test_row_01_a_killed_host_changes_nothing_of_what_sums_come_to(fleet: Fleet, lenient_promotion: None) -> None:
    # Sums of many pairs: norms of a few vary so much that in a thousand steps one is left out, by how it was leased.
    words = ["--es.space", "activation", "--es.copies", "4", "--es.chunk-pairs", "32", "--data.carry"]
    words += ["--es.population-size", "1024"]
    server = fleet.serve(*words)
    fleet.join("survivor")
    victim = fleet.join("victim")
    wait_until(lambda: steps_done(fleet.run) >= 5 and all_ready(fleet, 2))
    victim.send(signal.SIGKILL)
    wait_for_steps(fleet, 20)
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    steps = steps_done(fleet.run)
    local = fleet.folder / "local"
    settings = [*SMALL, *words, "--ledger", "--steps", str(steps), "--data.text", str(TEXT), "--out", str(local)]
    assert fleet.start("train", *settings).ends() == 0  # with one device, as the hosts
    assert updates(fleet.run) == updates(local)
    # With one device, too: the older emitters of the tests compile the update for four devices to other last bits.
    assert fleet.start("replay", str(fleet.run)).ends() == 0


def test_row_31_training_stops_before_a_step_that_cannot_be_recorded(fleet: Fleet, lenient_promotion: None) -> None:
    words = ["--checkpoint-time", "1000", "--es.population-size", "16384", "--es.chunk-pairs", "256"]
    server = fleet.serve(*words, "--data.window", "2", file_blocks=200)
    fleet.join("one")
    assert server.ends() == 2
    assert "cannot write the ledger" in server.output
    assert "Traceback" not in server.output
    done = steps_done(fleet.run)
    assert done >= 5
    again = fleet.serve_again("--steps", str(done + 5))
    assert again.ends() == 0
    assert replay(fleet.run).agrees
    assert steps_done(fleet.run) == done + 5


def test_workers_of_this_machine(fleet: Fleet, lenient_promotion: None) -> None:
    words = [*SMALL, "--steps", "12", "--out", str(fleet.run), "--data.text", str(TEXT)]
    run = fleet.start("train", "--workers", "2", "--oversubscribe", *words)  # also on one core
    assert run.ends() == 0
    assert sorted(path.name for path in fleet.run.glob("*.log")) == ["worker-0.log", "worker-1.log"]
    expected_updates, expected_digest = alone(fleet, 12)
    assert updates(fleet.run) == expected_updates
    assert replay(fleet.run).digest == expected_digest
