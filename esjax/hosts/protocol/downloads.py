"""Downloads of hosts: the text, blocks of tokens, snapshots, and the recorded updates."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from esjax.data.delivery import PackedText
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import History, Snapshot, hash_bytes
from esjax.hosts.protocol.wire import Envelope

FAR = 1024
"""Missing updates above which a host gets a newer snapshot instead, which is faster."""


class Downloads:
    """Answers requests for parts and updates."""

    def __init__(
        self, text: PackedText, block: Callable[[int], bytes] | None, interval: int, history: History | None
    ) -> None:
        """Set up.

        Args:
            text: The packed text.
            block: Returns a block of tokens as bytes, by its number. None: the text holds all tokens.
            interval: Number of steps that use the same block.
            history: The recorded updates, or None.
        """
        self.text = text
        self._block, self._interval, self._history = block, interval, history
        self._hash_block = lru_cache(maxsize=3)(lambda number: hash_bytes(block(number)) if block else "")

    def block_bytes(self, step: int) -> int:
        """Return the size of a block in bytes; 0: the text holds all tokens."""
        return len(self._block(step // self._interval)) if self._block else 0

    def part(self, message: wire.Fetch, step: int, snapshots: Sequence[Snapshot]) -> Envelope | str:
        """Return the requested part, or why there is none.

        Args:
            message: The request.
            step: Step that is being scored.
            snapshots: The newest states, the newest last.
        """
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
        """Return updates from a step on, as many as fit into a part; None: the host needs a snapshot instead.

        Args:
            first: Step of the first update.
            step: Step that is being scored.
            snapshots: The newest states, the newest last.
        """
        if self._history is None or not self._history.first <= first <= step:
            return None
        if step - first > FAR and snapshots and snapshots[-1].step > first:
            return None
        updates = self._history.updates(first, wire.PART)
        return Envelope(wire.Updates(first, [len(update) for update in updates]), b"".join(updates))


def _part(data: bytes, digest: str, offset: int, step: int = 0) -> Envelope:
    return Envelope(wire.Part(digest, len(data), offset, step), data[offset : offset + wire.PART])
