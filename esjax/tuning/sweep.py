"""Trains a grid of runs one after another.

The folder of a sweep holds:

sweep.yaml   the axes, and the settings that are not axes
sweep.csv    a line for each run, the best first: by held-out loss, or with a reward in Python by greedy reward
NAME/        a run folder for each combination, such as es.sigma=0.1,seed=3
keys/        keys of the hosts that may join, if hosts train, see `esjax.hosts.transport.keys`
"""

import csv
import io
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optax

from esjax.config.custom_names import unused_settings
from esjax.config.settings import Config
from esjax.data.corpus import load_corpus, locate_text
from esjax.data.sources import locate
from esjax.errors import EsjaxError
from esjax.hosts.local import LocalWorkers, check_workers
from esjax.hosts.serve import Server, resume_serving_with, serve_with
from esjax.hosts.transport.address import is_loopback
from esjax.models.custom import NOTHING_CUSTOM, Custom, Reward, Tool
from esjax.models.custom.code import complete, load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.runs.checkpoint import kept_steps
from esjax.runs.durable import try_lock, write_durably
from esjax.runs.folder import check_custom
from esjax.runs.reader import RunView, has_reached, read_run
from esjax.runs.step_info import Limits
from esjax.signals import starting, stop_on_signals
from esjax.training.run import Trainer, resume_with, train_with
from esjax.tuning.axes import Trial, make_grid
from esjax.tuning.sweep_record import Record, keep_record, read_record

TABLE, CHECKPOINTS = "sweep.csv", "checkpoints"

ANY_PORT = "tcp://127.0.0.1:0"

State = Literal["finished", "stopped", "failed", "waiting"]
"""finished: the run reached its limits. stopped: it can be resumed. failed: an error ended it. waiting: not begun."""

STATES: tuple[State, ...] = ("finished", "stopped", "failed", "waiting")


RankedBy = Literal["held-out loss", "greedy reward"]
"""What runs are compared by: the lowest held-out loss, or with a reward in Python the highest reward on held-out
prompts."""


class Outcome(NamedTuple):
    """Progress of a run of a sweep.

    Attributes:
        name: Name of its folder in the folder of the sweep.
        values: Values by axis.
        state: "finished", "stopped", "failed" or "waiting".
        held_out: Held-out loss of its last evaluation, in nats per token; None if there was none.
        seconds: Training time.
        member_tokens: Tokens scored, times members.
        step: Steps done.
        note: What went wrong, or "".
        greedy_reward: Greedy reward on held-out prompts, as last measured; None without a reward in Python.
    """

    name: str
    values: Mapping[str, Any]
    state: State
    held_out: float | None
    seconds: float
    member_tokens: int
    step: int
    note: str
    greedy_reward: float | None = None

    @property
    def ranked_by(self) -> RankedBy:
        """What runs are compared by."""
        return "held-out loss" if self.greedy_reward is None else "greedy reward"

    @property
    def value(self) -> float | None:
        """The number that runs are compared by; None if it was not measured."""
        return self.held_out if self.greedy_reward is None else self.greedy_reward


def measure_of(outcomes: Sequence[Outcome]) -> RankedBy:
    """Return what the runs of a sweep are compared by: greedy rewards if one was measured."""
    return next((one.ranked_by for one in outcomes if one.ranked_by == "greedy reward"), "held-out loss")


def order(ranked_by: RankedBy, value: float | None) -> float:
    """Return a number that is the lower the better the value is; infinity for None."""
    return math.inf if value is None else -value if ranked_by == "greedy reward" else value


class Hosts(NamedTuple):
    """Hosts that train the runs of a sweep in place of this process.

    Attributes:
        workers: Number of worker processes on this machine; 0: hosts join over the network.
        bind: Address at which hosts join, see `esjax.serve`; the runs are served there one after another.
        keys: See `esjax.serve`. None: `keys` in the folder of the sweep, and no keys on a loopback address.
        plain_text_anywhere: See `esjax.serve`.
        announce: Called for each run when hosts may join.
        oversubscribe: Allow more workers than cores.
    """

    workers: int = 0
    bind: str = ANY_PORT
    keys: Path | None = None
    plain_text_anywhere: bool = False
    announce: Callable[[Server], None] = lambda server: None
    oversubscribe: bool = False


class Sweep:
    """A grid of runs: iterate over it to train the runs that are not finished.

    Iteration ends after the last run, or after the step in which Ctrl-C or SIGTERM came. Iterating again, also in
    another process, continues from there. A run that fails is reported and does not stop the others.

    Attributes:
        path: Folder of the sweep.
        trials: The runs, in the order of training.
        stopped: Whether Ctrl-C or SIGTERM ended the last iteration.
        lost: Workers, as RUN/NAME, that ended too often during the last iteration; the others went on without them.
    """

    def __init__(
        self,
        path: Path,
        trials: Sequence[Trial],
        hosts: Hosts | None = None,
        show: Callable[[Trainer | Server], None] | None = None,
        tell: Callable[[str], None] | None = None,
        custom: Custom = NOTHING_CUSTOM,
    ) -> None:
        """Set up; use `sweep` or `resume_sweep` to get one.

        Raises:
            EsjaxError: There are more workers than cores, or a custom part cannot be passed to them.
        """
        if hosts is not None and hosts.workers:
            check_workers(hosts.workers, hosts.oversubscribe)
            custom.words()
        self._custom = custom
        self.path = path
        self.trials = trials
        self.stopped = False
        self.lost: list[str] = []
        self._hosts = hosts._replace(keys=given_path(hosts.keys)) if hosts and hosts.keys else hosts
        self._show = show or _iterate
        self._tell = tell or (lambda line: print(line, file=sys.stderr))
        self._failed: dict[str, str] = {}

    def __repr__(self) -> str:
        """Show the number of runs in each state."""
        states = [outcome.state for outcome in self.outcomes()]
        counted = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
        return f"<esjax sweep in {str(self.path)!r}: {counted}>"

    def outcomes(self) -> list[Outcome]:
        """Return the progress of each run, sorted by state, finished runs first, and then by value, the best first.

        `esjax.tuning.seed_means.seed_means` compares settings over seeds.
        """
        found = [self._outcome(trial) for trial in self.trials]
        ranked_by = measure_of(found)

        def place(one: Outcome) -> tuple[int, float]:
            return STATES.index(one.state), order(ranked_by, one.value if one.ranked_by == ranked_by else None)

        return sorted(found, key=place)

    def __iter__(self) -> Iterator[Outcome]:
        """Train each run that is not finished, and yield its outcome."""
        self.stopped, self.lost = False, []
        self._failed.clear()
        with _claim(self.path):
            ahead = [trial for trial in self.trials if self._outcome(trial).state != "finished"]
            done = len(self.trials) - len(ahead)
            if done:
                self._tell(f"{done} of {len(self.trials)} runs are finished already")
            for number, trial in enumerate(ahead, done + 1):
                self._tell(f"run {number} of {len(self.trials)}: {trial.name}")
                try:
                    with stop_on_signals() as asked, starting():
                        run = self._open(trial)
                    if not asked.is_set():
                        with run.handling_signals():
                            self._show(run)
                    self.stopped = asked.is_set() or run.stopped
                except Exception as error:  # of any kind, since the other runs do not depend on this one
                    kind = "" if isinstance(error, EsjaxError) else f"{type(error).__name__}: "
                    note = f"{kind}{error}".strip().splitlines()[0][:200]
                    self._failed[trial.name] = note
                    self._tell(f"{trial.name} failed: {note}")
                self._write_table()
                yield self._outcome(trial)
                if self.stopped:
                    return

    def _open(self, trial: Trial) -> Trainer | Server:
        path, limits, custom = self.path / trial.name, trial.config, self._custom
        complete(NOTHING_CUSTOM, custom.code)  # raises if the files of custom parts have changed
        kept, has_ledger = kept_steps(path / CHECKPOINTS), (path / "ledger").exists()
        if not kept and not has_ledger:
            if path.exists():
                with _claim(path):  # fails if another process trains this run
                    shutil.rmtree(path)  # killed before its first checkpoint, so nothing can be resumed
            return self._begin(limits, path)
        run = read_run(path)
        before = run.seconds_at(run.step if has_ledger else max(kept))
        # The clock of the run may be past the limit by a little.
        seconds = None if limits.seconds is None else max(limits.seconds - before, 1e-3)
        if self._hosts is None:
            return resume_with(custom, path, steps=limits.steps, seconds=seconds, tell=self._tell)
        where = self._where(self._hosts)
        server = resume_serving_with(custom, path, steps=limits.steps, seconds=seconds, **where)
        return self._with_hosts(server, self._hosts)

    def _begin(self, config: Config, path: Path) -> Trainer | Server:
        if self._hosts is None:
            return train_with(self._custom, config, path, tell=self._tell)
        return self._with_hosts(serve_with(self._custom, config, path, **self._where(self._hosts)), self._hosts)

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

        @contextmanager
        def with_workers() -> Iterator[Callable[[], None]]:
            workers = LocalWorkers(
                hosts.workers,
                server.folder.path,
                lambda line: server.tell(line),
                given=server.custom.words(),
                oversubscribe=hosts.oversubscribe,
            )
            try:
                with workers.joined(server.address) as check:
                    yield check
            finally:
                self.lost += [f"{server.folder.path.name}/{name}" for name in workers.lost]

        server.while_open = with_workers if hosts.workers else announce
        return server

    def _outcome(self, trial: Trial) -> Outcome:
        path = self.path / trial.name
        failed = self._failed.get(trial.name, "")
        try:
            run = read_run(path)
        except EsjaxError:  # the folder is missing or incomplete
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
            run.last("greedy_reward"),
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
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Begin or continue a grid of runs; iterate over the result to train them.

    Args:
        axes: Values by the name of a setting, such as `{"es.sigma": [0.05, 0.1]}`; `model` takes names of models.
        config: Settings that are not axes; None: the defaults.
        out: Folder of the sweep. An existing sweep must have the same settings and axes, in any order.
        hosts: Hosts that train. None: this process trains.
        model: A custom model for all runs, see `esjax.train`. Workers need it as "PATH.py:FUNCTION", like the four
            below.
        loss: A custom loss for all runs.
        reward: A custom reward for all runs.
        tool: A tool for all runs.
        optimizer: A custom optimizer for all runs.
        show: Called with each run; it has to iterate over the run to train it. None: iterate and print nothing.
        tell: Called with each line for the user. None: print to standard error.

    Raises:
        EsjaxError: An axis is not allowed, a run has no limit, a text cannot be used, or the folder exists and holds
            something else.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return sweep_with(custom, axes, config or Config(), out=out, hosts=hosts, show=show, tell=tell)


def sweep_with(
    custom: Custom,
    axes: Mapping[str, Sequence[Any]],
    config: Config,
    *,
    out: str | Path,
    hosts: Hosts | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """`sweep`, given all custom parts."""
    config, path = locate_text(config), given_path(out)
    for name in unused_settings(custom.names(), axes):
        raise EsjaxError(f"{name} would change nothing with a custom model or optimizer; leave that axis out")
    trials = make_grid(config, axes)
    for trial in trials:
        if trial.config.steps is None and trial.config.seconds is None:
            raise EsjaxError(f"the run {trial.name} would never end; give a limit with --steps or --seconds")
    for data in dict.fromkeys(trial.config.data for trial in trials):
        load_corpus(data)
    typed = {name: list(dict.fromkeys(trial.values[name] for trial in trials)) for name in axes}
    if "data.text" in typed:
        typed["data.text"] = [locate(text) for text in typed["data.text"]]
    # Names of the folders keep the order of the axes in which the sweep was begun.
    found = Sweep(path, trials, hosts, show, tell, custom)
    found.trials = make_grid(config, keep_record(path, Record(typed, config, custom.names(), custom.code)))
    return found


def resume_sweep(
    path: str | Path,
    *,
    hosts: Hosts | None = None,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """Continue a grid of runs; iterate over the result to train the runs that are not finished.

    Args:
        path: Folder of the sweep.
        hosts: See `sweep`.
        model: The custom model of the runs, if they have one, see `esjax.resume`.
        loss: The custom loss of the runs, likewise.
        reward: The custom reward of the runs, likewise.
        tool: The tool of the runs, likewise.
        optimizer: The custom optimizer of the runs, likewise.
        show: See `sweep`.
        tell: See `sweep`.

    Raises:
        EsjaxError: The path is not the folder of a sweep, it is damaged, or custom code is missing or has changed.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return resume_sweep_with(custom, path, hosts=hosts, show=show, tell=tell)


def resume_sweep_with(
    custom: Custom,
    path: str | Path,
    *,
    hosts: Hosts | None = None,
    show: Callable[[Trainer | Server], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Sweep:
    """`resume_sweep`, given the custom parts that the sweep does not find by itself."""
    path = given_path(path)
    record = read_record(path)
    custom = complete(custom, record.code)
    check_custom(str(path), record.custom, custom.names(), "esjax.resume_sweep")
    return Sweep(path, make_grid(record.config, record.axes), hosts, show, tell, custom)


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    with (path / ".lock").open("w") as lock:
        if not try_lock(lock):
            raise EsjaxError(f"another process is at work in {str(path)!r}; stop that one first")
        yield


def _is_finished(run: RunView, config: Config) -> bool:
    """Return whether a run has reached its limits and its last state is on disk."""
    if max(kept_steps(run.path / CHECKPOINTS), default=0) < run.step and not (run.path / "ledger").exists():
        return False
    return has_reached(Limits(config.steps, config.seconds), run.step, run.last("seconds") or 0.0)


def _trouble(run: RunView) -> str:
    """Return a note if the last steps of a run made no update, or ""."""
    applied = run.metrics.get("applied")
    if applied is None or not len(applied) or applied[-1]:
        return ""
    last = run.metrics["step"][np.flatnonzero(applied == 1)]
    return f"no update since step {int(np.max(last, initial=0))}"


def _iterate(run: Trainer | Server) -> None:
    for _ in run:
        pass
