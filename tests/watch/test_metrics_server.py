"""Metrics and health of a run as Prometheus reads them, over real connections."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from esjax.errors import EsjaxError
from esjax.watch.metrics_server import MetricsServer
from esjax.watch.tracking import TrackedRun

RUN = TrackedRun("a1b2", "first", Path("runs/first"), {}, {"unigram": 3.34, "trigram": 1.99}, 0)

ROW = {"step": 7, "seconds": 1.5, "loss": 2.5, "void_pairs": 2, "applied": True, "update_norm": 0.25}


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    server = MetricsServer(0)
    yield server
    server.close()


def get(server: MetricsServer, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(server: MetricsServer) -> dict[str, float]:
    code, text = get(server, "/metrics")
    assert code == 200
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join([sample.name, *sorted(sample.labels.values())]): sample.value for sample in samples}


def test_metrics_are_the_last_rows_and_void_pairs_add_up(server: MetricsServer) -> None:
    server.start(RUN)
    before = scrape(server)
    assert before["esjax_run_info a1b2 first runs/first"] == 1
    assert (before["esjax_baseline unigram"], before["esjax_baseline trigram"]) == (3.34, 1.99)
    assert "esjax_loss" not in before  # unknown, which is not 0

    server.log({**ROW, "held_out": 2.75})
    server.log({**ROW, "step": 8, "loss": 2.25, "hosts": 3})
    after = scrape(server)
    assert {
        name: after[f"esjax_{name}"] for name in ("step", "seconds", "loss", "update_norm", "held_out", "hosts")
    } == {
        "step": 8,
        "seconds": 1.5,
        "loss": 2.25,
        "update_norm": 0.25,
        "held_out": 2.75,  # as last measured
        "hosts": 3,
    }
    assert after["esjax_applied"] == 1
    assert after["esjax_void_pairs_total"] == 2 + 2
    assert 0 <= after["esjax_seconds_since_step"] < 60


def test_health_is_whether_steps_still_finish(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    server.start(RUN)
    assert get(server, "/healthz") == (503, '{"state": "no step has finished yet"}\n')
    for step in (1, 2, 3):
        server.log({**ROW, "step": step})
        now += 1.0
    # A second a step: stalled after the 60 s that every run has.
    for since, code, state in ((1.0, 200, "training"), (60.0, 200, "training"), (60.5, 503, "no step finishes")):
        now = 1002.0 + since
        assert get(server, "/healthz") == (
            code,
            json.dumps({"state": state, "step": 3, "seconds_since_step": since}) + "\n",
        )
    server.log({**ROW, "step": 4})
    assert get(server, "/healthz")[0] == 200
    # 40 s a step, two steps a row: stalled after ten times as long.
    for step in range(6, 60, 2):
        now += 80.0
        server.log({**ROW, "step": step})
    now += 399.0
    assert get(server, "/healthz")[0] == 200
    now += 2.0
    assert get(server, "/healthz")[0] == 503


def test_other_paths_are_not_found(server: MetricsServer) -> None:
    server.start(RUN)
    for path in ("/", "/metrics/x", "/etc/passwd"):
        assert get(server, path)[0] == 404
    assert get(server, "/metrics?name[]=esjax_run_info")[0] == 200


def test_it_listens_on_the_loopback_address_and_frees_the_port_at_the_end(server: MetricsServer) -> None:
    assert server._server is not None
    assert server._server.server_address[0] == "127.0.0.1"
    for _ in range(2):  # a run that is continued has the same port
        server.start(RUN)
        assert get(server, "/metrics")[0] == 200
        server.close()
        with socket.create_server(("127.0.0.1", server.port)):
            pass
    server.close()  # once more does no harm


def test_a_port_that_is_taken_or_out_of_range_is_refused(server: MetricsServer) -> None:
    with pytest.raises(EsjaxError, match=rf"cannot serve metrics at 127.0.0.1:{server.port}: .* choose another port"):
        MetricsServer(server.port)
    for port in (-1, 65536):
        with pytest.raises(EsjaxError, match=f"from 0 to 65535, not {port}"):
            MetricsServer(port)


def test_a_silent_connection_does_not_hold_up_the_others(server: MetricsServer) -> None:
    server.start(RUN)
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(server, "/metrics")[0] == 200


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:9000", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:80", 200),
        ("10.0.0.1:9000", 200),  # through a tunnel or a proxy
        ("evil.example:9000", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example/127.0.0.1", 421),
        ("", 421),
    ],
)
def test_a_site_whose_name_leads_to_this_address_reads_nothing(server: MetricsServer, host: str, code: int) -> None:
    server.start(RUN)
    found, text = get(server, "/metrics", Host=host)
    assert (found, "esjax_" in text) == (code, code == 200)
    assert get(server, "/other", Host=host)[0] == (404 if code == 200 else 421)


def test_no_text_of_a_run_forges_a_metric(server: MetricsServer) -> None:
    title = 'a"} 1\nesjax_loss 0\n# \\'
    server.start(RUN._replace(title=title))
    found = scrape(server)
    assert found[" ".join(["esjax_run_info", *sorted(["a1b2", title, "runs/first"])])] == 1
    assert "esjax_loss" not in found
