"""Joins everything: a run is an object to iterate over, one step at a time."""

import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optax

from esjax.config.settings import Config, replace, to_plain
from esjax.data.corpus import Corpus, load_corpus, locate_text
from esjax.data.delivery import Blocks
from esjax.devices.mesh import local_mesh, whole_mesh
from esjax.devices.process_group import any_of, here, leads
from esjax.errors import EsjaxError
from esjax.exchange.update_record import unpack_update
from esjax.flags import changed_flags
from esjax.inference.held_out import make_measure
from esjax.inference.language_model import LanguageModel
from esjax.inference.loaded_run import load_run_corpus, restore_run
from esjax.inference.run_inference import RunInference
from esjax.models.custom import Custom, Reward
from esjax.models.custom_code import gather
from esjax.models.member import Loss
from esjax.models.model import ModelFactory, Params
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import UPDATE, Ledger, read
from esjax.runs.reader import RunView, read_run
from esjax.runs.step_info import Clock, Limits, StepInfo
from esjax.signals import STOPPING, stop_on_signals
from esjax.training.local_steps import LocalSteps
from esjax.watch.history import History
from esjax.watch.summary import describe_kinds, describe_run
from esjax.watch.trackers import JsonLines, find_trackers, tracked_run
from esjax.watch.tracking import TrackedRun, Tracker, Watch

SAMPLE_DOCUMENTS = 4
"""Documents of a sample."""

SAMPLE_TOKENS = 200
"""Most tokens of each."""


class Trainer(RunInference):
    """A run: iterate over it to train, and write or score with it at any time.

    Iteration ends at the limits of the settings, or after the step during which Ctrl-C or SIGTERM came. With a run
    folder, it leaves a checkpoint however it ends, and going on is iterating again.

    Attributes:
        config: Settings.
        corpus: The text.
        limits: Where iteration ends; may be changed.
        baselines: Nats per token of the n-gram models over the held-out documents; empty if there are none, and with a
            loss or reward of its own.
        folder: Where the run is kept, or None.
        on_start: Called when an iteration has opened all that it needs, before its first step.
        trackers: Whom the run is shown to, beside its folder; may be changed between iterations.
        last: Info of the last step, or None.
        stopped: Whether Ctrl-C or SIGTERM ended the last iteration.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        folder: RunFolder | None = None,
        *,
        custom: Custom,
        trackers: Sequence[Tracker | str] = (),
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Set up a run; use `train` or `resume` to get one."""
        vocabulary = corpus.vocabulary
        built = custom.build(config.model, vocabulary.size)
        self.config = config
        self.corpus = corpus
        self.limits = Limits(config.steps, config.seconds)
        self.folder = folder
        objective = custom.objective
        self.trackers = find_trackers(trackers) if leads() else []
        self.baselines = corpus.baselines(corpus.held_out) if corpus.held_out and objective is None else {}
        self.on_start: Callable[[], None] = lambda: None
        self.last: StepInfo | None = None
        self.stopped = False
        self.tell = (tell or (lambda line: print(line, file=sys.stderr))) if leads() else (lambda line: None)
        if flags := changed_flags():
            self.tell(flags)
        # A text that is used block by block comes with its first block.
        stream = None if config.data.block_tokens else corpus.stream()
        self._replica = Replica(config, built, stream, whole_mesh(), objective, custom.optimizer)
        self._language_model = LanguageModel(built, vocabulary, local_mesh())
        self._measure = make_measure(self._language_model, config, corpus.held_out, objective)
        if config.data.held_out > 0 and self._measure is None:
            what = "less than a window" if corpus.held_out else "no document"
            self.tell(
                f"{what} is held out, so nothing is evaluated; give more documents, or cut them smaller "
                "(data.documents line)"
            )
        self._seconds = 0.0
        self._member_tokens = 0
        self._custom = custom
        self._is_finite = True
        self._id = secrets.token_hex(8)
        self._history = History()

    def __repr__(self) -> str:
        """Say what the run is, and where it stands."""
        where = f" in {str(self.folder.path)!r}" if self.folder else ""
        loss = f", loss {self.last.loss:.3f}" if self.last else ""
        return f"<esjax run{where}: {self.summary()}; {self.step:,} steps, {self._member_tokens:,} member-tokens{loss}>"

    def summary(self) -> str:
        """Say in one line what is trained on what, and how much a step is."""
        devices = describe_kinds(self._replica.devices)
        return describe_run(devices, self.config, self.corpus, self._replica.state.params, self._custom.names())

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._replica.state.step)

    @property
    def params(self) -> Params:
        """The weights to use: the average that the settings ask for."""
        return here(self._replica.state.average)

    def sample(self) -> str:
        """Write a few documents, a line of dashes between two of them; what they are follows from the step."""
        texts = self.generate(count=SAMPLE_DOCUMENTS, max_tokens=SAMPLE_TOKENS, seed=self.step)
        return "\n---\n".join(written.text for written in texts)

    def _now(self) -> tuple[LanguageModel, Params]:
        return self._language_model, self.params

    def _text(self, text: str | None) -> Corpus:
        if text is None:
            return self.corpus
        return load_corpus(replace(self.config.data, text=text), self.corpus.vocabulary)

    def _training_text(self, text: Corpus) -> Corpus:
        return self.corpus

    def _view(self) -> RunView:
        """Return what its folder holds, or without one what was measured since `train` was called."""
        if self.folder:
            return read_run(self.folder.path)
        values = {f"custom.{kind}": name for kind, name in self._custom.names().items()}
        return RunView(Path(), "this run", "running", values, self._history.columns(), self.baselines, (), ())

    def __iter__(self) -> Iterator[StepInfo]:
        """Train, and yield what each step did."""
        config = self.config
        self.limits.check(self.step)
        with ExitStack() as stack:
            asked = stack.enter_context(stop_on_signals())
            # Left after all the rest, so that a tracker that hangs delays nothing that matters.
            watch = stack.enter_context(Watch(self.trackers, lambda line: self.tell(line)))
            record = self._open_folder(stack)
            watch.start(self._tracked(), JsonLines(record.folder, self.tell) if record else None)
            clock = Clock(self._seconds)
            steps = self._set_up(record.ledger if record else None, clock)
            self.on_start()
            has_begun = False
            # Where there is a held-out loss already, the next one can wait.
            evaluate_after = config.evaluate_time if self._is_measured() else 0.0
            evaluate_at = checkpoint_at = 0.0
            while True:
                started, tokens_before = time.perf_counter(), self._member_tokens
                info = self._take_step(steps)
                now = time.perf_counter()
                if not has_begun:
                    has_begun, evaluate_at, checkpoint_at = True, now + evaluate_after, now + config.checkpoint_time
                self._seconds = clock.seconds
                # Clocks and signals differ between processes; what follows from them must not.
                self.stopped = asked.is_set()
                if self.stopped:
                    self.tell(STOPPING)
                done = any_of(self.stopped or (leads() and self.limits.reached(info.step, clock.session)))
                held_out = None
                if leads() and self._measure is not None and (done or now >= evaluate_at):
                    held_out = self._measure(self.params)
                    evaluate_at = time.perf_counter() + config.evaluate_time
                self.last = info._replace(
                    seconds=self._seconds,
                    member_tokens_per_second=(info.member_tokens - tokens_before) / (now - started),
                    held_out=held_out,
                )
                self._history.add(self.last)
                watch.log(self.last)
                if record and (done or now >= checkpoint_at):
                    record.checkpoints.save(self._replica.state, self._seconds, self._member_tokens)
                    watch.sample(info.step, self.sample())
                    checkpoint_at = time.perf_counter() + config.checkpoint_time
                yield self.last
                if done:
                    return

    def _open_folder(self, stack: ExitStack) -> "_Record | None":
        if self.folder is None:
            return None
        self.folder.lock()
        stack.callback(self.folder.unlock)
        checkpoints = Checkpoints(self.folder.checkpoints, self.config.keep_checkpoints)
        if checkpoints.newest > self.step:
            raise EsjaxError(
                f"{str(self.folder.path)!r} was trained on to step {checkpoints.newest} since; resume it from there"
            )
        self.folder.keep_baselines(self.baselines)

        def save() -> None:
            checkpoints.save(self._replica.state, self._seconds, self._member_tokens)

        stack.callback(save)  # however the iteration ends, what is trained is kept
        ledger = self._open_ledger(stack, self.folder)
        if ledger is not None and not checkpoints.newest:
            save()  # the state that the ledger begins with: initial weights may be any
        return _Record(self.folder, checkpoints, ledger)

    def _is_measured(self) -> bool:
        """Tell whether a held-out loss is kept, or remembered."""
        if self.folder is not None:
            return read_run(self.folder.path).last("held_out") is not None
        return not np.isnan(self._history.columns()["held_out"]).all()

    def _tracked(self) -> TrackedRun:
        if self.folder is not None:
            return tracked_run(self.folder, self.baselines, self.step)
        return TrackedRun(self._id, "esjax", None, to_plain(self.config), self.baselines, self.step)

    def _open_ledger(self, stack: ExitStack, folder: RunFolder) -> Ledger | None:
        if not (self.config.ledger or folder.ledger.exists()):
            return None
        ledger = stack.enter_context(closing(Ledger.open(folder.ledger, self.tell)))
        if ledger.next and ledger.next != self.step:
            raise EsjaxError(f"{str(folder.path)!r} was trained on to step {ledger.next} since; resume it from there")
        return ledger

    def _catch_up(self) -> None:
        """Make the updates that the ledger holds beyond the checkpoint."""
        assert self.folder is not None
        if not self.folder.ledger.exists():
            return
        data = self.config.data
        for record in read(self.folder.ledger):
            if record.kind == UPDATE and record.step == self.step:
                pairs = sum(count for _, count in unpack_update(record.payload).header.spans)
                self._replica.update(record.payload)
                self._seconds = max(self._seconds, record.seconds or 0.0)
                self._member_tokens += self.config.es.members_per_pair * pairs * data.batch_size * data.window

    def _set_up(self, ledger: Ledger | None, clock: Clock) -> LocalSteps:
        def record(step: int, payload: bytes) -> None:
            clock.set_finished(time.perf_counter())
            if ledger:
                ledger.append(UPDATE, step, payload, clock.seconds)

        config = self.config
        size, block_tokens = self.corpus.vocabulary.size, config.data.block_tokens
        blocks = Blocks(self.corpus.stream(), size, config.seed, block_tokens) if block_tokens else None
        return LocalSteps(config, self._replica, custom=self._custom.names(), record=record, blocks=blocks)

    def _take_step(self, steps: LocalSteps) -> StepInfo:
        done = steps.take()
        concluded = done.concluded
        was_finite, self._is_finite = self._is_finite, math.isfinite(done.update_norm)
        if done.notice:
            self.tell(done.notice)
        if was_finite and not self._is_finite:
            self.tell(f"step {self.step}: the update is not finite; lower optim.learning_rate; no update")
        population = self.config.es.members_per_pair * done.pairs
        self._member_tokens += population * self.config.data.batch_size * self.config.data.window
        return StepInfo(
            step=self.step,
            seconds=0.0,
            loss=math.nan if concluded.loss is None else concluded.loss,
            population=population,
            void_pairs=concluded.void_pairs,
            applied=not concluded.trouble and self._is_finite,
            gradient_norm=done.gradient_norm,
            update_norm=done.update_norm,
            member_tokens=self._member_tokens,
            member_tokens_per_second=0.0,
        )


class _Record(NamedTuple):
    """An open run folder."""

    folder: RunFolder
    checkpoints: Checkpoints
    ledger: Ledger | None


def train(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """Begin a run; iterate over the result to train.

    Args:
        config: Settings; None: the defaults.
        out: Run folder to make. None: nothing is written.
        model: Builds a model of one's own, in place of the one that the settings name.
        loss: A loss of one's own, in place of cross entropy: `(member, tokens, key) -> float32`, lower is better, see
            `esjax.models.member`.
        reward: The same with higher is better; `loss` and `held_out` of an info are its negative.
        optimizer: Any optax transformation that needs no more than gradients, parameters and `value`, the mean loss of
            the step; in place of the one that the settings name.
            Each of the four may be a text, PATH.py:FUNCTION: then the run folder knows where it is, and resume, load
            and the command line find it again. The function for an optimizer takes nothing, and returns it.
        trackers: Whom to show the run to, see `esjax.Tracker`; also by name: tensorboard, wandb, trackio.
        tell: Called with each line that a person should see. None: they go to standard error.

    Raises:
        EsjaxError: The text cannot be used, the folder exists already, the package of a tracker is missing, there are a
            loss and a reward, or one that does not return one float32, or the optimizer needs more than there is.
    """
    config, out = locate_text(config or Config()), None if out is None else given_path(out)
    custom = gather(model=model, loss=loss, reward=reward, optimizer=optimizer)
    corpus = load_corpus(config.data)
    trainer = Trainer(config, corpus, custom=custom, trackers=trackers, tell=tell)
    if corpus.note:
        trainer.tell(corpus.note)
    if out is not None and leads():
        trainer.folder = RunFolder.create(out, config, corpus.vocabulary, corpus.digest, custom.names(), custom.code)
    return trainer


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    text: str | None = None,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """Go on with a run from its newest checkpoint; iterate over the result to train.

    If the run keeps a ledger, the updates since that checkpoint are made again. Where no checkpoint is whole, the state
    is rebuilt from the seed and the ledger.

    Args:
        path: Run folder.
        steps: Stop when the run has done so many steps in all.
        seconds: Stop so many seconds after the first step finished from now. With neither of the two, the limits of
            the run's settings hold.
        text: Where the run's text is now, as the setting data.text; None: where it was.
        model: The run's own model, if it was given one. What was named as PATH.py:FUNCTION is found again without it;
            a text of that form says where the same file is now.
        loss: The same of its own loss.
        reward: The same of its own reward.
        optimizer: The same of its own optimizer.
        trackers: Whom to show the run to, see `esjax.Tracker`; also by name: tensorboard, wandb, trackio.
        tell: Called with each line that a person should see. None: they go to standard error.

    Raises:
        EsjaxError: It is no run folder, its text or its code has changed, neither a checkpoint nor a ledger from its
            first step on is whole, or a model, loss or optimizer of its own is missing.
    """
    folder = RunFolder(given_path(path))
    folder.check_goes_on()
    custom = gather(folder.code, model=model, loss=loss, reward=reward, optimizer=optimizer)
    folder.check_custom(custom.names(), "esjax.resume")
    corpus = load_run_corpus(folder, text)
    if text is not None:
        folder.keep_config()
    trainer = Trainer(folder.config, corpus, folder, custom=custom, trackers=trackers, tell=tell)
    restored = restore_run(folder, trainer._replica.state, trainer.tell)
    trainer._replica.state = restored.state
    trainer._seconds, trainer._member_tokens = restored.seconds, restored.member_tokens
    trainer._catch_up()
    # Older ledgers have no clock; the metrics have.
    trainer._seconds = max(trainer._seconds, read_run(folder.path).seconds_at(trainer.step))
    if steps is not None or seconds is not None:
        trainer.limits = Limits(steps, seconds)
    return trainer
