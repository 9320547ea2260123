"""The inputs of the coordinator, and the actions that it asks its caller to carry out."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from esjax.config.custom_names import describe_difference
from esjax.exchange.values import Exchange, LossExchange
from esjax.hosts.protocol.wire import Envelope, Join, Message


@runtime_checkable
class History(Protocol):
    """The recorded updates of the run."""

    @property
    def first(self) -> int:
        """Step of the first update."""

    def updates(self, from_step: int, limit_bytes: int) -> list[bytes]:
        """Return consecutive updates as recorded, up to `limit_bytes` in all, but at least one if there is one."""


class Snapshot(NamedTuple):
    """A training state as bytes, its step, and the hash of the bytes."""

    step: int
    data: bytes
    digest: str


class Terms(NamedTuple):
    """What is fixed for all hosts of a run."""

    run: str  # name of the run
    incarnation: int  # number of this start of the coordinator
    quantum: int  # pairs of a lease quantum, which is never split between hosts
    vocab_size: int  # number of token ids
    known_answers: dict[str, str]  # see `esjax.hosts.known_answers`
    # Names of the custom model, loss or reward, and optimizer, and hashes of their code, see
    # `esjax.config.custom_names.identities`
    custom: dict[str, str]
    publish_port: int = 0  # port of the broadcasts
    state_bytes: int = 0  # size of a snapshot in bytes
    exchange: Exchange = LossExchange()  # whether hosts send losses or gradient sums

    def objection(self, join: Join, noise: str) -> str:
        """Return why a host cannot take part, or ""; `noise` is the run's kind of noise."""
        if not (join.name + join.device).isprintable():  # control characters would reach the terminal
            return "the name of this host holds characters that cannot be shown; join with another --name"
        if join.run not in ("", self.run):
            return f"this is run {self.run}, not {join.run}; start the host anew"
        theirs = dict(join.known_answers)
        unused = "gaussian" if noise == "rademacher" else ""
        differ = [
            f"{name} ({theirs.get(name)}, not {answer})"
            for name, answer in self.known_answers.items()
            if theirs.get(name) != answer and name != unused
        ]
        if differ:
            flags = f"; this host sets {join.flags}: leave that out" if join.flags else ""
            way_out = ", or use es.noise rademacher" if all(name.startswith("gaussian") for name in differ) else ""
            return (
                f"this host draws other numbers than the coordinator: {', '.join(differ)}; install the same version of "
                f"JAX on both{way_out}{flags}"
            )
        return describe_difference(self.custom, dict(join.custom))


class Publish(NamedTuple):
    """Send a message to all hosts."""

    envelope: Envelope


class Record(NamedTuple):
    """Write an update to the ledger, before any later action."""

    step: int
    payload: bytes


class RecordDigest(NamedTuple):
    """Write the digest of the state at a step to the ledger."""

    step: int
    digest: str


class Store(NamedTuple):
    """Write a checkpoint, then call `Audits.stored`, or `Audits.not_stored` if it could not be written.

    If the state has another digest, call `Audits.is_false` instead. Hosts may come and go before that, and there is no
    other `Store` until then.
    """

    snapshot: Snapshot
    digest: str
    is_confirmed: bool  # whether another owner's host has this digest, see `Verdict`


class Tell(NamedTuple):
    """Print a line for the user."""

    line: str


class Closed(NamedTuple):
    """A step is finished."""

    step: int  # number of steps done so far
    loss: float  # mean of the finite losses, or NaN
    population: int  # number of members scored
    void_pairs: int  # number of pairs with a loss that is not finite, or in a gradient sum that is left out
    trouble: str  # why the step is void, or ""
    hosts: int  # number of hosts that scored some of its pairs
    notice: str  # line about the step for the user, or ""
    outliers: int = 0  # number of pairs that are no measure of others, see `esjax.exchange.values.Conclusion`
    rewards: Mapping[str, float] = {}  # means of the rewards that have names, as hosts said


Action = Publish | Record | RecordDigest | Store | Tell | Closed


class Outbox:
    """Actions that wait to be carried out, in their order."""

    def __init__(self) -> None:
        """Set up without actions."""
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """Add an action."""
        self._actions.append(action)

    def tell(self, line: str) -> None:
        """Add a line for the user."""
        self.add(Tell(line))

    def publish(self, message: Message, body: bytes = b"") -> None:
        """Add a message to all hosts."""
        self.add(Publish(Envelope(message, body)))

    def drain(self) -> list[Action]:
        """Return the actions since the last call."""
        actions, self._actions = self._actions, []
        return actions
