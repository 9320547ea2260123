"""The command `bench`: runs benchmarks and stores their results."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tyro
from rich.console import Console

from bench import settings
from bench.settings import SHORT
from esjax.cli.shared import prepare
from esjax.errors import EsjaxError

TARGETS = "targets"


@dataclass(frozen=True)
class Bench:
    """Measure speed and learning, in comparison with other libraries.

    Each benchmark writes NAME.json, a table NAME.md and a plot NAME.png. At the end all results in the folder are
    compared with the targets; the name `targets` does only that.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Benchmarks to run. None: all."""

    short: bool = False
    """A few seconds each, with small settings in place of those below, to see that they run."""

    out: Path = Path("runs/bench")
    """Folder for what is found."""

    throughput: settings.Throughput = field(default_factory=settings.Throughput)
    update: settings.Update = field(default_factory=settings.Update)
    rewards: settings.Rewards = field(default_factory=settings.Rewards)
    learning: settings.Learning = field(default_factory=settings.Learning)
    growth: settings.Growth = field(default_factory=settings.Growth)
    start: settings.Start = field(default_factory=settings.Start)
    ablation: settings.Ablation = field(default_factory=settings.Ablation)
    scale_free: settings.ScaleFree = field(default_factory=settings.ScaleFree)
    scaling: settings.Scaling = field(default_factory=settings.Scaling)
    activation: settings.Activation = field(default_factory=settings.Activation)
    frameworks: settings.Frameworks = field(default_factory=settings.Frameworks)
    exchange: settings.Exchange = field(default_factory=settings.Exchange)
    cosines: settings.Cosines = field(default_factory=settings.Cosines)
    bias: settings.Bias = field(default_factory=settings.Bias)
    execution: settings.Execution = field(default_factory=settings.Execution)
    workers: settings.Workers = field(default_factory=settings.Workers)
    watching: settings.Watching = field(default_factory=settings.Watching)
    coordinator: settings.Coordinator = field(default_factory=settings.Coordinator)
    liars: settings.Liars = field(default_factory=settings.Liars)
    floods: settings.Floods = field(default_factory=settings.Floods)

    def run(self, console: Console) -> None:
        """Run the benchmarks one after another."""
        for name in self.names:
            if name not in (*SHORT, TARGETS):
                raise EsjaxError(f"there is no benchmark {name!r}; there are {', '.join((*SHORT, TARGETS))}")
        prepare()
        from bench.report import to_table, write
        from bench.targets import compare

        for name in self.names or SHORT:
            if name == TARGETS:
                continue
            chosen: Any = SHORT[name] if self.short else getattr(self, name)
            console.print(f"{name} ...", markup=False, highlight=False)
            report = importlib.import_module(f"bench.{name}").run(chosen)
            print(f"\n{write(self.out, name, msgspec.to_builtins(chosen), report)}\n", flush=True)
        print(f"{to_table(compare(self.out))}\n", flush=True)
        console.print(f"kept in {self.out}", markup=False, highlight=False)
