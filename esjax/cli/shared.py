"""What the commands have in common."""

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from esjax.errors import DiskError, EsjaxError

if TYPE_CHECKING:
    from esjax.hosts.serve import Server
    from esjax.tracking import Tracker
    from esjax.training import Trainer

MOST_COLUMNS = 10_000
"""Of a line in a file or a pipe."""

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class Watching:
    """Options of the commands that train: who else is shown the run."""

    track: tyro.conf.UseAppendAction[tuple[Literal["tensorboard", "wandb", "trackio"], ...]] = ()
    """Show the run there, too; may be given several times. wandb stays on this machine until you log in to it."""

    metrics_port: int | None = None
    """Serve Prometheus metrics and health at http://127.0.0.1:PORT/metrics and /healthz; 0: any free port."""

    def trackers(self, tell: Callable[[str], None]) -> "list[Tracker]":
        """Make them, after `prepare` and before anything is written."""
        from esjax.processes import leads
        from esjax.trackers import find_trackers

        if not leads():
            return []
        trackers = find_trackers(self.track)
        if self.metrics_port is not None:
            from esjax.metrics_server import MetricsServer

            server = MetricsServer(self.metrics_port)
            tell(f"metrics at http://127.0.0.1:{server.port}/metrics, health at /healthz")
            trackers.append(server)
        return trackers


def prepare(processes: str | None = None) -> None:
    """Set up the devices, before anything uses JAX.

    Args:
        processes: Those that compute as one, see `esjax.processes.connect`; None: this one alone.
    """
    from esjax.devices import prepare_devices, start_devices

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    prepare_devices(Path(home) / "esjax")
    if processes is not None:
        from esjax.processes import connect

        connect(processes)
    start_devices()


def new_folder(out: Path | None, parent: str = "runs") -> Path:
    """Name the folder to make: `out`, or the time of day, and four random characters for runs that start together."""
    return out or Path(parent) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def teller(console: Console) -> Callable[[str], None]:
    """Make the function that shows a person a line."""
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def wide_console() -> Console:
    """Make a console on standard output that, where it is no terminal, leaves lines as long as they are."""
    console = Console()
    return console if console.is_terminal else Console(width=MOST_COLUMNS)


def show(run: "Trainer | Server", console: Console) -> None:
    """Train, with a line of progress."""
    from esjax.processes import leads
    from esjax.progress import Progress

    if not leads():
        for _ in run:
            pass
        return
    assert run.folder is not None
    with Progress(console, run.baselines, run.limits) as progress:
        run.tell = progress.tell
        try:
            for info in run:
                progress.update(info)
        except DiskError as error:
            raise EsjaxError(f"{error}; {_way_on(run)}") from error
    if run.last is not None and run.last.held_out is not None:
        against = ", ".join(f"{name} {value:.3f}" for name, value in run.baselines.items())
        run.tell(f"held-out {run.last.held_out:.4f} nats/token ({against})")
    run.tell(f"kept in {run.folder.path}")


def _way_on(run: "Trainer | Server") -> str:
    """Say what is kept of a run whose disk is full, and how to go on."""
    from esjax.checkpoint import kept_steps
    from esjax.hosts.serve import Server
    from esjax.ledger import UPDATE, read

    assert run.folder is not None
    kept = kept_steps(run.folder.checkpoints)
    if kept and run.folder.ledger.exists():
        kept += [record.step + 1 for record in read(run.folder.ledger) if record.kind == UPDATE]
    command = "serve --resume" if isinstance(run, Server) else "resume"
    return (
        f"the run is kept to step {max(kept)}; make room, then: esjax {command} {run.folder.path}"
        if kept
        else "make room"
    )
