"""The steps of a run: the coordinator leases pairs, collects their values, and makes the update."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from esjax.averages import Average, NamedMean, join_means
from esjax.config.settings import Config
from esjax.core.shaping import LARGEST_LOSS
from esjax.exchange.update_record import SPAN_LIMIT, Span, pair_count
from esjax.exchange.values import Values, pack_conclusion
from esjax.hosts.coordination.audits import NOTHING_ELSE, Audits, Plan
from esjax.hosts.coordination.inspector import Inspector
from esjax.hosts.coordination.leases import FixedPopulation, Lease
from esjax.hosts.coordination.registry import Host, Registry, usual_speed
from esjax.hosts.coordination.spot_checks import CheckedLeases
from esjax.hosts.coordination.time_budget import TimeBudget
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Closed, Outbox, Record, Terms
from esjax.replica.notices import Notices
from esjax.rewards.calls import MOST_NAMES, is_name

STUCK = 30.0
"""Seconds without progress after which a host with work counts as hung, unless the others are as slow."""

DEADLINE_FLOOR = 1.0
"""Seconds that every host has for its pairs at least."""

FIRST_DEADLINE = 10.0
"""Seconds that a host without a speed has at least while no host has finished its pairs of the step."""

FIRST_TEXTS = 300.0
"""The same, and seconds without progress after which a host counts as hung, while no speed is known and members write:
a large model writes for long before the first reward is called."""

DEADLINE_FACTOR = 3.0
"""Time that a host may take for its pairs, as a multiple of its own and of the other hosts' usual time."""

RATE_MEMORY = 0.9
"""Weight of a step in the mean rate, relative to the step after it."""


class Steps:
    """State machine of the steps.

    Attributes:
        step: Step that is being scored.
        leases: The leases of this step.
        inspector: The spot checks.
        loss: Mean of the finite losses of the last finished step, or None.
        rewards: Means of its rewards that have names.
        rate: Member-tokens a second over the last steps.
    """

    def __init__(
        self,
        config: Config,
        terms: Terms,
        step: int,
        last_update: bytes,
        rng: np.random.Generator,
        registry: Registry,
        audits: Audits,
        out: Outbox,
        put_aside: Callable[[Host, str], None],
        trusted: str | None,
    ) -> None:
        """Start at a step of a new or resumed run; for `last_update`, `rng` and `trusted` see `Coordinator`.

        `put_aside` gives a host no more work; it is called with the host and the reason.
        """
        self.step = step
        self.loss: float | None = None
        self.rewards: dict[str, float] = {}
        self.rate, self._mean_rate = 0.0, Average()
        self._config, self._terms = config, terms
        self._registry, self._audits = registry, audits
        self._out = out
        self._last_update = last_update
        self.leases = self._new_leases()
        self.inspector = Inspector(
            config.hosts.spot_check,
            terms.exchange,
            registry,
            rng.spawn(1)[0],
            out,
            put_aside,
            trusted,
        )
        self._sent: defaultdict[int, set[int]] = defaultdict(set)  # by slot: lease quanta whose values a host sent
        self._means: dict[int, list[NamedMean]] = {}  # of this step, by slot
        self._closed_at: float | None = None
        self._call = config.reward_seconds
        self._notices = Notices(config, terms.custom)
        self._is_stopped = False

    def take(self, host: Host, message: wire.Losses, values: Values, now: float) -> str:
        """Store the values that a host sends; return why they are rejected, or ""."""
        was_busy, before = self.leases.busy(host.slot), self.leases.count(host.slot)
        is_check = self.leases.is_checking(host.slot)
        fault = self.leases.accept(host.slot, message.spans, values, message.final)
        if fault:
            return fault
        if message.rewards and self._config.writes:
            self._take_means(host.slot, message, self.leases.count(host.slot) - before)
        is_fixed = self._config.es.time_per_step is None
        pairs = self._new_pairs(host, message.spans) if is_fixed else self.leases.count(host.slot) - before
        if is_check:  # too few pairs to measure a speed by
            pairs = 0
        if not was_busy:
            if pairs:  # it was late with them
                host.took(pairs, now - host.leased_at)
            return ""
        is_finished = not self.leases.busy(host.slot)
        host.set_answered(pairs, now, is_finished=is_finished)
        if is_finished:
            seconds = now - host.leased_at
            expected = (host.expected(None) or seconds) + self._call
            self._registry.hold_ups.finished(host.owner, host.slot, seconds, expected)
        return ""

    def _take_means(self, slot: int, message: wire.Losses, new_pairs: int) -> None:
        """Add means of rewards that have names; those of a message that came before, or of a check, do not count."""
        means = [NamedMean(name, mean, min(pairs, new_pairs)) for name, mean, pairs in message.rewards]
        sound = [one for one in means if one.pairs and is_name(one.name) and abs(one.mean) <= LARGEST_LOSS]
        self._means[slot] = join_means([*self._means.get(slot, ()), *sound])[:MOST_NAMES]

    def _reward_means(self, pairs: int) -> dict[str, float]:
        """Join the means of all hosts, none of which counts for more pairs than it scored.

        A few hosts cannot invent names: a name counts if hosts that scored more than half of the pairs report it.
        """
        counted = [
            mean._replace(pairs=min(mean.pairs, self.leases.count(slot)))
            for slot, means in self._means.items()
            for mean in means
            if self.leases.count(slot)
        ]
        return {name: mean for name, mean, scored in join_means(counted) if scored > pairs / 2}

    def _new_pairs(self, host: Host, spans: Sequence[Span]) -> int:
        """Count the pairs that a host scored, also those whose values another host sent before, each once."""
        size = self._terms.quantum
        quanta = {first // size + i for first, count in spans for i in range(-(-count // size))}
        pairs = size * len(quanta - self._sent[host.slot])
        self._sent[host.slot] |= quanta
        return pairs

    def release(self, host: Host, allowed: float = 0.0) -> None:
        """Take the open pairs from a host, which holds up the step while others score them.

        Args:
            host: The host.
            allowed: Seconds for which it may have had them beyond what is usual: they do not count as a hold-up.
        """
        if self.leases.busy(host.slot):
            seconds = self._registry.now - host.leased_at - allowed
            self._registry.hold_ups.failed(host.owner, max(seconds, 0.0))
            host.has_failed = True
        self.leases.release(host.slot)

    def stop(self) -> None:
        """Drop the open step."""
        self._is_stopped = True
        for host in self._registry:
            self.leases.release(host.slot)

    def check(self, now: float) -> None:
        """Take the pairs from hosts that are hung or much slower than the others."""
        overdue = [host for host in self._registry if self._may_be_late(host, now)]
        if not overdue:
            return
        workers = self._registry.workers(now)
        are_idle, usual_speed_now = any(not self.leases.busy(host.slot) for host in workers), usual_speed(workers)
        for host in overdue:
            self._check_deadline(host, host.expected(usual_speed_now), are_idle, now)

    def go_on(self, now: float, is_host_new: bool = False) -> None:
        """Close the step if all values are in; else lease the pairs that wait for a host."""
        if self._is_stopped:
            return
        if self.leases.waits or is_host_new:
            self._give_out(now)
        if self.leases.complete:
            checks = self._check_answers(now)
            if self.leases.waits:  # a liar's values were dropped
                self._give_out(now)
            elif not checks:
                self._close(now)

    def announce(self, plan: Plan, leases: Sequence[Lease] = (), update: bytes = b"") -> None:
        """Publish the opening of the step, with the update that leads to it."""
        some = list(leases[:SPAN_LIMIT])
        self._out.publish(wire.Step(self._terms.run, self._terms.incarnation, self.step, [*some], *plan), update)
        self._announce_more(leases[SPAN_LIMIT:])

    def _announce_more(self, leases: Sequence[Lease]) -> None:
        for at in range(0, len(leases), SPAN_LIMIT):
            some = leases[at : at + SPAN_LIMIT]
            self._out.publish(wire.Extra(self._terms.run, self._terms.incarnation, self.step, [*some]))

    def _new_leases(self) -> CheckedLeases:
        es, quantum, exchange = self._config.es, self._terms.quantum, self._terms.exchange
        if es.time_per_step is None:
            return CheckedLeases(FixedPopulation(es.pairs, quantum, exchange), exchange)
        return CheckedLeases(TimeBudget(es.time_per_step, quantum, exchange), exchange)

    def _may_be_late(self, host: Host, now: float) -> bool:
        """Return whether a host has had its pairs for longer than the shortest deadline."""
        return now - host.leased_at > DEADLINE_FLOOR / 2 and self.leases.busy(host.slot)

    def _check_deadline(self, host: Host, expected: float, are_idle: bool, now: float) -> None:
        """Take the pairs from a host that missed its deadline.

        Args:
            host: A host with pairs.
            expected: Seconds that they should take; 0 if no host's speed is known.
            are_idle: Whether other hosts have no pairs.
            now: The time.
        """
        usual = self._registry.usual_slowness(host)
        usually = DEADLINE_FACTOR * (max(usual or 1.0, 1.0) * expected + self._call)
        idle = now - max(host.progress_at, host.leased_at)
        is_hung = idle > max(FIRST_TEXTS if self._call and not expected else STUCK, usually)
        allowed = self._allowed(host, usually, usual is None and not host.speed)
        is_late = now - host.leased_at > allowed and (are_idle or usual is not None)
        if not (is_hung or is_late):
            return
        if self._audits.is_measuring(host):
            if not self._audits.measure_seconds:  # how long it takes was not known: no fault
                self.leases.release(host.slot)
        elif is_hung:
            host.hung = True
            self._out.tell(f"{host.name} is hung: no progress for {idle:.0f} s")
        else:
            if not host.late:
                self._out.tell(f"{host.name} is late: it gets no pairs for a while")
            is_fixed = self._config.es.time_per_step is None
            host.set_late(self.leases.open_pairs(host.slot) if is_fixed else 0, now)
        self.release(host, self._call)

    def _allowed(self, host: Host, usually: float, is_first: bool) -> float:
        """Return the seconds that a host may take; `is_first`: neither its speed nor that of the others is known.

        A time budget does not hold for a check, which is as long as what another host scored in its own time. A single
        call of a reward may take its whole time limit; while no speed is known, so may all of them.
        """
        budget = None if self.leases.is_checking(host.slot) else self._config.es.time_per_step
        allowed = max(DEADLINE_FLOOR, usually) if budget is None else budget + max(budget, DEADLINE_FLOOR) / 2
        if not is_first:
            return allowed if budget is None else allowed + self._call
        calls = self.leases.open_pairs(host.slot) if budget is None else self._terms.quantum
        return max(FIRST_TEXTS if self._call else FIRST_DEADLINE, allowed) + self._call * calls

    def _check_answers(self, now: float) -> list[Lease]:
        """Let hosts score some answers again; return the leases."""
        helpers = [host for host in self._registry.workers(now) if not self._audits.is_measuring(host)]
        leases = self.inspector.review(self.leases, helpers, now)
        self._announce_more(leases)
        return leases

    def _give_out(self, now: float) -> None:
        leases = self._lease(now)
        if leases and self._last_update:
            self.announce(NOTHING_ELSE, leases, self._last_update)
            self._last_update = b""
        else:
            self._announce_more(leases)

    def _lease(self, now: float) -> list[Lease]:
        hosts, budget = self._registry.workers(now), self._config.es.time_per_step
        delays = {host.slot: self._audits.delay(now) for host in hosts if self._audits.is_measuring(host)}
        usual = usual_speed(hosts)
        speeds, trials = self._speeds(hosts, usual, now)
        busy = {host.slot for host in hosts if self.leases.busy(host.slot)}
        leases = self.leases.lease(speeds, delays)
        given = {lease.slot for lease in leases}
        for host in hosts:
            slot = host.slot
            if slot in given:
                pairs = self.leases.open_pairs(slot) if budget is None else math.ceil(budget * speeds[slot])
                speed, delay = speeds[slot] if usual else None, delays.get(slot, 0.0)
                host.set_leased(pairs, speed, usual, delay, now, was_busy=slot in busy)
            if slot in given & trials and not host.late:
                host.is_tried = True
                host.put_off_trial(now)
        return leases

    def _speeds(self, hosts: Sequence[Host], usual: float | None, now: float) -> tuple[dict[int, float], set[int]]:
        """Return the speeds by which hosts get pairs, and the slots of hosts that are tried again.

        A new host, and one that got no pairs for long, get the speed at which they get about one quantum.
        """
        speeds = {host.slot: host.speed or usual or 1.0 for host in hosts}
        enough = self._terms.quantum * sum(speeds.values()) / self._config.es.pairs
        trials = {host.slot for host in hosts if host.speed < enough and host.speed and host.is_due(now)}
        new = {host.slot for host in hosts if usual and not host.speed and usual > enough}
        speeds.update(dict.fromkeys(trials | new, enough))
        return speeds, trials

    def _close(self, now: float) -> None:
        """Make the update from all values, and open the next step."""
        spans, result = self.leases.result()
        pairs = pair_count(spans)
        for host in self._registry:
            host.share = self.leases.count(host.slot) / pairs
            host.slowness, host.has_failed = None, False
        hosts = sum(host.share > 0 for host in self._registry)
        members = pairs * self._config.es.members_per_pair
        self._measure_rate(members, now)
        concluded = self._terms.exchange.conclude(result, spans, self._config.es)
        self.loss, self.rewards = concluded.loss, self._reward_means(pairs)
        payload = pack_conclusion(
            self.step, spans, concluded, self._terms.exchange.vector_length, self._config.es.weights_per_pair
        )
        self._out.add(Record(self.step, payload))
        self._tell_rests(self._registry.hold_ups.closed(now))
        self.step += 1
        loss = math.nan if self.loss is None else self.loss
        notice = self._notices.line(self.step, concluded)
        # Closed before the next step is opened: a state that the next step asks for is the one after this step.
        self._out.add(
            Closed(
                self.step,
                loss,
                members,
                concluded.void_pairs,
                concluded.trouble,
                hosts,
                notice,
                concluded.outliers,
                self.rewards,
            )
        )
        self._means.clear()
        self.leases = self._new_leases()
        self.inspector.begin_step(now)
        self._sent.clear()
        plan = self._audits.plan(self.step, now)
        self.announce(plan, self._lease(now), payload)

    def _tell_rests(self, rests: Mapping[str, float]) -> None:
        for owner, seconds in rests.items():
            names = ", ".join(host.name for host in self._registry if host.owner == owner and not host.dropped)
            self._out.tell(
                f"{names or 'hosts that left'} held up the run again and again: no pairs for {seconds:.0f} s"
            )

    def _measure_rate(self, members: int, now: float) -> None:
        if self._closed_at is not None:
            rate = members * self._config.tokens_per_member / max(now - self._closed_at, 1e-9)
            self.rate = self._mean_rate.add(rate, RATE_MEMORY)
        self._closed_at = now
