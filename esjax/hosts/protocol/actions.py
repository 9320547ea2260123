"""What the coordinator is given, and what it wants done."""

import hashlib
from typing import NamedTuple, Protocol, runtime_checkable

from esjax.config.custom_names import CODE, OPTIONS, SHOWN
from esjax.exchange.values import Exchange, LossExchange
from esjax.hosts.protocol.wire import Envelope, Join


@runtime_checkable
class History(Protocol):
    """The updates so far."""

    @property
    def first(self) -> int:
        """Number of the first update."""

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        """Return consecutive updates as they were recorded, at least one if there is one."""


class Snapshot(NamedTuple):
    """A state as bytes, and the step at which it was taken."""

    step: int
    data: bytes
    digest: str


class Terms(NamedTuple):
    """What a run asks of every host.

    Attributes:
        run: Name of the run.
        epoch: Number of this start of the coordinator.
        quantum: Pairs that are never split between hosts.
        vocab_size: Number of token ids.
        fingerprints: Hashes of known noise by kind of noise.
        custom: Names of the run's own model, loss or reward, and optimizer, and hashes of their code, see
            `esjax.config.custom_names.identities`.
        publish_port: Port of the broadcasts.
        state_bytes: Size of a snapshot.
        exchange: What hosts hand in.
    """

    run: str
    epoch: int
    quantum: int
    vocab_size: int
    fingerprints: dict[str, str]
    custom: dict[str, str]
    publish_port: int = 0
    state_bytes: int = 0
    exchange: Exchange = LossExchange()

    def objection(self, join: Join, noise: str) -> str:
        """Say why a host cannot take part, or ""; `noise` is the kind that the run draws."""
        if not (join.name + join.device).isprintable():  # a terminal would obey it
            return "the name of this host holds characters that cannot be shown; join with another --name"
        if join.run not in ("", self.run):
            return f"this is run {self.run}, not {join.run}; start the host anew"
        theirs, ours = dict(join.fingerprints).get(noise), self.fingerprints.get(noise)
        if theirs != ours:
            return (
                f"the {noise} noise of this host is {theirs}, the coordinator's is {ours}: another version or setting "
                "of JAX; install the same one, or use es.noise rademacher"
            )
        return self._objection_to(dict(join.custom))

    def _objection_to(self, custom: dict[str, str]) -> str:
        """Say why a host of such parts cannot take part; code of which one side has no hash is known by its name."""
        wanted, names = ({kind: one[kind] for kind in sorted(one.keys() & OPTIONS)} for one in (self.custom, custom))
        if names != wanted:
            needed = ", ".join(f"{kind} {name}" for kind, name in wanted.items()) or "no part of its own"
            options = " ".join(f"{OPTIONS[kind]} PATH.py:FUNCTION" for kind in wanted)
            return f"the run has {needed}; join with the same{f': {options}' if options else ''}"
        for kind, name in wanted.items():
            theirs, ours = (one.get(f"{kind}{CODE}", "") for one in (custom, self.custom))
            if theirs and ours and theirs != ours:
                return (
                    f"the file of this host's {kind} {name} (SHA-256 {theirs[:SHOWN]}) is not the coordinator's "
                    f"({ours[:SHOWN]}); copy that one here"
                )
        return ""


class Publish(NamedTuple):
    """Send to everybody."""

    envelope: Envelope


class Record(NamedTuple):
    """Write an update to the ledger before anything else is done."""

    step: int
    payload: bytes


class RecordDigest(NamedTuple):
    """Write down the digest of the state at a step."""

    step: int
    digest: str


class Store(NamedTuple):
    """Write a checkpoint, then call `Coordinator.stored`."""

    snapshot: Snapshot


class Tell(NamedTuple):
    """Say a line to the person who watches."""

    line: str


class Closed(NamedTuple):
    """A step is finished.

    Attributes:
        step: Steps done so far.
        loss: Mean of the finite losses, or NaN.
        population: Members scored.
        void_pairs: Pairs left out because a loss of theirs is not finite.
        trouble: Why no update is made, or "".
        hosts: Hosts that scored a part of it.
        notice: What a person should be told of it, or "".
    """

    step: int
    loss: float
    population: int
    void_pairs: int
    trouble: str
    hosts: int
    notice: str


Action = Publish | Record | RecordDigest | Store | Tell | Closed


def hash_bytes(data: bytes) -> str:
    """Hash what is sent in parts."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()
