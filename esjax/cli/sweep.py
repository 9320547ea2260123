"""The command sweep."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from esjax.cli.shared import (
    CustomOptions,
    announce_to_hosts,
    command_line,
    new_folder,
    open_console,
    prepare,
    show,
    teller,
)
from esjax.config.settings import Config
from esjax.errors import EsjaxError
from esjax.hosts.local import check_workers
from esjax.texts import legible
from esjax.tuning.axes import parse_axes

if TYPE_CHECKING:
    from esjax.hosts.serve import Server
    from esjax.training.run import Trainer
    from esjax.tuning.seed_means import SeedMean
    from esjax.tuning.sweep import Hosts, Outcome


@dataclass(frozen=True)
class Sweep:
    """Train a grid of settings, one run after another, and compare them.

    Takes the settings of train, for all settings that are not axes. The same command again, or --resume, continues a
    sweep that was stopped.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    axis: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A setting and its values, such as es.sigma=0.05,0.1 or model=rnn,gru; once for each axis of the grid."""

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Folder of the sweep. None: a new folder in sweeps/, named by date and time."""

    resume: Path | None = None
    """Folder of a sweep to continue; it holds the axes and settings."""

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    workers: int = 0
    """Number of worker processes on this machine, which share its cores. 0: train in this process."""

    oversubscribe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow more workers than cores; each takes at least 0.6 GB of memory."""

    bind: str | None = None
    """Train with hosts that join at this address, tcp://HOST:PORT, with --stay."""

    keys: Path | None = None
    """With bind: folder of the keys. None: "keys" in the folder of the sweep; on a loopback address, no keys."""

    plain_text_anywhere: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With bind: listen without keys on any address."""

    def run(self, console: Console) -> None:
        """Train the runs that are not finished, then print the table and draw the plot."""
        tell = teller(console)
        check_workers(self.workers, self.oversubscribe)
        if self.workers and self.bind:
            raise EsjaxError("workers and bind are two ways to train with hosts; give one of them")
        if self.bind and self.bind.endswith(":0"):
            raise EsjaxError("hosts stay at one address from run to run; give --bind a port other than 0")
        if self.resume is not None and (self.axis or self.out or self.settings != Config()):
            raise EsjaxError("a sweep that is resumed has its axes, its settings and its folder; give --resume alone")
        axes = parse_axes(self.axis)
        if self.workers or self.bind:  # the coordinator leaves accelerators to the hosts
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        prepare()
        from esjax.tuning.sweep import TABLE, resume_sweep_with, sweep_with

        def show_run(run: "Trainer | Server") -> None:
            show(run, console)

        hosts = self._hosts()
        custom = self.custom.load()
        if self.resume is None:
            out = new_folder(self.out, "sweeps")
            grid = sweep_with(custom, axes, self.settings, out=out, hosts=hosts, show=show_run, tell=tell)
        else:
            grid = resume_sweep_with(custom, self.resume, hosts=hosts, show=show_run, tell=tell)
        again = command_line("esjax", "sweep", "--resume", grid.path)
        try:
            for _ in grid:
                pass
        except KeyboardInterrupt:
            tell(f"stopped; go on with: {again}")
            raise
        outcomes = grid.outcomes()
        open_console().print(_table(outcomes))
        self._compare(outcomes, tell)
        tell(f"kept in {grid.path / TABLE}")
        self._draw(outcomes, grid.path / "sweep.png", tell)
        if grid.stopped:
            tell(f"stopped; go on with: {again}")
            sys.exit(130)
        if any(outcome.state == "failed" for outcome in outcomes):
            tell(f"what failed is tried again by: {again}")
            sys.exit(1)
        if grid.lost:
            tell(f"not kept: {', '.join(grid.lost)}; the reason is in their logs in {grid.path}")
            sys.exit(1)

    def _compare(self, outcomes: "Sequence[Outcome]", tell: Callable[[str], None]) -> None:
        """Print means over the seeds, and the best settings."""
        from esjax.tuning.seed_means import SEED, seed_means

        if len(outcomes) < 2 or all(one.state != "finished" for one in outcomes):
            return
        if len({one.values.get(SEED) for one in outcomes}) < 2:
            tell(
                "one seed: how far runs of other seeds lie apart is not known; to compare settings, add an axis, "
                "--axis seed=0,1,2"
            )
            return
        means = seed_means(outcomes)
        if len(means) > 1:
            open_console().print(_mean_table(means))
        print(conclusion(means))

    def _draw(self, outcomes: "Sequence[Outcome]", path: Path, tell: Callable[[str], None]) -> None:
        from esjax.tuning.sweep_plot import draw

        try:
            if draw(outcomes, path):
                tell(f"drawn in {path}")
        except EsjaxError as error:
            tell(f"{error}; then {command_line('esjax', 'sweep', '--resume', path.parent)} draws it")

    def _hosts(self) -> "Hosts | None":
        from esjax.tuning.sweep import ANY_PORT, Hosts

        if not (self.workers or self.bind):
            return None
        address = self.bind or ANY_PORT
        return Hosts(self.workers, address, self.keys, self.plain_text_anywhere, _announce, self.oversubscribe)


def conclusion(means: "Sequence[SeedMean]") -> str:
    """Return a line that names the best settings over the seeds, or those that do not differ significantly."""
    if not means or means[0].seeds < 2:
        return "fewer than two seeds have finished for all settings, so they cannot be compared"
    if len(means) == 1:
        unit = "nats per token" if means[0].ranked_by == "held-out loss" else means[0].ranked_by
        interval = f"{means[0].mean:.4f} ± {means[0].interval:.4f} {unit} over {means[0].seeds} seeds"
        return f"{interval}; nothing to compare it with"
    ahead = [" ".join(f"{name}={value}" for name, value in mean.values.items()) for mean in means if mean.ahead]
    if len(ahead) == 1:
        return f"best over {means[0].seeds} seeds: {ahead[0]}"
    return f"no difference seen between {', '.join(ahead)}; more seeds show smaller differences"


def _mean_table(means: "Sequence[SeedMean]") -> Table:
    """Make the table of means over the seeds, best first, with half of their 95% intervals."""
    table = Table(box=None)
    for name in means[0].values:
        table.add_column(name)
    for name in (f"mean {means[0].ranked_by}", "± 95%", "seeds"):
        table.add_column(name, justify="right")
    for mean in means:
        interval = f"{mean.interval:.4f}" if math.isfinite(mean.interval) else "-"
        table.add_row(*map(str, mean.values.values()), f"{mean.mean:.4f}", interval, str(mean.seeds))
    return table


def _announce(server: "Server") -> None:
    announce_to_hosts(server, "--stay")


def _table(outcomes: "Sequence[Outcome]") -> Table:
    """Make the table of runs, with the values of the axes."""
    table = Table(box=None)
    for name in outcomes[0].values:
        table.add_column(name)
    for name in (outcomes[0].ranked_by, "seconds", "member-tokens", "steps"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in outcomes:
        note = f"{one.state}: {legible(one.note)}" if one.note else "" if one.state == "finished" else one.state
        table.add_row(
            *map(str, one.values.values()),
            "-" if one.value is None else f"{one.value:.4f}" if one.value < 1000 else f"{one.value:.2g}",
            f"{one.seconds:.1f}",
            f"{one.member_tokens:,}",
            f"{one.step:,}",
            note,
            style="red" if one.note else None,
        )
    return table
