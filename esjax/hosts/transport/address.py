"""Addresses of coordinators: tcp://HOST:PORT."""

import ipaddress
import re
import socket
from typing import NamedTuple

from esjax.errors import EsjaxError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Address(NamedTuple):
    """A host, by name or IP address, and a port; port 0: any free one."""

    host: str
    port: int


def parse_address(address: str) -> Address:
    """Take tcp://HOST:PORT apart; an IPv6 host stands in brackets, and * is any free port.

    Raises:
        EsjaxError: It is no such address.
    """
    match = re.fullmatch(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]+)):(\*|\d{1,5})", address, re.ASCII)
    port = 0 if match is None or match[3] == "*" else int(match[3])
    if match is None or port >= 2**16:
        raise EsjaxError(f"{address!r} is no address; give tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    return Address(match[1] or match[2], port)


def is_loopback(address: str) -> bool:
    """Tell whether tcp://HOST:PORT is reached from this machine alone.

    Raises:
        EsjaxError: It is no address, or its host is not found.
    """
    host, _ = parse_address(address)
    return host != "*" and resolve(host).is_loopback


def resolve(host: str) -> IPAddress:
    """Find the address of a host; of several, one of IPv4.

    Raises:
        EsjaxError: It has none.
    """
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EsjaxError(
            f"cannot find the host {host!r} ({reason}); correct its name, or give its IP address"
        ) from error
    return min((ipaddress.ip_address(address[0]) for *_, address in found), key=lambda ip: ip.version)
