"""Noise on activations against exact gradients, which `jax.grad` knows and the estimator does not."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.tokens import STOP
from esjax.models import Model, gru, rnn
from esjax.models.member import Member
from esjax.models.model import Params, Tap, untouched
from esjax.replica.estimators.discount import _later, make_estimate_chunk
from esjax.replica.estimators.taps import Estimate, Taps, find_taps

VOCAB = 6
TOKENS = jnp.array([2, 3, STOP, 5, 2, 4, 4, 3])
"""With a document that ends in the middle: what comes after STOP does not depend on what was before it."""

MODELS = {"gru": gru(VOCAB, 4, 5), "rnn": rnn(VOCAB, 4, 2)}
SIGMA = 0.005
CHUNKS, WINDOWS, COPIES = 8, 32, 128


@cache
def layer(vocab_size: int = VOCAB) -> Model:
    """One linear layer from the last token to the next: pre-activations are all there is."""

    def predict(params: Params, state: Array, tap: Tap = untouched) -> Array:
        return tap("logits", state @ params)

    def consume(params: Params, state: Array, token: Array, tap: Tap = untouched) -> Array:
        return jax.nn.one_hot(token, vocab_size)

    return Model(
        init=lambda key: jax.random.normal(key, (vocab_size, vocab_size)),
        initial_state=lambda params: jax.nn.one_hot(STOP, vocab_size),
        predict=predict,
        consume=consume,
        tapped=True,
    )


@cache
def make(
    model: Model,
    *,
    sigma: float = SIGMA,
    layer_sigma: tuple[tuple[str, float], ...] = (),
    discount: float = 1.0,
    copies: int = COPIES,
    **changes: Any,
) -> tuple[Params, Taps, Callable[..., Estimate]]:
    """Make and compile once what several tests call."""
    first = model.init(jax.random.key(3))
    params = jax.tree.map(lambda leaf, key: leaf + 0.5 * jax.random.normal(key, leaf.shape), first, keys_like(first))
    taps = find_taps(model, params)
    names = [*taps.consume, *taps.predict]
    settings: dict[str, Any] = {
        "sigma": dict.fromkeys(names, sigma) | dict(layer_sigma),
        "discount": dict.fromkeys(taps.consume, discount),
        "copies": copies,
        "burn_in": 0,
        "exact_logits": False,
    }
    estimate = make_estimate_chunk(model, taps, **(settings | changes))
    return params, taps, jax.jit(lambda params, *given: estimate(params, [], *given))


def keys_like(params: Params) -> Params:
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [*jax.random.split(jax.random.key(4), len(leaves))])


def seeds_of(chunk: int, windows: int = WINDOWS) -> Array:
    return pair_seeds(stream_seed(0, 0), chunk, jnp.arange(windows, dtype=jnp.uint32))


def exact(model: Model, params: Params, tokens: Array = TOKENS) -> Params:
    return jax.jit(jax.grad(lambda params: len(tokens) * Member(model, params).cross_entropy(tokens)))(params)


def flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def trained(model: Model, params: Params) -> np.ndarray:
    """Tell which parameters have a part in a pre-activation: all but a learned first state."""
    if not hasattr(params, "start"):
        return np.ones(flat(params).shape, bool)
    marked = jax.tree.map(jnp.ones_like, params)._replace(start=jnp.zeros_like(params.start))
    return flat(marked) == 1


def estimates(estimate: Callable[..., Estimate], params: Params, tokens: Array = TOKENS) -> np.ndarray:
    """Estimate in chunks, each of as many windows of the same text: independent draws of the same mean."""
    windows = jnp.broadcast_to(tokens, (WINDOWS, len(tokens)))
    there = jnp.ones(WINDOWS, bool)
    return np.stack([flat(estimate(params, seeds_of(i), windows, there).gradient) for i in range(CHUNKS)]) / WINDOWS


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_exact_gradient_on_average(name: str) -> None:
    """With γ = 1 and the whole document in the window, but for noise and O(sigma²).

    Bound: the mean of n draws is off by their standard error, which is known from the draws; a norm of it by no more
    than half again as much, for dozens of entries. A flipped sign makes the difference twice the gradient, a shifted
    position or a lost factor 2 a large part of it, and noise is below 6% of it here, which is tested.
    """
    model = MODELS[name]
    params, _, estimate = make(model)
    draws, is_trained = estimates(estimate, params), trained(model, params)
    right = exact(model, params)
    off = (draws.mean(axis=0) - flat(right))[is_trained]
    standard_error = np.linalg.norm(draws.std(axis=0, ddof=1)[is_trained]) / np.sqrt(CHUNKS)
    size = np.linalg.norm(flat(right)[is_trained])
    assert standard_error < 0.06 * size
    assert np.linalg.norm(off) < 1.5 * standard_error + SIGMA**2 * size
    assert not draws[:, ~is_trained].any()


def test_one_layer_in_closed_form() -> None:
    """Of one linear layer and a softmax, Σ (probabilities - token) ⊗ input, in float64 by hand."""
    model = layer()
    params, _, estimate = make(model)
    expected = np.zeros((VOCAB, VOCAB))
    for before, token in zip([STOP, *TOKENS[:-1].tolist()], TOKENS.tolist(), strict=True):
        logits = np.asarray(params, np.float64)[before]
        error = np.exp(logits) / np.exp(logits).sum()
        error[token] -= 1
        expected[before] += error
    draws = estimates(estimate, params)
    standard_error = np.linalg.norm(draws.std(axis=0, ddof=1)) / np.sqrt(CHUNKS)
    assert standard_error < 0.02 * np.linalg.norm(expected)
    assert np.linalg.norm(draws.mean(axis=0) - expected.ravel()) < 1.5 * standard_error + SIGMA**2


def test_its_noise_follows_the_number_of_copies() -> None:
    """Four times as many copies, half the standard deviation."""
    model = layer()
    params, _, few = make(model, copies=8)
    _, _, many = make(model, copies=32)
    ratio = np.linalg.norm(estimates(few, params).std(axis=0)) / np.linalg.norm(estimates(many, params).std(axis=0))
    assert 1.6 < ratio < 2.4


def test_sigma_of_a_layer_is_its_own() -> None:
    """In the limit of small sigma the estimate does not depend on it: another one changes it, and next to nothing."""
    model = MODELS["gru"]
    params, _, estimate = make(model)
    _, _, other = make(model, layer_sigma=(("hidden", SIGMA / 2), ("new", SIGMA / 4)))
    one, two = estimates(estimate, params)[0], estimates(other, params)[0]
    assert 0 < np.linalg.norm(one - two) < 0.05 * np.linalg.norm(one)


def test_without_discount_noise_on_the_state_is_rewarded_by_the_next_token_alone() -> None:
    """γ = 0 on two tokens is γ = 1 on two tokens; on more it is not."""
    model = MODELS["gru"]
    params, _, near = make(model, discount=0.0)
    _, _, far = make(model, discount=1.0)
    short, long = jnp.array([2, 3]), TOKENS
    np.testing.assert_allclose(estimates(near, params, short), estimates(far, params, short), rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(estimates(near, params, long) - estimates(far, params, long)) > 0.1


def test_the_rewards_of_noise_on_the_state_by_hand() -> None:
    """What comes after, each token half as much as the one before, up to the end of the document."""
    rewards = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])[:, None, None]
    tokens = jnp.array([2, 3, STOP, 4, 5])[:, None]
    found = _later(rewards, tokens, 0.5)[:, 0, 0]
    assert found.tolist() == [2 + 4 / 2, 4, 0, 16, 0]


def test_exact_logits_are_the_exact_gradient_of_the_last_layer() -> None:
    model = MODELS["gru"]
    params, _, estimate = make(model, exact_logits=True)
    windows, there = jnp.broadcast_to(TOKENS, (WINDOWS, len(TOKENS))), jnp.ones(WINDOWS, bool)
    found, right = estimate(params, seeds_of(0), windows, there).gradient, exact(model, params)
    for got, expected in zip(found.head_output, right.head_output, strict=True):
        np.testing.assert_allclose(got / WINDOWS, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_packed_noise_makes_the_same_estimate(name: str) -> None:
    """Equality of two ways: noise written out and summed by products, or unpacked where it is used and summed up."""
    params, _, estimate = make(MODELS[name])
    _, _, packed = make(MODELS[name], packed=True)
    windows, there = jnp.broadcast_to(TOKENS, (WINDOWS, len(TOKENS))), jnp.ones(WINDOWS, bool)
    one, other = (flat(made(params, seeds_of(0), windows, there).gradient) for made in (estimate, packed))
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_the_estimate_is_nearly_the_same(name: str) -> None:
    params, _, estimate = make(MODELS[name])
    _, _, rounded = make(MODELS[name], precision="bfloat16")
    windows, there = jnp.broadcast_to(TOKENS, (WINDOWS, len(TOKENS))), jnp.ones(WINDOWS, bool)
    one, other = (flat(made(params, seeds_of(0), windows, there).gradient) for made in (estimate, rounded))
    assert (one != other).any()
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_the_losses_are_those_of_noisy_copies() -> None:
    """As noise vanishes they become the loss of the model itself; a little of it makes them differ."""
    model = MODELS["gru"]
    params, _, estimate = make(model, sigma=1e-4)
    windows, there = jnp.broadcast_to(TOKENS, (WINDOWS, len(TOKENS))), jnp.ones(WINDOWS, bool)
    right = Member(model, params).cross_entropy(TOKENS)
    np.testing.assert_allclose(estimate(params, seeds_of(0), windows, there).losses, right, atol=1e-3)


def test_a_burn_in_only_prepares_the_state() -> None:
    """A window with a burn-in counts as the rest of it does from the state that the burn-in leads to."""
    model = layer()
    params, _, estimate = make(model)
    _, _, prepared = make(model, burn_in=1)
    windows, there = jnp.broadcast_to(TOKENS, (WINDOWS, len(TOKENS))), jnp.ones(WINDOWS, bool)
    whole = estimate(params, seeds_of(0), windows, there)
    rest = prepared(params, seeds_of(0), windows, there)
    # The one layer's state is the last token alone, so what is missing is the row of the first prediction's.
    first = exact(model, params, TOKENS[:1])
    draws = np.stack([flat(prepared(params, seeds_of(i), windows, there).gradient) for i in range(CHUNKS)]) / WINDOWS
    right = flat(exact(model, params)) - flat(first)
    error = np.linalg.norm(draws.std(axis=0, ddof=1)) / np.sqrt(CHUNKS)
    assert np.linalg.norm(draws.mean(axis=0) - right) < 1.5 * error + SIGMA**2
    assert rest.losses.shape == whole.losses.shape


def test_a_window_that_is_void_or_not_there_counts_for_nothing() -> None:
    """Beside it, the others come to what they come to without it."""
    model = MODELS["gru"]
    params, _, estimate = make(model)
    windows = jnp.stack([jnp.roll(TOKENS, i) for i in range(4)])
    some = jnp.array([True, False, True, True])
    kept = jnp.array([0, 2, 3, 0])
    found = estimate(params, seeds_of(0, 4), windows, some)
    alone = estimate(params, seeds_of(0, 4)[kept], windows[kept], jnp.array([True, True, True, False]))
    np.testing.assert_allclose(flat(found.gradient), flat(alone.gradient), rtol=1e-5, atol=1e-5)
    assert found.finite.tolist() == some.tolist()


def test_weights_that_are_not_finite_make_every_window_void() -> None:
    model = MODELS["gru"]
    params, _, estimate = make(model)
    broken = params._replace(head_output=params.head_output._replace(bias=params.head_output.bias.at[0].set(jnp.nan)))
    windows = jnp.broadcast_to(TOKENS, (4, len(TOKENS)))
    found = estimate(broken, seeds_of(0, 4), windows, jnp.ones(4, bool))
    assert not found.finite.any()


def test_the_taps_of_the_models() -> None:
    params = MODELS["gru"].init(jax.random.key(0))
    assert find_taps(MODELS["gru"], params) == Taps(
        {"reset": 4, "update": 4, "new": 4}, {"hidden": 5, "logits": VOCAB}, {"state": 4}
    )
    params = MODELS["rnn"].init(jax.random.key(0))
    assert find_taps(MODELS["rnn"], params) == Taps({"state_0": 4, "state_1": 4}, {"hidden": 16, "logits": VOCAB}, {})


def test_logits_that_are_changed_after_their_tap_are_refused() -> None:
    """What noise does to the loss is in closed form for what a softmax is taken of, and for that alone."""
    model = layer()
    cold = model._replace(predict=lambda params, state, tap=untouched: 2 * tap("logits", state @ params))
    with pytest.raises(ValueError, match="changes its logits after tapping them"):
        find_taps(cold, model.init(jax.random.key(0)))


def test_a_name_is_used_once() -> None:
    model = layer()
    twice = model._replace(
        consume=lambda params, state, token, tap=untouched: tap("logits", jax.nn.one_hot(token, VOCAB))
    )
    with pytest.raises(ValueError, match="taps 'logits' twice"):
        find_taps(twice, model.init(jax.random.key(0)))
