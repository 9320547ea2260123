"""Messages and their bytes.

A message is one or two frames: a header (a mark, the version of the protocol, and msgpack of a typed struct), and a
body of raw little-endian bytes that the struct describes. Nothing is unpickled or evaluated. Every field is checked
against its type and bounds before memory is allocated for it. Structs are arrays on the wire, so the order of fields is
a part of the protocol.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from esjax.exchange.update_record import SPAN_LIMIT, Pair, Positive, Spans, Whole
from esjax.exchange.values import MAX_REQUEST
from esjax.rewards.calls import LONGEST_NAME, MOST_NAMES

VERSION = 8
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
RewardName = Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
RewardMeans = Annotated[list[tuple[RewardName, float, Positive]], msgspec.Meta(max_length=MOST_NAMES)]
"""Names of rewards, their means, and over how many pairs."""

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
    """Ask to take part."""

    name: Short  # name of the host; of two hosts with one name the newer one counts
    device: Short  # description of its devices, for the status
    kind: Short  # hash of known float computations, see `esjax.hosts.rounding`; floats of one kind should be equal
    known_answers: Names  # hashes of what it draws from a known seed, see `esjax.hosts.known_answers`
    custom: Names  # names of its custom parts, and hashes of their code, see `esjax.config.custom_names`
    run: Short  # run that it took part in before, or ""
    instance: Long  # random number that distinguishes it from another host of its name
    attempt: Whole  # number of this request; a request with a lower number is old
    flags: Reason = ""  # JAX's flags that its process sets, see `esjax.flags`


class Fetch(Message, frozen=True, tag="fetch"):
    """Ask for a part of a download."""

    session: Long
    what: Literal["text", "state", "block"]  # the text, a snapshot, or a block of tokens
    digest: Short  # hash of the whole; "" for the newest snapshot
    offset: Long  # bytes before this part
    block: Whole = 0  # number of the block of tokens


class CatchUp(Message, frozen=True, tag="catch_up"):
    """Ask for the updates from a step on."""

    session: Long
    step: Whole


class Beat(Message, frozen=True, tag="beat"):
    """Send a sign of life."""

    session: Long
    incarnation: Whole
    step: Whole  # step of the host's parameters
    phase: Phase
    progress: Long  # number of device tasks, and of calls of a reward, finished so far
    note: Reason = ""  # line for the user, or ""


class Losses(Message, frozen=True, tag="losses"):
    """Send losses, two float32 for each pair, span after span, or a gradient sum for each span; the body."""

    session: Long
    incarnation: Whole
    step: Whole
    spans: Spans  # the pairs
    final: bool  # whether this is the host's last message of losses in this step
    dtype: Short = "<f4"  # "<f4" for losses; one of `esjax.exchange.update_record.Integers` for gradient sums
    gradient_norm: float | None = None  # norm of the estimate in the update before this step, or None
    update_norm: float | None = None  # norm of that update, or None
    rewards: RewardMeans = []  # means of the rewards that have names, over these pairs


class Digest(Message, frozen=True, tag="digest"):
    """Send the digest of the host's state at a step."""

    session: Long
    step: Whole
    digest: Short


class Measured(Message, frozen=True, tag="measured"):
    """Send what was measured at a step; None: there is nothing to measure it on."""

    session: Long
    step: Whole
    held_out: float | None = None  # held-out loss
    greedy_reward: float | None = None  # rewards on held-out prompts, see `esjax.rewards.held_out`
    pass_at_k: float | None = None


class Upload(Message, frozen=True, tag="upload"):
    """Send a part of a snapshot, the body."""

    session: Long
    step: Whole  # step of the state
    digest: Short  # hash of all bytes
    size: Long  # number of all bytes
    offset: Long  # bytes before this part


class Leave(Message, frozen=True, tag="leave"):
    """Leave the run."""

    session: Long
    reason: Reason


class AskStatus(Message, frozen=True, tag="ask_status"):
    """Ask for the status; needs no session."""


# From the coordinator to a host, in reply.


class Welcome(Message, frozen=True, tag="welcome"):
    """Let a host join."""

    run: Short  # name of the run
    incarnation: Whole  # number of this start of the coordinator; messages with a lower one are old
    session: Long  # number that every request of the host must carry
    slot: Whole  # number of the host in broadcasts
    config: Annotated[str, msgspec.Meta(max_length=2**16)]  # settings as YAML
    vocab_size: Whole  # number of token ids
    text_digest: Short  # hash of the text's unpacked bytes
    text_bytes: Long  # number of the text's unpacked bytes
    state_bytes: Long  # size of a snapshot in bytes
    block_bytes: Long  # size of a block of tokens in bytes; 0: the text holds all tokens
    publish_port: Whole  # port of the broadcasts
    step: Whole  # step that is being scored
    # Pairs of a lease quantum, which is never split between hosts
    quantum: Annotated[int, msgspec.Meta(gt=0, le=MAX_REQUEST // 8)]
    block_interval: Positive  # number of steps that use the same block of tokens
    budget: float | None  # seconds to score in a step. None: all leased pairs are scored
    # Length of the gradient sum that hosts send for each span; 0: hosts send losses
    vector_length: Annotated[int, msgspec.Meta(ge=0, le=MAX_REQUEST // 4)]


class Part(Message, frozen=True, tag="part"):
    """A part of a download, the body."""

    digest: Short  # hash of the whole
    size: Long  # bytes of the whole, packed
    offset: Long  # bytes before this part
    step: Whole = 0  # step of a snapshot, or number of a block


class Updates(Message, frozen=True, tag="updates"):
    """Consecutive updates, the body."""

    step: Whole  # step of the first update
    sizes: Annotated[list[Whole], msgspec.Meta(max_length=2**14)]  # number of bytes of each update


class Ok(Message, frozen=True, tag="ok"):
    """Accept a request."""

    incarnation: Whole
    step: Whole  # step that is being scored
    spans: Spans  # leased pairs of that step that the host has not sent values of
    # Side tasks that it has not finished; the broadcast that asked for them may have been lost
    side_tasks: Annotated[list[SideTask], msgspec.Meta(max_length=3)] = []
    resync: bool = False  # whether the host must fetch the newest snapshot


class Rejected(Message, frozen=True, tag="rejected"):
    """Reject a request; the host stays in the run."""

    reason: Reason  # why
    incarnation: Whole
    step: Whole  # step that is being scored
    rejoin: bool = False  # whether the session has ended, so that the host must join again
    wait: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0  # seconds after which the host should try again


class Refused(Message, frozen=True, tag="refused"):
    """Refuse a host for good."""

    reason: Reason


class HostStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Status of one host."""

    name: str
    slot: int
    state: str  # joining, compiling, ready, straggling, silent, lost or put aside. A host that has left is not listed
    device: str
    step: int
    members_per_second: float  # members that it scores per second; 0 for a lost host
    last_seen: float  # seconds since its last message
    digest: str  # last digest of its state
    share: float  # part of the last finished step's pairs that it scored, 0 to 1
    note: str  # why it is put aside, or its last note


class Status(Message, frozen=True, tag="status"):
    """Status of the run."""

    run: str
    incarnation: int
    step: int
    loss: float | None  # mean loss of the last finished step, or None
    held_out: float | None  # last held-out loss, or None
    greedy_reward: float | None  # last rewards on held-out prompts, see `esjax.rewards.held_out`, or None
    pass_at_k: float | None
    rewards: dict[str, float]  # means of the rewards that have names, over the pairs of the last finished step
    member_tokens_per_second: float  # speed over the last steps; 0 while the run is paused
    paused: bool  # whether no host is ready
    reference: int | None  # slot of the reference host, whose state is kept, or None
    hosts: list[HostStatus]
    counters: dict[str, int]  # number of rejected requests, by reason


# From the coordinator to all hosts.


class Step(Message, frozen=True, tag="step"):
    """Open a step; the body is the update that leads to it, as in the ledger, or empty."""

    run: Short
    incarnation: Whole
    step: Whole  # step to score, with the parameters after update number `step - 1`
    leases: Leases  # leases of all hosts
    digest: bool = False  # whether every host should send the digest of its state at this step
    upload: Whole | None = None  # slot of the host that should send its state at this step, or None
    measure: Whole | None = None  # slot of the host that should send the held-out loss at this step, or None


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
    """The coordinator stops."""

    run: Short
    incarnation: Whole
    done: bool  # whether training has ended; if not, the coordinator will restart


Request = Join | Fetch | CatchUp | Beat | Losses | Digest | Measured | Upload | Leave | AskStatus
Reply = Welcome | Part | Updates | Ok | Rejected | Refused | Status
Broadcast = Step | Extra | Pulse | Bye
Kind = Literal["request", "reply", "broadcast"]

_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: dict[Kind, msgspec.msgpack.Decoder[Any]] = {
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
