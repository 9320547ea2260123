"""A host in the simulation that holds a token and sends valid messages as a script says, not as a worker would."""

import itertools
from collections.abc import Callable

import numpy as np
from hosts_simulation import FIRST_STATE, KNOWN_ANSWERS, Simulation, body_of, hash_state, next_state, values_of

from esjax.exchange.update_record import Span
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope

LOOK = 0.05
"""Seconds between its turns."""


class TokenHolder:
    """The host.

    Attributes:
        answer_after: Seconds from its first look at a lease to the answer. None: it never answers.
        is_whole: Whether it answers with all its pairs, or with one span of a single quantum at a time.
        twist: Changes its values.
        digest: What it makes of the true digest; None: it sends none.
        phases: Phases that its beats name in turn.
    """

    def __init__(self, sim: Simulation, name: str, key: str, kind: str = "fake") -> None:
        """Join, and act every `LOOK` seconds from now on."""
        self._sim, self.key, self._kind = sim, key, kind
        self._names = (f"{name} {number}" for number in itertools.count())
        self.answer_after: float | None = 0.0
        self.is_whole = True
        self.twist: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
        self.digest: Callable[[str], str] | None = lambda digest: digest
        self.phases: list[wire.Phase] = ["ready"]
        self._states = [FIRST_STATE]
        self.is_over = False
        self.join()
        sim.at(sim.now, self._act)

    @property
    def state(self) -> bytes:
        """The state of the run."""
        for update in self._sim.updates[len(self._states) - 1 :]:
            self._states.append(next_state(self._states[-1], update))
        return self._states[-1]

    def ask(self, message: wire.Message, body: bytes = b"") -> wire.Message:
        """Send a request, and return the reply."""
        frames = wire.encode(Envelope(message, body))
        reply = self._sim.server.receive(wire.decode(frames, "request"), self._sim.now, self.key, self.peer)
        self._sim.carry_out()
        return reply.message

    def join(self) -> None:
        """Join under a new name."""
        self.name = next(self._names)
        self.peer = self.name.encode()
        self._beats, self._seen = itertools.count(1), (-1, 0.0)
        answers = list(KNOWN_ANSWERS.items())
        reply = self.ask(wire.Join(self.name, "", self._kind, answers, [], "", 1, 1))
        self.session = reply.session if isinstance(reply, wire.Welcome) else 0

    def leave(self) -> None:
        """Leave with a goodbye, and join again."""
        self.ask(wire.Leave(self.session, ""))
        self.join()

    def vanish(self) -> None:
        """Close the connection, and join again."""
        self._sim.server.disconnected({self.peer}, self._sim.now)
        self._sim.carry_out()
        self.join()

    def beat(self) -> wire.Ok | None:
        """Send a sign of life with progress; return the reply unless it is a refusal."""
        number = next(self._beats)
        phase = self.phases[number % len(self.phases)]
        reply = self.ask(wire.Beat(self.session, self._sim.incarnation, self._sim.server.step, phase, number))
        return reply if isinstance(reply, wire.Ok) else None

    def answer(self, spans: list[Span], *, final: bool = True) -> wire.Message:
        """Send the values of some pairs of the open step."""
        values = values_of(self._sim.config, self.state, spans, self.twist)
        dtype = "<i4" if self._sim.config.es.exchange == "sums" else "<f4"
        step = self._sim.server.step
        return self.ask(wire.Losses(self.session, self._sim.incarnation, step, spans, final, dtype), body_of(values))

    def _act(self) -> None:
        if self.is_over:
            return
        self._sim.at(self._sim.now + LOOK, self._act)
        reply = self.beat()
        if reply is None:
            return
        if "digest" in reply.side_tasks and self.digest:
            self.ask(wire.Digest(self.session, reply.step, self.digest(hash_state(self.state))))
        if not reply.spans:
            return
        if self._seen[0] != reply.step:
            self._seen = reply.step, self._sim.now
        if self.answer_after is not None and self._sim.now >= self._seen[1] + self.answer_after:
            spans = list(reply.spans)
            if self.is_whole:
                self.answer(spans)
            else:
                self.answer([(spans[0][0], min(spans[0][1], 4))], final=False)
