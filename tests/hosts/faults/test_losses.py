"""Losses that are not finite, all equal, too large or lies.

The rows are those of the list of faults; `fault_runs` has the reference.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
from fault_runs import FIXED, PAIRS, all_modes, both_exchanges, check_run, status_of
from hosts_simulation import FIRST_STATE, Simulation, check_updates, config_of, next_state, values_of

from esjax.config.settings import Config
from esjax.core.shaping import shape
from esjax.exchange import update_record


def spoil(values: dict[int, float]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Make a device whose losses of some pairs are other ones."""

    def twist(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        changed = losses.copy()
        for pair, value in values.items():
            changed[pairs % PAIRS == pair, 1] = value
        return changed

    return twist


@all_modes
def test_row_11_losses_that_are_not_finite_weigh_nothing(config: Config) -> None:
    bad = {0: math.nan, 1: math.inf, 2: -math.inf, 3: 1e30}
    sim = Simulation(config)
    sim.add("a", twist=spoil(bad))
    sim.run_steps(3)
    check_updates(sim.updates, config, spoil(bad))
    for update, closed in zip(map(update_record.unpack_update, sim.updates), sim.closed, strict=True):
        is_bad = np.isin(update.pairs() % PAIRS, list(bad))
        if not config.es.sums(0):
            assert not update.weights[is_bad].any()
            assert update.weights[~is_bad].any()
        assert update.header.void_pairs == closed.void_pairs == is_bad.sum()
        assert 2 < closed.loss < 3
        assert update.header.loss == closed.loss


@both_exchanges
def test_row_11_a_step_of_mostly_bad_losses_is_void(sums: bool) -> None:
    bad = dict.fromkeys(range(PAIRS // 2 + 1), math.nan)
    sim = Simulation(config_of(sums=sums))
    sim.add("a", twist=spoil(bad))
    sim.run_steps(3)
    for update, closed in zip(map(update_record.unpack_update, sim.updates), sim.closed, strict=True):
        assert not update.header.applied
        assert not update.weights.size
        assert update.header.void_pairs == len(bad)
        assert "not finite" in closed.trouble
    assert sum("not finite; no update" in line for line in sim.lines) == 1
    assert sim.hosts["a"].device.step >= 2  # and training goes on
    check_updates(sim.updates, sim.config, spoil(bad))


@pytest.mark.parametrize("split", [False, True])
def test_row_45_one_pair_does_not_erase_the_others(split: bool) -> None:
    """Reference: the weights of the same losses if this pair were not finite, and so counted for nothing."""
    config, lie = config_of(split=split), 9
    sim = Simulation(config)

    def twist(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        return np.where((pairs == lie)[:, None], np.array([9e8, -9e8], np.float32), losses)

    for name in ("a", "b", "c"):
        sim.add(name, twist=twist)
    sim.run_steps(5)
    state = FIRST_STATE
    for payload in sim.updates:
        update = update_record.unpack_update(payload)
        losses = values_of(config, state, update.header.spans)
        losses[lie] = np.nan
        expected = shape(losses, examples=update.pairs() // 3 if split else None).weights
        others = update.pairs() != lie
        np.testing.assert_array_equal(update.weights[others], expected[others])
        assert np.count_nonzero(expected) > PAIRS / 2
        state = next_state(state, payload)
    assert [closed.outliers for closed in sim.closed] == [1] * 5


def test_row_12_equal_losses_change_nothing_and_are_reported() -> None:
    sim = Simulation(FIXED)
    sim.add("a", twist=lambda losses, pairs: np.full_like(losses, 2.5))
    sim.run_steps(3)
    for update in map(update_record.unpack_update, sim.updates):
        assert not update.header.applied
        assert update.header.loss == 2.5
    assert sum("equal; no update" in line for line in sim.lines) == 1


def lie(losses: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return losses + np.where(pairs % 2, [[0.1], [-0.1]], 0.0).astype(np.float32).T


@both_exchanges
@pytest.mark.parametrize("liar", ["a", "b", "c"])
def test_row_25_nothing_that_a_liar_says_counts(liar: str, sums: bool) -> None:
    config = config_of(spot_check=1.0, sums=sums)
    sim = Simulation(config)
    for name in ("a", "b", "c"):
        sim.add(name, twist=lie if name == liar else None)
    sim.run_steps(10)
    assert status_of(sim, liar).state == "put aside"
    assert f"its {'gradient sums' if sums else 'losses'} differ" in status_of(sim, liar).note
    assert "put aside" in sim.hosts[liar].worker.refused
    assert {host.state for host in sim.server.status(sim.now).hosts if host.name != liar} == {"ready"}
    check_run(sim)


@both_exchanges
def test_row_25_a_sample_finds_a_liar_in_time(sums: bool) -> None:
    sim = Simulation(config_of(spot_check=0.3, sums=sums))
    for name in ("a", "b", "c"):
        sim.add(name, twist=lie if name == "c" else None)
    sim.run_steps(30)
    assert status_of(sim, "c").state == "put aside"
