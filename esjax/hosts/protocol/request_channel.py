"""A host's line to the coordinator: one request at a time, and how long nothing was heard."""

from esjax.hosts.protocol.wire import Envelope, Message

TIMEOUT = 4.0
"""Seconds after which a request that was not answered is made again."""

DEAF = 20.0
"""Seconds without a broadcast, or without a reply, after which the connections are made anew."""


class RequestChannel:
    """The line.

    Attributes:
        request: What was asked and not yet answered, or None.
        sent_at: When it was sent last.
        heard_at: When the coordinator last said anything.
        failures: Requests in a row that were not answered in time.
        is_dead: Whether the connections should be made anew.
    """

    def __init__(self, now: float) -> None:
        """Begin with nothing asked."""
        self.request: Envelope | None = None
        self.sent_at = self.heard_at = now
        self.failures = 0
        self.is_dead = False
        # Of the last reply and the last broadcast, or of the last connections.
        self._reply_at = self._broadcast_at = now

    def is_waiting(self, now: float) -> bool:
        """Tell whether a reply may still come."""
        return self.request is not None and now - self.sent_at < TIMEOUT

    def give_up(self, now: float) -> Envelope | None:
        """Wait no more for a reply, and return what was asked, or None."""
        request, self.request = self.request, None
        if request is not None:
            self.failures += 1
            if now - self._reply_at > DEAF:
                self.is_dead, self._reply_at = True, now
        return request

    def send(self, request: Envelope, now: float) -> Envelope:
        """Ask something."""
        self.request, self.sent_at = request, now
        return request

    def take_reply(self, now: float) -> Message | None:
        """Hear a reply, and return what it answers; None: nothing was asked."""
        request, self.request = self.request, None
        if request is None:
            return None
        self._reply_at = self.heard_at = now
        self.failures = 0
        return request.message

    def take_broadcast(self, now: float) -> None:
        """Hear a broadcast, or begin to listen for some."""
        self._broadcast_at = self.heard_at = now

    def listen(self, now: float) -> None:
        """Notice that the broadcasts have stopped."""
        if now - self._broadcast_at > DEAF:
            self.is_dead, self._broadcast_at = True, now

    def mended(self) -> None:
        """Hear that the connections were made anew: what was asked is to be asked again."""
        self.is_dead = False
        self.request = None
