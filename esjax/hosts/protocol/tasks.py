"""What a host's devices are asked to do, and what comes of it.

Tasks are messages too, since a host may be several processes that all do the same, see `esjax.hosts.executor`.
"""

from typing import Any

import msgspec

from esjax.exchange.update_record import Span
from esjax.exchange.values import Values


class Build(msgspec.Struct, frozen=True, tag=True):
    """Make the replica, and compile.

    Attributes:
        config: Settings, as YAML.
        vocab_size: Number of token ids.
        text: The text as it was sent.
        text_digest: Hash of its plain bytes.
        text_bytes: Their number.
    """

    config: str
    vocab_size: int
    text: bytes
    text_digest: str
    text_bytes: int


class Load(msgspec.Struct, frozen=True, tag=True):
    """Take over a snapshot."""

    snapshot: bytes


class UseBlock(msgspec.Struct, frozen=True, tag=True):
    """Score on a block of tokens from now on."""

    block: int
    tokens: bytes


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Make consecutive updates, each as it is recorded."""

    updates: list[bytes]


class Score(msgspec.Struct, frozen=True, tag=True):
    """Score pairs with the present parameters."""

    spans: list[Span]


class TakeDigest(msgspec.Struct, frozen=True, tag=True):
    """Hash the state."""


class TakeSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Turn the state into bytes."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Score the held-out documents."""


Task = Build | Load | UseBlock | Apply | Score | TakeDigest | TakeSnapshot | Measure


class Built(msgspec.Struct, frozen=True):
    """Of `Build`: pairs that the devices like to score at a time."""

    granule: int


class Done(msgspec.Struct, frozen=True):
    """Of `Load`, `UseBlock` and `Apply`: step of the parameters, and norms of the last update, if one was made."""

    step: int
    gradient_norm: float | None = None
    update_norm: float | None = None


class Scored(msgspec.Struct, frozen=True):
    """Of `Score`: the values of the spans, see `esjax.exchange.values`, and the seconds that they took."""

    values: Values
    seconds: float


class Value(msgspec.Struct, frozen=True):
    """Of the others: a digest, a snapshot's bytes, or a loss (None: there is nothing to measure)."""

    value: Any


class Failed(msgspec.Struct, frozen=True):
    """Of any task that cannot be done."""

    reason: str


Result = Built | Done | Scored | Value | Failed
