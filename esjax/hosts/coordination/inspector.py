"""Inspector: draws the answers that a second host scores again, and judges who is wrong.

The draws of the steps are independent and come from a generator that serves nothing else, so nothing that a host sees
predicts them. In a drawn step one answer of every host is checked, all at the same time. If two evaluations differ,
hosts of further voters are asked until two evaluations agree; then the voters with other evaluations are put aside. A
voter is an owner with all its hosts; if all hosts have one owner, each host is a voter. Hosts of one kind check each
other where they can, since other hardware rounds differently.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from esjax.averages import SHORTEST
from esjax.exchange.values import Exchange, Values
from esjax.hosts.coordination.leases import Lease, Queue, Unit
from esjax.hosts.coordination.registry import Host, Registry, median, usual_speed
from esjax.hosts.coordination.spot_checks import Check, CheckedLeases
from esjax.hosts.protocol.actions import Outbox

CHECKS_A_HOST = 2
"""Most answers that one host scores again at a time."""

PROOFS = 3
"""Checks that a host must pass before checks keep to their share of the time, and again when its speed has doubled."""

UNPROVEN = 0.1
"""Chance of checks in a step while a host has not passed them: one that invents its answers makes steps very short."""

KIND_OWNERS = 3
"""Owners that a kind of hardware needs so that its hosts check each other, and others do not."""

LEAST = 0.25
"""Least chance of checks in a step, as a multiple of the share of time: one stalled check must not end all others."""


class _Answer(NamedTuple):
    """An evaluation of a unit, its host, and the voter."""

    host: Host
    voter: str
    values: Values

    @property
    def counts(self) -> bool:
        """Whether its host was not found wrong meanwhile."""
        return not (self.host.aside or self.host.resync)


class _Case:
    """A unit that is checked, the evaluations so far, and the one under way."""

    def __init__(self, unit: Unit, first: _Answer) -> None:
        """Begin with the evaluation that counts in the step."""
        self.unit, self.answers = unit, [first]
        self.asked: list[tuple[Host, str, Check]] = []  # with the voter


class Inspector:
    """State machine of the spot checks.

    Attributes:
        checks: Number of answers that a second host scored again.
        seconds: Seconds that steps were held open for checks.
    """

    def __init__(
        self,
        share: float,
        exchange: Exchange,
        registry: Registry,
        rng: np.random.Generator,
        out: Outbox,
        put_aside: Callable[[Host, str], None],
        trusted: str | None,
    ) -> None:
        """Set up.

        Args:
            share: Share of the time that checks may take, 0 to 1; 0: no checks.
            exchange: What hosts send.
            registry: All hosts.
            rng: Draws the checks; hosts must not learn numbers of this generator.
            out: Takes lines for the user.
            put_aside: Gives a host no more work; it is called with the host and the reason.
            trusted: Owner whose host is right if it differs from another voter's and there is no third voter, or None.
        """
        self.checks, self.seconds = 0, 0.0
        self._share, self._exchange, self._registry, self._rng = share, exchange, registry, rng
        self._out, self._put_aside, self._trusted = out, put_aside, trusted
        self._values = "gradient sums" if exchange.adds_up else "losses"
        self._steps: deque[float] = deque(maxlen=32)  # seconds of the last steps without their checks
        self._rounds: deque[float] = deque(maxlen=8)  # seconds of the last checks
        self._proofs: dict[Host, tuple[int, float]] = {}  # checks that it passed, and its speed at the first of them
        self._undecided: set[frozenset[str]] = set()  # voters that differed, which the user knows
        self._begun_at: float | None = None
        self._drawn_at: float | None = None
        self._cases: list[_Case] = []
        self._owners_vote = True

    def begin_step(self, now: float) -> None:
        """Note that a step begins."""
        self._begun_at, self._drawn_at = now, None

    def review(self, leases: CheckedLeases, helpers: Sequence[Host], now: float) -> list[Lease]:
        """Draw checks, or judge those that ended; called whenever all values are in and no check is open.

        Args:
            leases: The leases of the step.
            helpers: Hosts that may score something again.
            now: The time in seconds.

        Returns:
            Leases of checks. If there are none, the step may close, unless the values of liars were dropped.
        """
        if self._drawn_at is None:
            self._drawn_at = now
            if self._begun_at is not None:
                self._steps.append(now - self._begun_at)
            return self._draw(leases, helpers, now) if self._rng.random() < self._chance(leases) else []
        if not self._cases:
            return []
        confirmed = [case.answers[0].host for case in self._cases if self._is_confirmed(case)]
        is_calm = len(confirmed) == len(self._cases)
        for host in confirmed:
            self._prove(host)
        begun: list[Lease] = []
        cases, self._cases = self._cases, []
        for case in cases:
            lease = self._settle(case, leases, helpers, now)
            if lease:
                begun += lease
                self._cases.append(case)
        if not self._cases:
            self.seconds += now - self._drawn_at
            if is_calm:
                self._rounds.append(now - self._drawn_at)
        return begun

    def _chance(self, leases: CheckedLeases) -> float:
        """Return the chance of checks in a step, so that they take their share of the time."""
        share = self._share
        if not share:
            return 0.0
        if any(self._is_unproven(host) for host in self._registry if leases.count(host.slot)):
            return max(share, UNPROVEN)
        usual = (median(self._steps) or 0.0) / max(median(self._rounds) or 0.0, SHORTEST)
        return share * max(usual, LEAST)

    def _is_unproven(self, host: Host) -> bool:
        passed, speed = self._proofs.get(host, (0, 0.0))
        return passed < PROOFS or host.speed > 2 * speed

    def _prove(self, host: Host) -> None:
        """Note that a host passed a check."""
        passed, speed = self._proofs.get(host, (0, 0.0))
        self._proofs[host] = (passed + 1, speed) if host.speed <= 2 * speed else (1, host.speed)

    def _draw(self, leases: CheckedLeases, helpers: Sequence[Host], now: float) -> list[Lease]:
        """Begin the check of one answer of every host."""
        suspects = [host for host in self._registry if leases.units(host.slot)]
        self._proofs = {host: proofs for host, proofs in self._proofs.items() if not host.dropped}
        self._owners_vote = len({host.owner for host in [*suspects, *helpers]}) > 1
        of_voter: defaultdict[str, set[int]] = defaultdict(set)
        of_kind: defaultdict[str, set[int]] = defaultdict(set)
        owners: defaultdict[str, set[str]] = defaultdict(set)  # by kind
        for host in helpers:
            of_voter[self._voter(host)].add(host.slot)
            of_kind[host.kind].add(host.slot)
            owners[host.kind].add(self._voter(host))
        speeds = _speeds_of(helpers)
        queue = Queue(dict.fromkeys(speeds, 0), {slot: 1 / speed for slot, speed in speeds.items()}, {})
        loads = dict.fromkeys(speeds, 0)
        full: set[int] = set()
        begun: list[Lease] = []
        for i in self._rng.permutation(len(suspects)).tolist():
            host = suspects[i]
            voter = self._voter(host)
            unit = self._choose(leases.units(host.slot))
            # A host that had a lease of the same pairs may have them on their way, and would not score them again.
            barred = of_voter[voter] | full | unit.leased
            # Hosts of other hardware round differently. But two owners could invent a kind, and check each other alone.
            alike = of_kind[host.kind] if len(owners[host.kind]) >= KIND_OWNERS else set()
            slot = queue.take(barred | (speeds.keys() - alike)) if alike else None
            if slot is None:
                slot = queue.take(barred)
            if slot is None:  # all others had a lease of these pairs: they score them when asked again
                slot = queue.take(of_voter[voter] | full)
            if slot is None:
                continue
            loads[slot] += 1
            if loads[slot] == CHECKS_A_HOST:
                full.add(slot)
            case = _Case(unit, _Answer(host, voter, unit.values))
            self._cases.append(case)
            begun += self._begin(case, slot, leases, speeds[slot], now)
        self.checks += len(self._cases)
        return begun

    def _choose(self, units: Sequence[Unit]) -> Unit:
        """Choose any unit half of the time, else the one with the most extreme values: outliers do the most harm."""
        if self._rng.random() < 0.5:
            return units[int(self._rng.integers(len(units)))]
        with np.errstate(invalid="ignore"):  # in float64: the difference of two int32 may not fit
            spreads = [np.ptp(unit.values.astype(np.float64), axis=1).max() for unit in units]
        return units[int(np.argmax(np.nan_to_num(spreads, nan=np.inf)))]

    def _begin(self, case: _Case, slot: int, leases: CheckedLeases, speed: float, now: float) -> list[Lease]:
        """Lease a unit to a further host."""
        host = self._registry.in_slot(slot)
        assert host is not None
        was_busy = leases.busy(slot)
        case.asked.append((host, self._voter(host), leases.begin_check(slot, case.unit)))
        host.set_leased(leases.open_pairs(slot), speed, speed, 0.0, now, was_busy=was_busy)
        return [Lease(slot, *span) for span in case.unit.spans]

    def _settle(self, case: _Case, leases: CheckedLeases, helpers: Sequence[Host], now: float) -> list[Lease]:
        """Judge a case, or lease its unit to a further host."""
        host, voter, check = case.asked[-1]
        if not check.missing:
            case.answers.append(_Answer(host, voter, check.values()))
        answers = [answer for answer in case.answers if answer.counts]
        if len(answers) > 1 and answers[0] is case.answers[0]:
            right = self._right(answers)
            if right is None:
                begun = self._ask_further(case, leases, helpers, now)
                if begun:
                    return begun
                right = next((answer for answer in answers if answer.host.owner == self._trusted), None)
            if right is None:
                self._tell_undecided(answers)
                return []
            for answer in answers:
                if not self._exchange.agree(right.values, answer.values):
                    self._exclude(answer, leases)
        others = [answer for answer in answers if answer.counts]
        if others and not case.answers[0].counts:  # its values were dropped
            leases.fill(others[0].host.slot, Unit(case.unit.spans, others[0].values))
        return []

    def _ask_further(self, case: _Case, leases: CheckedLeases, helpers: Sequence[Host], now: float) -> list[Lease]:
        """Lease a unit to the host of a further voter that would finish it first; [] if there is none.

        A host of the same kind comes before others, whose rounding may differ.
        """
        suspect = case.answers[0].host
        involved = {case.answers[0].voter, *(voter for _, voter, _ in case.asked)}
        others = [host for host in helpers if self._voter(host) not in involved and not host.aside]
        if not others:
            return []
        speeds = _speeds_of(helpers)
        seconds = {host: (leases.open_pairs(host.slot) + case.unit.pairs) / speeds[host.slot] for host in others}
        leased = case.unit.leased
        best = min(others, key=lambda host: (host.slot in leased, host.kind != suspect.kind, seconds[host]))
        return self._begin(case, best.slot, leases, speeds[best.slot], now)

    def _is_confirmed(self, case: _Case) -> bool:
        """Return whether the second evaluation is in and agrees."""
        check = case.asked[-1][2]
        return not check.missing and self._exchange.agree(check.values(), case.unit.values)

    def _right(self, answers: Sequence[_Answer]) -> _Answer | None:
        """Return an evaluation with which another voter's agrees, or None.

        Two decide only if they agree with the same evaluations: one whose pairs failed agrees with right and wrong.
        """
        agree = self._exchange.agree
        agreeing = [[agree(one.values, other.values) for other in answers] for one in answers]
        pairs = ((i, j) for i in range(len(answers)) for j in range(i + 1, len(answers)))
        return next((answers[i] for i, j in pairs if agreeing[i][j] and agreeing[i] == agreeing[j]), None)

    def _exclude(self, answer: _Answer, leases: CheckedLeases) -> None:
        """Put the hosts of a voter aside, and drop their values of this step."""
        reason = f"its {self._values} differ from those of other hosts"
        for host in self._registry:
            if self._voter(host) == answer.voter:
                leases.revoke(host.slot)
                if not (host.aside or host.dropped):
                    self._put_aside(host, reason if host is answer.host else f"it has the token of {answer.host.name}")

    def _tell_undecided(self, answers: Sequence[_Answer]) -> None:
        voters = frozenset(answer.voter for answer in answers)
        if voters not in self._undecided:
            self._undecided.add(voters)
            names = " and ".join(answer.host.name for answer in answers)
            self._out.tell(
                f"the {self._values} of {names} differ, and no host of a further token can decide; nobody is put aside"
            )

    def _voter(self, host: Host) -> str:
        return host.owner if self._owners_vote else host.name


def _speeds_of(hosts: Sequence[Host]) -> dict[int, float]:
    usual = usual_speed(hosts) or 1.0
    return {host.slot: host.speed or usual for host in hosts}
