"""The process that owns a coordinator's ports and passes bytes between hosts and libzmq's sockets.

libzmq limits the size of a frame, but neither connections, nor subscriptions, nor unread messages. This process follows
the frames of each connection and closes those that exceed a limit before libzmq sees the bytes. It needs the standard
library alone, starts in 50 ms, and shares no interpreter lock with the coordinator.

Limits for the bytes of a connection count from the coordinator's last reply. Small messages always pass. A large one
waits, unread, until the pool has room for it.
"""

import errno
import json
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import time
from contextlib import suppress

from esjax.hosts.transport.allowances import Pool, Rates
from esjax.hosts.transport.crowd import Crowd
from esjax.hosts.transport.link import READ, SMALL, Door, Link, Plan
from esjax.hosts.transport.reports import Reports
from esjax.hosts.transport.zmtp import GREETING, ViolationError

POOL = 2**25
"""Most bytes of large messages, of all connections, that have no reply yet; one address gets half of them."""

HANDSHAKE_SECONDS = 5.0
"""Seconds that a connection has for its handshake."""

HANDSHAKE_BYTES = 2048
"""Most bytes of a handshake."""

HANDSHAKE_RATE, HANDSHAKE_BURST = 200.0, 1024.0
"""Most handshakes that an address may begin: a second over a while, and at once. With keys, each takes 0.2 ms."""

IDLE_SECONDS = 5.0
"""Seconds without bytes after which a connection with replies may be closed in favor of a new one of its address."""

STALL_SECONDS, POOL_RATE = 1.0, 2**18
"""While others wait for the pool: seconds that a large message may pause, and bytes a second that it must reach."""

ACCEPTS = 8
"""Most new connections of a port at once."""

STRANGERS_SHARE, STINT = 0.05, 0.0005
"""Most of the time that goes to strangers, and seconds of it at once, so that hosts wait for no flood."""

LARGE = 8
"""How many times as long as a port a stranger with a large message waits for its turn."""

TURN = 0.1
"""Most seconds between two checks of deadlines, and between two reports; also a pause without descriptors."""

FAREWELL = 0.5
"""Seconds for the last bytes after the coordinator has closed."""


class Gate:
    """All connections.

    A *stranger* is a connection without a reply so far; at the port of broadcasts, one that has not subscribed. Ports
    and strangers have a selector of their own, which is looked at for a share of the time.
    """

    def __init__(self, plan: Plan) -> None:
        """Take over the ports."""
        self._plan = plan
        self._selector, self._outside = selectors.DefaultSelector(), selectors.DefaultSelector()
        self._links: dict[Link, None] = {}  # oldest first
        # Without a word, strangers known to libzmq, and the others. Each may send away its own kind alone.
        self._silent = Crowd[Link](plan.half_open, max(4, plan.most // 8))
        self._strangers = Crowd[Link](plan.each, max(4, plan.most // 8))
        self._settled = {door: Crowd[Link](plan.each, max(1, plan.most * 3 // 8)) for door in plan.doors}
        self._rates = Rates(HANDSHAKE_RATE, HANDSHAKE_BURST)
        self._greetings = {door: _greeting(door.inner) for door in plan.doors}
        self._pool = Pool(POOL)
        self._waiting: dict[Link, None] = {}
        self._resting_until: float | None = None  # when strangers are looked at again; None: they are now
        control = socket.socket(fileno=plan.control)
        control.setblocking(False)
        self._reports = Reports(control)
        self._selector.register(control, selectors.EVENT_READ)
        self._selector.register(self._outside, selectors.EVENT_READ)
        self._listeners = {door: socket.socket(fileno=door.fd) for door in plan.doors}
        for door, listener in self._listeners.items():
            listener.setblocking(False)
            self._outside.register(listener, selectors.EVENT_READ, door)

    def run(self) -> None:
        """Pass bytes until the coordinator has closed, and a little longer."""
        ends, checked = float("inf"), 0.0
        while (now := time.monotonic()) < ends and (self._links or ends == float("inf")):
            rest = TURN
            if self._resting_until is not None:
                rest = min(TURN, self._resting_until - now)
                if rest <= 0:
                    self._selector.register(self._outside, selectors.EVENT_READ)
                    self._resting_until = None
            strangers_ready = False
            for key, events in self._selector.select(max(rest, 0.0)):
                if key.data is not None:
                    self._pass(key.data, key.fileobj, events, now)
                elif key.fileobj is self._outside:
                    strangers_ready = True
                elif self._reports.coordinator_ended():
                    self._selector.unregister(self._reports.control)
                    for listener in self._listeners.values():
                        self._outside.unregister(listener)
                    ends = now + FAREWELL
            if strangers_ready:
                self._attend_to_strangers(now)
            if now >= checked + TURN:
                checked = now
                self._check(now)
                self._reports.send()
            if ends < float("inf"):
                for link in [link for link in self._links if link.inner is None]:
                    self._close(link)

    def _attend_to_strangers(self, now: float) -> None:
        """Serve ports and strangers for a while, and then let them rest."""
        began, pause = time.thread_time(), 0.0
        # Not all are served now. So that what is accepted is served, ports come after it.
        for key, mask in sorted(self._outside.select(0), key=lambda event: _rank(event[0].data)):
            if isinstance(key.data, Door):
                pause = self._accept(key.data, now)
            else:
                self._pass(key.data, key.fileobj, mask, now)
            used = time.thread_time() - began
            if used > STINT or pause:
                break
        self._resting_until = now + max(pause, (time.thread_time() - began) / STRANGERS_SHARE)
        self._selector.unregister(self._outside)

    def _accept(self, door: Door, now: float) -> float:
        """Accept a few connections; return seconds in which no more shall be accepted."""
        for _ in range(ACCEPTS):
            try:
                outer, (address, *_) = self._listeners[door].accept()
            except BlockingIOError:
                return 0.0
            except OSError as error:  # the other side has left already, or there are no descriptors
                return TURN if error.errno in (errno.EMFILE, errno.ENFILE) else 0.0
            self._reports.accepted += 1
            outer.setblocking(False)
            outer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = Link(outer, door, address, self._plan, self._silent, self._outside, now)
            self._links[link] = None
            self._watch(link)
            crowded = self._silent.enter(link.group, link)
            if crowded is not None:
                self._make_room(self._silent, self._silent.oldest(crowded), crowded, "unfinished handshakes")
        return 0.0

    def _pass(self, link: Link, ready: object, events: int, now: float) -> None:
        """Read and write at one side of a connection."""
        if link not in self._links:
            return
        try:
            if ready is link.outer:
                if events & selectors.EVENT_WRITE:
                    link.to_outer = _send(link.outer, link.to_outer)
                if events & selectors.EVENT_READ:
                    self._read_outer(link, now)
            else:
                if events & selectors.EVENT_WRITE:
                    link.to_inner = _send(link.inner, link.to_inner)
                if events & selectors.EVENT_READ:
                    self._read_inner(link, now)
        except ViolationError as violation:
            self._cut(link, str(violation))
        except OSError:
            self._close(link)
        if link in self._links:
            self._watch(link)

    def _read_outer(self, link: Link, now: float) -> None:
        if not self._grant(link, now):
            self._waiting[link] = None
            return
        most = HANDSHAKE_BYTES if link.crowd is self._silent else min(READ, SMALL + link.granted - link.held)
        data = link.outer.recv(most)
        if not data:
            self._end(link)
            return
        greeted = link.inward.is_zmtp
        link.active = now
        link.inward.follow(data, link.begun + link.door.frames)
        link.held += len(data)
        link.to_inner += data
        if link.inward.is_zmtp and not greeted:
            link.to_outer = _send(link.outer, self._greetings[link.door])
        self._judge(link, now)
        if link in self._links:
            link.to_inner = _send(link.inner, link.to_inner)

    def _judge(self, link: Link, now: float) -> None:
        """Check a connection against the limits, and note how far it is.

        Raises:
            ViolationError: It exceeds a limit.
        """
        door, finished = link.door, link.inward.finished
        if link.held > door.bytes:
            raise ViolationError(f"sent more than {door.bytes:,} bytes {_since(door)}")
        if link.crowd is self._settled[door]:
            return
        if link.held > HANDSHAKE_BYTES and finished < self._plan.handshake:
            raise ViolationError(f"sent more than {HANDSHAKE_BYTES:,} bytes without a handshake")
        if link.crowd is self._silent and finished:
            if not self._rates.take(link.group, now):
                raise ViolationError(f"begins more than {HANDSHAKE_RATE:.0f} handshakes a second")
            link.inner = socket.socket(socket.AF_UNIX)
            link.inner.setblocking(False)
            link.inner.connect(door.inner)
            crowded = self._advance(link, self._strangers)
            if crowded is not None:
                leaves = self._strangers.oldest(crowded)
                self._make_room(self._strangers, leaves, crowded, "connections without a reply")
        if link in self._links and not door.replies and finished > self._plan.handshake:
            self._settle(link, now)

    def _settle(self, link: Link, now: float) -> None:
        """Count a connection as that of a host from now on."""
        for end, mask in zip((link.outer, link.inner), link.masks, strict=True):
            if end is not None and mask:
                link.selector.unregister(end)
        link.selector, link.masks = self._selector, [0, 0]
        crowd = self._settled[link.door]
        crowded = self._advance(link, crowd)
        if crowded is not None:
            leaves = crowd.idle(crowded, lambda other: now - other.active > IDLE_SECONDS)
            self._make_room(crowd, leaves, crowded, "connections")

    def _advance(self, link: Link, crowd: "Crowd[Link]") -> str | None:
        link.crowd.leave(link.group, link)
        link.crowd = crowd
        return crowd.enter(link.group, link)

    def _make_room(self, crowd: "Crowd[Link]", link: Link, group: str, what: str) -> None:
        """Close a connection in favor of others."""
        self._cut(link, "")
        line = f"{group} has more than {crowd.each} {what}, or all have more than {crowd.most}: some are closed"
        self._reports.say(group, line)

    def _read_inner(self, link: Link, now: float) -> None:
        assert link.inner is not None
        data = link.inner.recv(READ)
        if not data:
            self._end(link)
            return
        heard, link.unheard = link.unheard, max(0, link.unheard - len(data))
        link.to_outer = _send(link.outer, link.to_outer + data[heard:])
        if link.door.replies:
            replies = link.outward.messages
            link.outward.follow(data)
            if link.outward.messages > replies:
                link.held, link.begun = 0, link.inward.frames
                self._release(link, now)
                if link.crowd is self._strangers:
                    self._settle(link, now)

    def _grant(self, link: Link, now: float) -> bool:
        """Give a connection the room in the pool that it needs to read on; return False if there is none."""
        more = link.need - link.granted
        if more <= 0:
            return True
        if not self._pool.take(link.group, more, link.crowd is self._strangers):
            return False
        if not link.granted:
            link.granted_at = now
        link.granted += more
        return True

    def _release(self, link: Link, now: float) -> None:
        """Give a connection's room back; those that can have what they need now read on, in their order."""
        resuming = list(self._waiting) if link.granted else [link] if link in self._waiting else []
        if link.granted:
            self._pool.give_back(link.group, link.granted)
            link.granted = 0
        for waiting in resuming:
            if self._grant(waiting, now):
                del self._waiting[waiting]
                self._watch(waiting)

    def _check(self, now: float) -> None:
        """Close connections whose time is over."""
        self._rates.tidy(now)
        for link in list(self._links):
            if link.inward.finished < self._plan.handshake:
                if now - link.opened > HANDSHAKE_SECONDS:
                    self._cut(link, "")
            elif link.granted and self._waiting:
                stalls = link.inward.is_amid and now - link.active > STALL_SECONDS
                if stalls or now - link.granted_at > STALL_SECONDS + link.granted / POOL_RATE:
                    self._cut(link, "holds a large message back while others wait")

    def _end(self, link: Link) -> None:
        """Close a connection after its last bytes."""
        link.ending = True
        if not link.to_inner and not link.to_outer:
            self._close(link)

    def _cut(self, link: Link, why: str) -> None:
        """Close a connection at once, so that the other side stops sending; count it."""
        self._reports.cut_off += 1
        with suppress(OSError):
            link.outer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._close(link)
        if why:
            self._reports.say(link.group, f"{link.address} was cut off: it {why}")

    def _close(self, link: Link) -> None:
        if link not in self._links:
            return
        del self._links[link]
        self._waiting.pop(link, None)
        for end, mask in zip((link.outer, link.inner), link.masks, strict=True):
            if end is not None:
                if mask:
                    link.selector.unregister(end)
                end.close()
        link.crowd.leave(link.group, link)
        self._release(link, time.monotonic())

    def _watch(self, link: Link) -> None:
        """Wait for what a connection can do next."""
        reads = (link.inner is None or not link.to_inner) and not link.ending and link not in self._waiting
        outer = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if link.to_outer else 0)
        inner = selectors.EVENT_READ if not link.to_outer and not link.ending else 0
        inner |= selectors.EVENT_WRITE if link.to_inner else 0
        if link.ending and not link.to_outer and not link.to_inner:
            self._close(link)
            return
        for side, (end, mask) in enumerate(((link.outer, outer), (link.inner, inner))):
            if end is not None and mask != link.masks[side]:
                if not link.masks[side]:
                    link.selector.register(end, mask, link)
                elif mask:
                    link.selector.modify(end, mask, link)
                else:
                    link.selector.unregister(end)
                link.masks[side] = mask


def _greeting(inner: str) -> bytes:
    """Return the greeting of libzmq's socket, so that hosts get theirs before libzmq sees them."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(10)
        asking.connect(inner)
        asking.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x01")
        greeting = b""
        while len(greeting) < GREETING:
            part = asking.recv(GREETING - len(greeting))
            if not part:
                raise ConnectionError("the coordinator has gone")
            greeting += part
        return greeting


def _rank(data: Door | Link) -> float:
    """Return when a port or a stranger has its turn, by chance: the lowest first."""
    if isinstance(data, Link) and data.held <= SMALL:
        return random.random()
    return 1 + random.random() * (LARGE if isinstance(data, Link) else 1)


def _since(door: Door) -> str:
    return "before a reply" if door.replies else "to a port of broadcasts"


def _send(end: socket.socket | None, data: bytes) -> bytes:
    """Send what fits; return the rest."""
    if end is None:
        return data
    try:
        return data[end.send(data) :] if data else data
    except BlockingIOError:
        return data


def main(words: str) -> None:
    """Run a gate; `words` is a plan in JSON."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the coordinator's end is its end
    given = json.loads(words)
    plan = Plan(**{**given, "doors": [Door(*door) for door in given["doors"]]})
    try:
        gate = Gate(plan)
    except (ConnectionError, FileNotFoundError):  # the coordinator ended with an error of its own, which is printed
        sys.exit(1)
    gate.run()
    # Not after an error: the coordinator, if it is there, starts another gate, which needs the folder.
    shutil.rmtree(plan.folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
