"""Noise on rows that a pair's example does not read: left out of the sum, which stays exact and unbiased."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jaxtyping import Array
from small import epsilons_of, seeds_of

from esjax import core
from esjax.core.noise import Noise, Totals, full, low_rank

PAIRS, VOCAB = 26, 9
PARAMS = {
    "head": jnp.zeros((VOCAB, 4)),  # as many rows as the tables, but all of them are read
    "tables": (jnp.zeros((VOCAB, 5)), jnp.zeros((VOCAB, 3)), jnp.zeros(VOCAB)),
}
READ = np.random.default_rng(0).integers(0, VOCAB, (PAIRS, 4))
"""Rows of the tables that each pair reads, some of them twice."""


def noise_of(rank: int, split: bool) -> Noise:
    return low_rank(0.1, rank, split=split) if rank else full(0.1, split=split)


def weights_of(split: bool) -> np.ndarray:
    return np.random.default_rng(1).integers(-127, 128, (PAIRS, 2) if split else PAIRS).astype(np.int8)


def by_hand(noise: Noise, count: int) -> list[np.ndarray]:
    """Add weight * ε pair by pair and row by row, in float64; √rank times, as totals are."""
    weights, totals = weights_of(noise.split).astype(np.float64), []
    for place, epsilon in enumerate(epsilons_of(noise, PARAMS, seeds_of(PAIRS))):
        total = np.zeros(epsilon.shape[:-1])
        places = np.arange(total.size).reshape(total.shape)  # of entries; of columns, where a matrix is of low rank
        is_even = (places if total.ndim == 1 or not noise.rank else np.arange(total.shape[1]) + 0 * places) % 2 == 0
        for pair in range(count):
            weight = np.where(is_even, *weights[pair]) if noise.split else np.full(total.shape, weights[pair])
            for row in range(VOCAB):
                if place == 0 or row in READ[pair]:
                    total[row] += weight[row] * epsilon[row, ..., pair]
        totals.append(total * np.sqrt(max(noise.rank, 1)) if total.ndim == 2 else total)
    return totals


def weigh(noise: Noise, devices: int, chunk_pairs: int, **more: Any) -> Totals:
    run = jax.jit(core.weigh(noise, mesh=mesh_of(devices), chunk_pairs=chunk_pairs))
    rows = {"tables": jnp.asarray(READ, jnp.int32)}
    return run(PARAMS, seeds_of(PAIRS), jnp.asarray(weights_of(noise.split)), rows=rows, **more)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_noise_on_rows_that_are_not_read_is_left_out(rank: int, split: bool) -> None:
    """Exact integers, in chunks of any size, on 1 and 4 devices, for the first pairs alone, and on top of a sum."""
    noise = noise_of(rank, split)
    expected = by_hand(noise, PAIRS)
    before = [jnp.full(total.shape, 7, jnp.int32) for total in expected]
    shared = weigh(noise, 4, 3, count=jnp.int32(PAIRS), totals=before)
    for got, again, right in zip(weigh(noise, 1, PAIRS), shared, expected, strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, np.rint(right))
        np.testing.assert_array_equal(again, 7 + np.rint(right))
        np.testing.assert_allclose(np.rint(right), right, atol=1e-9)
    part = weigh(noise, 4, 3, count=jnp.int32(17), totals=before)
    for got, right in zip(part, by_hand(noise, 17), strict=True):
        np.testing.assert_array_equal(got, 7 + np.rint(right))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_estimate_with_rows_is_the_gradient_on_average_and_has_less_variance(rank: int) -> None:
    """Reference: `jax.grad` of the mean loss of look-ups in a table.

    One pair's estimate of an entry is (∇ₖ·ε) ε / unit, with ∇ₖ the gradient of pair k's loss in units. Entries of ε are
    ±1 and uncorrelated, at rank 1 as well, so its second moment is |∇ₖ|². With rows it counts for the pairs that read
    the entry's row alone: the deviation of the mean over K pairs is at most (Σ |∇ₖ|²)^½ / K over these pairs. An entry
    is off by 5 deviations in one of two million tries. Raw weights are rounded to steps, half a step at most.
    """
    pairs, sigma, unit = 3000, 0.01, 0.5
    rng = np.random.default_rng(5)
    params = {"table": jnp.asarray(rng.normal(size=(24, 3)), jnp.float32), "out": jnp.asarray(rng.normal(size=3) / 2)}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    read = jnp.asarray(rng.integers(0, 24, (pairs, 3)), jnp.int32)

    def loss(params: Any, tokens: Array) -> Array:
        return jnp.sum(jnp.tanh(jnp.sum(params["table"][tokens], axis=0)) * params["out"])

    shared: Any = {"units": dict.fromkeys(params, unit)}
    noise = low_rank(sigma, 1, **shared) if rank else full(sigma, **shared)
    losses = np.asarray(jax.jit(core.evaluate(loss, noise))(params, seeds_of(pairs), read))
    shaped = core.shape(losses, "raw", sigma)
    step = shaped.scale * pairs
    run = jax.jit(core.estimate(noise))
    plain = run(params, seeds_of(pairs), shaped)
    found = run(params, seeds_of(pairs), shaped, rows={"table": read})
    each = jax.vmap(lambda tokens: jax.grad(loss)(params, tokens))(read)
    right = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64).mean(axis=0), each)
    norms = sum((np.asarray(leaf, np.float64) ** 2).reshape(pairs, -1).sum(axis=1) for leaf in each.values()) * unit**2
    is_read = (np.asarray(read)[:, :, None] == np.arange(24)).any(axis=1)
    deviations = np.sqrt(norms @ is_read) / pairs + step / 2 / np.sqrt(pairs) * np.sqrt(is_read.mean(axis=0))
    assert (np.abs(found["table"] - right["table"]) < 5 * deviations[:, None] / unit + sigma**2).all()
    np.testing.assert_array_equal(found["out"], plain["out"])
    errors = [float(np.sum((np.asarray(one["table"]) - right["table"]) ** 2)) for one in (found, plain)]
    # A row is read by one pair of eight, so the variance is an eighth of what it is without rows.
    assert 0.06 < errors[0] / errors[1] < 0.25
