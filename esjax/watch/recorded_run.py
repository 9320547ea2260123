"""What runs on one machine and runs over hosts share: attributes, files, trackers, clock and limits."""

import math
import secrets
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from threading import Event
from weakref import ReferenceType, ref

from esjax.config.settings import Config, to_plain
from esjax.data.corpus import Corpus
from esjax.devices.process_group import leads
from esjax.errors import EsjaxError
from esjax.models.custom import Custom
from esjax.replica.replica import Replica
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder
from esjax.runs.horizon import is_cut_due
from esjax.runs.ledger import DIGEST, UPDATE, Ledger
from esjax.runs.step_info import Clock, Limits, StepInfo
from esjax.signals import started, starting, stop_on_signals
from esjax.watch.iteration import Iteration
from esjax.watch.summary import describe_run
from esjax.watch.trackers import JsonLines, find_trackers, tracked_run
from esjax.watch.tracking import TrackedRun, Tracker, Watch


class RecordedRun:
    """Base class of `Trainer` and `Server`; they describe its attributes."""

    _replica: Replica
    _devices: str

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        folder: RunFolder | None,
        custom: Custom,
        trackers: Sequence[Tracker | str],
        tell: Callable[[str], None] | None,
    ) -> None:
        """Set up the attributes."""
        self.config, self.corpus, self.folder, self.custom = config, corpus, folder, custom
        self.limits = Limits(config.steps, config.seconds)
        has_baselines = corpus.held_out and custom.objective is None
        self.baselines = corpus.baselines(corpus.measured) if has_baselines else {}
        self.on_start: Callable[[], None] = lambda: None
        self.trackers = find_trackers(trackers) if leads() else []
        self.last: StepInfo | None = None
        self.stopped = False
        self.tell = (tell or (lambda line: print(line, file=sys.stderr))) if leads() else (lambda line: None)
        self._id = secrets.token_hex(8)
        self._asked = Event()
        self._iteration: ReferenceType[Iteration] | None = None
        self._best_reward, self._evaluations = -math.inf, 0  # the highest greedy reward, and evaluations since
        if corpus.note:
            self.tell(corpus.note)

    def __iter__(self) -> Iteration:
        """Return an iterator over the steps, see the class; an earlier one that was left half-way is closed."""
        if self._iteration is not None and (former := self._iteration()) is not None:
            former.close()
        iteration = Iteration(self._steps(), self._asked)
        self._iteration = ref(iteration)
        return iteration

    def _steps(self) -> Generator[StepInfo]:
        raise NotImplementedError

    def stop(self) -> None:
        """End the iteration after the present step, from any thread or from the body of the loop."""
        self._asked.set()

    def handling_signals(self) -> AbstractContextManager[Event]:
        """Let Ctrl-C and SIGTERM `stop` the run within a `with` block; elsewhere they do so while a step is taken."""
        return stop_on_signals(self._asked)

    def summary(self) -> str:
        """Return one line with the devices, the text, the model and the population."""
        params = self._replica.state.params
        return describe_run(self._devices, self.config, self.corpus, params, self.custom.names())

    def _has_settled(self, info: StepInfo) -> bool:
        """Return whether the greedy reward on held-out prompts has not risen in `reward.patience` evaluations."""
        patience = self.config.reward.patience
        if patience is None or info.greedy_reward is None:
            return False
        if info.greedy_reward > self._best_reward:
            self._best_reward, self._evaluations = info.greedy_reward, 0
        else:
            self._evaluations += 1
        if self._evaluations < patience:
            return False
        self.tell(
            f"no greedy reward above {self._best_reward:.4g} in {patience} evaluations (reward.patience); stopping"
        )
        return True

    def _tracked(self, step: int) -> TrackedRun:
        if self.folder is not None:
            return tracked_run(self.folder, self.baselines, step)
        return TrackedRun(self._id, "esjax", None, to_plain(self.config), self.baselines, step)

    @contextmanager
    def _recording(self) -> Iterator["Recorder"]:
        """Prepare the trackers, and lock the folder while the context is open."""
        # Trackers are closed last, so that one that hangs delays nothing else.
        watch = Watch(self.trackers, lambda line: self.tell(line))
        with starting(), watch, ExitStack() as stack:
            stack.callback(self._asked.clear)
            if self.folder is not None:
                stack.enter_context(self.folder.locked())
            yield Recorder(self, self._asked, watch, stack)

    @contextmanager
    def _removing_new_folder(self) -> Iterator[None]:
        """Remove a new run folder if an error ends the context before a step is done; enter it with the lock held."""
        folder = self.folder
        is_fresh = folder is not None and folder.is_new and not folder.checkpoints.exists()
        try:
            yield
        except Exception:
            replica = self._replica
            has_begun = self.last is not None if replica.is_lost else int(replica.state.step) > 0
            if folder is not None and is_fresh and not has_begun:
                folder.remove()
            raise


class Recorder:
    """The open files, trackers, clock and limits of a run while it is iterated over.

    Attributes:
        asked: Set by Ctrl-C, SIGTERM or `RecordedRun.stop`.
        watch: The trackers.
        checkpoints: The checkpoints; None without a folder.
        ledger: The ledger; None if the run keeps none.
        member_tokens: Member-tokens scored so far.
    """

    def __init__(self, run: RecordedRun, asked: Event, watch: Watch, stack: ExitStack) -> None:
        """Prepare; `stack` closes the files that `open_files` opens."""
        self.asked, self.watch = asked, watch
        self.checkpoints: Checkpoints | None = None
        self.ledger: Ledger | None = None
        self.member_tokens = 0
        self._run, self._stack, self._clock = run, stack, Clock(0.0)
        self._is_cut_due = False
        self._trouble: EsjaxError | None = None  # why it is not known whether the ledger can be cut

    @property
    def seconds(self) -> float:
        """Training time so far, see `StepInfo`."""
        return self._clock.seconds

    @property
    def progress(self) -> tuple[float, int]:
        """Training time and member-tokens so far."""
        return self.seconds, self.member_tokens

    def open_files(self) -> None:
        """Open checkpoints and ledger, and keep the baselines; nothing without a folder."""
        run, folder = self._run, self._run.folder
        if folder is None:
            return
        folder.keep_baselines(run.baselines)
        self.checkpoints = Checkpoints(folder.checkpoints, run.config.keep_checkpoints)
        if run.config.ledger or folder.ledger.exists():
            opened = Ledger.open(folder.ledger, run.tell, self.checkpoints.newest)
            self.ledger = self._stack.enter_context(closing(opened))
            self.checkpoints.beginnings = lambda: opened.beginnings
            if opened.first:
                run.tell(
                    f"the ledger begins at step {opened.first:,}: the run can be replayed from the oldest checkpoint "
                    "at or after it, not from the start"
                )

    def start(self, step: int, seconds: float, member_tokens: int) -> None:
        """Start clock and trackers; steps, training time and member-tokens are those so far."""
        self._clock, self.member_tokens = Clock(seconds), member_tokens
        folder = self._run.folder
        self.watch.start(self._run._tracked(step), JsonLines(folder, self._run.tell) if folder else None)

    def append(self, step: int, payload: bytes, now: float) -> None:
        """Note that the losses of a step are known, and write its update to the ledger; `now` is in seconds."""
        self._clock.set_finished(now)
        if self.ledger:
            self.ledger.append(UPDATE, step, payload, self.seconds)

    def is_done(self, step: int) -> bool:
        """Return whether a limit is reached after `step` steps."""
        return self._run.limits.reached(step, self._clock.session)

    def append_digest(self, step: int, digest: str) -> None:
        """Write the digest of the state at a step to the ledger."""
        if self.ledger:
            self.ledger.append(DIGEST, step, digest.encode())

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, and drop updates behind the horizon."""
        self.write(state, self.progress)
        self.cut_ledger()

    def write(self, state: TrainState, progress: tuple[float, int], *, is_confirmed: bool = True) -> None:
        """Write a checkpoint, in any thread, one at a time; `cut_ledger` follows before the next one.

        Args:
            state: The state.
            progress: Training time and member-tokens at its step.
            is_confirmed: False for a state of a host that no other owner's host has confirmed.
        """
        horizon = self._run.config.ledger_horizon
        if self.checkpoints:
            self.checkpoints.save(state, *progress, is_confirmed=is_confirmed)
            if horizon is not None and self.ledger:
                try:
                    self._is_cut_due = is_cut_due(horizon, self.ledger.beginnings[-1], self.checkpoints)
                except EsjaxError as error:  # the new checkpoint is whole all the same
                    self._trouble = error

    def cut_ledger(self) -> None:
        """Drop updates behind the horizon, in the thread that appends to the ledger."""
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble
        if self.ledger and self._is_cut_due:
            self._is_cut_due = False
            self.ledger.begin_part()

    def log(self, info: StepInfo) -> StepInfo:
        """Pass on the info of a step to files and trackers, and return it, with the mean reward if text is scored."""
        started()
        if self._run.config.writes:
            info = info._replace(reward=-info.loss)
        self._run.last = info
        self.watch.log(info)
        return info
