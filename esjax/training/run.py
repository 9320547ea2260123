"""Training on one machine: a run is an object to iterate over, one step at a time."""

import math
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esjax.config.settings import Config, replace
from esjax.core.seeds import stream_seed
from esjax.data.corpus import Corpus, load_corpus, locate_text
from esjax.devices.mesh import local_mesh, whole_mesh
from esjax.devices.process_group import any_of, here, leads
from esjax.errors import EsjaxError
from esjax.exchange.update_record import pair_count, unpack_update
from esjax.flags import changed_flags
from esjax.inference.held_out import make_measure
from esjax.inference.language_model import LanguageModel
from esjax.inference.loaded_run import complete_custom, load_run_corpus, restore_run
from esjax.inference.run_inference import RunInference
from esjax.models.custom import Custom, Reward, Tool
from esjax.models.custom.code import load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory, Params
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.replica.streams import HELD_OUT
from esjax.replica.update import TrainState
from esjax.rewards.held_out import HeldOutRewards, MeasureRewards, make_measure_rewards
from esjax.rewards.scoring import begin, make_scorer, move_prompts
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import UPDATE, read
from esjax.runs.reader import RunView, read_run
from esjax.runs.step_info import Limits, StepInfo
from esjax.signals import STOPPING
from esjax.training.local_steps import LocalSteps
from esjax.watch.history import History
from esjax.watch.recorded_run import RecordedRun, Recorder
from esjax.watch.summary import describe_kinds
from esjax.watch.tracking import Tracker
from esjax.weights.first import first_params, start_of

SAMPLE_DOCUMENTS = 4
"""Documents of a sample."""

SAMPLE_TOKENS = 200
"""Most tokens of each of these documents."""


class Trainer(RecordedRun, RunInference):
    """A run on this machine: iterate over it to train; generate and evaluate between steps.

    Iteration ends at the limits, after the step in which Ctrl-C or SIGTERM came, or after `stop`. Iterating again
    continues. With a run folder, every end of the iteration leaves a checkpoint: errors, `break` and the end of the
    program included. If an error comes before the first step is done, a new folder is removed. If the devices fail in
    an update, the state is lost from their memory, and `resume` goes on from the last checkpoint and the ledger.
    Between two steps, signals are the program's own, see `handling_signals`.

    Attributes:
        config: Settings.
        corpus: The text.
        custom: Custom model, loss, reward, tool and optimizer.
        limits: Limits of the iteration; may be changed.
        baselines: Nats per token of the n-gram models over the held-out documents; empty without held-out documents,
            and with a custom loss or reward.
        folder: The run folder, or None.
        on_start: Called after an iteration has opened its files, before its first step.
        trackers: Trackers of the run; may be changed between iterations.
        last: Info of the last step, or None.
        stopped: Whether Ctrl-C or SIGTERM came, or `stop` was called, during the last iteration.
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
        super().__init__(config, corpus, folder, custom, trackers, tell)
        if flags := changed_flags():
            self.tell(flags)
        # With token blocks, the first block is set before the first step.
        stream = None if config.data.block_tokens or config.writes else corpus.stream()
        self._scorer = make_scorer(config, custom, vocabulary, lambda line: self.tell(line))
        self._replica = Replica(config, built, stream, whole_mesh(), custom.objective, custom.optimizer, self._scorer)
        self._devices = describe_kinds(self._replica.devices)
        self._language_model = LanguageModel(built, vocabulary, local_mesh())
        self._measure = make_measure(self._language_model, config, corpus.measured, custom.objective)
        self._measure_rewards: MeasureRewards | None = None
        if self._scorer is not None:
            seed = stream_seed(config.seed, HELD_OUT)
            self._measure_rewards = make_measure_rewards(built, config.reward, self._scorer, seed)
        if config.data.held_out > 0 and self._measure is None:
            what = "less than a window" if corpus.held_out else "no document"
            self.tell(
                f"{what} is held out, so there is no held-out loss; give more documents, or cut them smaller "
                "(data.documents line)"
            )
        self._seconds = 0.0
        self._member_tokens = 0
        self._is_finite = True
        self._history = History()

    def __repr__(self) -> str:
        """Show the settings and the progress in one line."""
        where = f" in {str(self.folder.path)!r}" if self.folder else ""
        loss = f", loss {self.last.loss:.3f}" if self.last else ""
        done = "state lost" if self._replica.is_lost else f"{self.step:,} steps"
        return f"<esjax run{where}: {self.summary()}; {done}, {self._member_tokens:,} member-tokens{loss}>"

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self._state.step)

    @property
    def params(self) -> Params:
        """A copy of the averaged parameters, for evaluation and generation."""
        return jax.tree.map(jnp.copy, self._average)

    @property
    def _average(self) -> Params:
        return here(self._state.average)

    @property
    def _state(self) -> TrainState:
        """Return the state.

        Raises:
            EsjaxError: The devices failed in an update, and the state is gone from their memory.
        """
        if self._replica.is_lost:
            raise EsjaxError(
                "the devices failed in a step, and the state is lost; resume the run from its folder, or start anew"
            )
        return self._replica.state

    def measure_rewards(self) -> HeldOutRewards | None:
        """Measure rewards on held-out prompts now; None without a reward in Python or held-out prompts."""
        return None if self._measure_rewards is None else self._measure_rewards(self._average)

    def sample(self) -> str:
        """Generate four documents, separated by lines of dashes; the step is the seed."""
        texts = self.generate(count=SAMPLE_DOCUMENTS, max_tokens=SAMPLE_TOKENS, seed=self.step)
        return "\n---\n".join(written.text for written in texts)

    def _now(self) -> tuple[LanguageModel, Params]:
        return self._language_model, self._average

    def _text(self, text: str | None) -> Corpus:
        if text is None:
            return self.corpus
        return load_corpus(replace(self.config.data, text=text), self.corpus.vocabulary)

    def _training_text(self, text: Corpus) -> Corpus:
        return self.corpus

    def _view(self) -> RunView:
        """Read the run folder; without a folder, return what was measured since `train` was called."""
        if self.folder:
            return read_run(self.folder.path)
        values = {f"custom.{kind}": name for kind, name in self.custom.names().items()}
        return RunView(Path(), "this run", "running", values, self._history.columns(), self.baselines, (), ())

    def _steps(self) -> Generator[StepInfo]:
        """Train, and yield the info of each step."""
        self.limits.check(self.step)
        with self._recording() as recorder, self._removing_new_folder():
            self._open(recorder)
            try:
                yield from self._train(recorder)
            finally:
                if self._scorer is not None:
                    self._scorer.close()
                if not self._replica.is_lost:
                    recorder.save(self._replica.state)

    def _open(self, recorder: Recorder) -> None:
        """Open the files, and check that no other process has trained the run on."""
        recorder.open_files()
        newest = recorder.checkpoints.newest if recorder.checkpoints else 0
        recorded = recorder.ledger.next if recorder.ledger else 0
        done = newest if newest > self.step else recorded or self.step
        if self.folder and done != self.step:
            raise EsjaxError(f"{str(self.folder.path)!r} was trained on to step {done} since; resume it from there")
        recorder.start(self.step, self._seconds, self._member_tokens)
        if (recorder.ledger or self.config.init) and not newest:
            # A replay starts from this checkpoint: the first weights may not follow from the seed.
            recorder.save(self._replica.state)

    def _train(self, recorder: Recorder) -> Generator[StepInfo]:
        config = self.config
        blocks = self.corpus.blocks(config.seed, config.data.block_tokens)

        def record(step: int, payload: bytes) -> None:
            recorder.append(step, payload, time.perf_counter())

        steps = LocalSteps(config, self._replica, custom=self.custom.names(), record=record, blocks=blocks)
        self.on_start()
        done, has_begun = False, False
        # If a held-out loss is known already, the next one is measured later.
        evaluate_after = config.evaluate_time if self._is_measured() else 0.0
        evaluate_at = checkpoint_at = 0.0
        while not done:
            info = self._take_step(steps, recorder)
            now = time.perf_counter()
            if not has_begun:
                has_begun, evaluate_at, checkpoint_at = True, now + evaluate_after, now + config.checkpoint_time
            # Clocks and signals differ between processes, but all of them must decide the same.
            self.stopped = recorder.asked.is_set()
            if self.stopped:
                self.tell(STOPPING)
            done = any_of(self.stopped or (leads() and recorder.is_done(info.step)))
            if leads() and (done or now >= evaluate_at):
                info = self._evaluated(info)
                done = done or self._has_settled(info)
                evaluate_at = time.perf_counter() + config.evaluate_time
            if self._scorer is not None:
                info = info._replace(rewards={name: mean for name, mean, _ in self._scorer.take_means()} or None)
            info = recorder.log(info)
            self._history.add(info)
            if self.folder and (done or now >= checkpoint_at):
                recorder.save(self._replica.state)
                recorder.watch.sample(info.step, self.sample())
                checkpoint_at = time.perf_counter() + config.checkpoint_time
            yield info
        self.stopped = recorder.asked.is_set()  # also while the last step was evaluated: a sweep must end, too

    def _evaluated(self, info: StepInfo) -> StepInfo:
        """Add what is measured on held-out documents and prompts."""
        if self._measure is not None:
            info = info._replace(held_out=self._measure(self._average))
        if (rewards := self.measure_rewards()) is not None:
            info = info._replace(**rewards._asdict())
        return info

    def _is_measured(self) -> bool:
        """Return whether a held-out loss of this run is known."""
        if self.folder is not None:
            return read_run(self.folder.path).last("held_out") is not None
        return not np.isnan(self._history.columns()["held_out"]).all()

    def _catch_up(self) -> None:
        """Apply the updates of the ledger that are later than the checkpoint."""
        assert self.folder is not None
        if not self.folder.ledger.exists():
            return
        for record in read(self.folder.ledger, self.step):
            if record.kind == UPDATE:
                pairs = pair_count(unpack_update(record.payload).header.spans)
                self._replica.update(record.payload)
                self._seconds = max(self._seconds, record.seconds or 0.0)
                self._member_tokens += self.config.tokens_per_pair * pairs

    def _take_step(self, steps: LocalSteps, recorder: Recorder) -> StepInfo:
        started = time.perf_counter()
        done = steps.take()
        concluded = done.concluded
        was_finite, self._is_finite = self._is_finite, math.isfinite(done.update_norm)
        if done.notice:
            self.tell(done.notice)
        if was_finite and not self._is_finite:
            self.tell(f"step {self.step}: the update is not finite; lower optim.learning_rate; no update")
        tokens = done.pairs * self.config.tokens_per_pair
        recorder.member_tokens += tokens
        self._seconds, self._member_tokens = recorder.seconds, recorder.member_tokens
        return StepInfo(
            step=self.step,
            seconds=self._seconds,
            loss=math.nan if concluded.loss is None else concluded.loss,
            population=done.pairs * self.config.es.members_per_pair,
            void_pairs=concluded.void_pairs,
            applied=not concluded.trouble and self._is_finite,
            gradient_norm=done.gradient_norm,
            update_norm=done.update_norm,
            member_tokens=self._member_tokens,
            member_tokens_per_second=tokens / (time.perf_counter() - started),
        )


def train(
    config: Config | None = None,
    out: str | Path | None = None,
    *,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """Begin a run; iterate over the result to train.

    Each of `model`, `loss`, `reward`, `tool` and `optimizer` may be given as "PATH.py:FUNCTION". The run folder records
    this place, so `resume`, `load` and the command line find the code again.

    Args:
        config: Settings; None: the defaults.
        out: Run folder to make. None: nothing is written.
        model: A custom model in place of the one in the settings: a function from the number of token ids to an
            `esjax.Model`.
        loss: A custom loss in place of cross entropy: `(member, tokens, key) -> float32 scalar`, lower is better; see
            `esjax.Member`.
        reward: A custom reward, higher is better. `(member, tokens, key) -> float32 scalar`, jitted; `loss` and
            `held_out` of an info are then minus the reward. Or plain Python over what members write, with the setting
            `reward.prompts`: `(prompts, completions) -> list of floats`, or with `answers` as a third argument; or a
            mapping from names to such lists.
        tool: A tool that members call while they write for a reward in Python: `(text) -> string`, see
            docs/rewards.md.
        optimizer: A custom optimizer in place of the one in the settings: an optax transformation that needs only
            gradients, parameters and `value`, the mean loss of the step. In a file, a function without arguments that
            returns it.
        trackers: Trackers, see `esjax.Tracker`, or names: "tensorboard", "wandb", "trackio".
        tell: Called with each line for the user. None: print to standard error.

    Raises:
        EsjaxError: The text cannot be used, the folder exists, the package of a tracker is missing, both a loss and a
            reward are given, one of them does not return a float32 scalar, or the optimizer needs other arguments.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return train_with(custom, config or Config(), out, trackers=trackers, tell=tell)


def train_with(
    custom: Custom,
    config: Config,
    out: str | Path | None = None,
    *,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """`train`, given all custom parts."""
    if config.ledger_horizon is not None and not config.ledger:
        raise EsjaxError("ledger_horizon is of no use without a ledger; set ledger to true (--ledger), or leave it out")
    out = None if out is None else given_path(out)
    config, custom, vocabulary, params = start_of(config, custom)
    config = locate_text(config)
    corpus = load_corpus(config.data, vocabulary)
    config = begin(config, custom)
    trainer = Trainer(config, corpus, custom=custom, trackers=trackers, tell=tell)
    if params is not None:
        trainer._replica.begin(params)
    if out is not None and leads():
        trainer.folder = RunFolder.create(
            out, config, corpus.vocabulary, corpus.digest, custom.names(), custom.code, corpus.files
        )
    return trainer


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    text: str | None = None,
    prompts: str | None = None,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """Continue a run from its newest undamaged checkpoint; iterate over the result to train.

    If the run keeps a ledger, the updates after that checkpoint are applied again. If no checkpoint is whole, the state
    is rebuilt from the seed and the ledger.

    Args:
        path: Run folder.
        steps: Total number of steps at which to stop.
        seconds: Seconds to train, from the end of the first step. If `steps` and `seconds` are both None, the limits in
            the settings of the run hold.
        text: New place of the run's text, as in the setting data.text. None: the place in the settings.
        prompts: New place of the run's prompts, as in the setting reward.prompts, likewise.
        model: The custom model of the run, if it has one. Code that was given as "PATH.py:FUNCTION" is found without
            this argument; such a text names the new place of the file.
        loss: The custom loss of the run, likewise.
        reward: The custom reward of the run, likewise.
        tool: The tool of the run, likewise.
        optimizer: The custom optimizer of the run, likewise.
        trackers: Trackers, see `esjax.Tracker`, or names: "tensorboard", "wandb", "trackio".
        tell: Called with each line for the user. None: print to standard error.

    Raises:
        EsjaxError: The path is not a run folder, its text or its code has changed, it has neither an undamaged
            checkpoint nor a ledger from step 0 on, or a custom part is missing.
    """
    custom = load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer)
    return resume_with(
        custom, path, steps=steps, seconds=seconds, text=text, prompts=prompts, trackers=trackers, tell=tell
    )


def resume_with(
    custom: Custom,
    path: str | Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    text: str | None = None,
    prompts: str | None = None,
    trackers: Sequence[Tracker | str] = (),
    tell: Callable[[str], None] | None = None,
) -> Trainer:
    """`resume`, given the custom parts that the run does not find by itself."""
    folder = RunFolder(given_path(path))
    folder.check_goes_on()
    custom = complete_custom(folder, custom, "esjax.resume")
    corpus = load_run_corpus(folder, text)
    if prompts is not None:
        folder.config = move_prompts(folder.config, prompts)
    if text is not None or prompts is not None:
        folder.keep_config()
    trainer = Trainer(folder.config, corpus, folder, custom=custom, trackers=trackers, tell=tell)
    first = trainer._replica.state
    restored = restore_run(folder, first, trainer.tell)
    if restored.state is not first:
        trainer._replica.resume_from(restored.state)
    elif (params := first_params(folder.config, custom)) is not None:
        trainer._replica.begin(params)
    trainer._seconds, trainer._member_tokens = restored.seconds, restored.member_tokens
    trainer._catch_up()
    # Older ledgers do not record the training time; the metrics do.
    trainer._seconds = max(trainer._seconds, read_run(folder.path).seconds_at(trainer.step))
    if steps is not None or seconds is not None:
        trainer.limits = Limits(steps, seconds)
    return trainer
