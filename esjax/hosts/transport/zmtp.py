"""The bytes of one direction of a ZMTP 3 connection (rfc.zeromq.org/spec/23): where its frames begin and end."""

GREETING = 64
"""Bytes before the first frame."""

SIGNATURE = 10
"""Bytes at the start of a greeting, after which a peer waits for those of the other side; then comes the version."""

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame: others of its message follow, its size has 8 bytes instead of 1, it is a command."""


class ViolationError(ValueError):
    """Bytes that no host sends; the text completes a sentence about the sender."""


class Stream:
    """Follows bytes without keeping them.

    Attributes:
        frames: Frames begun so far, commands included.
        messages: Frames begun so far that are no commands.
        finished: Frames ended so far.
        left: Bytes that the current frame still has.
    """

    def __init__(self, largest: int, parts: int) -> None:
        """Set up; a frame has at most `largest` bytes, and a message `parts` frames."""
        self.frames = self.messages = self.finished = self.left = 0
        self._largest, self._parts = largest, parts
        self._part = 0  # frames of the current message
        self._greeted = 0
        self._start = b""  # of the greeting, then of each frame's header

    @property
    def is_zmtp(self) -> bool:
        """Whether the greeting has begun as that of ZMTP 3."""
        return self._greeted >= SIGNATURE

    @property
    def is_amid(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self.left or self._part or (self._start and self._greeted == GREETING))

    def follow(self, data: bytes, most: int = 2**63) -> None:
        """Follow more bytes.

        Args:
            data: The bytes.
            most: Most frames from the beginning on; at the next one it stops, since many small frames take long.

        Raises:
            ViolationError: They are not those of ZMTP 3, or exceed a limit.
        """
        at = 0
        if self._greeted < GREETING:
            at = min(GREETING - self._greeted, len(data))
            if self._greeted <= SIGNATURE:
                self._start += data[: SIGNATURE + 1 - self._greeted]
                _check_greeting(self._start)
            self._greeted += at
            if self._greeted > SIGNATURE:
                self._start = b""
        while at < len(data):
            if self.left:
                step = min(self.left, len(data) - at)
                self.left -= step
                at += step
            else:
                header = self._start + data[at : at + 9 - len(self._start)]
                size = 9 if header[0] & LONG else 2
                if len(header) < size:
                    self._start = header
                    return
                at += size - len(self._start)
                self._start = b""
                if self.frames >= most:
                    raise ViolationError("sent more frames than it may")
                self._begin(header[0], int.from_bytes(header[1:size], "big"))
            if not self.left:
                self.finished += 1

    def _begin(self, flags: int, size: int) -> None:
        if flags > MORE | LONG | COMMAND:
            raise ViolationError("sent bytes that are no frame of ZMTP 3")
        if size > self._largest:
            raise ViolationError(f"began a frame of {size:,} bytes, and {self._largest:,} are the most")
        self.frames += 1
        self.left = size
        if not flags & COMMAND:
            self.messages += 1
            self._part += 1
            if self._part > self._parts:
                raise ViolationError(f"sent a message of more than {self._parts} frames")
            if not flags & MORE:
                self._part = 0


def _check_greeting(start: bytes) -> None:
    if start[0] != 0xFF or (len(start) > 9 and start[9] != 0x7F) or (len(start) > 10 and start[10] < 3):
        raise ViolationError("does not begin as ZMTP 3 does")
