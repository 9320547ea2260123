"""The executor of a host's device tasks: in the calling thread or a background thread, in all processes of the host."""

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
import numpy as np

from esjax.config.settings import Config, from_yaml, replace
from esjax.core.seeds import stream_seed
from esjax.data.delivery import token_type, unpack_block, unpack_text
from esjax.data.vocabulary import Vocabulary
from esjax.devices.mesh import device_failure, local_mesh, whole_mesh
from esjax.devices.process_group import here, share, share_number
from esjax.errors import EsjaxError
from esjax.flags import changed_flags
from esjax.hosts.protocol import tasks
from esjax.inference.held_out import make_measure
from esjax.inference.language_model import LanguageModel
from esjax.models.custom import NOTHING_CUSTOM, Custom
from esjax.models.model import Params
from esjax.replica.replica import Replica
from esjax.replica.snapshot import from_bytes, to_bytes
from esjax.replica.streams import HELD_OUT
from esjax.rewards.held_out import make_measure_rewards
from esjax.rewards.prompts import check_for_hosts
from esjax.rewards.scoring import Scorer, make_scorer, move_prompts
from esjax.runs.checkpoint import digest
from esjax.signals import started
from esjax.weights.first import first_params

IDLE = 5.0
"""Seconds without a task after which process 0 sends the others a sign of life: collectives time out without one."""

TASKS = "esjax-tasks"
"""Name of the thread that runs the tasks."""

CLOSE, CLOSE_TOGETHER = 1.0, 60.0
"""Seconds that the running task has to finish at the end: of a single process, and of a process group, whose processes
must end together."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tasks.Task)
_NOTHING, _END = b"nothing", b"end"


class Places(NamedTuple):
    """Where a host has files of the run, if not where the settings of the run name them.

    Attributes:
        init: The weights that the run starts from.
        prompts: The prompts, see the setting `reward.prompts`.
    """

    init: Path | None = None
    prompts: str | None = None


AS_SETTINGS = Places()
"""All files are where the settings name them."""


class Executor:
    """Runs tasks on a replica."""

    def __init__(
        self,
        replica: Replica | None = None,
        vocab_size: int = 0,
        *,
        custom: Custom = NOTHING_CUSTOM,
        places: Places = AS_SETTINGS,
        tell: Callable[[str], None],
    ) -> None:
        """Set up with a replica and the size of its vocabulary, or without them until the task `Build`."""
        self._replica, self._vocab_size, self._custom, self._tell = replica, vocab_size, custom, tell
        self._places = places
        self._scorer: Scorer | None = None
        self._measure: Callable[[], float | None] = lambda: None
        self._measure_rewards: Callable[[], tuple[float, float] | None] = lambda: None

    @property
    def replica(self) -> Replica:
        """The replica, which must be built."""
        assert self._replica is not None
        return self._replica

    @property
    def calls(self) -> int:
        """Calls of a reward in Python that have ended so far."""
        return self._scorer.calls if self._scorer else 0

    def close(self) -> None:
        """End the processes that call a reward."""
        if self._scorer:
            self._scorer.close()

    def do(self, task: tasks.Task) -> tasks.Result:
        """Run a task. Errors of the run and of the devices are returned as `Failed`, with a reason of one line."""
        try:
            return self._build(task) if isinstance(task, tasks.Build) else self._do(task)
        except EsjaxError as error:
            return tasks.Failed(str(error))
        except jax.errors.JaxRuntimeError as error:
            return tasks.Failed(device_failure(error))

    def follow(self) -> None:
        """Run the tasks that process 0 of the host runs, until it ends; all other processes call this."""
        while (word := share(b"")) != _END:
            if word != _NOTHING:
                task = _DECODER.decode(word)
                self.do(task)
                if isinstance(task, tasks.Score):
                    started()

    def _do(self, task: tasks.Task) -> tasks.Result:
        replica = self.replica
        norms: tuple[float | None, float | None] = (None, None)
        match task:
            case tasks.Score():
                began = time.perf_counter()
                values = replica.score(task.spans)
                means = self._scorer.take_means() if self._scorer else []
                return tasks.Scored(values, share_number(time.perf_counter() - began), means)
            case tasks.TakeDigest():
                return tasks.Value(digest(replica.state))
            case tasks.TakeSnapshot():
                return tasks.Value(to_bytes(replica.state))
            case tasks.Measure():
                return tasks.Measured(self._measure(), *(self._measure_rewards() or ()))
            case tasks.Apply():
                for payload in task.updates:
                    norms = replica.update(payload)
            case tasks.Load():
                replica.resume_from(from_bytes(task.snapshot, replica.state))
            case tasks.UseBlock():
                replica.use_tokens(unpack_block(task.tokens, self._vocab_size))
        return tasks.Done(int(replica.state.step), *norms)

    def _build(self, task: tasks.Build) -> tasks.Result:
        if flags := changed_flags():
            self._tell(flags)
        config = from_yaml(task.config, "the run's settings")
        check_for_hosts(config.reward.prompts)
        if self._places.prompts is not None:
            config = move_prompts(config, self._places.prompts)
        start = self._start(config)  # first: what is missing here is known before anything is compiled
        text = unpack_text(task.text, task.text_bytes, task.text_digest, task.vocab_size)
        model = self._custom.build(config.model, task.vocab_size)
        mesh = whole_mesh()
        self._vocab_size = task.vocab_size
        scorer = self._scorer = make_scorer(config, self._custom, text.vocabulary or Vocabulary("byte"), self._tell)
        stream = None if config.writes else text.stream
        if config.data.block_tokens:  # tokens come later; zeros are enough to compile the programs
            stream = np.zeros(config.data.block_tokens, token_type(task.vocab_size))
        while True:
            replica = Replica(config, model, stream, mesh, self._custom.objective, self._custom.optimizer, scorer)
            try:
                replica.warm_up()
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or replica.chunk_pairs <= 2:
                    raise
                fewer = max(2, replica.chunk_pairs // 2)
                self._tell(f"out of memory with {replica.chunk_pairs} pairs at a time; trying {fewer}")
                config = replace(config, es=replace(config.es, chunk_pairs=fewer))
        self._replica = replica
        language_model = LanguageModel(model, Vocabulary("byte"), local_mesh())
        measure = make_measure(language_model, config, text.held_out, self._custom.objective)
        if measure:
            self._measure = lambda: measure(here(replica.state.average))
        if scorer is not None:
            measure_rewards = make_measure_rewards(model, config.reward, scorer, stream_seed(config.seed, HELD_OUT))
            if measure_rewards:
                self._measure_rewards = lambda: measure_rewards(here(replica.state.average))
        if start is not None:
            replica.begin(start)
        return tasks.Built(replica.device_batch, -1 if start is None else 0)

    def _start(self, config: Config) -> Params | None:
        """Return the weights that the run starts from; None: the host fetches a state.

        Raises:
            EsjaxError: They are not here, or other weights are, and the run sends none.
        """
        if config.init is None:
            if self._places.init is not None:
                raise EsjaxError("the run starts from random weights; join without --init")
            return None
        try:
            return first_params(config, self._custom, self._places.init)
        except EsjaxError as error:
            if self._places.init is None and config.hosts.send_init:
                return None
            raise EsjaxError(
                f"{error}; the run starts from weights that every host reads for itself: copy the run or the file "
                f"{config.init} here and join with --init PATH, or let serve send them, --hosts.send-init"
            ) from error


class Background:
    """A thread that runs one task after another, in all processes of the host; a context manager.

    Meanwhile the host answers messages. `wake` is called from the thread after each task.
    """

    def __init__(self, executor: Executor, wake: Callable[[], None]) -> None:
        """Start the thread."""
        self._executor, self._wake = executor, wake
        self._tasks: queue.SimpleQueue[tasks.Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tasks.Result] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name=TASKS)
        self._thread.start()

    def give(self, task: tasks.Task) -> None:
        """Queue a task."""
        self._tasks.put(task)

    @property
    def calls(self) -> int:
        """Calls of a reward in Python that have ended so far."""
        return self._executor.calls

    def results(self) -> list[tasks.Result]:
        """Return the results of the tasks that finished since the last call."""
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread after its running task; wait `CLOSE` or `CLOSE_TOGETHER` for it."""
        self._tasks.put(None)
        self._thread.join(CLOSE if jax.process_count() == 1 else CLOSE_TOGETHER)
        self._executor.close()

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=IDLE)
            except queue.Empty:
                share(_NOTHING)
                continue
            if task is None:
                share(_END)
                return
            share(_ENCODER.encode(task))
            try:
                result = self._executor.do(task)
            except (Exception, SystemExit) as error:  # a custom model may raise anything
                result = tasks.Failed(f"{type(error).__name__}: {str(error)[:300]}")
            self._results.put(result)
            self._wake()
