"""Does a host's tasks with its devices."""

import math
import time
from collections.abc import Callable

import jax
import numpy as np

from esjax.checkpoint import digest
from esjax.config import from_yaml, replace
from esjax.data.delivery import token_type, unpack_block, unpack_text
from esjax.data.vocabulary import Vocabulary
from esjax.devices import local_mesh, whole_mesh
from esjax.errors import EsjaxError
from esjax.flags import changed_flags
from esjax.held_out import make_measure
from esjax.hosts import wire
from esjax.hosts.tasks import (
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
from esjax.own import NOTHING_OWN, Own
from esjax.processes import here, share_number
from esjax.replica import Replica
from esjax.snapshot import from_bytes, to_bytes
from esjax.trained import Trained


class Engine:
    """A replica, once it is built, and what it is asked to do."""

    def __init__(
        self,
        replica: Replica | None = None,
        vocab_size: int = 0,
        *,
        own: Own = NOTHING_OWN,
        tell: Callable[[str], None],
    ) -> None:
        """Begin with a replica, or with none until `Build`.

        Args:
            replica: The replica, if there is one already.
            vocab_size: Its number of token ids.
            own: Of a replica that is still to be built.
            tell: Called with each line that a person should see.
        """
        self._replica = replica
        self._vocab_size = vocab_size
        self._own = own
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

    def _do(self, task: Task) -> Result:
        replica = self.replica
        if isinstance(task, Score):
            started = time.perf_counter()
            if replica.numbers:
                values = np.stack([replica.sums(wire.pairs_of([span])) for span in task.spans])
            else:
                values = replica.losses(wire.pairs_of(task.spans))
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
            norms = make_update(replica, payload)
        return Done(int(replica.state.step), *norms)

    def _build(self, task: Build) -> Result:
        if flags := changed_flags():
            self._tell(flags)
        config = from_yaml(task.config, "the run's settings")
        text = unpack_text(task.text, task.text_bytes, task.text_digest, task.vocab_size)
        model = self._own.build(config.model, task.vocab_size)
        mesh = whole_mesh()
        self._vocab_size = task.vocab_size
        stream = text.stream
        if config.data.block_tokens:  # no text yet, but the programs can be compiled
            stream = np.zeros(config.data.block_tokens, token_type(task.vocab_size))
        while True:
            replica = Replica(config, model, stream, mesh, self._own.objective, self._own.optimizer)
            try:
                _compile(replica)
                break
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or replica.chunk_pairs <= 2:
                    raise
                fewer = max(2, replica.chunk_pairs // 2)
                self._tell(f"out of memory with {replica.chunk_pairs} pairs at a time; trying {fewer}")
                config = replace(config, es=replace(config.es, chunk_pairs=fewer))
        self._replica = replica
        trained = Trained(model, Vocabulary("byte"), local_mesh())
        measure = make_measure(trained, config, text.held_out, self._own.objective)
        if measure:
            self._measure = lambda: measure(here(replica.state.average))
        return Built(replica.granule)


def make_update(replica: Replica, payload: bytes) -> tuple[float | None, float | None]:
    """Take a replica one step on.

    Args:
        replica: At the step of the update.
        payload: The update, as it is published and kept in the ledger.

    Returns:
        Norms of the estimate and of the update; None for a void step.

    Raises:
        EsjaxError: The update is of another step, pairing or model.
    """
    update = wire.unpack_update(payload)
    step = int(replica.state.step)
    if update.header.step != step:
        raise EsjaxError(f"update {update.header.step} came to a state at step {step}")
    if not update.header.applied:
        replica.skip()
        return None, None
    if update.weights.shape[1:] != replica.halves:
        raise EsjaxError(f"update {step} was made with another es.pairing; take the settings of its run")
    if update.header.numbers != replica.numbers:
        raise EsjaxError(f"update {step} is of another model: {update.header.numbers} numbers, not {replica.numbers}")
    # Not measured here, but read from the update: the same bits on every host, and when the run is replayed.
    loss = math.nan if update.header.loss is None else update.header.loss
    if replica.numbers:
        info = replica.apply_sum(update.weights, update.header.scale, loss)
    else:
        info = replica.apply(update.pairs(), update.weights, update.header.scale, loss)
    return float(info.gradient_norm), float(info.update_norm)


def _compile(replica: Replica) -> None:
    """Run everything once, so that the first step is as fast as the others."""
    first = replica.state
    pairs = np.arange(replica.granule, dtype=np.uint32)
    if replica.numbers:
        replica.apply_sum(replica.sums(pairs), 0.0)
    else:
        replica.losses(pairs)
        replica.apply(pairs, np.ones((len(pairs), *replica.halves), np.int8), 0.0)
    replica.state = first
