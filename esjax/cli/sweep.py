"""sweep."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from esjax.axes import parse_axes
from esjax.cli.shared import new_folder, prepare, show, teller, wide_console
from esjax.config import Config
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from esjax.hosts.serve import Server
    from esjax.sweeping import Hosts, Outcome
    from esjax.training import Trainer


@dataclass(frozen=True)
class Sweep:
    """Train a grid of settings, one run after another, and compare them.

    Takes the settings of train, which hold for what is no axis. The same line again, or --resume, goes on where it
    stopped.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    axis: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A setting and its values, es.sigma=0.05,0.1; once for each axis of the grid. model=rnn,gru: architectures."""

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Folder of the runs. None: sweeps/, the time of day, and four random characters."""

    resume: Path | None = None
    """Folder of a sweep to go on with; it knows its axes and settings."""

    workers: int = 0
    """Train with so many processes of this machine, its cores divided among them. 0: in this one."""

    bind: str | None = None
    """Train with hosts that join at this address, tcp://HOST:PORT, run after run; let them join with --stay."""

    keys: Path | None = None
    """With bind: folder of the keys. None: "keys" in the sweep's folder, and no keys on a loopback address."""

    plain_text_anywhere: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With bind: listen on any address without keys."""

    def run(self, console: Console) -> None:
        """Train what is not finished, then print the table and draw the plot."""
        tell = teller(console)
        if self.workers < 0:
            raise EsjaxError(f"workers must be at least 0, got {self.workers}")
        if self.workers and self.bind:
            raise EsjaxError("workers and bind are two ways to train with hosts; give one of them")
        if self.bind and self.bind.endswith(":0"):
            raise EsjaxError("hosts stay at one address from run to run; give --bind a port other than 0")
        if self.resume is not None and (self.axis or self.out or self.settings != Config()):
            raise EsjaxError("a sweep that is resumed has its axes, its settings and its folder; give --resume alone")
        axes = parse_axes(self.axis)
        if self.workers or self.bind:  # a coordinator leaves accelerators to the hosts
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        prepare()
        from esjax.sweeping import TABLE, resume_sweep, sweep

        def show_run(run: "Trainer | Server") -> None:
            show(run, console)

        hosts = self._hosts()
        if self.resume is None:
            out = new_folder(self.out, "sweeps")
            grid = sweep(axes, self.settings, out=out, hosts=hosts, show=show_run, tell=tell)
        else:
            grid = resume_sweep(self.resume, hosts=hosts, show=show_run, tell=tell)
        how = f"go on with: esjax sweep --resume {grid.path}"
        try:
            for _ in grid:
                pass
        except KeyboardInterrupt:
            tell(f"stopped; {how}")
            raise
        outcomes = grid.outcomes()
        wide_console().print(_table(outcomes))
        tell(f"kept in {grid.path / TABLE}")
        self._draw(outcomes, grid.path / "sweep.png", tell)
        if grid.stopped:
            tell(f"stopped; {how}")
            sys.exit(130)
        if any(outcome.state == "failed" for outcome in outcomes):
            tell(f"what failed is tried again by: esjax sweep --resume {grid.path}")
            sys.exit(1)

    def _draw(self, outcomes: "Sequence[Outcome]", path: Path, tell: Callable[[str], None]) -> None:
        from esjax.sweep_plot import draw

        try:
            if draw(outcomes, path):
                tell(f"drawn in {path}")
        except EsjaxError as error:
            tell(f"{error}; then esjax sweep --resume {path.parent} draws it")

    def _hosts(self) -> "Hosts | None":
        from esjax.sweeping import ANY_PORT, Hosts

        if not (self.workers or self.bind):
            return None
        return Hosts(self.workers, self.bind or ANY_PORT, self.keys, self.plain_text_anywhere, _announce)


def _announce(server: "Server") -> None:
    token = f" --token-file {server.token}" if server.token else ""
    print(f"esjax join {server.address}{token} --stay", flush=True)


def _table(outcomes: "Sequence[Outcome]") -> Table:
    """Show the settings that were varied and what they came to, best first."""
    table = Table(box=None)
    for name in outcomes[0].values:
        table.add_column(name)
    for name in ("held-out", "seconds", "member-tokens", "steps"):
        table.add_column(name, justify="right")
    table.add_column("")
    for rank, one in enumerate(outcomes):
        note = f"{one.state}: {one.note}" if one.note else "" if one.state == "finished" else one.state
        table.add_row(
            *map(str, one.values.values()),
            "-" if one.held_out is None else f"{one.held_out:.4f}" if one.held_out < 1000 else f"{one.held_out:.2g}",
            f"{one.seconds:.1f}",
            f"{one.member_tokens:,}",
            f"{one.step:,}",
            note,
            style="red" if one.note else "bold green" if rank == 0 and one.state == "finished" else None,
        )
    return table
