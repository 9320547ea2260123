"""A host that is several processes: one of them talks to the coordinator, and all of them do every task together."""

import jax
import msgspec

from esjax.hosts.engine import Engine
from esjax.hosts.tasks import Result, Task
from esjax.processes import leads, share

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Task)

IDLE = 5.0
"""Seconds after which the leader says that there is nothing to do: collectives give up on a process that is silent."""


class Crew:
    """The processes of one host, as `jax.distributed` knows them; without it, just this one."""

    def __init__(self, engine: Engine) -> None:
        """Begin with this process's engine."""
        self._engine = engine

    @property
    def size(self) -> int:
        """Number of processes."""
        return jax.process_count()

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks to the coordinator."""
        return leads()

    def do(self, task: Task) -> Result:
        """Do a task with all processes; the leader calls it."""
        share(_ENCODER.encode(task))
        return self._engine.do(task)

    def idle(self) -> None:
        """Keep the others waiting; the leader calls it every `IDLE` seconds or so."""
        share(_NOTHING)

    def dismiss(self) -> None:
        """Let the others end; the leader calls it."""
        share(_END)

    def follow(self) -> None:
        """Do what the leader says until it lets go; every other process calls it."""
        while (word := share(b"")) != _END:
            if word != _NOTHING:
                self._engine.do(_DECODER.decode(word))


_NOTHING, _END = b"nothing", b"end"
