"""Votes on the digests of hosts' states: each owner has one, so that many hosts of one token cannot outvote others."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from esjax.hosts.coordination.registry import Host


class Verdict(NamedTuple):
    """What the votes decide.

    Attributes:
        right: The right digest; "": as many owners are for another one.
        is_confirmed: Whether hosts of two owners have it, a host of the trusted owner has it, or the run has one owner.
    """

    right: str
    is_confirmed: bool


def decide(digests: Mapping[Host, str], kind: str, trusted: str | None, *, is_alone: bool) -> Verdict:
    """Decide which digest is right.

    Args:
        digests: Digests by host, those of a preferred host first.
        kind: Kind of hardware whose hosts vote; at least one of the hosts is of this kind.
        trusted: Owner who decides where as many owners are for one digest as for another, or None.
        is_alone: Whether all hosts of the run are of one owner.
    """
    by_owner: dict[str, list[str]] = {}
    for host, digest in digests.items():
        if host.kind == kind:
            by_owner.setdefault(host.owner, []).append(digest)
    votes = {owner: Counter(some).most_common(1)[0][0] for owner, some in by_owner.items()}  # the first of several
    (right, count), *others = Counter(votes.values()).most_common()
    if others and others[0][1] == count:
        right = votes.get(trusted or "", "")
    owners = {host.owner for host, digest in digests.items() if digest == right}
    return Verdict(right, bool(right) and (len(owners) > 1 or is_alone or trusted in owners))


def choose_reference(reference: Host | None, hosts: Sequence[Host], trusted: str | None) -> Host | None:
    """Choose the reference host: the former one, or the first one, of the kind that most owners have.

    An invented kind has a single owner, so its host becomes the reference host only where every kind has one. A
    host of the trusted owner comes first.
    """
    owners: dict[str, set[str]] = {}
    for host in hosts:
        owners.setdefault(host.kind, set()).add(host.owner)
    most = max(map(len, owners.values()), default=0)
    able = [host for host in hosts if host.owner == trusted] or [
        host for host in hosts if len(owners[host.kind]) == most or (host is reference and len(owners[host.kind]) > 1)
    ]
    return reference if reference in able else next(iter(able), None)
