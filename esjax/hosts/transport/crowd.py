"""Which connections have to leave when there are too many: those of the address that has the most."""

import ipaddress
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

Member = TypeVar("Member")

TRIES = 16
"""Random members that are asked whether they may be sent away."""


@lru_cache(maxsize=1024)
def group_of(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the /64 network of an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class Crowd(Generic[Member]):
    """Members by group: at most `each` of one group, and `most` of all."""

    def __init__(self, each: int, most: int) -> None:
        """Set up without members."""
        self.each, self.most = each, most
        self._groups: dict[str, dict[Member, None]] = {}  # members in the order in which they came
        self._count = 0

    def enter(self, group: str, member: Member) -> str | None:
        """Add a member; return the group that one member has to leave now, or None."""
        members = self._groups.setdefault(group, {})
        members[member] = None
        self._count += 1
        if len(members) > self.each:
            return group
        if self._count > self.most:
            return max(self._groups, key=lambda name: len(self._groups[name]))
        return None

    def leave(self, group: str, member: Member) -> None:
        """Remove a member, if it is one."""
        members = self._groups.get(group, {})
        if member in members:
            del members[member]
            self._count -= 1
            if not members:
                del self._groups[group]

    def oldest(self, group: str) -> Member:
        """Return the member of a group that came first."""
        return next(iter(self._groups[group]))

    def idle(self, group: str, is_idle: Callable[[Member], bool]) -> Member:
        """Return a random idle member of a group; the newest if none of a few is idle."""
        members = list(self._groups[group])
        tried = random.sample(members, min(TRIES, len(members)))
        return next((member for member in tried if is_idle(member)), members[-1])
