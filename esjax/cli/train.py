"""The commands train and resume."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from esjax.cli.shared import CustomOptions, Moved, MovedPrompts, Run, Watching, new_folder, prepare, show, teller
from esjax.config.settings import Config
from esjax.errors import EsjaxError
from esjax.hosts.local import LocalWorkers, check_workers
from esjax.terminal import print_text

if TYPE_CHECKING:
    from esjax.training.run import Trainer


@dataclass(frozen=True)
class Train:
    """Train a model from scratch.

    The name of a model, such as gru, mingru or transformer, or PATH.py:FUNCTION, anywhere among the options chooses it:
    esjax train gru --help lists its settings.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Run folder to make. None: a new folder in runs/, named by date and time."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    workers: int = 0
    """Number of worker processes on this machine, which share its cores. 0: train in this process."""

    oversubscribe: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow more workers than cores; each takes at least 0.6 GB of memory."""

    distributed: str | None = None
    """Be one process of a process group: auto (TPU pods, Slurm, Open MPI), or HOST:PORT,N,I with the address of process
    0, the number of processes, and the index of this one."""

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        check_workers(self.workers, self.oversubscribe)
        if self.workers and self.distributed:
            raise EsjaxError("workers and distributed are two ways to train with several processes; give one of them")
        prepare(self.distributed)
        out = new_folder(self.out)
        custom = self.custom.load()
        tell = teller(console)
        trackers = self.watching.trackers(tell)
        if self.workers:
            from esjax.hosts.serve import serve_with

            server = serve_with(custom, self.settings, out, bind="tcp://127.0.0.1:0", trackers=trackers, tell=tell)
            workers = LocalWorkers(
                self.workers,
                server.folder.path,
                lambda line: server.tell(line),
                given=server.custom.words(),
                oversubscribe=self.oversubscribe,
            )
            server.while_open = lambda: workers.joined(server.address)
            show(server, console)
            workers.check_kept()
            return
        from esjax.training.run import train_with

        run = train_with(custom, self.settings, out, trackers=trackers, tell=tell)
        show(run, console)
        if run.folder is not None:
            _show_sample(run, console)


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest checkpoint, and from every later update if it was trained with --ledger.

    Without --steps and --seconds the limits in the settings of the run hold; seconds count from this start.
    """

    run_folder: Run
    """Run folder."""

    steps: int | None = None
    """Total number of steps at which to stop."""

    seconds: float | None = None
    """Seconds to train, from the end of the first step."""

    text: Moved = None
    """New place of the run's text, which must be unchanged. None: the place in its settings."""

    prompts: MovedPrompts = None
    """New place of the run's prompts, which must be unchanged. None: the place in its settings."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        prepare()
        from esjax.training.run import resume_with

        tell = teller(console)
        trackers = self.watching.trackers(tell)
        trainer = resume_with(
            self.custom.load(),
            self.run_folder,
            steps=self.steps,
            seconds=self.seconds,
            text=self.text,
            prompts=self.prompts,
            trackers=trackers,
            tell=tell,
        )
        show(trainer, console)
        _show_sample(trainer, console)


def _show_sample(run: "Trainer", console: Console) -> None:
    teller(console)("samples, separated by lines of dashes:")
    print_text(f"\n{run.sample()}\n")
