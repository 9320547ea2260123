"""Addresses of coordinators: tcp://HOST:PORT."""

import ipaddress
import re
import socket
from typing import NamedTuple

from esjax.errors import EsjaxError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Address(NamedTuple):
    """A host (name or IP address) and a port; port 0: any free port."""

    host: str
    port: int


def parse_address(address: str) -> Address:
    """Parse tcp://HOST:PORT; an IPv6 address is in brackets, and the port * means any free port.

    Raises:
        EsjaxError: The address has another form.
    """
    match = re.fullmatch(r"tcp://(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s]+)):(\*|\d{1,5})", address, re.ASCII)
    port = 0 if match is None or match[3] == "*" else int(match[3])
    if match is None or port >= 2**16:
        raise EsjaxError(f"{address!r} is not an address; give tcp://HOST:PORT, such as tcp://127.0.0.1:5555")
    return Address(match[1] or match[2], port)


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach tcp://HOST:PORT.

    Raises:
        EsjaxError: The address has another form, or its host is not found.
    """
    host, _ = parse_address(address)
    return host != "*" and resolve(host).is_loopback


def resolve(host: str) -> IPAddress:
    """Return the IP address of a host; IPv4 is preferred.

    Raises:
        EsjaxError: The host has no address.
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
