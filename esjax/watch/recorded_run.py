"""What runs on one machine and runs over hosts share: attributes, files, trackers, clock and limits."""

import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from threading import Event

from esjax.config.settings import Config, to_plain
from esjax.data.corpus import Corpus
from esjax.devices.process_group import leads
from esjax.models.custom import Custom
from esjax.replica.replica import Replica
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import DIGEST, UPDATE, Ledger
from esjax.runs.step_info import Clock, Limits, StepInfo
from esjax.signals import stop_on_signals
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
        self.baselines = corpus.baselines(corpus.held_out) if has_baselines else {}
        self.on_start: Callable[[], None] = lambda: None
        self.trackers = find_trackers(trackers) if leads() else []
        self.last: StepInfo | None = None
        self.stopped = False
        self.tell = (tell or (lambda line: print(line, file=sys.stderr))) if leads() else (lambda line: None)
        self._id = secrets.token_hex(8)

    def summary(self) -> str:
        """Return one line with the devices, the text, the model and the population."""
        params = self._replica.state.params
        return describe_run(self._devices, self.config, self.corpus, params, self.custom.names())

    def _tracked(self, step: int) -> TrackedRun:
        if self.folder is not None:
            return tracked_run(self.folder, self.baselines, step)
        return TrackedRun(self._id, "esjax", None, to_plain(self.config), self.baselines, step)

    @contextmanager
    def _recording(self) -> Iterator["Recorder"]:
        """Catch signals, prepare the trackers, and lock the folder while the context is open."""
        # Trackers are closed last, so that one that hangs delays nothing else.
        watch = Watch(self.trackers, lambda line: self.tell(line))
        with stop_on_signals() as asked, watch, ExitStack() as stack:
            if self.folder is not None:
                self.folder.lock()
                stack.callback(self.folder.unlock)
            yield Recorder(self, asked, watch, stack)


class Recorder:
    """The open files, trackers, clock and limits of a run while it is iterated over.

    Attributes:
        asked: Set by Ctrl-C or SIGTERM.
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
            self.ledger = self._stack.enter_context(closing(Ledger.open(folder.ledger, run.tell)))

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

    def save(self, state: TrainState, progress: tuple[float, int] | None = None) -> None:
        """Write a checkpoint; `progress` is that at the step of the state, by default the present one."""
        if self.checkpoints:
            self.checkpoints.save(state, *(progress or self.progress))

    def log(self, info: StepInfo) -> StepInfo:
        """Pass on the info of a step to files and trackers, and return it, with the mean reward if text is scored."""
        if self._run.config.writes:
            info = info._replace(reward=-info.loss)
        self._run.last = info
        self.watch.log(info)
        return info
