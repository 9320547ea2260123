"""train and resume."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from esjax.cli.shared import Run, Watching, new_folder, prepare, show, teller
from esjax.config import Config
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from esjax.training import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model from scratch.

    Name a model, rnn or gru, anywhere among the options to choose it and to see its settings: esjax train gru --help.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Run folder to make. None: runs/, the time of day, and four random characters."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    workers: int = 0
    """Train with so many processes of this machine, its cores divided among them. 0: in this one."""

    distributed: str | None = None
    """Be one of several processes that compute as one: auto (TPU pods, Slurm, Open MPI), or HOST:PORT,N,I with the
    address of process 0, the number of processes, and the index of this one."""

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        if self.workers < 0:
            raise EsjaxError(f"workers must be at least 0, got {self.workers}")
        if self.workers and self.distributed:
            raise EsjaxError("workers and distributed are two ways to train with several processes; give one of them")
        prepare(self.distributed)
        out = new_folder(self.out)
        tell = teller(console)
        trackers = self.watching.trackers(tell)
        if self.workers:
            from esjax.hosts.local import local_workers
            from esjax.hosts.serve import serve

            server = serve(self.settings, out, bind="tcp://127.0.0.1:0", trackers=trackers, tell=tell)
            server.while_open = lambda: local_workers(server.address, self.workers, out)
            show(server, console)
            return
        from esjax.training import train

        run = train(self.settings, out, trackers=trackers, tell=tell)
        show(run, console)
        if run.folder is not None:
            _show_sample(run, console)


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint.

    With neither --steps nor --seconds the limits of the run's settings hold; seconds are counted anew.
    """

    run_folder: Run
    """Run folder."""

    steps: int | None = None
    """Stop when the run has done so many steps in all."""

    seconds: float | None = None
    """Train for so many seconds more, from the first finished step on."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        prepare()
        from esjax.training import resume

        tell = teller(console)
        trackers = self.watching.trackers(tell)
        trainer = resume(self.run_folder, steps=self.steps, seconds=self.seconds, trackers=trackers, tell=tell)
        show(trainer, console)
        _show_sample(trainer, console)


def _show_sample(run: "Trainer", console: Console) -> None:
    teller(console)("it writes, between lines of dashes:\n")
    print(f"{run.sample()}\n")
