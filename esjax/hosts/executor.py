"""Does a host's tasks with its devices: at once or in a thread, and in all processes of the host alike."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import msgspec
import numpy as np

from esjax.config.settings import from_yaml, replace
from esjax.data.delivery import token_type, unpack_block, unpack_text
from esjax.data.vocabulary import Vocabulary
from esjax.devices.mesh import local_mesh, whole_mesh
from esjax.devices.process_group import here, share, share_number
from esjax.errors import EsjaxError
from esjax.flags import changed_flags
from esjax.hosts.protocol.tasks import (
    Apply,
    Build,
    Built,
    Done,
    Failed,
    Load,
    Measure,
    Result,
    Score,
    Scored,
    TakeDigest,
    TakeSnapshot,
    Task,
    UseBlock,
    Value,
)
from esjax.inference.held_out import make_measure
from esjax.inference.language_model import LanguageModel
from esjax.models.custom import NOTHING_CUSTOM, Custom
from esjax.replica.replica import Replica
from esjax.replica.snapshot import from_bytes, to_bytes
from esjax.runs.checkpoint import digest

IDLE = 5.0
"""Seconds after which the other processes hear that there is nothing to do: collectives give up on a silent one."""

TASKS = "esjax-tasks"
"""Name of the thread that keeps the devices busy."""

CLOSE, CLOSE_TOGETHER = 1.0, 60.0
"""Seconds that the devices have to finish what they are at, when all is over; those of several processes must, since
none of them can end well before the others."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Task)
_NOTHING, _END = b"nothing", b"end"


class Executor:
    """A replica, once it is built, and what it is asked to do."""

    def __init__(
        self,
        replica: Replica | None = None,
        vocab_size: int = 0,
        *,
        custom: Custom = NOTHING_CUSTOM,
        tell: Callable[[str], None],
    ) -> None:
        """Begin with a replica, or with none until `Build`.

        Args:
            replica: The replica, if there is one already.
            vocab_size: Its number of token ids.
            custom: Of a replica that is still to be built.
            tell: Called with each line that a person should see.
        """
        self._replica = replica
        self._vocab_size = vocab_size
        self._custom = custom
        self._tell = tell
        self._measure: Callable[[], float | None] = lambda: None

    @property
    def replica(self) -> Replica:
        """The replica, which has to be there."""
        assert self._replica is not None
        return self._replica

    def do(self, task: Task) -> Result:
        """Do a task; what fails comes back as `Failed`, with the reason in one line."""
        try:
            return self._build(task) if isinstance(task, Build) else self._do(task)
        except EsjaxError as error:
            return Failed(str(error))
        except jax.errors.JaxRuntimeError as error:
            return Failed(f"the devices failed: {str(error).splitlines()[0][:300]}")

    def follow(self) -> None:
        """Do what the process that leads does, until it ends; every other process of a host calls it."""
        while (word := share(b"")) != _END:
            if word != _NOTHING:
                self.do(_DECODER.decode(word))

    @contextmanager
    def in_background(self, wake: Callable[[], None]) -> Iterator["Background"]:
        """Do tasks in a thread until the block ends, and with all processes of the host.

        Args:
            wake: Called from the thread after each task.
        """
        background = Background(self, wake)
        try:
            yield background
        finally:
            background.close()

    def _do(self, task: Task) -> Result:
        replica = self.replica
        if isinstance(task, Score):
            started = time.perf_counter()
            values = replica.score(task.spans)
            return Scored(values, share_number(time.perf_counter() - started))
        if isinstance(task, Apply):
            return self._apply(replica, task)
        if isinstance(task, Load):
            replica.state = from_bytes(task.snapshot, replica.state)
        elif isinstance(task, UseBlock):
            replica.use_tokens(unpack_block(task.tokens, self._vocab_size))
        elif isinstance(task, TakeDigest):
            return Value(digest(replica.state))
        elif isinstance(task, TakeSnapshot):
            return Value(to_bytes(replica.state))
        elif isinstance(task, Measure):
            return Value(self._measure())
        return Done(int(replica.state.step))

    def _apply(self, replica: Replica, task: Apply) -> Done:
        norms: tuple[float | None, float | None] = (None, None)
        for payload in task.updates:
            norms = replica.update(payload)
        return Done(int(replica.state.step), *norms)

    def _build(self, task: Build) -> Result:
        if flags := changed_flags():
            self._tell(flags)
        config = from_yaml(task.config, "the run's settings")
        text = unpack_text(task.text, task.text_bytes, task.text_digest, task.vocab_size)
        model = self._custom.build(config.model, task.vocab_size)
        mesh = whole_mesh()
        self._vocab_size = task.vocab_size
        stream = text.stream
        if config.data.block_tokens:  # no text yet, but the programs can be compiled
            stream = np.zeros(config.data.block_tokens, token_type(task.vocab_size))
        while True:
            replica = Replica(config, model, stream, mesh, self._custom.objective, self._custom.optimizer)
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
        return Built(replica.device_batch)


class Background:
    """A thread that does tasks one at a time, so that the host can go on talking meanwhile."""

    def __init__(self, executor: Executor, wake: Callable[[], None]) -> None:
        """Begin; see `Executor.in_background`."""
        self._executor, self._wake = executor, wake
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Result] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._leases, daemon=True, name=TASKS)
        self._thread.start()

    def give(self, task: Task) -> None:
        """Have a task done."""
        self._tasks.put(task)

    def results(self) -> list[Result]:
        """Return what came of tasks since the last call."""
        found = []
        while not self._results.empty():
            found.append(self._results.get())
        return found

    def close(self) -> None:
        """Let the thread end after the task that it is at, if it is at one."""
        self._tasks.put(None)
        self._thread.join(CLOSE if jax.process_count() == 1 else CLOSE_TOGETHER)

    def _leases(self) -> None:
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
            except Exception as error:  # a custom model may raise anything
                result = Failed(f"{type(error).__name__}: {str(error)[:300]}")
            self._results.put(result)
            self._wake()
