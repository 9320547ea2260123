"""What the commands have in common."""

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from esjax.config import MODELS, VARIANTS, Config, from_yaml, replace
from esjax.errors import EsjaxError
from esjax.mistakes import form_with, nearest, setting_names

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
    from esjax.devices import prepare_devices

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    prepare_devices(Path(home) / "esjax")
    if processes is not None:
        from esjax.processes import connect

        connect(processes)


def new_folder(out: Path | None, parent: str = "runs") -> Path:
    """Name the folder to make: `out`, or the time of day."""
    return out or Path(parent) / time.strftime("%Y%m%d-%H%M%S")


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
        for info in run:
            progress.update(info)
    if run.last is not None and run.last.held_out is not None:
        against = ", ".join(f"{name} {value:.3f}" for name, value in run.baselines.items())
        run.tell(f"held-out {run.last.held_out:.4f} nats/token ({against})")
    run.tell(f"kept in {run.folder.path}")


def parse_settings(command: Any, name: str, words: list[str]) -> Any:
    """Read settings from a file, then a model's name, then the options, each over the one before.

    Args:
        command: A dataclass whose field `settings` is a `Config`.
        name: Of the command.
        words: After the command.
    """
    settings = Config()
    path = _option(words, "--config")
    if path is not None:
        try:
            settings = from_yaml(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise EsjaxError(f"cannot read the settings {path!r}: {error}") from error
    named = [i for i, word in enumerate(words) if word in MODELS and not (i and _awaits_value(words[i - 1]))]
    if len(named) > 1:
        raise EsjaxError(f"one model at a time, not {' and '.join(words[i] for i in named)}")
    if named:
        kind = MODELS[words[named[0]]]
        if not isinstance(settings.model, kind):  # that of the file keeps its settings
            settings = replace(settings, model=kind())
        words = words[: named[0]] + words[named[0] + 1 :]
    _check_options(command, settings, words)
    try:
        return tyro.cli(
            command,
            args=words,
            prog=f"esjax {name}",
            default=command(settings),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:  # of the settings as a whole; those of a section come as a box of tyro's
        raise EsjaxError(str(error)) from error


def _check_options(command: Any, settings: Config, words: Sequence[str]) -> None:
    """Refuse an option that there is not, if it is clear what was meant."""
    own = [field.name for field in fields(command)]
    own += [field.name for field in fields(Watching)] if "watching" in own else []
    known = [*setting_names(settings), *(name for name in own if name not in ("settings", "watching")), "help"]
    for word in words:
        option = word.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name in known or re.sub(r"(^|\.)no_", r"\1", name) in known:
            continue
        if model := form_with(name, VARIANTS):
            raise EsjaxError(f"{option} is a setting of the model {model}; name it, too: esjax ... {model} {option}")
        if near := nearest(name, known):
            raise EsjaxError(f"there is no option {option}; did you mean --{near.replace('_', '-')}?")


def _awaits_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word and word != "--help"


def _option(words: Sequence[str], name: str) -> str | None:
    """Find an option's value before the whole line can be read."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return None
