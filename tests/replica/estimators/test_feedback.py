"""Learned feedback: its rule, where it leads to, and what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.models import gru
from esjax.replica.estimators.feedback import Feedback, first_feedback, learn, shapes_of
from esjax.replica.estimators.gates import chain_of, make_estimate_chunk
from esjax.replica.estimators.taps import Estimate, find_taps

VOCAB, HIDDEN, HEAD, WINDOWS = 6, 4, 5, 32


def test_a_matrix_leads_from_the_next_tap_to_this_one() -> None:
    assert shapes_of([4, 5, 6]) == [(5, 4), (6, 5)]
    assert shapes_of([4]) == []
    first = first_feedback([(5, 4), (6, 5)])
    assert [matrix.shape for matrix in first.matrices] == [(5, 4), (6, 5)]
    assert not any(matrix.any() for matrix in first.matrices)


@pytest.mark.usefixtures("lenient_promotion")
def test_it_learns_by_adam_up_the_correlation() -> None:
    """Reference: Adam (Kingma & Ba 2015, algorithm 1) in float64 numpy, with the step size that falls."""
    shapes, rng = [(3, 2), (2, 3)], np.random.default_rng(0)
    feedback = first_feedback(shapes)
    run = jax.jit(learn)
    value, mean, square = np.zeros(12), np.zeros(12), np.zeros(12)
    for step in range(1, 6):
        correlation = rng.integers(-(2**20), 2**20, 12)
        feedback = run(feedback, jnp.asarray(correlation, jnp.int32))
        mean = 0.9 * mean + 0.1 * correlation
        square = 0.99 * square + 0.01 * correlation.astype(np.float64) ** 2
        rate = 0.03 * (1 + (step - 1) / 100) ** -0.5
        value += rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
        found = np.concatenate([np.asarray(matrix).ravel() for matrix in feedback.matrices])
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-7)


def cosine(one: Array, two: Array) -> float:
    return float(jnp.sum(one * two) / jnp.linalg.norm(one) / jnp.linalg.norm(two))


@pytest.mark.usefixtures("lenient_promotion")
def test_it_comes_to_the_transposed_weights_and_lowers_the_variance() -> None:
    """On a model that stays as it is, from 32 windows a step and two copies.

    Errors of logits add up to 0, so what is the same for all logits has no effect and is not learned. Reference for the
    variance: estimates of the same windows without feedback, from the same seeds.
    """
    model = gru(VOCAB, HIDDEN, HEAD)
    leaves, treedef = jax.tree.flatten(model.init(jax.random.key(2)))
    keys = jax.random.split(jax.random.key(102), len(leaves))
    params = jax.tree.unflatten(
        treedef, [leaf + 0.5 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )
    taps = find_taps(model, params)
    chain = chain_of(taps)
    estimate = make_estimate_chunk(
        model, taps, sigma=dict.fromkeys(chain, 0.01), copies=2, burn_in=0, exact_logits=True, lanes=512
    )
    texts = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, 12)), jnp.int32)

    @jax.jit
    def found(matrices: list[Array], step: Array | int) -> Estimate:
        seeds = pair_seeds(stream_seed(0, 0), step, jnp.arange(WINDOWS, dtype=jnp.uint32))
        return estimate(params, matrices, seeds, texts, jnp.ones(WINDOWS, bool), None)

    def take(feedback: Feedback, step: Array) -> tuple[Feedback, None]:
        parts = [jnp.rint(64 * part).astype(jnp.int32).ravel() for part in found(feedback.matrices, step).correlations]
        return learn(feedback, jnp.concatenate(parts)), None

    first = first_feedback(shapes_of([*chain.values()]))
    learned, _ = jax.jit(lambda first: jax.lax.scan(take, first, jnp.arange(300, dtype=jnp.int32)))(first)
    to_state, to_hidden = learned.matrices
    output = params.head_output.matrix
    assert cosine(to_state, params.head_hidden.matrix.T) > 0.9
    assert cosine(to_hidden - jnp.mean(to_hidden, axis=0)[None], (output - jnp.mean(output, axis=1)[:, None]).T) > 0.9

    def deviation(matrices: list[Array]) -> np.ndarray:
        """Return the standard deviation of the estimates of each leaf that has noise."""
        draws = [found(matrices, 1000 + i).gradient._replace(head_output=()) for i in range(12)]
        spread = jax.tree.map(lambda *leaves: jnp.linalg.norm(jnp.std(jnp.stack(leaves), axis=0)), *draws)
        return np.asarray(jax.tree.leaves(spread))

    assert (deviation(learned.matrices) < 0.7 * deviation(first.matrices)).all()
