"""Training steps on one machine: score a population, conclude, record, update. With hosts, the bits are the same."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from esjax.averages import running_speed
from esjax.config.settings import Config
from esjax.data.delivery import Blocks
from esjax.devices.mesh import device_failure
from esjax.devices.process_group import share_number
from esjax.errors import EsjaxError
from esjax.exchange.update_record import Span, pair_count
from esjax.exchange.values import SLOT_PAIRS, Conclusion, Values, make_exchange, pack_conclusion
from esjax.replica.notices import Notices
from esjax.replica.replica import Replica

SLICE = 0.25
"""Seconds of work in one call of the devices, if a step has a time budget; their speed is measured after each call."""


class StepDone(NamedTuple):
    """Result of a step.

    Attributes:
        concluded: The population's losses or gradient sums, concluded.
        pairs: Pairs that were scored.
        notice: A line for the user, or "".
        gradient_norm: Norm of the estimate in units; 0 for a void step.
        update_norm: Norm of the update in units; 0 for a void step, not finite if the update was not made.
    """

    concluded: Conclusion
    pairs: int
    notice: str
    gradient_norm: float
    update_norm: float


class LocalSteps:
    """Takes training steps of a replica on this machine."""

    def __init__(
        self,
        config: Config,
        replica: Replica,
        *,
        custom: dict[str, str],
        record: Callable[[int, bytes], None] = lambda step, payload: None,
        blocks: Blocks | None = None,
    ) -> None:
        """Set up.

        Args:
            config: Settings.
            replica: The replica, which scores pairs and applies updates.
            custom: Names of the custom parts of the run, by kind.
            record: Called with the step and the bytes of an update before it is applied.
            blocks: Source of token blocks, if the replica does not hold the whole text.
        """
        self._config, self._replica, self._record, self._blocks = config, replica, record, blocks
        self._exchange = make_exchange(replica.vector_length, replica.scale, replica.bounds)
        self._most_pairs = max(1, self._exchange.most_pairs // replica.chunk_pairs) * replica.chunk_pairs
        self._notices = Notices(config, custom)
        self._block: int | None = None
        self._speed = 0.0  # pairs a second

    def take(self) -> StepDone:
        """Score a population and apply the update.

        Raises:
            EsjaxError: The devices failed, or the update cannot be recorded.
        """
        replica, es = self._replica, self._config.es
        step = int(replica.state.step)
        try:
            self._use_block(step)
            spans, values = self._score_for(es.time_per_step) if es.time_per_step else self._score(es.pairs)
            pairs = pair_count(spans)
            concluded = self._exchange.conclude(values, spans, es)
            payload = pack_conclusion(step, spans, concluded, self._exchange.vector_length, es.weights_per_pair)
            self._record(step, payload)
            gradient_norm, update_norm = replica.update(payload)
        except jax.errors.JaxRuntimeError as error:
            raise EsjaxError(device_failure(error)) from error
        notice = self._notices.line(step + 1, concluded)
        return StepDone(concluded, pairs, notice, gradient_norm or 0.0, update_norm or 0.0)

    def _use_block(self, step: int) -> None:
        block = step // self._config.data.new_tokens_interval
        if self._blocks and block != self._block:
            self._replica.use_tokens(self._blocks.tokens(block))
            self._block = block

    def _score(self, pairs: int) -> tuple[list[Span], Values]:
        most = self._most_pairs
        parts = [self._replica.score([(first, min(most, pairs - first))]) for first in range(0, pairs, most)]
        return [(0, pairs)], self._exchange.merge(parts)

    def _score_for(self, budget: float) -> tuple[list[Span], Values]:
        """Score as many pairs as the devices can in `budget` seconds, in whole device batches."""
        device_batch = self._replica.device_batch
        parts: list[Values] = []
        done, spent = 0, 0.0
        while not parts or (spent + device_batch / self._speed <= budget and done < SLOT_PAIRS):
            device_batches = max(1, math.floor(min(SLICE, budget - spent) * self._speed / device_batch))
            count = min(device_batches * device_batch, self._most_pairs, SLOT_PAIRS - done)
            started = time.perf_counter()
            parts.append(self._replica.score([(done, count)]))
            seconds = share_number(time.perf_counter() - started)
            self._speed = running_speed(self._speed, count, seconds)
            done, spent = done + count, spent + seconds
        return [(0, done)], self._exchange.merge(parts)
