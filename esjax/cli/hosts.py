"""The commands serve, join, status, token and replay."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from esjax.cli.shared import (
    CustomOptions,
    Moved,
    MovedPrompts,
    Run,
    Watching,
    announce_to_hosts,
    command_line,
    new_folder,
    open_console,
    prepare,
    show,
    teller,
)
from esjax.config.settings import Config, replace
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from esjax.hosts.protocol.wire import Status as StatusReply

Address = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADDRESS")]


@dataclass(frozen=True)
class Serve:
    """Coordinate a new or resumed run that hosts join over the network.

    Takes the settings of train. Prints the command with which hosts join, and the files that they need.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    config: Path | None = None
    """YAML file of settings; options on the command line override it."""

    out: Path | None = None
    """Run folder to make. None: a new folder in runs/, named by date and time."""

    resume: Path | None = None
    """Run folder to resume, in place of a new run. It keeps its settings, except for steps, seconds and data.text, the
    new place of its text."""

    bind: str = "tcp://127.0.0.1:5555"
    """Address to listen at; the next port is used for broadcasts. tcp://0.0.0.0:PORT listens on all interfaces."""

    keys: Path | None = None
    """Folder of the keys. None: "keys" in the run folder; on a loopback address, no keys."""

    plain_text_anywhere: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Listen without keys on any address: everyone who reaches it can read the traffic and join."""

    watching: Annotated[Watching, tyro.conf.arg(name="")] = field(default_factory=Watching)

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    def run(self, console: Console) -> None:
        """Coordinate until a limit or Ctrl-C."""
        if self.resume is not None and (self.out or self.config or _without_limits(self.settings) != Config()):
            raise EsjaxError(
                "a run that is resumed has its settings and its folder; beside --resume give none of them but --steps, "
                "--seconds and --data.text"
            )
        # A coordinator holds no weights, so it leaves accelerators to the hosts.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        prepare()
        from esjax.hosts.serve import resume_serving_with, serve_with

        tell = teller(console)
        where: Any = {
            "bind": self.bind,
            "keys": self.keys,
            "plain_text_anywhere": self.plain_text_anywhere,
            "trackers": self.watching.trackers(tell),
            "tell": tell,
        }
        custom = self.custom.load()
        if self.resume is None:
            server = serve_with(custom, self.settings, new_folder(self.out), **where)
        else:
            text = self.settings.data.text
            server = resume_serving_with(
                custom,
                self.resume,
                steps=self.settings.steps,
                seconds=self.settings.seconds,
                text=None if text == Config().data.text else text,
                **where,
            )

        @contextmanager
        def announce() -> Iterator[None]:
            announce_to_hosts(server)
            yield

        server.while_open = announce
        show(server, console)


def _without_limits(settings: Config) -> Config:
    """Return settings without those that a resumed run takes."""
    return replace(settings, steps=None, seconds=None, data=replace(settings.data, text=Config().data.text))


@dataclass(frozen=True)
class Join:
    """Join a run as a host, with the devices of this machine."""

    address: Address
    """Address of the coordinator, tcp://HOST:PORT."""

    token_file: Path | None = None
    """Token file from the coordinator, if it has keys."""

    name: str | None = None
    """Name of this host; a newer host of the same name replaces it. None: a name is made up."""

    lifetime: float | None = None
    """Seconds after which to leave. None: stay to the end."""

    distributed: str | None = None
    """Be one of several processes that form one host, such as a TPU pod: auto, or HOST:PORT,N,I, see train."""

    patience: float = 600.0
    """Seconds without a message from the coordinator after which to give up."""

    stay: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """After the end of the run, wait for the next run at the address, as in a sweep."""

    init: Path | None = None
    """Copy of the weights that the run starts from: a run folder or a file, see train. None: where its settings say."""

    prompts: MovedPrompts = None
    """Copy of the prompts of a reward in Python, see train. None: where the settings of the run say."""

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    def run(self, console: Console) -> None:
        """Score pairs until training ends, SIGTERM or Ctrl-C."""
        if self.lifetime is not None and not self.lifetime > 0:
            raise EsjaxError(f"lifetime must be above 0, got {self.lifetime}")
        prepare(self.distributed)
        from esjax.hosts.executor import TASKS
        from esjax.hosts.join import join_with

        try:
            join_with(
                self.custom.load(),
                self.address,
                token_file=self.token_file,
                name=self.name,
                lifetime=self.lifetime,
                patience=self.patience,
                stay=self.stay,
                init=self.init,
                prompts=self.prompts,
                tell=teller(console),
            )
        except EsjaxError as error:
            teller(console)(f"error: {error}")
            code = 2
        else:
            code = 0
        if any(thread.name == TASKS for thread in threading.enumerate()):
            # A running device task cannot be interrupted, and Python would wait for it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


@dataclass(frozen=True)
class Status:
    """Show the status of a run and its hosts."""

    address: Address
    """Address of the coordinator, tcp://HOST:PORT."""

    token_file: Path | None = None
    """Token file from the coordinator, if it has keys."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    def run(self, console: Console) -> None:
        """Print the status."""
        from esjax.hosts.status import fetch_status

        status = fetch_status(self.address, self.token_file)
        if self.json:
            import msgspec

            print(msgspec.json.encode(msgspec.structs.asdict(status)).decode())
        else:
            _print(status)


@dataclass(frozen=True)
class Token:
    """Make or revoke a token, which a host needs to join."""

    action: Annotated[Literal["new", "revoke"], tyro.conf.Positional]
    """new: make a token and admit its key. revoke: refuse its key from now on."""

    keys: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="KEYS")]
    """Folder of the coordinator's keys: RUN/keys, or the --keys of serve."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the token."""

    address: str = "tcp://127.0.0.1:5555"
    """Address at which hosts reach the coordinator; it is part of the token."""

    def run(self, console: Console) -> None:
        """Change the folder of keys; a running coordinator notices."""
        from esjax.hosts.transport.address import parse_address
        from esjax.hosts.transport.keys import ServerKeys
        from esjax.hosts.transport.sockets import check_curve, new_keypair

        if self.action == "new":
            check_curve()
        keys = ServerKeys(self.keys, new_keypair, teller(console))
        if self.action == "new":
            parse_address(self.address)
            token = keys.new_token(self.name, self.address)
            print(command_line("esjax", "join", self.address, "--token-file", token))
        else:
            keys.revoke_token(self.name)


@dataclass(frozen=True)
class Replay:
    """Rebuild the weights of a run from its ledger, and compare digests."""

    run_folder: Run
    """Run folder."""

    text: Moved = None
    """New place of the run's text, which must be unchanged. None: the place in its settings."""

    custom: Annotated[CustomOptions, tyro.conf.arg(name="")] = field(default_factory=CustomOptions)

    def run(self, console: Console) -> None:
        """Print the result; exit with 1 unless at least one digest was compared and all agree."""
        prepare()
        from esjax.training.replay import replay_with

        found = replay_with(self.custom.load(), self.run_folder, text=self.text, tell=teller(console))
        print(found.summary())
        sys.exit(0 if found.agrees else 1)


def _print(status: "StatusReply") -> None:
    loss = "none yet" if status.loss is None else f"{status.loss:.3f}"
    measured = "" if status.held_out is None else f"  held-out {status.held_out:.3f}"
    rate = f"{status.member_tokens_per_second / 1e6:.2f} M/s"
    for name, value in (
        *status.rewards.items(),
        ("greedy reward", status.greedy_reward),
        ("pass@k", status.pass_at_k),
    ):
        measured += "" if value is None else f"  {name} {value:.3f}"
    print(f"run {status.run}  step {status.step:,}  loss {loss}{measured}  {'paused' if status.paused else rate}")
    table = Table("host", "state", "step", "members/s", "share", "last seen", "digest", "device", "note", box=None)
    for host in status.hosts:
        mark = " *" if host.slot == status.reference else ""
        table.add_row(
            host.name + mark,
            host.state,
            f"{host.step:,}",
            f"{host.members_per_second:,.0f}",
            f"{host.share:.0%}",
            f"{host.last_seen:.0f} s",
            host.digest[:8],
            host.device,
            host.note,
        )
    open_console().print(table)
    if any(host.slot == status.reference for host in status.hosts):
        print("* checkpoints save the state of this host")
    for reason, count in sorted(status.counters.items()):
        print(f"turned down: {count:,} x {reason}")
