"""Admission: which hosts may join, and how much the hosts of an owner, that is of a token, may use of the run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from esjax.config.settings import Config
from esjax.hosts.coordination.registry import MAX_HOSTS, Host, Registry
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Terms

MINUTE = 60.0

JOINS = 4
"""Attempts to join that an owner has in a minute, for each host that it may have."""

COPIES = 4
"""Copies of text and state that an owner may fetch in a minute, for each of its hosts."""

LEAST_BYTES = 2**26
"""Bytes of texts and states that an owner may fetch in a minute in any case."""

ASKS = 2**14
"""Parts of blocks, and series of updates, that an owner may ask for in a minute, for each of its hosts."""

FULL_WAIT = 5.0
"""Seconds after which a host that finds no place should ask again."""

MOST_OWNERS = 2**12
"""Owners whose use is kept before those without recent use are dropped, and most owners that may not join."""


class Objection(NamedTuple):
    """Why a host may not join."""

    reason: str
    counter: str  # under which it is counted
    wait: float = 0.0  # seconds after which it may try again; 0: it is refused for good


class Admission:
    """Decides who may join and fetch."""

    def __init__(self, config: Config, terms: Terms, registry: Registry, make_room: Callable[[Sequence[Host]], bool]):
        """Set up; `make_room` ends the session of one of some hosts, if one of them is lost, or else returns False."""
        self._config, self._terms, self._registry, self._make_room = config, terms, registry, make_room
        self._joins, self._fetched, self._asked = _Meter(), _Meter(), _Meter()
        self._excluded: dict[str, str] = {}  # reasons, by owner

    def objection(self, join: wire.Join, former: Host | None, key: str | None, now: float) -> Objection | None:
        """Return why a host with a key may not join now, or None; `former` has its name, and would end."""
        excluded = self._excluded.get(key or join.name)
        if excluded:
            return Objection(excluded, "hosts turned away")
        reason = self._terms.objection(join, self._config.es.noise)
        if reason:
            return Objection(reason, "hosts turned away")
        if former and former.key != key:
            reason = f"a host of another token is called {join.name!r}; give each host a different --name"
            return Objection(reason, "hosts turned away")
        most = self._config.hosts.hosts_per_token
        wait = self._joins.use(key or join.name, 1 / (JOINS * most), now)
        if wait:
            return Objection("the hosts of this token join too often", "attempts to join above the quota", wait)
        hosts = self._registry.of(key) if key and not former else []
        if len(hosts) >= most and not self._make_room(hosts):
            reason = f"this token has {most} hosts, as many as hosts.hosts_per_token allows"
            return Objection(reason, "hosts above the quota of a token", FULL_WAIT)
        everyone = list(self._registry)
        if len(everyone) >= MAX_HOSTS and not self._make_room(everyone):
            return Objection(f"the run has {MAX_HOSTS} hosts, and takes no more", "too many hosts", FULL_WAIT)
        return None

    def exclude(self, host: Host, reason: str) -> None:
        """Let no host of the owner of a host join any more."""
        what, which = "a host of this name", "hosts of this name"
        if host.key:
            what, which = f"{host.name}, a host with this token,", "hosts with this token"
        why = f"{what} was put aside; {which} may join again after a restart of the coordinator: {reason}"
        self._excluded.setdefault(host.owner, why)
        if len(self._excluded) > MOST_OWNERS:  # without keys, each new name is an owner
            del self._excluded[next(iter(self._excluded))]

    def fetch(self, host: Host, part: int, copy: int, now: float) -> float:
        """Count a part of a text or a state, in bytes; return 0, or the seconds to wait if it is above the quota.

        Args:
            host: The host that asks for it.
            part: Its bytes.
            copy: Bytes of text and state together.
            now: The time.
        """
        quota = max(COPIES * copy * len(self._registry.of(host.owner)), LEAST_BYTES)
        return self._fetched.use(host.owner, part / quota, now)

    def ask(self, host: Host, now: float) -> float:
        """Count a request for a part of a block, or for updates; return 0, or the seconds to wait, as `fetch` does."""
        return self._asked.use(host.owner, 1 / (ASKS * len(self._registry.of(host.owner))), now)


class _Meter:
    """What each owner used: up to a quota at once, and as much again in each minute."""

    def __init__(self) -> None:
        """Set up without use."""
        self._free_at: dict[str, float] = {}  # when an owner's use counts no longer

    def use(self, owner: str, part: float, now: float) -> float:
        """Use a part of the quota, from 0 to 1; return 0, or the seconds to wait if less than that is left."""
        until = max(self._free_at.get(owner, now), now) + MINUTE * part
        if until - now > MINUTE:
            return until - now - MINUTE
        if len(self._free_at) >= MOST_OWNERS:
            self._free_at = {name: at for name, at in self._free_at.items() if at > now}
        self._free_at[owner] = until
        return 0.0
