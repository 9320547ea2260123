"""Transfers in parts: text, blocks of tokens, states and updates, on the side of the coordinator and of a host."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal

from esjax.data.delivery import PackedText, hash_bytes
from esjax.exchange.update_record import is_update
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import History, Snapshot
from esjax.hosts.protocol.wire import Envelope, Message

PENDING = 64
"""Most broadcast updates that are kept ahead of their turn; later ones are fetched from the ledger."""

FAR = 1024
"""Missing updates above which a host gets a newer snapshot instead, which is faster."""

PACKING = 1024
"""Bytes by which a compressed text may be larger than the text, beside 1/64 of it."""


class Downloads:
    """Answers requests for parts and updates."""

    def __init__(
        self,
        text: PackedText,
        block: Callable[[int], bytes] | None,
        interval: int,
        history: History | None,
        saves_states: bool = False,
    ) -> None:
        """Set up.

        Args:
            text: See `Coordinator`.
            block: See `Coordinator`.
            interval: Number of steps that use the same block.
            history: See `Coordinator`.
            saves_states: Whether a host that is far behind gets all updates, and a newer state only if they are gone.
        """
        self.text = text
        self._block, self._interval, self._history, self._saves_states = block, interval, history, saves_states
        self._hash_block = lru_cache(maxsize=3)(lambda number: hash_bytes(block(number)) if block else "")

    def block_bytes(self, step: int) -> int:
        """Return the size of a block in bytes; 0: the text holds all tokens."""
        return len(self._block(step // self._interval)) if self._block else 0

    def part(self, message: wire.Fetch, step: int, snapshots: Sequence[Snapshot]) -> Envelope | str:
        """Return the requested part, or why there is none; `step` is being scored, the newest snapshot is the last."""
        if message.what == "text":
            if message.digest != self.text.digest:
                return "this run has another text"
            return _part(self.text.data, self.text.digest, message.offset)
        if message.what == "block":
            if self._block is None or abs(message.block - step // self._interval) > 1:
                return f"there is no block {message.block} now"
            data, digest = self._block(message.block), self._hash_block(message.block)
            return _part(data, digest, message.offset, message.block)
        for snapshot in reversed(snapshots):
            if message.digest in ("", snapshot.digest):
                return _part(snapshot.data, snapshot.digest, message.offset, snapshot.step)
        return "this snapshot is no longer kept; fetch the newest"

    def updates(self, first: int, step: int, snapshots: Sequence[Snapshot]) -> Envelope | None:
        """Return updates from step `first` on, as many as fit into a part; None: the host needs a snapshot instead."""
        if self._history is None or not self._history.first <= first <= step:
            return None
        if step - first > FAR and snapshots and snapshots[-1].step > first and not self._saves_states:
            return None
        updates = self._history.updates(first, wire.PART)
        return Envelope(wire.Updates(first, [len(update) for update in updates]), b"".join(updates))


def _part(data: bytes, digest: str, offset: int, step: int = 0) -> Envelope:
    return Envelope(wire.Part(digest, len(data), offset, step), data[offset : offset + wire.PART])


def longest_text(size: int) -> int:
    """Return the most bytes of a compressed text of `size` bytes."""
    return size + size // 64 + PACKING


class Download:
    """A download in parts.

    Attributes:
        what: The text, a snapshot, or a block of tokens.
        block: Number of the block of tokens.
        digest: Hash of all bytes; "" until the first part gives it. The hash of the text is that of its unpacked bytes,
            which `esjax.data.delivery.unpack_text` checks.
        data: The bytes so far.
    """

    def __init__(self, what: Literal["text", "state", "block"], limit: int, digest: str = "", block: int = 0) -> None:
        """Start a download of at most `limit` bytes."""
        self.what, self.digest, self.block = what, digest, block
        self.data = bytearray()
        self._limit, self._size = limit, 0

    def request(self, session: int) -> Envelope:
        """Return the request for the next part."""
        return Envelope(wire.Fetch(session, self.what, self.digest, len(self.data), self.block))

    def take(self, part: wire.Part, data: bytes) -> bool:
        """Add a part; return False if it does not fit, so that the download must start again."""
        if not self.data:
            self.digest, self._size = self.digest or part.digest, part.size
        have = len(self.data)
        fits = (part.digest, part.size, part.offset) == (self.digest, self._size, have) and part.size <= self._limit
        if not fits or not 0 < len(data) <= min(wire.PART, part.size - have):
            return False
        self.data += data
        return self.what == "text" or not self.is_whole or hash_bytes(bytes(self.data)) == self.digest

    @property
    def is_whole(self) -> bool:
        """Whether all parts are there."""
        return bool(self.data) and len(self.data) == self._size


class Supplies:
    """Downloads, one at a time; finished ones are kept until a device task has used them.

    Attributes:
        text: The packed text, or None.
        snapshot: A state to load, or None.
        block: Number and tokens of a block, or None.
    """

    def __init__(self) -> None:
        """Set up without downloads."""
        self.text: bytes | None = None
        self.snapshot: bytes | None = None
        self.block: tuple[int, bytes] | None = None
        self._download: Download | None = None

    def request(self, session: int, wanted: Download | None) -> Envelope | None:
        """Return the request for the next part of the running download, else start `wanted`; None if both are None."""
        self._download = self._download or wanted
        return self._download.request(session) if self._download else None

    def take(self, part: wire.Part, data: bytes, request: Message) -> None:
        """Add a part that `request` asked for."""
        download = self._download
        if download is None or download.request(getattr(request, "session", -1)).message != request:
            return
        if not download.take(part, data):
            self.give_up()
        elif download.is_whole:
            self.give_up()
            whole = bytes(download.data)
            if download.what == "text":
                self.text = whole
            elif download.what == "state":
                self.snapshot = whole
            else:
                self.block = (download.block, whole)

    def give_up(self) -> None:
        """Drop the running download."""
        self._download = None


class Sending:
    """An upload of a snapshot, in parts."""

    def __init__(self, step: int, data: bytes) -> None:
        """Start the upload of the state of a step."""
        self._step, self._data, self._digest = step, data, hash_bytes(data)
        self._offset = 0

    def request(self, session: int) -> Envelope:
        """Return the message with the next part."""
        part = self._data[self._offset : self._offset + wire.PART]
        return Envelope(wire.Upload(session, self._step, self._digest, len(self._data), self._offset), part)

    def arrived(self) -> bool:
        """Note that the part has arrived; return whether it was the last one."""
        self._offset += wire.PART
        return self._offset >= len(self._data)


class Backlog:
    """Updates that wait for their turn, by step."""

    def __init__(self) -> None:
        """Set up without updates."""
        self._updates: dict[int, bytes] = {}

    def __contains__(self, step: int) -> bool:
        """Return whether the update of a step is here."""
        return step in self._updates

    def hear(self, step: int, update: bytes) -> None:
        """Keep a broadcast update if it belongs to the step and fewer than `PENDING` wait."""
        if len(self._updates) < PENDING and is_update(update, step):
            self._updates[step] = update

    def fill(self, step: int, sizes: Sequence[int], body: bytes) -> int:
        """Keep consecutive updates from the ledger up to the first invalid one; return the step that they lead to."""
        for end, size in zip(accumulate(sizes), sizes, strict=True):
            update = body[end - size : end]
            if not is_update(update, step):
                break
            self._updates[step] = update
            step += 1
        return step

    def run(self, first: int, end: int) -> list[bytes]:
        """Return the consecutive updates from step `first` on, before step `end`."""
        found: list[bytes] = []
        while first + len(found) < end and first + len(found) in self._updates:
            found.append(self._updates[first + len(found)])
        return found

    def drop_before(self, step: int) -> None:
        """Drop the updates of earlier steps."""
        self._updates = {number: update for number, update in self._updates.items() if number >= step}

    def clear(self) -> None:
        """Drop all updates."""
        self._updates.clear()
