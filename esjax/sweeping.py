"""A grid of runs, one after another, each in a folder of its own.

sweep.yaml   the axes and the settings of what is no axis
sweep.csv    a line for each run, by held-out loss
NAME/        a run folder for each combination, such as es.sigma=0.1,seed=3
keys/        who may join, if hosts take part, see `esjax.hosts.keys`
"""

import csv
import fcntl
import io
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from esjax.axes import Trial, make_grid
from esjax.checkpoint import kept_steps
from esjax.config import Config, from_yaml, to_plain
from esjax.data.corpus import load_corpus
from esjax.errors import EsjaxError
from esjax.files import write_durably
from esjax.hosts.address import is_loopback
from esjax.hosts.local import local_workers
from esjax.hosts.serve import Server, resume_serving, serve
from esjax.runs import RunView, has_reached, read_run
from esjax.step_info import Limits
from esjax.training import Trainer, resume, train
from esjax.yaml_text import read_yaml

RECORD, TABLE, CHECKPOINTS = "sweep.yaml", "sweep.csv", "checkpoints"

ANY_PORT = "tcp://127.0.0.1:0"

State = Literal["finished", "stopped", "failed", "waiting"]
"""finished: it reached its limits. stopped: it can be gone on with. failed: it could not. waiting: it has not begun."""

STATES: tuple[State, ...] = ("finished", "stopped", "failed", "waiting")


class Outcome(NamedTuple):
    """How far a run of a sweep has come.

    Attributes:
        name: Its folder in that of the sweep.
        values: By axis.
        state: See `State`.
        held_out: Nats per token over the held-out documents, by its last evaluation; None if there was none.
        seconds: Training time.
        member_tokens: Tokens scored, times members.
        step: Steps done.
        note: What went wrong, or "".
    """

    name: str
    values: Mapping[str, Any]
    state: State
    held_out: float | None
    seconds: float
    member_tokens: int
    step: int
    note: str


class Hosts(NamedTuple):
    """Who trains, in place of this process.

    Attributes:
        workers: Processes of this machine; 0: hosts that join.
        bind: Where hosts join, see `esjax.serve`; each run in turn is served there.
        keys: See `esjax.serve`. None: `keys` in the folder of the sweep, and no keys on a loopback address.
        plain_text_anywhere: See `esjax.serve`.
        announce: Called when hosts may join.
    """

    workers: int = 0
    bind: str = ANY_PORT
    keys: Path | None = None
    plain_text_anywhere: bool = False
    announce: Callable[[Server], None] = lambda server: None


class Sweep:
    """A grid of runs: iterate over it to train those that are not finished.

    Iteration ends with the last run, or after the step during which Ctrl-C or SIGTERM came. Iterating again, now or in
    another process, goes on from there. A run that fails is told of, and does not stop the others.

    Attributes:
        path: Folder of the sweep.
        trials: The runs, in the order in which they are trained.
        stopped: Whether Ctrl-C or SIGTERM ended the last iteration.
    """

    def __init__(
        self,
        path: Path,
        trials: Sequence[Trial],
        hosts: Hosts | None = None,
        show: Callable[[Trainer | Server], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Set up; use `sweep` or `resume_sweep` to get one."""
        self.path = path
        self.trials = trials
        self.stopped = False
        self._hosts = hosts
        self._show = show or _iterate
        self._tell = tell or (lambda line: print(line, file=sys.stderr))
        self._failed: dict[str, str] = {}

    def __repr__(self) -> str:
        """Say how far it is."""
        states = [outcome.state for outcome in self.outcomes()]
        counted = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
        return f"<esjax sweep in {str(self.path)!r}: {counted}>"

    def outcomes(self) -> list[Outcome]:
        """Say how far each run has come, sorted by held-out loss, finished ones before others.

        See `esjax.seed_means` for which settings are better, as far as that can be told.
        """
        found = map(self._outcome, self.trials)
        return sorted(
            found,
            key=lambda one: (STATES.index(one.state), float("inf") if one.held_out is None else one.held_out),
        )

    def __iter__(self) -> Iterator[Outcome]:
        """Train each run that is not finished, and yield what came of it."""
        self.stopped = False
        self._failed.clear()
        with _claim(self.path):
            ahead = [trial for trial in self.trials if self._outcome(trial).state != "finished"]
            done = len(self.trials) - len(ahead)
            if done:
                self._tell(f"{done} of {len(self.trials)} runs are finished already")
            for number, trial in enumerate(ahead, done + 1):
                self._tell(f"run {number} of {len(self.trials)}: {trial.name}")
                try:
                    run = self._open(trial)
                    self._show(run)
                    self.stopped = run.stopped
                except Exception as error:  # of any kind: the other runs do not depend on this one
                    kind = "" if isinstance(error, EsjaxError) else f"{type(error).__name__}: "
                    note = f"{kind}{error}".strip().splitlines()[0][:200]
                    self._failed[trial.name] = note
                    self._tell(f"{trial.name} failed: {note}")
                self._write_table()
                yield self._outcome(trial)
                if self.stopped:
                    return

    def _open(self, trial: Trial) -> Trainer | Server:
        path, limits = self.path / trial.name, trial.config
        if not kept_steps(path / CHECKPOINTS):
            if path.exists():
                shutil.rmtree(path)  # killed before its first checkpoint: there is nothing to go on from
            return self._begin(limits, path)
        run = read_run(path)
        before = 0.0
        if run.step:  # not if it was stopped while it waited for hosts
            kept = run.metrics["step"] <= max(kept_steps(path / CHECKPOINTS))
            if (path / "ledger").exists():
                kept[:] = True
            before = float(np.max(run.metrics["seconds"][kept], initial=0.0))
        # A run stops at its own clock: what is left of it may be less than nothing.
        seconds = None if limits.seconds is None else max(limits.seconds - before, 1e-3)
        if self._hosts is None:
            return resume(path, steps=limits.steps, seconds=seconds, tell=self._tell)
        where = self._where(self._hosts)
        return self._with_hosts(resume_serving(path, steps=limits.steps, seconds=seconds, **where), self._hosts)

    def _begin(self, config: Config, path: Path) -> Trainer | Server:
        if self._hosts is None:
            return train(config, path, tell=self._tell)
        return self._with_hosts(serve(config, path, **self._where(self._hosts)), self._hosts)

    def _where(self, hosts: Hosts) -> dict[str, Any]:
        open_to_all = hosts.plain_text_anywhere or is_loopback(hosts.bind)
        return {
            "bind": hosts.bind,
            "keys": hosts.keys or (None if open_to_all else self.path / "keys"),
            "plain_text_anywhere": hosts.plain_text_anywhere,
            "tell": self._tell,
        }

    def _with_hosts(self, server: Server, hosts: Hosts) -> Server:
        @contextmanager
        def announce() -> Iterator[None]:
            hosts.announce(server)
            yield

        def workers() -> Any:
            return local_workers(server.address, hosts.workers, server.folder.path)

        server.while_open = workers if hosts.workers else announce
        return server

    def _outcome(self, trial: Trial) -> Outcome:
        path = self.path / trial.name
        failed = self._failed.get(trial.name, "")
        try:
            run = read_run(path)
        except EsjaxError:  # it has no folder yet, or not much of one
            return Outcome(trial.name, trial.values, "failed" if failed else "waiting", None, 0.0, 0, 0, failed)
        state: State = "failed" if failed else "finished" if _is_finished(run, trial.config) else "stopped"
        return Outcome(
            trial.name,
            trial.values,
            state,
            run.last("held_out"),
            run.last("seconds") or 0.0,
            int(run.last("member_tokens") or 0),
            run.step,
            failed or _trouble(run),
        )

    def _write_table(self) -> None:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        axes = list(self.trials[0].values)
        table.writerow(["name", *axes, *Outcome._fields[2:]])
        for one in self.outcomes():
            table.writerow([one.name, *one.values.values(), *one[2:]])
        write_durably(self.path / TABLE, text.getvalue())


def sweep(
    axes: Mapping[str, Sequence[Any]],
    config: Config | None = None,
    *,
    out: str | Path,
    hosts: Hosts | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Begin a grid of runs, or go on with it; iterate over the result to train them.

    Args:
        axes: Values by the name of a setting, such as `{"es.sigma": [0.05, 0.1]}`; `model` takes names of models.
        config: Settings of what is no axis; None: the defaults.
        out: Folder of the sweep. One that is there already has to be of the same axes, in any order, and settings.
        hosts: Who trains. None: this process.
        show: Trains a run, by iterating over it. None: that, and nothing else.
        tell: Called with each line that a person should see. None: they go to standard error.

    Raises:
        EsjaxError: An axis is not allowed, a run would have no end, a text cannot be used, or the folder is of
            something else.
    """
    config, path = config or Config(), Path(out)
    trials = make_grid(config, axes)
    for trial in trials:
        if trial.config.steps is None and trial.config.seconds is None:
            raise EsjaxError(f"the run {trial.name} would never end; give a limit with --steps or --seconds")
    for data in dict.fromkeys(trial.config.data for trial in trials):
        load_corpus(data)
    typed = {name: list(dict.fromkeys(trial.values[name] for trial in trials)) for name in axes}
    # The folders are called by the axes in the order in which they were first given.
    trials = make_grid(config, _record(path, typed, config))
    return Sweep(path, trials, hosts, show, tell)


def resume_sweep(
    path: str | Path,
    *,
    hosts: Hosts | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Go on with a grid of runs; iterate over the result to train those that are not finished.

    Args:
        path: Folder of the sweep.
        hosts: See `sweep`.
        show: See `sweep`.
        tell: See `sweep`.

    Raises:
        EsjaxError: It is no sweep's folder, or is damaged.
    """
    axes, config = _read_record(Path(path))
    return Sweep(Path(path), make_grid(config, axes), hosts, show, tell)


def _record(path: Path, axes: Mapping[str, Sequence[Any]], config: Config) -> Mapping[str, Sequence[Any]]:
    """Write down what a sweep is of, or see that it is the same as before; return the axes as they are recorded."""
    if (path / RECORD).exists():
        before, settings = _read_record(path)
        if before != axes:
            there = " ".join(f"--axis {name}={','.join(map(str, values))}" for name, values in before.items())
            raise EsjaxError(f"{str(path)!r} is a sweep over {there}; give another --out, or go on with that one")
        if settings != config:
            old, new = msgspec.to_builtins(settings), msgspec.to_builtins(config)
            raise EsjaxError(
                f"{str(path)!r} is a sweep with other settings, {_first_difference(old, new)}; give another --out, or "
                "go on with that one"
            )
        return before
    try:
        if path.exists() and any(path.iterdir()):
            raise EsjaxError(f"{str(path)!r} exists already, is no sweep, and is left alone; give another --out")
        path.mkdir(parents=True, exist_ok=True)
        record = {"axes": axes, "settings": to_plain(config)}
        write_durably(path / RECORD, msgspec.yaml.encode(record).decode())
    except OSError as error:
        raise EsjaxError(f"cannot make the folder {str(path)!r}: {error.strerror}") from error
    return axes


def _read_record(path: Path) -> tuple[dict[str, list[Any]], Config]:
    source = path / RECORD
    try:
        record = read_yaml(source.read_text(encoding="utf-8"))
        axes = msgspec.convert(record["axes"], dict[str, list[Any]])
        settings = msgspec.yaml.encode(record["settings"]).decode()
    except OSError as error:
        raise EsjaxError(f"{str(path)!r} is not the folder of a sweep: cannot read its {RECORD}") from error
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise EsjaxError(f"{source} is damaged ({error}); restore it from a copy") from error
    return axes, from_yaml(settings, str(source))


def _first_difference(old: Any, new: Any, name: str = "") -> str:
    for key in old:
        if old[key] != new.get(key):
            if isinstance(old[key], dict) and isinstance(new.get(key), dict):
                return _first_difference(old[key], new[key], f"{name}{key}.")
            return f"{name}{key}={old[key]} in place of {new.get(key)}"
    return name


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EsjaxError(f"another process is at the sweep in {str(path)!r}; stop that one first") from error
        yield


def _is_finished(run: RunView, config: Config) -> bool:
    """Tell whether a run has reached its limits, and its state is kept."""
    if max(kept_steps(run.path / CHECKPOINTS), default=0) < run.step and not (run.path / "ledger").exists():
        return False
    return has_reached(Limits(config.steps, config.seconds), run.step, run.last("seconds") or 0.0)


def _trouble(run: RunView) -> str:
    """Say that a run has come to nothing more."""
    applied = run.metrics.get("applied")
    if applied is None or not len(applied) or applied[-1]:
        return ""
    last = run.metrics["step"][np.flatnonzero(applied == 1)]
    return f"no update since step {int(np.max(last, initial=0))}"


def _iterate(run: Trainer | Server) -> None:
    for _ in run:
        pass
