"""Options and helpers that several commands share."""

import os
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from esjax import __version__
from esjax.errors import DiskError, EsjaxError
from esjax.paths import cache_folder, given_path
from esjax.terminal import has_cursor
from esjax.texts import legible

if TYPE_CHECKING:
    from esjax.hosts.serve import Server
    from esjax.models.custom import Custom
    from esjax.training.run import Trainer
    from esjax.watch.tracking import Tracker

MOST_COLUMNS = 10_000
"""Columns of a console whose lines must not be wrapped."""

LITERAL: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
"""Options of a console that prints text literally, also [red] and :car:."""

PATHS = tyro.constructors.ConstructorRegistry()
"""Reads every path on the command line by `given_path`."""

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


Moved = Annotated[str | None, tyro.conf.arg(name="data.text")]

MovedPrompts = Annotated[str | None, tyro.conf.arg(name="reward.prompts")]

ModelOption = Annotated[str | None, tyro.conf.arg(metavar="PATH.py:FUNCTION")]


@PATHS.primitive_rule
def _read_path(kind: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    if kind.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: given_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def command_line(*words: str | Path) -> str:
    """Return a command quoted for a shell."""
    return shlex.join(map(str, words))


@dataclass(frozen=True)
class Watching:
    """Options for trackers, of the commands that train."""

    track: tyro.conf.UseAppendAction[tuple[Literal["tensorboard", "wandb", "trackio"], ...]] = ()
    """Send metrics to this tracker, too; may be given several times. wandb stays offline until you log in."""

    metrics_port: int | None = None
    """Serve Prometheus metrics and health at http://127.0.0.1:PORT/metrics and /healthz; 0: any free port."""

    def trackers(self, tell: Callable[[str], None]) -> "list[Tracker]":
        """Make the trackers, after `prepare` and before anything is written."""
        from esjax.devices.process_group import leads
        from esjax.watch.trackers import find_trackers

        if not leads():
            return []
        trackers = find_trackers(self.track)
        if self.metrics_port is not None:
            from esjax.watch.metrics_server import MetricsServer

            server = MetricsServer(self.metrics_port)
            tell(f"metrics at http://127.0.0.1:{server.port}/metrics, health at /healthz")
            trackers.append(server)
        return trackers


@dataclass(frozen=True)
class CustomOptions:
    """Options for custom parts, of the commands that train. See docs/extending.md."""

    model: ModelOption = None
    """Custom model: a function that takes the number of token ids and returns an esjax.Model. The file is executed as
    Python, so it must be trusted."""

    loss: Annotated[str | None, tyro.conf.arg(name="loss.function", metavar="PATH.py:FUNCTION")] = None
    """Custom loss to minimise: (member, tokens, key) -> float32."""

    reward: Annotated[str | None, tyro.conf.arg(name="reward.function", metavar="PATH.py:FUNCTION")] = None
    """Custom reward to maximise: (member, tokens, key) -> float32, or (prompts, completions) -> list of floats in plain
    Python, with --reward.prompts. See docs/rewards.md."""

    tool: Annotated[str | None, tyro.conf.arg(name="reward.tool", metavar="PATH.py:FUNCTION")] = None
    """Tool that members call while they write for a reward in Python: (text) -> string. See --reward.tool-at."""

    optimizer: Annotated[str | None, tyro.conf.arg(name="optim.custom", metavar="PATH.py:FUNCTION")] = None
    """Custom optimizer: a function without arguments that returns an optax transformation."""

    def load(self) -> "Custom":
        """Load the custom parts that are given, after `prepare`."""
        from esjax.models.custom.code import load_custom

        return load_custom(
            model=self.model, loss=self.loss, reward=self.reward, tool=self.tool, optimizer=self.optimizer
        )


def prepare(processes: str | None = None) -> None:
    """Set up the devices, before anything uses JAX.

    Args:
        processes: Process group to join, see `esjax.devices.process_group.connect`; None: this process alone.
    """
    from esjax.devices.mesh import prepare_devices, start_devices

    prepare_devices(cache_folder())
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # an unusable cache only costs seconds
        warnings.filterwarnings("ignore", r"Error (reading|writing) persistent compilation cache", UserWarning)
    if processes is not None:
        from esjax.devices.process_group import connect

        connect(processes)
    start_devices()


def new_folder(out: Path | None, parent: str = "runs") -> Path:
    """Return the folder to make: `out`, or a name from date, time and four random characters."""
    return out or given_path(parent) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def teller(console: Console) -> Callable[[str], None]:
    """Return the function that prints a line for the user; it stays one line."""
    return lambda line: console.print(legible(line), soft_wrap=True)


def announce_to_hosts(server: "Server", *more: str) -> None:
    """Print the command with which a host joins, and the files that it needs.

    Args:
        server: The run, after its address is known.
        more: Further options of the command.
    """
    config = server.config
    token = [] if server.token is None else ["--token-file", str(server.token)]
    start = [] if config.init is None or config.hosts.send_init else ["--init", config.init]
    prompts = [] if config.reward.prompts is None else ["--reward.prompts", config.reward.prompts]
    words = [*token, *start, *server.custom.words(), *prompts, *more]
    print(command_line("esjax", "join", server.address, *words), flush=True)
    code = dict.fromkeys(code.path for code in server.custom.code.values())
    files = [*token[1:], *start[1:], *code, *prompts[1:]]
    if server.is_local:
        how = "give the line above in other terminals of this machine"
    elif files:
        how = f"copy {' and '.join(files)} to each machine, and give the line above there, with the paths of the copies"
    else:
        how = "give the line above on each machine"
    server.tell(f"waiting for hosts: {how}; each needs esjax {__version__}. The first one starts the training")


def open_console(*, stderr: bool = False) -> Console:
    """Make a console on standard output or standard error.

    A line of progress on standard error keeps to the width of the terminal, if the terminal can move its cursor.
    Tables, on standard output, are never cut off; a narrow terminal wraps them. Colors follow FORCE_COLOR and NO_COLOR.
    A closed output discards everything.
    """
    stream = sys.stderr if stderr else sys.stdout
    movable = has_cursor(stream)
    width = None if movable and stderr else MOST_COLUMNS
    return Console(stderr=stderr, force_interactive=movable, quiet=stream is None, width=width, **LITERAL)


def show(run: "Trainer | Server", console: Console) -> None:
    """Train, with a line of progress."""
    from esjax.devices.process_group import leads
    from esjax.watch.progress import Progress

    if not leads():
        with run.handling_signals():
            for _ in run:
                pass
        return
    assert run.folder is not None
    per_byte = run.corpus.bits_of_a_nat if run.baselines else 0.0
    is_subword = run.corpus.vocabulary.kind == "tokenizer"
    shown_per_byte = per_byte if is_subword else 0.0
    with run.handling_signals(), Progress(console, run.baselines, run.limits, shown_per_byte) as progress:
        run.tell = progress.tell
        run.on_start = lambda: run.tell(run.summary())
        try:
            for info in run:
                progress.update(info)
        except DiskError as error:
            raise EsjaxError(f"{error}; {_way_on(run, error.remedy)}") from error
    if run.last is not None and run.last.held_out is not None:
        against = ", ".join(f"{name} {value:.3f}" for name, value in run.baselines.items())
        bits = f", {run.last.held_out * per_byte:.4f} bits/byte" if per_byte else ""
        unit = " nats/token" if run.baselines or run.config.writes else ""
        run.tell(f"held-out {run.last.held_out:.4f}{unit}{bits}" + (f" ({against})" if against else ""))
    if run.last is not None and run.last.greedy_reward is not None:
        run.tell(f"on held-out prompts: greedy reward {run.last.greedy_reward:.4f}, pass@k {run.last.pass_at_k:.4f}")
    run.tell(f"kept in {run.folder.path}")


def _way_on(run: "Trainer | Server", remedy: str) -> str:
    """Return what is kept of a run after a disk error, and how to resume it."""
    from esjax.hosts.serve import Server
    from esjax.runs.checkpoint import kept_steps
    from esjax.runs.ledger import UPDATE, read

    assert run.folder is not None
    kept = kept_steps(run.folder.checkpoints)
    if run.folder.ledger.exists():
        records = read(run.folder.ledger, max(kept, default=0))
        kept += [record.step + 1 for record in records if record.kind == UPDATE]
    words = ("serve", "--resume") if isinstance(run, Server) else ("resume",)
    again = command_line("esjax", *words, run.folder.path)
    return f"the run is kept to step {max(kept)}; {remedy}, then: {again}" if kept else remedy
