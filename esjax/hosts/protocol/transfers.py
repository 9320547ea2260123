"""Large things on their way to and from a host, and updates that wait for their turn."""

from collections.abc import Sequence
from typing import Literal

from esjax.exchange.update_record import is_update
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import hash_bytes
from esjax.hosts.protocol.wire import Envelope, Message

PENDING = 64
"""Updates heard ahead of their turn that are kept at most; what is beyond comes from the ledger."""


class Download:
    """Something on its way in, part by part.

    Attributes:
        what: The text, a snapshot, or a block of tokens.
        block: Number of the block of tokens.
        digest: Hash of all the bytes; "" until the first part tells it. That of the text is of its plain bytes, and is
            checked by whoever unpacks it.
        data: What has come.
    """

    def __init__(self, what: Literal["text", "state", "block"], limit: int, digest: str = "", block: int = 0) -> None:
        """Begin; `limit` are the bytes that it has at most."""
        self.what, self.digest, self.block = what, digest, block
        self.data = bytearray()
        self._limit, self._size = limit, 0

    def request(self, session: int) -> Envelope:
        """Ask for the next part."""
        return Envelope(wire.Fetch(session, self.what, self.digest, len(self.data), self.block))

    def take(self, part: wire.Part, data: bytes) -> bool:
        """Take in a part; return False if it does not fit, so that all has to begin anew."""
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
    """What comes in large, one thing at a time, and waits until the devices have taken it.

    Attributes:
        text: The text as it was sent, or None.
        snapshot: A state to be taken over, or None.
        block: Number of a block of tokens, and the tokens, or None.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self.text: bytes | None = None
        self.snapshot: bytes | None = None
        self.block: tuple[int, bytes] | None = None
        self._download: Download | None = None

    def request(self, session: int, wanted: Download | None) -> Envelope | None:
        """Ask for the next part of what is on its way, or else of what is wanted, or return None."""
        self._download = self._download or wanted
        return self._download.request(session) if self._download else None

    def take(self, part: wire.Part, data: bytes, request: Message) -> None:
        """Take in a part that was asked for."""
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
        """Take no more of what is on its way."""
        self._download = None


class Sending:
    """A snapshot on its way out, part by part."""

    def __init__(self, step: int, data: bytes) -> None:
        """Begin; `step` is that of the state."""
        self._step, self._data, self._digest = step, data, hash_bytes(data)
        self._offset = 0

    def request(self, session: int) -> Envelope:
        """Hand in the next part."""
        part = self._data[self._offset : self._offset + wire.PART]
        return Envelope(wire.Upload(session, self._step, self._digest, len(self._data), self._offset), part)

    def arrived(self) -> bool:
        """Hear that the part has arrived, and tell whether it was the last one."""
        self._offset += wire.PART
        return self._offset >= len(self._data)


class Backlog:
    """Updates by the step that they are made at, until it is their turn."""

    def __init__(self) -> None:
        """Begin with none."""
        self._updates: dict[int, bytes] = {}

    def __contains__(self, step: int) -> bool:
        """Tell whether the update of a step is there."""
        return step in self._updates

    def hear(self, step: int, update: bytes) -> None:
        """Keep an update that was published, if it is that of the step, and if there is room."""
        if len(self._updates) < PENDING and is_update(update, step):
            self._updates[step] = update

    def fill(self, first: int, updates: Sequence[bytes]) -> int:
        """Keep consecutive updates that were asked for, up to one that is none; return the step that they lead to."""
        for step, update in enumerate(updates, first):
            if not is_update(update, step):
                return step
            self._updates[step] = update
        return first + len(updates)

    def run(self, first: int, end: int) -> list[bytes]:
        """Return consecutive updates from a step on, before another one."""
        found: list[bytes] = []
        while first + len(found) < end and first + len(found) in self._updates:
            found.append(self._updates[first + len(found)])
        return found

    def drop_before(self, step: int) -> None:
        """Forget the updates of earlier steps."""
        self._updates = {number: update for number, update in self._updates.items() if number >= step}

    def clear(self) -> None:
        """Forget all."""
        self._updates.clear()
