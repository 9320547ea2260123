"""A host's request channel to the coordinator: one request at a time, with time limits, and attempts to join."""

from collections.abc import Callable

import msgspec

from esjax.hosts.protocol.wire import Envelope, Join, Message

TIMEOUT = 4.0
"""Seconds after which a request without a reply is sent again."""

DEAF = 20.0
"""Seconds without a broadcast, or without a reply, after which the host reconnects."""

BACK_OFF, BACK_OFF_LONGEST = 0.5, 10.0
"""Seconds between attempts to join: at first, and at most; doubled each time, and times a random factor around 1."""


class RequestChannel:
    """The channel. Times are seconds of the host's clock.

    Attributes:
        request: The request that waits for its reply, or None.
        sent_at: When it was last sent.
        heard_at: When the last message came from the coordinator.
        failures: Number of requests in a row without a reply in time.
        is_dead: Whether the host should reconnect.
    """

    def __init__(self, now: float) -> None:
        """Set up without a request."""
        self.request: Envelope | None = None
        self.sent_at = self.heard_at = now
        self.failures = 0
        self.is_dead = False
        # Times of the last reply and the last broadcast, or of the last reconnection.
        self._reply_at = self._broadcast_at = now

    def is_waiting(self, now: float) -> bool:
        """Return whether a request still has time for its reply."""
        return self.request is not None and now - self.sent_at < TIMEOUT

    def give_up(self, now: float) -> Envelope | None:
        """Stop waiting for a reply; return the request that got none, or None."""
        request, self.request = self.request, None
        if request is not None:
            self.failures += 1
            if now - self._reply_at > DEAF:
                self.is_dead, self._reply_at = True, now
        return request

    def send(self, request: Envelope, now: float) -> Envelope:
        """Note a request as sent, and return it."""
        self.request, self.sent_at = request, now
        return request

    def take_reply(self, now: float) -> Message | None:
        """Note a reply, and return the request that it answers; None: no request was open."""
        request, self.request = self.request, None
        if request is None:
            return None
        self._reply_at = self.heard_at = now
        self.failures = 0
        return request.message

    def take_broadcast(self, now: float) -> None:
        """Note a broadcast, or the start of listening."""
        self._broadcast_at = self.heard_at = now

    def listen(self, now: float) -> None:
        """Check whether the broadcasts have stopped."""
        if now - self._broadcast_at > DEAF:
            self.is_dead, self._broadcast_at = True, now

    def mended(self) -> None:
        """Note that the host reconnected, which drops the open request."""
        self.is_dead = False
        self.request = None


class Joining:
    """A host's attempts to join, at growing intervals.

    Attributes:
        run: Run that the host took part in before, or "".
    """

    def __init__(self, hello: Join, jitter: Callable[[], float], now: float) -> None:
        """Set up with the request, without its `instance`, and a function for random numbers in [0, 1)."""
        self.run = ""
        self._hello = msgspec.structs.replace(hello, instance=int(jitter() * 2**53))
        self._jitter, self._due_at = jitter, now

    def request(self, now: float, failures: int) -> Envelope | None:
        """Return the request to join, or None if it is too early; `failures` is the number of failed requests."""
        if now < self._due_at:
            return None
        self.put_off(now, failures)
        self._hello = msgspec.structs.replace(self._hello, run=self.run, attempt=self._hello.attempt + 1)
        return Envelope(self._hello)

    def put_off(self, now: float, failures: int) -> None:
        """Wait before the next attempt."""
        self.wait(now, min(BACK_OFF * 2 ** min(failures, 10), BACK_OFF_LONGEST))

    def wait(self, now: float, seconds: float) -> None:
        """Wait about so many seconds before the next attempt, as the coordinator asked."""
        self._due_at = now + seconds * (0.5 + self._jitter())
