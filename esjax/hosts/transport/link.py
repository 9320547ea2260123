"""A connection as the gate sees it, and what the coordinator asks the gate for."""

import selectors
import socket
from typing import NamedTuple

from esjax.hosts.transport.crowd import Crowd, group_of
from esjax.hosts.transport.zmtp import GREETING, Stream

READ = 65_536
"""Most bytes that are read at once, and that wait for a slow side."""

SMALL = 32_768
"""Bytes since the last reply that need no room in the pool."""


class Door(NamedTuple):
    """A port, and what may come in through it."""

    fd: int  # listening socket
    inner: str  # path of libzmq's socket
    replies: bool  # a message to the host starts the limits again
    frames: int  # most frames since then
    bytes: int  # most bytes since then


class Plan(NamedTuple):
    """What the coordinator asks for; JSON in the process's arguments."""

    control: int  # socket for reports; its end is the coordinator's end
    folder: str  # folder of libzmq's sockets, which is removed at the end
    doors: list[Door]
    frame: int  # most bytes of a frame
    parts: int  # most frames of a message
    handshake: int  # frames of a host's handshake
    half_open: int  # most connections of an address that have not begun the handshake
    each: int  # most connections of an address to a port, and most that have begun the handshake and had no reply
    most: int  # most connections of all


class Link:
    """A connection, from outside and to libzmq."""

    __slots__ = (
        *("outer", "inner", "door", "address", "group", "inward", "outward", "opened", "active", "crowd"),
        *("held", "begun", "granted", "granted_at", "to_inner", "to_outer", "unheard", "ending", "selector", "masks"),
    )

    def __init__(
        self,
        outer: socket.socket,
        door: Door,
        address: str,
        plan: Plan,
        crowd: "Crowd[Link]",
        selector: selectors.BaseSelector,
        now: float,
    ) -> None:
        """Begin without a connection to libzmq."""
        self.outer, self.door, self.address, self.group = outer, door, address, group_of(address)
        self.inner: socket.socket | None = None
        self.inward, self.outward = Stream(plan.frame, plan.parts), Stream(2**63, 2**63)
        self.opened = self.active = now
        self.crowd = crowd  # connections that are as far as this one
        self.held = self.begun = 0  # bytes, and frames before, since the last reply
        self.granted, self.granted_at = 0, now  # bytes of the pool
        self.to_inner = self.to_outer = b""
        self.unheard = GREETING  # bytes of libzmq that the host already has
        self.ending = False  # one side has closed
        self.selector = selector
        self.masks = [0, 0]  # events that are waited for: outer, inner

    @property
    def need(self) -> int:
        """Bytes of the pool that it needs to read on."""
        return max(0, self.held + max(self.inward.left, SMALL // 2) - SMALL)
