"""How many connections a token has at a port, from all addresses; a new one takes the place of the most silent."""


class TokenConnections:
    """The connections of each token's key, by their file descriptors: at most `each` of one key."""

    def __init__(self, each: int) -> None:
        """Set up without connections."""
        self._each = each
        self._of: dict[str, dict[int, None]] = {}  # the one that was silent for longest comes first
        self._keys: dict[int, str] = {}

    def use(self, key: str, connection: int) -> int | None:
        """Note that a key used a connection; return the one that has to be closed now, or None."""
        if self._keys.get(connection) != key:
            self.close(connection)  # the system gave its number to a new connection
            self._keys[connection] = key
        mine = self._of.setdefault(key, {})
        mine.pop(connection, None)
        mine[connection] = None
        return next(iter(mine)) if len(mine) > self._each else None

    def close(self, connection: int) -> None:
        """Forget a connection, if it is known."""
        key = self._keys.pop(connection, None)
        if key is not None:
            del self._of[key][connection]
            if not self._of[key]:
                del self._of[key]
