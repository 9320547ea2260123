"""A coordinator and its only host in one process: the same state machines, with no network between them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esjax.config.settings import Config
from esjax.data.delivery import PackedText
from esjax.errors import EsjaxError
from esjax.exchange.values import make_exchange
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.executor import Executor
from esjax.hosts.protocol.actions import Action, Closed, Publish, Record, Terms
from esjax.hosts.protocol.tasks import Apply, Done, Failed
from esjax.hosts.protocol.worker import Worker

NOW = 0.0
"""The time stands still: no host can be late or lost."""

NO_TEXT = PackedText(b"", 0, "")
"""The replica has the text already."""


def pass_messages(coordinator: Coordinator, worker: Worker, now: float) -> list[Action]:
    """Pass messages until neither has anything to say.

    Returns:
        What else the coordinator wants done, in order.
    """
    coordinator.tick(now)
    worker.tick(now)
    others: list[Action] = []
    while True:
        request = worker.request(now)
        if request is not None:
            worker.receive(coordinator.receive(request, now), now)
        actions = coordinator.drain()
        for action in actions:
            if isinstance(action, Publish):
                worker.receive(action.envelope, now)
            else:
                others.append(action)
        if request is None and not actions:
            return others


class Taken(NamedTuple):
    """A step that was taken.

    Attributes:
        closed: Result of the losses.
        gradient_norm: Norm of the estimate; 0 for a void step.
        update_norm: Norm of the update; 0 for a void step, not finite if it was not made.
    """

    closed: Closed
    gradient_norm: float
    update_norm: float


class Loopback:
    """Takes steps."""

    def __init__(
        self,
        config: Config,
        executor: Executor,
        *,
        custom: dict[str, str],
        record: Callable[[int, bytes], None],
        block: Callable[[int], bytes] | None = None,
    ) -> None:
        """Set up.

        Args:
            config: Settings.
            executor: Does the tasks; it has a replica.
            custom: Names of the custom model, loss or reward, and optimizer.
            record: Called with the step and the bytes of an update before it is made.
            block: Gives a block of tokens as bytes, if the text is too large for the replica.
        """
        replica = executor.replica
        step = int(replica.state.step)
        terms = Terms(
            run="",
            incarnation=1,
            quantum=replica.chunk_pairs,
            vocab_size=0,
            known_answers={},
            custom=custom,
            exchange=make_exchange(replica.vector_length, replica.scale, replica.bounds),
        )
        rng = np.random.default_rng(config.seed)  # names a session; nothing that is trained depends on it
        self._coordinator = Coordinator(
            config, terms, step=step, now=NOW, rng=rng, text=NO_TEXT, block=block, with_audits=False
        )
        self._worker = Worker(
            "alone",
            "",
            "",
            {},
            custom,
            now=NOW,
            jitter=lambda: 0.0,
            built=True,
            step=step,
            device_batch=replica.device_batch,
        )
        self._executor = executor
        self._record = record

    def step(self) -> Taken:
        """Score a population and make the update.

        Raises:
            EsjaxError: The devices failed, or the update cannot be recorded.
        """
        worker = self._worker
        closed: Closed | None = None
        while True:
            for action in pass_messages(self._coordinator, worker, NOW):
                if isinstance(action, Record):
                    self._record(action.step, action.payload)
                elif isinstance(action, Closed):
                    closed = action
            task = worker.task()
            assert task is not None, "a host alone always has something to do"
            result = self._executor.do(task)
            if isinstance(result, Failed):
                raise EsjaxError(result.reason)
            worker.finished(result, NOW)
            if closed and isinstance(task, Apply) and isinstance(result, Done):
                return Taken(closed, result.gradient_norm or 0.0, result.update_norm or 0.0)
