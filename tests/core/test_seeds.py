"""Seeds: derived by name with threefry, whatever is asked for beside them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from esjax.core.seeds import pair_seeds, stream_seed


def test_seeds_are_those_of_fold_in() -> None:
    """Reference: keys of JAX, derived one by one."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(9, impl="threefry2x32"), 1), 5)
    expected = [jax.random.key_data(jax.random.fold_in(key, pair)) for pair in (0, 3, 2**32 - 1)]
    pairs = jnp.array([0, 3, 2**32 - 1], jnp.uint32)
    np.testing.assert_array_equal(pair_seeds(stream_seed(9, 1), 5, pairs), expected)


def test_runs_streams_steps_and_pairs_differ() -> None:
    pairs = jnp.arange(4)
    names = itertools.product([0, 1], [0, 1], [0, 1])
    seeds = np.concatenate([pair_seeds(stream_seed(run, stream), step, pairs) for run, stream, step in names])
    assert len({tuple(seed) for seed in seeds.tolist()}) == len(seeds)


def test_seeds_do_not_depend_on_the_range_they_are_asked_in() -> None:
    whole = pair_seeds(stream_seed(1, 0), 5, jnp.arange(20))
    np.testing.assert_array_equal(whole[7:12], pair_seeds(stream_seed(1, 0), 5, jnp.arange(7, 12)))
