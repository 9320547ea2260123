"""Messages and their bytes.

A message is one or two frames: a header (a mark, the version of the protocol, and msgpack of a typed struct), and a
body of raw little-endian bytes that the struct describes. Nothing is unpickled or evaluated. Every field is checked
against its type and bounds before memory is allocated for it. Structs are arrays on the wire, so the order of fields is
a part of the protocol.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec

from esjax.exchange.update_record import SPAN_LIMIT, Pair, Positive, Spans, Whole
from esjax.exchange.values import MAX_REQUEST

VERSION = 3
"""Version of the protocol; hosts with another version are refused."""

MARK = b"\xe5j"
"""Start of every header."""

MAX_HEADER = 2**22
"""Most bytes of a header; that of `Status` is the longest."""

MAX_REQUEST_HEADER = 2**18
"""Most bytes of the header of a request."""

MAX_BODY = 2**24
"""Most bytes of a body; larger data is sent in parts."""

MOST_WEIGHTS = MAX_BODY - 2**8
"""Most weights, of one byte each, in the update of a fixed population; its header takes the rest of the body."""

PART = 2**18
"""Most bytes of a part; small, so that a download does not delay other hosts."""

FRAMES = 2
"""Most frames of a message."""

NOTE = 200
"""Most characters of a note in `Status`."""

Long = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Short = Annotated[str, msgspec.Meta(max_length=128)]
Reason = Annotated[str, msgspec.Meta(max_length=1024)]
Leases = Annotated[list[tuple[Whole, Pair, Positive]], msgspec.Meta(max_length=SPAN_LIMIT)]
"""Slot of a host, first pair and number of pairs."""

Names = Annotated[list[tuple[Short, Short]], msgspec.Meta(max_length=16)]
Phase = Literal["joining", "compiling", "ready"]
SideTask = Literal["digest", "upload", "measure"]
"""Side tasks of a host: send the digest of its state, its state, or the held-out loss."""


class WireError(ValueError):
    """Bytes that are not a message."""


class VersionError(WireError):
    """A message of another version of the protocol."""

    def __init__(self, version: int) -> None:
        """Set the other side's version."""
        super().__init__(f"protocol version {version}")
        self.version = version


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message's header."""


# From a host to the coordinator; each gets one reply.


class Join(Message, frozen=True, tag="join"):
    """Ask to take part.

    Attributes:
        name: Name of the host; of two hosts with one name the newer one counts.
        device: Description of its devices, for the status.
        kind: Hardware and version of JAX; floats of hosts of one kind should agree to the last bit.
        fingerprints: Noise fingerprints by kind of noise, see `esjax.hosts.noise_fingerprint`.
        custom: Names of its custom parts, and hashes of their code, see `esjax.config.custom_names`.
        run: Run that it took part in before, or "".
        instance: Random number that distinguishes it from another host of its name.
        attempt: Number of this request; a request with a lower number is old.
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
    """Ask for a part of a download.

    Attributes:
        what: The text, a snapshot, or a block of tokens.
        digest: Hash of the whole; "" for the newest snapshot.
        offset: Bytes before this part.
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
    """Send a sign of life.

    Attributes:
        step: Step of the host's parameters.
        progress: Number of device tasks finished so far.
        note: Line for the user, or "".
    """

    session: Long
    incarnation: Whole
    step: Whole
    phase: Phase
    progress: Long
    note: Reason = ""


class Losses(Message, frozen=True, tag="losses"):
    """Send losses, two float32 for each pair, span after span, or a gradient sum for each span; the body.

    Attributes:
        spans: The pairs.
        seconds: Time of scoring them.
        final: Whether this is the host's last message of losses in this step.
        dtype: "<f4" for losses; one of `esjax.exchange.update_record.Integers` for gradient sums.
        gradient_norm: Norm of the estimate in the update before this step, or None.
        update_norm: Norm of that update, or None.
    """

    session: Long
    incarnation: Whole
    step: Whole
    spans: Spans
    seconds: float
    final: bool
    dtype: Short = "<f4"
    gradient_norm: float | None = None
    update_norm: float | None = None


class Digest(Message, frozen=True, tag="digest"):
    """Send the digest of the host's state at a step."""

    session: Long
    step: Whole
    digest: Short


class Measured(Message, frozen=True, tag="measured"):
    """Send the held-out loss at a step."""

    session: Long
    step: Whole
    held_out: float


class Upload(Message, frozen=True, tag="upload"):
    """Send a part of a snapshot, the body.

    Attributes:
        step: Step of the state.
        digest: Hash of all bytes.
        size: Number of all bytes.
        offset: Bytes before this part.
    """

    session: Long
    step: Whole
    digest: Short
    size: Long
    offset: Long


class Leave(Message, frozen=True, tag="leave"):
    """Leave the run."""

    session: Long
    reason: Reason


class AskStatus(Message, frozen=True, tag="ask_status"):
    """Ask for the status; needs no session."""


# From the coordinator to a host, in reply.


class Welcome(Message, frozen=True, tag="welcome"):
    """Let a host join.

    Attributes:
        run: Name of the run.
        incarnation: Number of this start of the coordinator; messages with a lower one are old.
        session: Number that every request of the host must carry.
        slot: Number of the host in broadcasts.
        config: Settings as YAML.
        vocab_size: Number of token ids.
        text_digest: Hash of the text's unpacked bytes.
        text_bytes: Number of the text's unpacked bytes.
        state_bytes: Size of a snapshot in bytes.
        block_bytes: Size of a block of tokens in bytes; 0: the text holds all tokens.
        publish_port: Port of the broadcasts.
        step: Step that is being scored.
        quantum: Pairs of a lease quantum, which is never split between hosts.
        block_interval: Number of steps that use the same block of tokens.
        budget: Seconds to score in a step. None: all leased pairs are scored.
        vector_length: Length of the gradient sum that hosts send for each span; 0: hosts send losses.
    """

    run: Short
    incarnation: Whole
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
    """A part of a download, the body.

    Attributes:
        digest: Hash of the whole.
        size: Bytes of the whole, packed.
        offset: Bytes before this part.
        step: Step of a snapshot, or number of a block.
    """

    digest: Short
    size: Long
    offset: Long
    step: Whole = 0


class Updates(Message, frozen=True, tag="updates"):
    """Consecutive updates, the body.

    Attributes:
        step: Step of the first update.
        sizes: Number of bytes of each update.
    """

    step: Whole
    sizes: Annotated[list[Whole], msgspec.Meta(max_length=2**14)]


class Ok(Message, frozen=True, tag="ok"):
    """Accept a request.

    Attributes:
        step: Step that is being scored.
        spans: Leased pairs of that step that the host has not sent values of.
        side_tasks: Side tasks that it has not finished; the broadcast that asked for them may have been lost.
        resync: Whether the host must fetch the newest snapshot.
    """

    incarnation: Whole
    step: Whole
    spans: Spans
    side_tasks: Annotated[list[SideTask], msgspec.Meta(max_length=3)] = []
    resync: bool = False


class Rejected(Message, frozen=True, tag="rejected"):
    """Reject a request; the host stays in the run.

    Attributes:
        reason: Why.
        step: Step that is being scored.
        rejoin: Whether the session has ended, so that the host must join again.
    """

    reason: Reason
    incarnation: Whole
    step: Whole
    rejoin: bool = False


class Refused(Message, frozen=True, tag="refused"):
    """Refuse a host for good."""

    reason: Reason


class HostStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Status of one host.

    Attributes:
        state: joining, compiling, ready, straggling, silent, lost or put aside. A host that has left is not listed.
        members_per_second: Members that it scores per second; 0 for a lost host.
        last_seen: Seconds since its last message.
        digest: Last digest of its state.
        share: Part of the last finished step's pairs that it scored, 0 to 1.
        note: Why it is put aside, or its last note.
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
    """Status of the run.

    Attributes:
        loss: Mean loss of the last finished step, or None.
        held_out: Last held-out loss, or None.
        member_tokens_per_second: Speed over the last steps; 0 while the run is paused.
        paused: Whether no host is ready.
        anchor: Slot of the host whose state is kept, or None.
        counters: Number of rejected requests, by reason.
    """

    run: str
    incarnation: int
    step: int
    loss: float | None
    held_out: float | None
    member_tokens_per_second: float
    paused: bool
    anchor: int | None
    hosts: list[HostStatus]
    counters: dict[str, int]


# From the coordinator to all hosts.


class Step(Message, frozen=True, tag="step"):
    """Open a step; the body is the update that leads to it, as in the ledger, or empty.

    Attributes:
        step: Step to score, with the parameters after update number `step - 1`.
        leases: Leases of all hosts.
        digest: Whether every host should send the digest of its state at this step.
        upload: Slot of the host that should send its state at this step, or None.
        measure: Slot of the host that should send the held-out loss at this step, or None.
    """

    run: Short
    incarnation: Whole
    step: Whole
    leases: Leases
    digest: bool = False
    upload: Whole | None = None
    measure: Whole | None = None


class Extra(Message, frozen=True, tag="extra"):
    """Add leases to the open step."""

    run: Short
    incarnation: Whole
    step: Whole
    leases: Leases


class Pulse(Message, frozen=True, tag="pulse"):
    """Send a sign of life with the step that is being scored."""

    run: Short
    incarnation: Whole
    step: Whole


class Bye(Message, frozen=True, tag="bye"):
    """The coordinator stops.

    Attributes:
        done: Whether training has ended; if not, the coordinator will restart.
    """

    run: Short
    incarnation: Whole
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
        WireError: They are not a message of this kind.
        VersionError: They are a message of another version of the protocol.
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
