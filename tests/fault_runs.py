"""Runs that a fault happens to, as far as the state machines show it, and what they are compared with.

Where a row of the list of faults says that nothing is lost, the reference is a run with one host and without faults:
its updates are the same bytes. With a time budget the population is what came back, so there every update is made again
from honest losses of the pairs that it names.
"""

from functools import cache
from typing import Any

import msgspec
import pytest
from hosts_simulation import (
    FIRST_STATE,
    STATE_BYTES,
    Host,
    Simulation,
    body_of,
    check_updates,
    config_of,
    hash_state,
    next_state,
    values_of,
)

from esjax.config.settings import Config, from_yaml, to_yaml
from esjax.exchange.values import SLOT_PAIRS
from esjax.hosts.protocol import wire
from esjax.hosts.protocol.wire import Envelope

FIXED = config_of()
BUDGET = config_of(budget=1.0)
FIXED_SUMS = config_of(sums=True)
BUDGET_SUMS = config_of(budget=1.0, sums=True)
both_modes = pytest.mark.parametrize("config", [FIXED, BUDGET], ids=["fixed", "budget"])
both_exchanges = pytest.mark.parametrize("sums", [False, True], ids=["losses", "sums"])
all_modes = pytest.mark.parametrize(
    "config", [FIXED, BUDGET, FIXED_SUMS, BUDGET_SUMS], ids=["fixed", "budget", "fixed sums", "budget sums"]
)
PAIRS = FIXED.es.population // 2


def fault_free(config: Config) -> Simulation:
    return _fault_free(to_yaml(config))


@cache
def _fault_free(settings: str) -> Simulation:
    sim = Simulation(from_yaml(settings, ""))
    sim.add("alone", speed=10_000.0)
    return sim


def check_run(sim: Simulation) -> None:
    """Check that the updates are those of a run without faults, and that all replicas made the same ones."""
    if sim.config.es.time_per_step is None:
        reference, steps = fault_free(sim.config), len(sim.updates)
        reference.run_steps(max(0, steps - len(reference.updates)))
        assert sim.updates == reference.updates[:steps]
    check_updates(sim.updates, sim.config)
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for host in sim.hosts.values():
        assert host.device.state == states[host.device.step], host.name


def run_with(config: Config, *names: str, steps: int = 3, **settings: Any) -> Simulation:
    """Start a run that has been through a few steps, and is in the middle of one."""
    sim = Simulation(config)
    for name in names:
        sim.add(name, **settings)
    sim.run_steps(steps)
    sim.run(0.1)
    return sim


def ask(sim: Simulation, host: Host, message: wire.Message, body: bytes = b"") -> wire.Message:
    """Let the coordinator answer a made-up message."""
    frames = wire.encode(Envelope(message, body))
    return sim.server.receive(wire.decode(frames, "request"), sim.now, host.key).message


def losses_message(sim: Simulation, host: Host, pairs: int, **changes: object) -> tuple[wire.Losses, bytes]:
    """Make honest losses of some of the pairs that a host is scoring."""
    joined = host.worker.joined
    assert joined is not None
    step = sim.server.step
    assert host.device.step == step
    first = joined.slot * SLOT_PAIRS if sim.config.es.time_per_step else 0
    dtype = "<i4" if joined.vector_length else "<f4"
    message = wire.Losses(joined.session, joined.incarnation, step, [(first, pairs)], False, dtype)
    body = body_of(values_of(sim.config, host.device.state, message.spans))
    return msgspec.structs.replace(message, **changes), body


def status_of(sim: Simulation, name: str) -> wire.HostStatus:
    return next(host for host in sim.server.status(sim.now).hosts if host.name == name)


def check_checkpoints(sim: Simulation) -> None:
    """Check that every snapshot and digest is that of a replay."""
    states = [FIRST_STATE]
    for update in sim.updates:
        states.append(next_state(states[-1], update))
    for snapshot in sim.checkpoints:
        assert snapshot.data[:STATE_BYTES] == states[snapshot.step]
    for step, digest in sim.digests:
        assert digest == hash_state(states[step])
