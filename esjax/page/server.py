"""Serves the page on the loopback address, with data that follow the runs."""

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.page.content import page_file, plotly_script
from esjax.page.follow import Follower
from esjax.signals import stop_on_signals

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

HOST = "127.0.0.1"
"""Only this machine is served."""

NAMES = ["127.0.0.1", "localhost"]
"""Host names that are answered. This prevents DNS rebinding: a foreign site whose name resolves to this address."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

PATIENCE = 2.0
"""Seconds to wait for the answer of a coordinator."""


class Known(msgspec.Struct, forbid_unknown_fields=True):
    """Data of a run that a page has.

    Attributes:
        mark: The mark of the last answer.
        points: For each column, the stride and the number of points.
    """

    mark: str = ""
    points: dict[str, tuple[int, int]] = {}


# Made here, not in the threads that answer requests: see the end of `esjax.config.settings`.
_KNOWN = msgspec.json.Decoder(Known)


def make_app(folder: Path) -> "Starlette":
    """Make the application.

    Args:
        folder: Folder of run folders.

    Raises:
        EsjaxError: The folder does not exist, or a package is missing.
    """
    with needing("the dashboard", "dashboard"):
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.gzip import GZipMiddleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.responses import Response
        from starlette.routing import Route
    follower = Follower(folder)

    def file(text: str, kind: str) -> Callable[["Request"], Response]:
        headers = HEADERS | ({"Cache-Control": "max-age=86400"} if len(text) > 1_000_000 else {})
        return lambda request: Response(text, media_type=kind, headers=headers)

    def answer(make: Callable[["Request"], Any]) -> Callable[["Request"], Response]:
        def respond(request: "Request") -> Response:
            try:
                content, status = make(request), 200
            except EsjaxError as error:
                content, status = {"error": str(error)}, 404
            except msgspec.MsgspecError as error:
                content, status = {"error": str(error)}, 400
            return Response(msgspec.json.encode(content), status, HEADERS, "application/json")

        return respond

    def run(request: "Request") -> dict[str, Any]:
        known = _KNOWN.decode(request.query_params.get("known", "{}"))
        return follower.run(request.query_params.get("run", ""), known.mark, known.points)

    def hosts(request: "Request") -> dict[str, Any]:
        return ask_hosts(follower.path(request.query_params.get("run", "")))

    return Starlette(
        routes=[
            Route("/", file(page_file("page.html"), "text/html")),
            Route("/page.css", file(page_file("page.css"), "text/css")),
            Route("/charts.js", file(page_file("charts.js"), "text/javascript")),
            Route("/page.js", file(page_file("page.js"), "text/javascript")),
            Route("/plotly.js", file(plotly_script("dashboard"), "text/javascript")),
            Route("/api/runs", answer(lambda request: follower.runs())),
            Route("/api/run", answer(run)),
            Route("/api/hosts", answer(hosts)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=NAMES), Middleware(GZipMiddleware)],
    )


def ask_hosts(run: Path) -> dict[str, Any]:
    """Ask the coordinator of a run for the status of its hosts.

    Args:
        run: Run folder.

    Returns:
        `hosts`, a list, and `note`, the reason if the list is empty.
    """
    from esjax.hosts.status import fetch_status
    from esjax.runs.folder import RunFolder

    folder = RunFolder(run)
    address = folder.address
    if address is None:
        return {"hosts": [], "note": ""}
    try:
        status = fetch_status(address, folder.token, PATIENCE)
    except EsjaxError as error:
        return {"hosts": [], "note": str(error)}
    if status.run != folder.name:
        return {"hosts": [], "note": f"another run is at {address} by now"}
    kept = status.reference
    return {
        "hosts": [{**msgspec.structs.asdict(host), "reference": host.slot == kept} for host in status.hosts],
        "note": "" if status.hosts else "no host has joined yet",
    }


def open_port(port: int) -> socket.socket:
    """Listen on the loopback address.

    Args:
        port: The port; 0 takes any free port.

    Raises:
        EsjaxError: The port is out of range, taken, or needs more rights.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()
    except (OSError, OverflowError) as error:
        listening.close()
        raise EsjaxError(f"cannot serve at port {port} ({error}); give another --port, 0 for any free one") from error
    return listening


def serve_page(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        folder: Folder of run folders.
        port: The port; 0 takes any free port.
        tell: Called with the address of the page.

    Raises:
        EsjaxError: The folder does not exist, the port is taken, or a package is missing.
    """
    app = make_app(folder)
    with needing("the dashboard", "dashboard"):
        import uvicorn

    with open_port(port) as listening:
        tell(f"http://{HOST}:{listening.getsockname()[1]}/")
        patience = math.ceil(PATIENCE) + 1
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=patience))
        with stop_on_signals():  # uvicorn stops at a signal and then raises it again
            server.run(sockets=[listening])
