"""Coordinator and hosts as real processes on the loopback interface; rows are those of the list of faults."""

import http.client
import json
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


def test_two_hosts_train_as_one_process_does(fleet: Fleet, lenient_promotion: None) -> None:
    """Whoever scored what: the same shaped weights and the same state."""
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


def test_rows_and_metrics_tell_how_many_hosts_take_part(fleet: Fleet) -> None:
    server = fleet.serve("--metrics-port", "0", "--track", "tensorboard")
    server.wait_for("metrics at ")
    address = server.output.split("metrics at ")[1].split(",")[0]

    def scrape() -> str:
        return urllib.request.urlopen(address, timeout=60).read().decode()

    fleet.join("one")
    fleet.join("two")
    wait_until(lambda: "\nesjax_hosts 2.0\n" in scrape())
    assert urllib.request.urlopen(address.replace("metrics", "healthz"), timeout=60).status == 200
    assert "\nesjax_held_out " in scrape()
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    hosts = [json.loads(line)["hosts"] for line in (fleet.run / "metrics.jsonl").read_text().splitlines()]
    assert set(hosts) == {1, 2}
    assert list((fleet.run / "tensorboard").glob("*tfevents*"))


@pytest.mark.parametrize("words", [(), ("--es.pairing", "split", "--es.pairs-per-window", "3")])
def test_row_01_a_killed_host_changes_nothing(words: tuple[str, ...], fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve(*words)
    fleet.join("survivor")
    victim = fleet.join("victim")
    wait_until(lambda: steps_done(fleet.run) >= 5 and all_ready(fleet, 2))
    victim.send(signal.SIGKILL)
    stop_after(fleet, server, 20)


def test_row_01_a_killed_host_changes_nothing_of_what_sums_come_to(fleet: Fleet, lenient_promotion: None) -> None:
    words = ["--es.space", "activation", "--es.copies", "4", "--es.chunk-pairs", "2", "--data.carry"]
    server = fleet.serve(*words)
    fleet.join("survivor")
    victim = fleet.join("victim")
    wait_until(lambda: steps_done(fleet.run) >= 5 and all_ready(fleet, 2))
    victim.send(signal.SIGKILL)
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + 20)
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    steps = steps_done(fleet.run)
    local = fleet.folder / "local"
    settings = [*SMALL, *words, "--ledger", "--steps", str(steps), "--data.text", str(TEXT), "--out", str(local)]
    assert fleet.start("train", *settings).ends() == 0  # with one device, as the hosts
    assert updates(fleet.run) == updates(local)
    replayed = replay(fleet.run)
    assert replayed.agrees
    assert replayed.compared >= 1


def stop_after(fleet: Fleet, server: Process, steps: int) -> None:
    """Let a run do some more steps, end it, and compare it with one process that did nothing else."""
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + steps)
    server.send(signal.SIGTERM)
    assert server.ends() == 0
    assert "Traceback" not in server.output
    found = updates(fleet.run)
    assert found == alone(fleet, len(found))[0]


def all_ready(fleet: Fleet, count: int) -> bool:
    return [host.state for host in fetch_status(fleet.address).hosts].count("ready") == count


def test_row_02_a_killed_coordinator_loses_nothing(fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve()
    hosts = [fleet.join("one"), fleet.join("two")]
    wait_until(lambda: steps_done(fleet.run) >= 20 and max(kept_steps(fleet.run / "checkpoints"), default=0) > 0)
    server.send(signal.SIGKILL)
    server.ends()
    before = updates(fleet.run)
    again = fleet.serve_again()
    wait_until(lambda: all_ready(fleet, 2) and steps_done(fleet.run) >= len(before) + 10)
    again.send(signal.SIGTERM)
    assert again.ends() == 0
    assert [host.popen.poll() for host in hosts] == [None, None]
    after = updates(fleet.run)
    assert after[: len(before)] == before
    assert after == alone(fleet, len(after))[0]
    assert replay(fleet.run).agrees
    view = read_run(fleet.run)  # the last update may have been written, and its line not
    np.testing.assert_array_equal(view.metrics["member_tokens"], view.metrics["step"] * 64 * 8)  # members, window
    assert (np.diff(view.metrics["seconds"]) >= 0).all()


def test_row_14_a_browser_a_scan_and_a_silent_socket_cost_nothing(fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve()
    fleet.join("one")
    wait_until(lambda: steps_done(fleet.run) >= 3)
    at = int(fleet.address.rsplit(":", 1)[1])
    silent = socket.create_connection(("127.0.0.1", at))
    for _ in range(20):
        socket.create_connection(("127.0.0.1", at)).close()
    for request in (f"http://127.0.0.1:{at}/", f"http://127.0.0.1:{at}/index.html"):
        with pytest.raises((http.client.HTTPException, OSError)):
            urllib.request.urlopen(request, timeout=1)
    with socket.create_connection(("127.0.0.1", at)) as rude:
        rude.sendall(np.random.default_rng(0).bytes(10_000))
    stop_after(fleet, server, 20)
    silent.close()


def test_row_38_a_stopped_host_does_not_stop_the_others(fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve("--evaluate-time", "1000")  # that of a silent host is waited for
    fleet.join("one")
    two = fleet.join("two")
    wait_until(lambda: steps_done(fleet.run) >= 5 and all_ready(fleet, 2))
    two.send(signal.SIGSTOP)
    stop_after(fleet, server, 20)


def test_row_31_training_stops_before_a_step_that_cannot_be_recorded(fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve("--checkpoint-time", "1000", "--es.population-size", "16384", file_blocks=300)
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


def test_a_run_of_hosts_goes_on_alone(fleet: Fleet, lenient_promotion: None) -> None:
    server = fleet.serve("--steps", "10")
    fleet.join("one")
    assert server.ends() == 0
    for _ in resume(fleet.run, steps=15):
        pass
    assert updates(fleet.run) == alone(fleet, 15)[0]
    assert replay(fleet.run).agrees


def test_blocks_of_tokens_are_the_same_for_hosts_as_alone(fleet: Fleet, lenient_promotion: None) -> None:
    words = ["--data.block-tokens", "500", "--data.new-tokens-interval", "4", "--steps", "15"]
    server = fleet.serve(*words)
    hosts = [fleet.join("one"), fleet.join("two")]
    assert [process.ends() for process in (server, *hosts)] == [0, 0, 0]
    assert updates(fleet.run) == alone(fleet, 15)[0]
    assert replay(fleet.run).agrees


def test_workers_of_this_machine(fleet: Fleet, lenient_promotion: None) -> None:
    words = [*SMALL, "--steps", "12", "--out", str(fleet.run), "--data.text", str(TEXT)]
    run = fleet.start("train", "--workers", "2", "--oversubscribe", *words)  # also on one core
    assert run.ends() == 0
    assert sorted(path.name for path in fleet.run.glob("*.log")) == ["worker-0.log", "worker-1.log"]
    expected_updates, expected_digest = alone(fleet, 12)
    assert updates(fleet.run) == expected_updates
    assert replay(fleet.run).digest == expected_digest
