"""Prometheus metrics and a health check of a run, over HTTP, on the loopback address."""

import json
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, make_wsgi_app, start_http_server

from esjax.errors import EsjaxError
from esjax.watch.tracking import TrackedRun, Tracker

HOST = "127.0.0.1"

ASKED = re.compile(r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d*)?", re.IGNORECASE)
"""Host headers that are answered: IP addresses and localhost. A site whose own name leads to this address (DNS
rebinding) could otherwise read the metrics from the browser of a user."""

SHORTEST_STALL, STALL = 60.0, 10.0
"""A run has stalled if the last step finished more than both of these ago: seconds, and usual step times."""

HELP = {
    "step": "Steps done.",
    "seconds": "Training time, in seconds.",
    "loss": "Mean over the population: nats per token, or the custom loss, or minus the custom reward.",
    "population": "Members evaluated in a step.",
    "applied": "1 if the last update was made, else 0.",
    "gradient_norm": "Euclidean norm of the estimate, in units of each leaf.",
    "update_norm": "Euclidean norm of the change of the parameters, in units of each leaf.",
    "member_tokens": "Tokens scored, times members.",
    "member_tokens_per_second": "Speed of a step.",
    "held_out": "The same quantity over the held-out documents, as last measured.",
    "reward": "Mean reward of the population, for a reward in Python.",
    "greedy_reward": "Mean reward on held-out prompts of completions of most probable tokens, as last measured.",
    "pass_at_k": "Fraction of held-out prompts for which one of k completions passes, as last measured.",
    "hosts": "Hosts that scored pairs of the last step.",
}


class MetricsServer(Tracker):
    """A tracker that serves /metrics for Prometheus, and /healthz: status 200 while steps finish, 503 otherwise.

    Attributes:
        port: Port on the loopback address.
    """

    def __init__(self, port: int) -> None:
        """Open the port, and answer requests.

        Args:
            port: From 0 to 65535; 0 takes any free port.

        Raises:
            EsjaxError: The port is out of range, taken, or needs more rights.
        """
        if not 0 <= port <= 65535:
            raise EsjaxError(f"a port for metrics is from 0 to 65535, not {port}")
        self.port = port
        self._vitals = _Vitals()
        self._metrics = make_wsgi_app(self._vitals.registry)
        self._server: WSGIServer | None = None
        self._open()

    def __repr__(self) -> str:
        """Show the address."""
        return f"<metrics at http://{HOST}:{self.port}/metrics>"

    def start(self, run: TrackedRun) -> None:
        """Show the numbers of a run from now on."""
        self._vitals.begin(run)
        if self._server is None:
            self._open()

    def log(self, row: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        self._vitals.take(row)

    def close(self) -> None:
        """Stop, and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _open(self) -> None:
        try:
            self._server, _ = start_http_server(self.port, HOST, self._vitals.registry)
        except OSError as error:
            raise EsjaxError(
                f"cannot serve metrics at {HOST}:{self.port}: {error.strerror}; choose another port, or 0 for any"
            ) from error
        self._server.set_app(self._answer)
        self.port = self._server.server_port

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ.get("HTTP_HOST", HOST)
        match environ["PATH_INFO"]:
            case _ if not ASKED.fullmatch(asked):
                status, content = "421 Misdirected Request", {"error": f"ask for an IP address, not for {asked!r}"}
            case "/metrics":
                return self._metrics(environ, start)
            case "/healthz":
                is_well, content = self._vitals.health()
                status = "200 OK" if is_well else "503 Service Unavailable"
            case _:
                status, content = "404 Not Found", {"error": "there are /metrics and /healthz"}
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(content).encode() + b"\n"]


class _Vitals:
    """The metrics of a run for Prometheus, and the times at which its steps finished.

    Attributes:
        registry: The metrics that are served.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}  # made with their first number, so that an unknown number is absent, not 0
        self._void_pairs = Counter(
            "esjax_void_pairs",
            "Pairs left out: a loss is not finite, or their gradient sum is far larger than usual.",
            registry=self.registry,
        )
        self._baselines = Gauge(
            "esjax_baseline",
            "Nats per token of an n-gram model over the held-out documents.",
            ["model"],
            registry=self.registry,
        )
        self._info = Info("esjax_run", "The run.", registry=self.registry)
        since = Gauge(
            "esjax_seconds_since_step", "Seconds since a step finished; NaN before the first.", registry=self.registry
        )
        since.set_function(lambda: float("nan") if self._last is None else time.monotonic() - self._last[0])
        self._last: tuple[float, int] | None = None  # time and number of the last step
        self._seconds_a_step: deque[float] = deque(maxlen=20)

    def begin(self, run: TrackedRun) -> None:
        """Start, or continue, with a run."""
        self._last = None
        self._seconds_a_step.clear()
        self._info.info({"id": run.id, "title": run.title, "folder": str(run.folder or "")})
        for name, value in run.baselines.items():
            self._baselines.labels(name).set(value)

    def take(self, row: Mapping[str, float]) -> None:
        """Take the numbers of a step."""
        now, step = time.monotonic(), int(row["step"])
        if self._last is not None:
            self._seconds_a_step.append((now - self._last[0]) / max(step - self._last[1], 1))
        self._last = now, step
        for name, value in row.items():
            if name == "void_pairs":
                self._void_pairs.inc(value)
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"esjax_{name}", HELP.get(name, name), registry=self.registry)
            self._gauges[name].set(value)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether steps still finish, and the body of the answer."""
        if self._last is None:
            return False, {"state": "no step has finished yet"}
        finished, step = self._last
        usual = statistics.median(self._seconds_a_step) if self._seconds_a_step else 0.0
        since = time.monotonic() - finished
        well = since <= max(SHORTEST_STALL, STALL * usual)
        state = "training" if well else "no step finishes"
        return well, {"state": state, "step": step, "seconds_since_step": round(since, 3)}
