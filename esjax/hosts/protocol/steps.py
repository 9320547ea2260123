"""The steps of a run, one after another: pairs are leased, losses taken in, and updates made of them."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from esjax.config.settings import Config
from esjax.exchange.update_record import SPAN_LIMIT, Span
from esjax.exchange.values import Values, pack_conclusion
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.actions import Action, Closed, Publish, Record, Tell, Terms
from esjax.hosts.protocol.audits import NOTHING_ELSE, Audits, Plan
from esjax.hosts.protocol.leases import FixedPopulation, Lease, Leases, TimeBudget
from esjax.hosts.protocol.registry import Host, Registry, speeds_of
from esjax.hosts.protocol.wire import Envelope, Message
from esjax.replica.notices import Notices
from esjax.watch.downsampling import Average

STUCK = 30.0
"""Seconds with work and without progress after which a host counts as hung, unless the others are as slow."""

DEADLINE_FLOOR = 1.0
"""Seconds that every host gets for its pairs at least."""

DEADLINE_FACTOR = 3.0
"""How many times as long as the others a host may take."""

RATE_MEMORY = 0.9
"""Weight of a step in the mean rate, against that of the step after it."""


class Steps:
    """State machine of the steps.

    Attributes:
        step: Step that is being scored.
        loss: Mean of the finite losses of the last finished step, or None.
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
        emit: Callable[[Action], None],
        put_aside: Callable[[Host, str], None],
    ) -> None:
        """Begin, or begin again, at a step.

        Args:
            config: Settings.
            terms: What the run asks of every host.
            step: Updates made so far.
            last_update: The last one, to be published once more, or b"".
            rng: Draws which pairs are scored twice.
            registry: All hosts.
            audits: What happens beside the steps.
            emit: Has something done.
            put_aside: Gives a host no more work, for a reason.
        """
        self.step = step
        self.loss: float | None = None
        self.rate, self._mean_rate = 0.0, Average()
        self._config, self._terms, self._rng = config, terms, rng
        self._registry, self._audits = registry, audits
        self._emit, self._put_aside = emit, put_aside
        self._last_update = last_update
        self._leases: Leases = self._new_leases()
        self._closed_at: float | None = None
        self._notices = Notices(config, terms.custom)
        self._is_stopped = False

    def take(self, host: Host, message: wire.Losses, values: Values, now: float) -> str:
        """Take in what a host hands in; return why not, or ""."""
        was_busy = self._leases.busy(host.slot)
        fault = self._leases.accept(host.slot, message.spans, values, message.final)
        if was_busy and not self._leases.busy(host.slot):
            host.set_finished(now)
        return fault

    def release(self, host: Host) -> None:
        """Take a host's open pairs from it."""
        self._leases.release(host.slot)

    def revoke(self, host: Host) -> None:
        """Take a host's open pairs from it, and forget what it handed in."""
        self._leases.revoke(host.slot)

    def took_part(self, host: Host) -> bool:
        """Tell whether a host was ever given pairs of this step."""
        return self._leases.took_part(host.slot)

    def open_spans(self, host: Host) -> list[Span]:
        """List the pairs that a host still has to hand in."""
        return self._leases.open_spans(host.slot)

    def stop(self) -> None:
        """Give up the step under way."""
        self._is_stopped = True
        for host in self._registry:
            self.release(host)

    def check(self, now: float) -> None:
        """Take their pairs from hosts that are hung, or take much longer than the others."""
        usual = self._registry.usual_slowness()
        for host in self._registry:
            if self._leases.busy(host.slot):
                self._check_deadline(host, usual, now)

    def go_on(self, now: float, is_somebody_new: bool = False) -> None:
        """Close the step if everything is in; else give out pairs that nobody is at, to whoever is there."""
        if self._is_stopped:
            return
        if self._leases.waits or is_somebody_new:
            self._give_out(now)
        if self._leases.complete:
            anchor = self._audits.anchor
            liars = self._leases.liars(anchor.slot if anchor else None)
            for slot in liars:
                self._catch(slot)
            if not liars:
                self._close(now)

    def announce(self, plan: Plan, leases: Sequence[Lease] = (), update: bytes = b"") -> None:
        """Open the step to everybody, with the update that leads to it."""
        some = list(leases[:SPAN_LIMIT])
        self._publish(wire.Step(self._terms.run, self._terms.epoch, self.step, [*some], *plan), update)
        self._announce_more(leases[SPAN_LIMIT:])

    def _announce_more(self, leases: Sequence[Lease]) -> None:
        for at in range(0, len(leases), SPAN_LIMIT):
            some = leases[at : at + SPAN_LIMIT]
            self._publish(wire.Extra(self._terms.run, self._terms.epoch, self.step, [*some]))

    def _new_leases(self) -> Leases:
        es, exchange = self._config.es, self._terms.exchange
        if es.time_per_step is not None:
            return TimeBudget(es.time_per_step, exchange)
        quanta = -(-es.pairs // self._terms.quantum)
        share = self._config.hosts.spot_check
        checked = np.flatnonzero(self._rng.random(quanta) < share).tolist() if share else []
        return FixedPopulation(es.pairs, self._terms.quantum, exchange, checked)

    def _check_deadline(self, host: Host, usual: float | None, now: float) -> None:
        idle = now - max(host.progress_at, host.leased_at)
        is_measuring = self._audits.is_measuring(host)
        by_others = DEADLINE_FACTOR * (usual or 0.0) * host.expected
        if idle > max(STUCK, by_others):
            if not is_measuring:
                host.hung = True
                self._emit(Tell(f"{host.name} is hung: no progress for {idle:.0f} s"))
            self.release(host)
            return
        if usual is None or is_measuring:
            return
        budget = self._config.es.time_per_step
        allowed = max(DEADLINE_FLOOR, by_others) if budget is None else budget + max(budget, DEADLINE_FLOOR) / 2
        if now - host.leased_at > allowed:
            if not host.late:
                self._emit(Tell(f"{host.name} is late: it gets no pairs for a while"))
            host.set_late(now)
            self.release(host)

    def _catch(self, slot: int) -> None:
        """Put a liar aside; nothing that it said counts."""
        self._leases.revoke(slot)
        liar = self._registry.in_slot(slot)
        if liar and not liar.aside:
            self._put_aside(liar, "its losses differ from those of other hosts")

    def _give_out(self, now: float) -> None:
        leases = self._lease(now)
        if leases and self._last_update:
            self.announce(NOTHING_ELSE, leases, self._last_update)
            self._last_update = b""
        else:
            self._announce_more(leases)

    def _lease(self, now: float) -> list[Lease]:
        hosts = self._registry.workers(now)
        delays = {host.slot: self._audits.measure_seconds for host in hosts if self._audits.is_measuring(host)}
        speeds = speeds_of(hosts)
        leases = self._leases.lease(speeds, delays)
        given = {lease.slot for lease in leases}
        for host in hosts:
            if host.slot in given:
                pairs = sum(count for _, count in self.open_spans(host))
                host.set_leased(pairs / speeds[host.slot], now)
        return leases

    def _close(self, now: float) -> None:
        """Make an update of what came in, and open the next step."""
        spans, result = self._leases.result()
        pairs = sum(count for _, count in spans)
        for host in self._registry:
            host.share = self._leases.count(host.slot) / pairs
            host.slowness = None
        hosts = sum(host.share > 0 for host in self._registry)
        members = pairs * self._config.es.members_per_pair
        self._measure_rate(members, now)
        concluded = self._terms.exchange.conclude(result, spans, self._config.es)
        self.loss = concluded.loss
        payload = pack_conclusion(
            self.step, spans, concluded, self._terms.exchange.vector_length, self._config.es.weights_per_pair
        )
        self._emit(Record(self.step, payload))
        self.step += 1
        loss = math.nan if self.loss is None else self.loss
        notice = self._notices.line(self.step, pairs, concluded)
        # Before the next step is opened: a state that it asks for is that after this one.
        self._emit(Closed(self.step, loss, members, concluded.void_pairs, concluded.trouble, hosts, notice))
        self._leases = self._new_leases()
        plan = self._audits.plan(self.step, now)
        self.announce(plan, self._lease(now), payload)

    def _measure_rate(self, members: int, now: float) -> None:
        data = self._config.data
        if self._closed_at is not None:
            rate = members * data.batch_size * data.window / max(now - self._closed_at, 1e-9)
            self.rate = self._mean_rate.add(rate, RATE_MEMORY)
        self._closed_at = now

    def _publish(self, message: Message, body: bytes = b"") -> None:
        self._emit(Publish(Envelope(message, body)))
