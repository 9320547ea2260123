"""The order in which requests for downloads are answered: tokens take turns, and so do the connections of a token."""

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")

WAITING = 4
"""Most requests of a connection that wait; a host waits for one reply at a time, so older ones are obsolete."""


class Turns(Generic[Item]):
    """Requests that wait."""

    def __init__(self) -> None:
        """Set up without requests."""
        self._tokens: dict[str, dict[bytes, deque[Item]]] = {}  # whose turn is next comes first

    def __bool__(self) -> bool:
        """Return whether a request waits."""
        return bool(self._tokens)

    def add(self, token: str, peer: bytes, item: Item) -> None:
        """Add a request of a connection."""
        self._tokens.setdefault(token, {}).setdefault(peer, deque(maxlen=WAITING)).append(item)

    def take(self) -> Item:
        """Take the request whose turn it is; one must wait."""
        token, peers = next(iter(self._tokens.items()))
        peer, items = next(iter(peers.items()))
        del self._tokens[token], peers[peer]
        item = items.popleft()
        if items:
            peers[peer] = items
        if peers:
            self._tokens[token] = peers
        return item
