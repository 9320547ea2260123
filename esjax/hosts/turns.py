"""The order in which requests for downloads are answered: tokens take turns, and so do the connections of a token."""

from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Requests that wait; of each connection the newest one, since a host drops replies to older ones."""

    def __init__(self) -> None:
        """Set up without requests."""
        self._tokens: dict[str, dict[bytes, Item]] = {}  # whose turn is next comes first

    def __bool__(self) -> bool:
        """Return whether a request waits."""
        return bool(self._tokens)

    def add(self, token: str, peer: bytes, item: Item) -> None:
        """Add a request of a connection, in place of the one that waits, if there is one."""
        self._tokens.setdefault(token, {})[peer] = item

    def take(self) -> Item:
        """Take the request whose turn it is; one must wait."""
        token, peers = next(iter(self._tokens.items()))
        item = peers.pop(next(iter(peers)))
        del self._tokens[token]
        if peers:
            self._tokens[token] = peers
        return item
