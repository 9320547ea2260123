"""What the gate's process reports to the coordinator: counts of connections, and lines for the user."""

import json
import re
import socket
from contextlib import suppress

LINES = 32
"""Most lines for the user."""

WAITING = 65_536
"""Bytes of reports that may wait before counts are left out."""

NUMBER = re.compile(r"[\d,]+")


class Reports:
    """Reports on their way.

    Attributes:
        control: Where they are sent; its end is the coordinator's end.
        accepted: Connections so far.
        cut_off: Connections closed so far for a limit.
    """

    def __init__(self, control: socket.socket) -> None:
        """Begin without news."""
        self.control = control
        self.accepted = self.cut_off = 0
        self._reported = (0, 0)
        self._said: set[tuple[str, str]] = set()
        self._news = b""

    def say(self, group: str, line: str) -> None:
        """Give the coordinator a line for the user, once for an address and a reason."""
        about = (group, NUMBER.sub("", line))
        if about not in self._said and len(self._said) < LINES:
            self._said.add(about)
            self._news += json.dumps({"line": line}).encode() + b"\n"

    def send(self) -> None:
        """Send news and counts; they wait while the coordinator is busy."""
        counts = (self.accepted, self.cut_off)
        if counts != self._reported and len(self._news) < WAITING:
            self._reported = counts
            self._news += json.dumps({"accepted": counts[0], "cut_off": counts[1]}).encode() + b"\n"
        with suppress(OSError):
            self._news = self._news[self.control.send(self._news) :] if self._news else b""

    def coordinator_ended(self) -> bool:
        """Return whether the coordinator has closed its end."""
        try:
            return not self.control.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True
