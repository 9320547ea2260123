"""What the served page is told: only what is new, only about runs that were found, only to this machine."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded import append, line_of, make
from starlette.testclient import TestClient

from esjax import cli
from esjax.config.settings import EsConfig
from esjax.errors import EsjaxError
from esjax.page.server import make_app, open_port
from esjax.watch.downsampling import POINTS


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make(tmp_path / "runs" / "a", done=3, es=EsConfig(sigma=0.1))
    make(tmp_path / "runs" / "deep" / "b", done=2, steps=2).keep_baselines({"unigram": 3.0})
    return tmp_path / "runs"


@pytest.fixture
def page(runs: Path) -> TestClient:
    return TestClient(make_app(runs), base_url="http://127.0.0.1:8050")


def ask(page: TestClient, run: str, **known: Any) -> dict[str, Any]:
    answer = page.get("/api/run", params={"run": run, "known": json.dumps(known)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def known_of(told: dict[str, Any]) -> dict[str, Any]:
    """Say what a page knows that was told this."""
    curves = told["curves"].items()
    return {
        "mark": told["mark"],
        "points": {name: (curve["stride"], curve["start"] + len(curve["value"])) for name, curve in curves},
    }


def test_runs_are_listed(page: TestClient, runs: Path) -> None:
    found = {run["run"]: run for run in page.get("/api/runs").json()}
    assert set(found) == {"a", "deep/b"}
    assert (found["a"]["state"], found["deep/b"]["state"]) == ("stopped", "finished")
    assert found["a"]["last"]["step"] == 3
    assert (found["a"]["last"]["held_out"], found["a"]["best"]) == (2.0, 2.0)
    assert found["a"]["last"]["void_pairs"] is None
    make(runs / "late")
    make(runs / "late2" / "a")
    names = {run["run"]: run["name"] for run in page.get("/api/runs").json()}
    assert names == {"a": "runs/a", "deep/b": "b", "late": "late", "late2/a": "late2/a"}


def test_each_run_tells_what_its_losses_are_in(page: TestClient, runs: Path) -> None:
    make(runs / "own", done=2, custom={"reward": "right"})
    assert {run["run"]: run["units"]["loss"] for run in page.get("/api/runs").json()} == {
        "a": "nats per token",
        "deep/b": "nats per token",
        "own": "minus right",
    }
    assert ask(page, "own")["units"]["loss"] == "minus right"


def test_a_run_that_cannot_be_read_is_listed_with_its_reason(page: TestClient, runs: Path) -> None:
    (runs / "a" / "metrics.jsonl").unlink()
    (runs / "a" / "metrics.jsonl").mkdir()
    errors = {run["run"]: run.get("error", "") for run in page.get("/api/runs").json()}
    assert "cannot read" in errors["a"]
    assert errors["deep/b"] == ""


def test_only_what_is_new_is_told(page: TestClient, runs: Path) -> None:
    first = ask(page, "a")
    assert first["curves"]["loss"]["value"] == [4.0, 3.0, 2.0]
    assert first["settings"]["es.sigma"] == 0.1
    append(runs / "a", line_of(4) + line_of(5)[:9])
    second = ask(page, "a", **known_of(first))
    assert second["curves"]["loss"]["start"] == 3
    assert second["curves"]["loss"]["value"] == [1.0]
    assert second["curves"]["held_out"] | {"start": 1, "value": [0.0], "step": [4]} == second["curves"]["held_out"]
    assert ask(page, "a", **known_of(second))["curves"]["loss"]["value"] == []


def test_a_resumed_run_is_told_anew(page: TestClient, runs: Path) -> None:
    first = ask(page, "a")
    with make(runs / "other", done=9).open_metrics(
        2, print
    ) as metrics:  # the metrics of a run that went back to step 2
        metrics.write(line_of(3).replace("2.0", "2.5"))
    (runs / "other" / "metrics.jsonl").replace(runs / "a" / "metrics.jsonl")
    second = ask(page, "a", **known_of(first))
    assert second["mark"] != first["mark"]
    assert second["curves"]["loss"]["start"] == 0
    assert second["curves"]["loss"]["value"] == [4.0, 3.0, 2.5]


def test_a_long_run_is_told_in_few_points(page: TestClient, runs: Path) -> None:
    make(runs / "long", done=POINTS)
    first = ask(page, "long")
    assert len(first["curves"]["loss"]["value"]) == POINTS
    append(runs / "long", line_of(POINTS + 1) + line_of(POINTS + 2))
    second = ask(page, "long", **known_of(first))
    assert (second["curves"]["loss"]["stride"], second["curves"]["loss"]["start"]) == (2, 0)
    assert len(second["curves"]["loss"]["value"]) == POINTS // 2 + 1


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/api/runs", "/page.js"])
def test_a_name_that_somebody_else_points_here_is_refused(page: TestClient, host: str, path: str) -> None:
    assert page.get(path, headers={"Host": host}).status_code == 400


def test_both_names_of_this_machine_are_served(page: TestClient) -> None:
    for host in ("127.0.0.1:8050", "localhost:8050"):
        answer = page.get("/", headers={"Host": host})
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("run", ["", ".", "..", "../runs/a", "/etc", "a/../a", "A", "deep", "a\0"])
def test_only_runs_that_were_found_are_told_of(page: TestClient, run: str) -> None:
    for path in ("/api/run", "/api/hosts"):
        answer = page.get(path, params={"run": run})
        assert answer.status_code == 404
        assert "there is no run" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/../run.json", "/..%2frunning", "/server.py", "/api", "/api/runs/a", "//etc/passwd"])
def test_no_other_file_is_served(page: TestClient, path: str) -> None:
    assert page.get(path).status_code == 404


@pytest.mark.parametrize(
    "known", ["{", "[]", '{"points": {"loss": [1]}}', '{"points": {"loss": [1, "x"]}}', '{"a": 1}']
)
def test_a_page_that_says_nonsense_is_told_so(page: TestClient, known: str) -> None:
    answer = page.get("/api/run", params={"run": "a", "known": known})
    assert answer.status_code == 400
    assert answer.json()["error"]


@pytest.mark.parametrize("points", [(1, -1), (1, 99), (0, 0), (3, 1)])
def test_points_that_nobody_was_told_are_told_again(page: TestClient, points: tuple[int, int]) -> None:
    mark = ask(page, "a")["mark"]
    assert ask(page, "a", mark=mark, points={"loss": points})["curves"]["loss"]["start"] == 0


def test_a_run_without_a_coordinator_has_no_hosts(page: TestClient) -> None:
    assert page.get("/api/hosts", params={"run": "a"}).json() == {"hosts": [], "note": ""}


def test_nothing_is_shown_of_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["dashboard", str(tmp_path / "none")])
    assert caught.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit) as caught:
            cli.main(["dashboard", str(runs), "--port", str(other.getsockname()[1])])
    assert caught.value.code == 2
    assert "give another --port" in capsys.readouterr().err
    for port in (-1, 70000):
        with pytest.raises(EsjaxError, match="give another --port"):
            open_port(port)


@pytest.mark.parametrize("package", ["starlette.applications", "plotly"])
def test_a_missing_extra_is_said(runs: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EsjaxError, match=r"esjax\[dashboard\]"):
        make_app(runs)


def test_of_a_folder_whose_name_is_no_text_the_page_says_so(page: TestClient, runs: Path) -> None:
    make(runs / "plain", done=1).path.rename(runs / os.fsdecode(b"caf\xe9"))
    found = {run["run"]: run for run in page.get("/api/runs").json()}
    assert set(found) == {"a", "deep/b", "caf\\udce9"}
    assert "is not UTF-8 text" in found["caf\\udce9"]["error"]
    assert "error" not in found["a"]
