"""Messages and their bytes.

A message is one frame, or two: a header (a mark, the version of this protocol, and msgpack of a typed struct) and a
body of raw little-endian bytes whose meaning the struct states. Nothing is ever unpickled or evaluated, and everything
a struct declares is checked against its type and bounds before anything is allocated for it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from esjax.exchange.update_record import SPAN_LIMIT, Pair, Positive, Spans, Whole
from esjax.exchange.values import MAX_REQUEST

VERSION = 3
"""Version of the protocol: hosts of another one are refused."""

MARK = b"\xe5j"
"""Start of every header."""

MAX_HEADER = 2**22
"""Bytes of a header at most: of the longest, that of `Status`."""

MAX_REQUEST_HEADER = 2**18
"""Bytes of the header of a request at most."""

MAX_BODY = 2**24
"""Bytes of a body at most; what is larger travels in parts."""

MOST_WEIGHTS = MAX_BODY - 2**8
"""Weights of a fixed population's update, a byte each, at most: its header takes the rest of the body."""

PART = 2**18
"""Bytes of a part at most: small, so that one who loads does not hold up the others."""

FRAMES = 2
"""Frames of a message at most."""

NOTE = 200
"""Characters of a note in `Status` at most."""

Long = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Short = Annotated[str, msgspec.Meta(max_length=128)]
Reason = Annotated[str, msgspec.Meta(max_length=1024)]
Leases = Annotated[list[tuple[Whole, Pair, Positive]], msgspec.Meta(max_length=SPAN_LIMIT)]
"""Slot of a host, first pair and number of pairs."""

Names = Annotated[list[tuple[Short, Short]], msgspec.Meta(max_length=16)]
Phase = Literal["joining", "compiling", "ready"]
SideTask = Literal["digest", "upload", "measure"]
"""What a host may be asked for beside losses: the digest of its state, its state, its held-out loss."""


class WireError(ValueError):
    """Bytes that are no message."""


class VersionError(WireError):
    """A message of another version of the protocol."""

    def __init__(self, version: int) -> None:
        """Name the version."""
        super().__init__(f"protocol version {version}")
        self.version = version


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message's header."""


# From a host to the coordinator; each gets one reply.


class Join(Message, frozen=True, tag="join"):
    """Ask to take part.

    Attributes:
        name: What the host calls itself; of two of one name the newer counts.
        device: What it computes on, for people.
        kind: Hardware and software whose floats should agree to the last bit.
        fingerprints: Hashes of known noise by kind of noise, see `esjax.hosts.noise_fingerprint`.
        custom: Names of its own model, loss and optimizer, and hashes of their code, see `esjax.config.custom_names`.
        run: Run it took part in before, or "".
        instance: Random number that tells it from another host of its name.
        attempt: How often it has asked; a lower number is an old request.
    """

    name: Short
    device: Short
    kind: Short
    fingerprints: Names
    custom: Names
    run: Short
    instance: Long
    attempt: Whole


class Fetch(Message, frozen=True, tag="fetch"):
    """Ask for a part of something large.

    Attributes:
        what: The text, a snapshot, or a block of tokens.
        digest: Of the thing; "" for the newest snapshot.
        offset: Bytes had already.
        block: Number of the block of tokens.
    """

    session: Long
    what: Literal["text", "state", "block"]
    digest: Short
    offset: Long
    block: Whole = 0


class CatchUp(Message, frozen=True, tag="catch_up"):
    """Ask for the updates from a step on."""

    session: Long
    step: Whole


class Beat(Message, frozen=True, tag="beat"):
    """Say that one is alive, and how far.

    Attributes:
        step: Step of one's parameters.
        progress: Number that grows with every piece of work done.
        note: Something for a person to know, or "".
    """

    session: Long
    epoch: Whole
    step: Whole
    phase: Phase
    progress: Long
    note: Reason = ""


class Losses(Message, frozen=True, tag="losses"):
    """Hand in what scoring gave: two float32 a pair, span after span; or a gradient sum for each span.

    Attributes:
        spans: The pairs.
        seconds: Time that scoring them took.
        final: Whether nothing more comes from this host for this step.
        dtype: "<f4" for losses, one of `esjax.exchange.update_record.Integers` for sums.
        gradient_norm: Norm of the estimate of the update before this step, or None.
        update_norm: Norm of that update, or None.
    """

    session: Long
    epoch: Whole
    step: Whole
    spans: Spans
    seconds: float
    final: bool
    dtype: Short = "<f4"
    gradient_norm: float | None = None
    update_norm: float | None = None


class Digest(Message, frozen=True, tag="digest"):
    """Hand in the digest of one's state at a step."""

    session: Long
    step: Whole
    digest: Short


class Measured(Message, frozen=True, tag="measured"):
    """Hand in the held-out loss at a step, in nats per token."""

    session: Long
    step: Whole
    held_out: float


class Upload(Message, frozen=True, tag="upload"):
    """Hand in a part of a snapshot, the body.

    Attributes:
        step: Step of the state.
        digest: Hash of all the bytes.
        size: Number of all the bytes.
        offset: Bytes before this part.
    """

    session: Long
    step: Whole
    digest: Short
    size: Long
    offset: Long


class Leave(Message, frozen=True, tag="leave"):
    """Say goodbye."""

    session: Long
    reason: Reason


class AskStatus(Message, frozen=True, tag="ask_status"):
    """Ask how things stand; needs no session."""


# From the coordinator to a host, in reply.


class Welcome(Message, frozen=True, tag="welcome"):
    """Take a host in.

    Attributes:
        run: Name of the run.
        epoch: Number of this start of the coordinator; a lower one is out of date.
        session: To be named in every request.
        slot: Short name of the host in broadcasts.
        config: Settings, as YAML.
        vocab_size: Number of token ids.
        text_digest: Hash of the text's plain bytes.
        text_bytes: Size of the text's plain bytes.
        state_bytes: Size of a snapshot.
        block_bytes: Size of a block of tokens; 0: the text holds all of them.
        publish_port: Port of the broadcasts.
        step: Step that is being scored.
        quantum: Pairs that are never split between hosts.
        block_interval: Steps for which a block of tokens is used.
        budget: Seconds to score for in a step, or None: all pairs of a lease.
        vector_length: Length of the sum that is handed in for each span; 0: losses are handed in.
    """

    run: Short
    epoch: Whole
    session: Long
    slot: Whole
    config: Annotated[str, msgspec.Meta(max_length=2**16)]
    vocab_size: Whole
    text_digest: Short
    text_bytes: Long
    state_bytes: Long
    block_bytes: Long
    publish_port: Whole
    step: Whole
    quantum: Annotated[int, msgspec.Meta(gt=0, le=MAX_REQUEST // 8)]
    block_interval: Positive
    budget: float | None
    vector_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_REQUEST // 4)]


class Part(Message, frozen=True, tag="part"):
    """A part of something large, the body.

    Attributes:
        digest: Of the whole thing.
        size: Bytes of the whole thing as it is sent.
        offset: Bytes before this part.
        step: Step of a snapshot, number of a block.
    """

    digest: Short
    size: Long
    offset: Long
    step: Whole = 0


class Updates(Message, frozen=True, tag="updates"):
    """Consecutive updates, the body.

    Attributes:
        step: Of the first one.
        sizes: Bytes of each.
    """

    step: Whole
    sizes: Annotated[list[Whole], msgspec.Meta(max_length=2**14)]


class Ok(Message, frozen=True, tag="ok"):
    """Acknowledge.

    Attributes:
        step: Step that is being scored.
        spans: Pairs of that step that this host still has to hand in.
        side_tasks: What else it still has to hand in, should the broadcast that said so have been lost.
        resync: Whether to fetch the newest snapshot.
    """

    epoch: Whole
    step: Whole
    spans: Spans
    side_tasks: Annotated[list[SideTask], msgspec.Meta(max_length=3)] = []
    resync: bool = False


class Rejected(Message, frozen=True, tag="rejected"):
    """Turn a request down; the host goes on.

    Attributes:
        reason: Why.
        step: Step that is being scored.
        rejoin: Whether the session has ended, so that only a new `Join` helps.
    """

    reason: Reason
    epoch: Whole
    step: Whole
    rejoin: bool = False


class Refused(Message, frozen=True, tag="refused"):
    """Turn a host away for good."""

    reason: Reason


class HostStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one host does.

    Attributes:
        state: joining, compiling, ready, straggling, silent, lost or put aside. A host that said goodbye is not listed.
        members_per_second: Rate at which it scores; 0 for one that is lost.
        last_seen: Seconds since its last message.
        digest: Of its state, as last handed in.
        share: Part of the last finished step's pairs that it scored.
        note: Why it is put aside, or something it said.
    """

    name: str
    slot: int
    state: str
    device: str
    step: int
    members_per_second: float
    last_seen: float
    digest: str
    share: float
    note: str


class Status(Message, frozen=True, tag="status"):
    """How things stand.

    Attributes:
        loss: Mean loss of the last finished step, or None.
        held_out: Loss over the held-out documents as last measured, or None.
        member_tokens_per_second: Rate over the last steps; 0 while the run is paused.
        paused: Whether nobody is there to go on.
        anchor: Slot of the host whose state is kept, or None.
        counters: How often something was turned down, by reason.
    """

    run: str
    epoch: int
    step: int
    loss: float | None
    held_out: float | None
    member_tokens_per_second: float
    paused: bool
    anchor: int | None
    hosts: list[HostStatus]
    counters: dict[str, int]


# From the coordinator to everybody.


class Step(Message, frozen=True, tag="step"):
    """Open a step; the body is the update that leads to it, as the ledger has it, or empty.

    Attributes:
        step: To be scored, with the parameters after update number `step - 1`.
        leases: Pairs of every host with work.
        digest: Whether every host should hand in the digest of its state at this step.
        upload: Slot of the host that should hand in its state at this step, or None.
        measure: Slot of the host that should hand in its held-out loss at this step, or None.
    """

    run: Short
    epoch: Whole
    step: Whole
    leases: Leases
    digest: bool = False
    upload: Whole | None = None
    measure: Whole | None = None


class Extra(Message, frozen=True, tag="extra"):
    """Give out more work within a step."""

    run: Short
    epoch: Whole
    step: Whole
    leases: Leases


class Pulse(Message, frozen=True, tag="pulse"):
    """Say that one is alive, and which step is being scored."""

    run: Short
    epoch: Whole
    step: Whole


class Bye(Message, frozen=True, tag="bye"):
    """Say goodbye.

    Attributes:
        done: Whether training has ended; if not, the coordinator will be back.
    """

    run: Short
    epoch: Whole
    done: bool


Request = Join | Fetch | CatchUp | Beat | Losses | Digest | Measured | Upload | Leave | AskStatus
Reply = Welcome | Part | Updates | Ok | Rejected | Refused | Status
Broadcast = Step | Extra | Pulse | Bye
Kind = Literal["request", "reply", "broadcast"]

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {
    "request": msgspec.msgpack.Decoder(Request),
    "reply": msgspec.msgpack.Decoder(Reply),
    "broadcast": msgspec.msgpack.Decoder(Broadcast),
}


class Envelope(NamedTuple):
    """A message with its body."""

    message: Message
    body: bytes = b""


def encode(envelope: Envelope) -> list[bytes]:
    """Turn a message into frames."""
    header = MARK + bytes([VERSION]) + _ENCODER.encode(envelope.message)
    return [header, envelope.body] if envelope.body else [header]


def decode(frames: Sequence[bytes], kind: Kind) -> Envelope:
    """Turn frames into a message.

    Raises:
        WireError: They are none of this kind.
        VersionError: They are of another version of the protocol.
    """
    if not 1 <= len(frames) <= FRAMES:
        raise WireError(f"{len(frames)} frames")
    header, body = frames[0], frames[1] if len(frames) == FRAMES else b""
    if len(header) > (MAX_REQUEST_HEADER if kind == "request" else MAX_HEADER) or len(body) > MAX_BODY:
        raise WireError("a frame is too long")
    if len(header) <= len(MARK) or header[: len(MARK)] != MARK:
        raise WireError("no message of esjax")
    version = header[len(MARK)]
    if version != VERSION:
        raise VersionError(version)
    try:
        return Envelope(_DECODERS[kind].decode(memoryview(header)[len(MARK) + 1 :]), body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
        raise WireError(str(error)[:200]) from error
