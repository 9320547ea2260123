"""The server loop: passes messages between network and state machine, and carries out the coordinator's actions."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from esjax.config.settings import Config
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.hosts.coordination.coordinator import Coordinator
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Closed, Publish, Record, RecordDigest, Snapshot, Store, Tell
from esjax.hosts.protocol.wire import Envelope
from esjax.hosts.transport.keys import ServerKeys
from esjax.hosts.transport.server import Request, ServerTransport
from esjax.hosts.turns import Turns
from esjax.replica.snapshot import from_bytes
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import digest
from esjax.runs.step_info import StepInfo
from esjax.texts import legible
from esjax.watch.recorded_run import Recorder

POLL = 0.05
"""Seconds to wait for requests before time limits are checked."""

TICK = 0.1
"""Seconds between calls of the state machine's `tick`, which looks at every host; all its time limits are longer."""

CHECK = 0.2
"""Seconds between checks of the connections."""

SIDE = 2
"""Side requests that are answered in one turn."""

SIDE_SHARE, PAUSED_SHARE = 0.1, 0.5
"""Most of the time that goes to side requests: while hosts train, and while none is ready."""

SideRequest = wire.Fetch | wire.CatchUp | wire.Join | wire.AskStatus
"""Requests that training does not wait for."""

Written = Future[tuple[Callable[[Snapshot], None], str]]
"""What becomes of a checkpoint, see `ServerLoop._write`."""


class ServerLoop:
    """Answers hosts, and writes ledger and checkpoints."""

    def __init__(
        self,
        config: Config,
        coordinator: Coordinator,
        transport: ServerTransport,
        recorder: Recorder,
        like: TrainState,
        keys: ServerKeys | None,
        tell: Callable[[str], None],
    ) -> None:
        """Set up; `like` is a state with the run's structure, and without `keys` every host is let in."""
        self._config, self._coordinator, self._transport = config, coordinator, transport
        self._recorder, self._like, self._keys, self._tell = recorder, like, keys, tell
        self._closed_at: float | None = None
        self._measured = coordinator.audits.measured
        self._tick_at = self._check_at = 0.0
        self._side: Turns[tuple[Request, Envelope]] = Turns()
        self._side_at = 0.0  # when the next side requests may be answered
        self._put_off: dict[bytes, float] = {}  # until when a connection is surely to wait
        self._marks: dict[int, tuple[float, int]] = {}  # progress at the step of an expected state
        # Writing a checkpoint of a large model takes seconds; hosts are answered meanwhile.
        self._writer = ThreadPoolExecutor(1, "esjax checkpoint")
        self._writing: tuple[Snapshot, Written] | None = None

    def turn(self) -> list[StepInfo]:
        """Wait up to `POLL` seconds for requests, answer them, and return the infos of the steps that were closed."""
        wait = min(self._side_at - time.monotonic(), POLL) if self._side else POLL
        requests = self._transport.poll(max(wait, 0.0))
        now = time.monotonic()
        closed: list[StepInfo] = []
        for request in requests:
            closed += self._answer(request, now)
        if self._side and now >= self._side_at:
            closed += self._answer_side_requests()
        if self._writing is not None and self._writing[1].done():
            self._finish_writing(*self._writing)
        if now >= self._tick_at:
            self._coordinator.tick(now)
            closed += self._carry_out(now)
            self._tick_at = now + TICK
        if now >= self._check_at:
            self._transport.check()
            peers = self._transport.disconnected()
            self._coordinator.disconnected(peers, now)
            for peer in peers:
                self._put_off.pop(peer, None)
            self._count()
            self._check_at = now + CHECK
        return closed

    def _answer_side_requests(self) -> list[StepInfo]:
        began = time.monotonic()
        closed: list[StepInfo] = []
        for _ in range(SIDE):
            if self._side:
                request, envelope = self._side.take()
                reply = self._coordinator.receive(envelope, began, request.key, request.peer)
                if isinstance(reply.message, wire.Rejected) and reply.message.wait:
                    self._put_off[request.peer] = began + reply.message.wait / 2  # hosts vary how long they wait
                closed += self._reply(request, reply, began)
        ended = time.monotonic()
        share = PAUSED_SHARE if self._coordinator.paused else SIDE_SHARE
        self._side_at = ended + (ended - began) * (1 / share - 1)
        return closed

    def _count(self) -> None:
        """Add the transport's counters to those of the status."""
        counters, transport = self._coordinator.counters, self._transport
        counters["connections without a handshake"] = transport.strangers
        counters["messages without an envelope"] = transport.rejected
        counters["connections cut off"] = transport.cut_off

    def _answer(self, request: Request, now: float) -> list[StepInfo]:
        coordinator = self._coordinator
        if self._keys is not None and request.key not in self._keys.allowed:
            reply = coordinator.refuse_key(request.key, now)
        else:
            try:
                envelope = wire.decode(request.frames, "request")
            except wire.VersionError as error:
                reply = coordinator.refuse_version(error.version)
            except wire.WireError:
                coordinator.counters["no message of esjax"] += 1
                return []
            else:
                if isinstance(envelope.message, SideRequest):
                    if now < self._put_off.get(request.peer, now):
                        coordinator.counters["requests before their time"] += 1
                    else:
                        self._side.add(request.key or "", request.peer, (request, envelope))
                    return []
                reply = coordinator.receive(envelope, now, request.key, request.peer)
        return self._reply(request, reply, now)

    def _reply(self, request: Request, reply: Envelope, now: float) -> list[StepInfo]:
        closed = self._carry_out(now)  # first: an update must be on the disk before a reply reports it
        self._transport.reply(request, wire.encode(reply))
        return closed

    def _carry_out(self, now: float) -> list[StepInfo]:
        closed = []
        for action in self._coordinator.drain():
            if isinstance(action, Record):
                self._recorder.append(action.step, action.payload, now)
            elif isinstance(action, Publish):
                message = action.envelope.message
                if isinstance(message, wire.Step) and message.upload is not None:
                    self._marks = {message.step: self._recorder.progress}
                self._transport.publish(wire.encode(action.envelope))
            elif isinstance(action, Closed):
                closed.append(self._close(action, now))
            elif isinstance(action, RecordDigest):
                self._recorder.append_digest(action.step, action.digest)
            elif isinstance(action, Store):
                self._store(action)
            elif isinstance(action, Tell):
                self._tell(legible(action.line))
        return closed

    def _close(self, closed: Closed, now: float) -> StepInfo:
        if closed.notice:
            self._tell(closed.notice)
        if closed.outliers:
            self._coordinator.counters["outlying pairs"] += closed.outliers
        tokens = closed.population * self._config.tokens_per_member
        self._recorder.member_tokens += tokens
        rate = 0.0 if self._closed_at is None else tokens / max(now - self._closed_at, 1e-9)
        self._closed_at = now
        coordinator = self._coordinator
        return StepInfo(
            step=closed.step,
            seconds=self._recorder.seconds,
            loss=closed.loss,
            population=closed.population,
            void_pairs=closed.void_pairs,
            applied=not closed.trouble,
            gradient_norm=coordinator.gradient_norm,
            update_norm=coordinator.update_norm,
            member_tokens=self._recorder.member_tokens,
            member_tokens_per_second=rate,
            hosts=closed.hosts,
            rewards=closed.rewards or None,
            **self.new_measurement(),
        )

    def new_measurement(self) -> dict[str, Any]:
        """Return what was measured since the last call, by name of the field of `StepInfo`; {}: nothing."""
        before, self._measured = self._measured, self._coordinator.audits.measured
        return {} if self._measured is before else self._measured._asdict()

    def close(self) -> None:
        """Wait for the checkpoint that is being written; the folder must stay locked until then."""
        try:
            self._writer.shutdown()
        except KeyboardInterrupt:  # in a notebook, a second one
            self._writer.shutdown()
            raise
        if self._writing is not None:
            self._finish_writing(*self._writing)
            self._carry_out(time.monotonic())

    def _store(self, store: Store) -> None:
        """Begin to write a checkpoint. The coordinator sends no other one until it knows what became of it."""
        step = store.snapshot.step
        progress = self._marks.get(step, self._recorder.progress)
        self._writing = store.snapshot, self._writer.submit(self._write, store, progress)

    @default_flags()
    def _write(self, store: Store, progress: tuple[float, int]) -> tuple[Callable[[Snapshot], None], str]:
        """Write a checkpoint; return the coordinator's method for what became of it, and what went wrong, or ""."""
        snapshot, audits = store.snapshot, self._coordinator.audits
        done = audits.is_false
        try:
            state = from_bytes(snapshot.data, self._like)
            if digest(state) != store.digest or int(state.step) != snapshot.step:
                raise EsjaxError("a host sent another state than its digest names")
            done = audits.not_stored
            self._recorder.write(state, progress, is_confirmed=store.is_confirmed)
        except EsjaxError as error:
            return done, str(error)
        return audits.stored, ""

    def _finish_writing(self, snapshot: Snapshot, writing: Written) -> None:
        self._writing = None
        done, trouble = writing.result()
        if trouble:
            # Nothing is lost: the checkpoint before is kept, and the ledger has every update since.
            self._tell(f"no checkpoint at step {snapshot.step}: {trouble}")
        else:
            try:
                self._recorder.cut_ledger()
            except EsjaxError as error:
                self._tell(f"the ledger keeps updates behind the horizon: {error}")
        done(snapshot)
