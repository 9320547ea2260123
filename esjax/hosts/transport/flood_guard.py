"""Owns the ports of a coordinator, in a process that closes connections which exceed a limit; see `gate`."""

import ctypes
import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import esjax
from esjax.errors import EsjaxError
from esjax.hosts.transport.address import IPAddress
from esjax.hosts.transport.sockets import OVERHEAD, Limits

HALF_OPEN = 1024
"""Most connections of an address that have not begun the handshake."""

EACH = 256
"""Most connections of an address to a port, and most that have begun the handshake and had no reply; libzmq takes up to
150 KB for each."""

MOST = 8192
"""Most connections of all: three eighths of them at each port, an eighth that have not begun the handshake, and an
eighth that have begun it and had no reply."""

SPARE = 24
"""Descriptors that the coordinator and the guard keep for files."""

FRAMES = 64
"""Most frames of a host before a reply: those of 16 requests."""

ROOM = 65_536
"""Bytes that a host may send before a reply, besides one message of the greatest size."""

BROADCAST_FRAMES, BROADCAST_BYTES = 16, 4096
"""Most frames and bytes that a host may send to the port of broadcasts: a handshake and subscriptions."""

KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 15_000}
"""Options of a connection, of which a system has some: the kernel notices within 20 s that a host has vanished."""

BACKLOG = 512
"""Most connections that wait to be accepted."""

PAUSE = 1.0
"""Least seconds between two starts of the process."""

M_MMAP_THRESHOLD, MAPPED = -3, 2**17
"""Option of glibc's mallopt, and bytes from which on blocks of memory are mapped one by one."""

COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from esjax.hosts.transport.gate import main; main(sys.argv[2])"


class FloodGuard:
    """Two ports, and the process that passes bytes from them to libzmq's sockets.

    Attributes:
        ports: Ports of requests and of broadcasts.
        endpoints: Where libzmq's sockets for the two must be bound.
        accepted: Connections so far.
        cut_off: Connections closed so far for a limit.
    """

    def __init__(
        self, interface: IPAddress, port: int, limits: Limits, tell: Callable[[str], None], *, curve: bool
    ) -> None:
        """Listen at a port and the next one; port 0: at any two free ports.

        Raises:
            EsjaxError: The address is not of this machine, or a port is in use.
        """
        self.accepted = self.cut_off = 0
        self._tell = tell
        self._before = (0, 0)  # counts of earlier processes
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._started = 0.0
        self._unread = b""
        self._listeners: list[socket.socket] = []
        self._folder = tempfile.mkdtemp(prefix="esjax-")  # with mode 700
        try:
            for number in (port, port and port + 1):
                self._listeners.append(_listen(interface, number))
            self.ports = [listener.getsockname()[1] for listener in self._listeners]
            paths = [f"{self._folder}/{port}" for port in self.ports]
            self.endpoints = [f"ipc://{path}" for path in paths]
            bounds = (
                (True, FRAMES, limits.frames * (limits.frame + OVERHEAD) + ROOM),
                (False, BROADCAST_FRAMES, BROADCAST_BYTES),
            )
            most = most_connections()
            self._plan = {
                "folder": self._folder,
                "doors": [
                    (listener.fileno(), path, *bound)
                    for listener, path, bound in zip(self._listeners, paths, bounds, strict=True)
                ],
                "frame": limits.frame + OVERHEAD,
                "parts": 2 + limits.frames,  # a REQ sends the number of its request and an empty frame first
                "handshake": 2 if curve else 1,
                "half_open": min(HALF_OPEN, max(4, most // 16)),
                "each": min(EACH, max(1, most * 3 // 8)),
                "most": most,
            }
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Let hosts in; libzmq's sockets are bound."""
        near, far = socket.socketpair()
        near.setblocking(False)
        with far:
            words = json.dumps({**self._plan, "control": far.fileno()})
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", COMMAND, str(Path(esjax.__file__).parents[1]), words],
                pass_fds=[far.fileno(), *(listener.fileno() for listener in self._listeners)],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # not ended by Ctrl-C
            )
        self._control, self._unread, self._started = near, b"", time.monotonic()

    def look(self) -> None:
        """Read the process's reports; start it again if it has ended."""
        if self._control is None or self._process is None:
            return
        with suppress(OSError):
            while part := self._control.recv(65_536):
                self._unread += part
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            news = json.loads(line)
            if "line" in news:
                self._tell(news["line"])
            else:
                self.accepted = self._before[0] + news["accepted"]
                self.cut_off = self._before[1] + news["cut_off"]
        if self._process.poll() is not None and time.monotonic() > self._started + PAUSE:
            self._tell("the process that guards the ports ended and was restarted; all hosts connect again")
            self._before = (self.accepted, self.cut_off)
            self._control.close()
            self.start()

    def close(self) -> None:
        """Close the ports; the process passes on the last bytes that libzmq has sent."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)


def prepare_process() -> None:
    """Let this process open as many files as the system allows, and return the memory of large messages at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS refuses more than its own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # glibc would soon keep large blocks among small ones: 200 MB a minute while unfinished frames come and go.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)


def most_connections() -> int:
    """Return how many connections fit into the open files of this process, and of the guard, which needs two each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MOST
    opened = len(os.listdir("/dev/fd"))
    return max(8, min(MOST, soft - opened - SPARE, (soft - SPARE) // 2))


def _listen(interface: IPAddress, port: int) -> socket.socket:
    family = socket.AF_INET6 if interface.version == 6 else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():  # connections inherit the listener's options
            if hasattr(socket, name):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.bind((str(interface), port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        at = f"[{interface}]" if interface.version == 6 else str(interface)
        if error.errno == errno.EADDRINUSE:
            raise EsjaxError(f"port {port} is in use; stop what uses it, or give another port") from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise EsjaxError(f"{at} is not an address of this machine; give one of its, or 0.0.0.0") from error
        raise EsjaxError(f"cannot listen at port {port} of {at}: {error.strerror}") from error
    return listener
