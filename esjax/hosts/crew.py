"""A host that is several processes: one of them talks to the coordinator, and all of them do every task together."""

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from esjax.hosts.engine import Engine
from esjax.hosts.tasks import Result, Task

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Task)

IDLE = 5.0
"""Seconds after which the leader says that there is nothing to do: collectives give up on a process that is silent."""


class Crew:
    """The processes of one host, as `jax.distributed` knows them; without it, just this one."""

    def __init__(self, engine: Engine) -> None:
        """Begin with this process's engine."""
        self._engine = engine
        self._alone = jax.process_count() == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks to the coordinator."""
        return jax.process_index() == 0

    def do(self, task: Task) -> Result:
        """Do a task with all processes; the leader calls it."""
        self._send(_ENCODER.encode(task))
        return self._engine.do(task)

    def idle(self) -> None:
        """Keep the others waiting; the leader calls it every `IDLE` seconds or so."""
        self._send(_NOTHING)

    def dismiss(self) -> None:
        """Let the others end; the leader calls it."""
        self._send(_END)

    def follow(self) -> None:
        """Do what the leader says until it lets go; every other process calls it."""
        while (word := _broadcast(b"")) != _END:
            if word != _NOTHING:
                self._engine.do(_DECODER.decode(word))

    def _send(self, word: bytes) -> None:
        if not self._alone:
            _broadcast(word)


_NOTHING, _END = b"nothing", b"end"


def _broadcast(word: bytes) -> bytes:
    """Give the first process's word to all."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(word))))
    padded = np.zeros(size, np.uint8)
    padded[: len(word)] = np.frombuffer(word, np.uint8)[:size]
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()
