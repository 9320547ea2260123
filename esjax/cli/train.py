"""train and resume."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from esjax.cli.shared import CustomOptions, Moved, Run, Watching, new_folder, prepare, show, teller
from esjax.config.settings import Config
from esjax.errors import EsjaxError
from esjax.hosts.local import check_workers

if TYPE_CHECKING:
    from esjax.training.run import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model from scratch.

    Name a model, rnn, gru or PATH.py:FUNCTION, anywhere among the options to choose it and to see its settings: esjax
    train gru --help.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Run folder to make. None: runs/, the time of day, and four random characters."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    workers: int = 0
    """Train with so many processes of this machine, its cores divided among them. 0: in this one."""

    oversubscribe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let there be more workers than cores; each takes 0.6 GB of memory or more."""

    distributed: str | None = None
    """Be one of several processes that compute as one: auto (TPU pods, Slurm, Open MPI), or HOST:PORT,N,I with the
    address of process 0, the number of processes, and the index of this one."""

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        check_workers(self.workers, self.oversubscribe)
        if self.workers and self.distributed:
            raise EsjaxError("workers and distributed are two ways to train with several processes; give one of them")
        prepare(self.distributed)
        out = new_folder(self.out)
        custom: Any = self.custom.given()
        tell = teller(console)
        trackers = self.watching.trackers(tell)
        if self.workers:
            from esjax.hosts.local import local_workers
            from esjax.hosts.serve import serve

            server = serve(self.settings, out, bind="tcp://127.0.0.1:0", trackers=trackers, tell=tell, **custom)
            server.while_open = lambda: local_workers(
                server.address,
                self.workers,
                server.folder.path,
                given=server.custom.words(),
                oversubscribe=self.oversubscribe,
            )
            show(server, console)
            return
        from esjax.training.run import train

        run = train(self.settings, out, trackers=trackers, tell=tell, **custom)
        show(run, console)
        if run.folder is not None:
            _show_sample(run, console)


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint, and every update since if it was trained with --ledger.

    With neither --steps nor --seconds the limits of the run's settings hold; seconds are counted anew.
    """

    run_folder: Run
    """Run folder."""

    steps: int | None = None
    """Stop when the run has done so many steps in all."""

    seconds: float | None = None
    """Train for so many seconds more, from the first finished step on."""

    text: Moved = None
    """Where the run's text is now; it must be the same text. None: where it was."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        prepare()
        from esjax.training.run import resume

        tell = teller(console)
        trackers = self.watching.trackers(tell)
        custom: Any = self.custom.given()
        trainer = resume(
            self.run_folder,
            steps=self.steps,
            seconds=self.seconds,
            text=self.text,
            trackers=trackers,
            tell=tell,
            **custom,
        )
        show(trainer, console)
        _show_sample(trainer, console)


def _show_sample(run: "Trainer", console: Console) -> None:
    teller(console)("it writes, between lines of dashes:\n")
    print(f"{run.sample()}\n")
