"""How many connections each token has at a port, from all addresses; one beyond the limit has to be closed."""

from collections import Counter


class TokenConnections:
    """The open connections of a socket, by their file descriptors: at most `each` of one key.

    The newest leaves, so a holder of a token that others hold, too, cannot displace their connections. A connection is
    counted once its key is known, and not if it is known to have ended.

    Attributes:
        leaving: Connections that were not admitted and have not ended yet.
    """

    def __init__(self, each: int) -> None:
        """Set up without connections."""
        self._each = each
        self._open: set[int] = set()
        self.leaving: set[int] = set()
        self._keys: dict[int, str] = {}
        self._counts: Counter[str] = Counter()

    def opened(self, connection: int) -> None:
        """Note that a connection was accepted."""
        self.closed(connection)
        self._open.add(connection)

    def closed(self, connection: int) -> None:
        """Note that a connection has ended."""
        self._open.discard(connection)
        self.leaving.discard(connection)
        self._forget(connection)

    def admits(self, key: str, connection: int) -> bool:
        """Count a connection for a key, unless it is; return False if the key has too many: close it then."""
        if connection not in self._open or self._keys.get(connection) == key:
            return True
        self._forget(connection)
        if self._counts[key] >= self._each:
            self.leaving.add(connection)
            return False
        self._keys[connection] = key
        self._counts[key] += 1
        return True

    def _forget(self, connection: int) -> None:
        key = self._keys.pop(connection, None)
        if key is not None:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]
