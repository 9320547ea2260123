"""From weighted seeds to an estimate of the gradient: draw every pair's noise again and sum it.

The estimate is the mean over pairs of (shaped value * ε / unit). A process needs only seeds and weights to compute it
(Salimans et al. 2017, algorithm 2, with antithetic pairs as in section 2.1).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int8, UInt32

from esjax.core.noise import Noise, Params, Rows, Totals
from esjax.core.population import Loss, check_seeds, deal, evaluate, examples_of
from esjax.core.seeds import Seed, pair_seeds
from esjax.core.shaping import Shaped, Shaping, is_finite, shape

WEIGHED_PAIRS = 512
"""Pairs whose noise a device sums at a time by default."""


def weigh(noise: Noise, *, mesh: Mesh | None = None, chunk_pairs: int | None = None) -> Callable[..., Totals]:
    """Make the function that sums weight * ε over pairs.

    Args:
        noise: How members differ.
        mesh: Devices that share the pairs. None: one device.
        chunk_pairs: Pairs whose noise a device sums at a time; `Noise.exact_pairs` is the upper limit. None: 512.

    Returns:
        `(params, seeds, weights, count=None, totals=None, rows=None) -> totals`. `seeds` is uint32 [pairs, 2] and
        `weights` int8 [pairs], or [pairs, 2] for split pairs. It adds Σ weight * ε over the first `count` pairs (None:
        all) to `totals` (None: 0), an array for each perturbed leaf. With ±1 noise totals are int32 and exact for up to
        2^31 / 127 / rank pairs (16 million at rank 1), for any chunks, order and devices. `rows` says which rows of a
        leaf a pair's example reads, such as the tokens of a window for an embedding: `{path: int32 [pairs, reads]}`,
        where a path names a leaf or all leaves below it. The noise of other rows had no effect on the losses and is
        left out of the sum.

    The returned function raises, while it is traced:
        ValueError: `seeds`, `weights` or `rows` has the wrong shape.
    """
    most = min(chunk_pairs or WEIGHED_PAIRS, noise.exact_pairs)

    def weigh_pairs(
        params: Params,
        seeds: UInt32[Array, "pairs 2"],
        weights: Int8[Array, " pairs *halves"],
        count: Int[Array, ""] | int | None = None,
        totals: Totals | None = None,
        rows: Rows | None = None,
    ) -> Totals:
        layout = noise.lay_out(params)
        check_seeds(seeds)
        rows = rows or {}
        for path, read in rows.items():
            if jnp.ndim(read) != 2 or len(read) != len(seeds):
                raise ValueError(f"rows of {path} must be of shape [{len(seeds)}, reads], got {list(jnp.shape(read))}")
        halves = (2,) if noise.split else ()
        if weights.shape != (len(seeds), *halves):
            raise ValueError(
                f"weights must be of shape {[len(seeds), *halves]} for {len(seeds)} "
                f"{'split' if noise.split else 'antithetic'} pairs, got {list(weights.shape)}"
            )

        def add(totals: Totals, seeds: Array, weights: Array, rows: Rows) -> Totals:
            sums = layout.weigh(seeds, weights.astype(jnp.float32), rows)
            return [total + more.astype(total.dtype) for total, more in zip(totals, sums, strict=True)]

        if count is not None:
            is_counted = (jnp.arange(len(seeds), dtype=jnp.int32) < count).reshape(-1, *[1] * len(halves))
            weights = jnp.where(is_counted, weights, jnp.zeros_like(weights))
        size = min(most, len(seeds))
        chunks = -(-len(seeds) // size)
        before = layout.zeros() if totals is None else totals
        if chunks == 1 and mesh is None and count is None:
            return add(before, seeds, weights, rows)

        def in_chunks(values: Array) -> Array:
            padded = jnp.pad(values, [(0, chunks * size - len(values)), *[(0, 0)] * (values.ndim - 1)])
            return padded.reshape(chunks, size, *values.shape[1:])

        def add_chunk(chunk: Array, totals: Totals, *parts: Any) -> Totals:
            return add(totals, *jax.tree.map(lambda part: part[chunk], parts))

        todo = chunks if count is None else -(-jnp.asarray(count, jnp.int32) // size)
        parts = jax.tree.map(in_chunks, (seeds, weights, rows))
        added = deal(mesh, add_chunk)(jnp.int32(todo), layout.zeros(), *parts)
        return [one + two for one, two in zip(before, added, strict=True)]

    return weigh_pairs


def estimate(noise: Noise, *, mesh: Mesh | None = None, chunk_pairs: int | None = None) -> Callable[..., Params]:
    """Make the function that estimates the gradient from seeds and shaped weights; jit it.

    Args:
        noise: How members differ.
        mesh: Devices that share the pairs. None: one device.
        chunk_pairs: See `weigh`.

    Returns:
        `(params, seeds, shaped, count=None, totals=None, rows=None) -> gradient`. The gradient is a pytree like
        `params`, the mean of (shaped value * ε / unit) over the pairs that are not void; frozen leaves get 0. With ±1
        noise it is the same to the last bit in any order and on any number of devices. The other arguments are as for
        `weigh`.
    """
    weigh_pairs = weigh(noise, mesh=mesh, chunk_pairs=chunk_pairs)

    def gradient(
        params: Params,
        seeds: UInt32[Array, "pairs 2"],
        shaped: Shaped,
        count: Int[Array, ""] | int | None = None,
        totals: Totals | None = None,
        rows: Rows | None = None,
    ) -> Params:
        totals = weigh_pairs(params, seeds, jnp.asarray(shaped.weights), count, totals, rows)
        return noise.lay_out(params).gradient(totals, jnp.float32(shaped.scale), params)

    return gradient


def value_and_grad(
    loss: Loss,
    noise: Noise,
    pairs: int,
    *,
    shaping: Shaping = "zscore",
    batch_axis: Any = 0,
    mesh: Mesh | None = None,
    chunk_pairs: int | None = None,
) -> Callable[..., tuple[Float[Array, ""], Params]]:
    """Make a replacement for `jax.value_and_grad(loss)` that needs no backpropagation; jit it.

    Args:
        loss: See `evaluate`.
        noise: How members differ.
        pairs: Pairs of members, at least 1.
        shaping: See `shape`. With z-scores, the default, the estimate has the direction of the gradient but not its
            size, which makes no difference to Adam. Take `raw` for plain SGD.
        batch_axis: See `evaluate`; None: `batch` is one example for all pairs.
        mesh: Devices that share the pairs. None: one device.
        chunk_pairs: Pairs that a device evaluates at a time, see `evaluate`.

    Returns:
        `(params, seed, batch) -> (value, gradient)`. `seed` is an integer or a JAX key, may be traced, and must differ
        in every step. `value` is the mean loss of the pairs that are not void, float32, or NaN if all are void.
        `gradient` is a pytree like `params`, and 0 if more than half of the pairs are void. The result equals that of
        `pair_seeds(seed, 0, pairs)`, `evaluate`, `shape` and `estimate` one after another.

    Raises:
        ValueError: `pairs` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    losses_of = evaluate(loss, noise, batch_axis=batch_axis, mesh=mesh, chunk_pairs=chunk_pairs)
    gradient_of = estimate(noise, mesh=mesh)

    def value_and_gradient(params: Params, seed: Seed, batch: Any = None) -> tuple[Float[Array, ""], Params]:
        seeds = pair_seeds(seed, 0, pairs)
        losses = losses_of(params, seeds, batch)
        finite = is_finite(losses)
        value = jnp.sum(jnp.where(finite[:, None], losses, 0)) / (2 * jnp.sum(finite.astype(jnp.float32)))
        numbers = jnp.arange(pairs, dtype=jnp.int32)
        examples = numbers // _pairs_an_example(batch, batch_axis, pairs) if noise.split else None
        shaped = shape(losses, shaping, sigma=noise.sigma, examples=examples)
        return value, gradient_of(params, seeds, shaped)

    return value_and_gradient


def _pairs_an_example(batch: Any, batch_axis: Any, pairs: int) -> int:
    """Return how many neighbouring pairs share an example: the fewest over the leaves of the batch."""
    groups, axes = examples_of(batch, batch_axis, pairs)
    return pairs // max((group for group, axis in zip(groups, axes, strict=True) if axis is not None), default=1)
