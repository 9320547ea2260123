"""Noise on pre-activations, weighed by the losses of single tokens: node perturbation for language models.

A clean copy of the model and `copies` noisy ones read each window of text. At every position, ±sigma is added to what
the layers of a noisy copy compute. With d_s = (noisy loss - clean loss) at position s, noise on a prediction at t is
weighed by the difference d_t, and noise on the state at t by Σ_{s>t} γ^(s-t-1) d_s, up to the end of the document. The
mean of (difference * noise / sigma) over the copies estimates the gradient with respect to the pre-activation. Times
the layer's input, it estimates the gradient with respect to the layer's weights (Widrow & Lehr 1990, section VII,
Madaline rule III; Hiratani et al. 2022; for how the noise grows with the number of nodes: Werfel, Xie & Seung 2005).

Two choices keep the variance small. Each tap of `predict` has separate noisy copies that start from the clean state, so
a difference contains no noise of another layer. And all copies share the window, so the outer products, most of the
work, are computed once for all of them.
"""

import math
from collections.abc import Mapping
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from esjax.core.interpreter import interpret
from esjax.core.noise import Precision, round_products
from esjax.core.rules import HIGHEST
from esjax.core.seeds import fold
from esjax.core.shaping import LARGEST_LOSS
from esjax.core.signs import BITS, signs
from esjax.data.tokens import STOP
from esjax.models.member import consume
from esjax.models.model import Model, Params, State
from esjax.replica.estimators.taps import (
    LOGITS,
    Estimate,
    EstimateChunk,
    Taps,
    changed_by,
    gradient_from,
    loss_from,
    predict_and_record,
)


class _Plan(NamedTuple):
    """The arguments of `make_estimate_chunk`, and the layout of the noise.

    Attributes:
        noisy: Taps of a prediction that get noise.
        bits: Number of entries of each family of noise: first all taps of the state together, then each of `noisy`.
        packed: Whether noise stays packed as bits until it is used.
    """

    model: Model
    taps: Taps
    sigma: Mapping[str, float]
    discount: Mapping[str, float]
    copies: int
    noisy: list[str]
    bits: list[int]
    packed: bool

    def family(self, number: int, words: UInt32[Array, "lanes words"]) -> Float[Array, "lanes bits"]:
        """Unpack the noise of a family in whole words, which is a plain loop; callers cut off the surplus entries."""
        many = [_words(bits) for bits in self.bits]
        first = sum(many[:number])
        words = words[:, first : first + many[number]]
        return signs(words).reshape(len(words), -1) if self.packed else _unpack(words)


def make_estimate_chunk(
    model: Model,
    taps: Taps,
    *,
    sigma: Mapping[str, float],
    discount: Mapping[str, float],
    copies: int,
    burn_in: int,
    exact_logits: bool,
    precision: Precision = "float32",
    packed: bool = False,
) -> EstimateChunk:
    """Make the function that estimates the gradient from a chunk of windows.

    Args:
        model: The architecture.
        taps: Its pre-activations, see `find_taps`.
        sigma: Standard deviation of the noise on each pre-activation, above 0.
        discount: γ of each pre-activation of the state, from 0 to 1. With 1, and windows that reach the end of the
            documents, the estimate is unbiased to O(sigma²). A smaller γ adds bias and removes much variance.
        copies: Noisy copies of each window, at least 1.
        burn_in: First tokens of a window that only prepare the state; they get no noise.
        exact_logits: Use the exact gradient with respect to the logits, with no noise on them.
        precision: Type to which operands of the copies' matrix products are rounded; sums are float32.
        packed: Keep noise packed as bits and add up copies by plain sums, which suits accelerators; else noise is
            stored, and sums are matrix products. This changes last digits only.
    """
    noisy = [name for name in taps.predict if not (exact_logits and name == LOGITS)]
    bits = [sum(taps.consume.values()), *(taps.predict[name] for name in noisy)]
    plan = _Plan(model, taps, sigma, discount, copies, noisy, bits, packed)

    def estimate_chunk(
        params: Params,
        feedback: list[Array],
        seeds: UInt32[Array, "windows 2"],
        windows: Int[Array, "windows length"],
        are_there: Bool[Array, " windows"],
        begin: State | None = None,
    ) -> Estimate:
        rounded = jax.tree.map(partial(round_products, precision=precision), params)

        def read(state: State, token: Int[Array, " windows"]) -> tuple[State, None]:
            return jax.vmap(partial(interpret(partial(consume, model)), rounded))(state, token), None

        state = jax.vmap(lambda _: model.initial_state(params))(seeds) if begin is None else begin
        state, _ = jax.lax.scan(read, state, windows[:, :burn_in].T)
        tokens = windows[:, burn_in:].T
        words = _draw(plan, seeds, len(tokens))
        # Lanes: the copies one after another, each with all windows; the clean copy comes last.
        start = _repeat(state, copies + 1)
        end, passed = jax.lax.scan(partial(_pass_token, plan, rounded), start, (tokens, words))

        losses = passed.losses.reshape(len(tokens), copies + 1, -1)
        finite = are_there & jnp.all(jnp.abs(losses) < LARGEST_LOSS, axis=(0, 1))
        errors = {**passed.errors, **_errors_of_state(plan, losses, finite, tokens, words)}
        errors = jax.tree.map(lambda error: jnp.where(finite[None, :, None], error, 0.0), errors)
        states = jax.tree.map(partial(_blank, ~finite), passed.clean)

        # Positions and windows as one axis: the products that sum over it are faster on CPUs than over two.
        everything = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (states, tokens, errors))

        gradient = gradient_from(model, params, *everything)
        clean = jax.tree.map(lambda leaf: leaf[-len(windows) :], end)
        return Estimate(gradient, losses[:, :copies].mean(axis=(0, 1)), finite, clean, [])

    return estimate_chunk


class _Passed(NamedTuple):
    """The results at one position.

    Attributes:
        clean: State of the clean copies before the token.
        losses: Losses of all copies.
        errors: Estimated gradient with respect to the pre-activations of the prediction.
    """

    clean: State
    losses: Float[Array, " lanes"]
    errors: dict[str, Float[Array, "windows entries"]]


_Words = tuple[UInt32[Array, "*positions blocks lanes"], UInt32[Array, "*positions blocks lanes"]]
"""Random bits: the two words of each block of threefry. Lanes come last, so that drawing is a plain loop over lanes."""


def _draw(plan: _Plan, seeds: UInt32[Array, "windows 2"], positions: int) -> _Words:
    """Draw the bits of all positions at once: one call of threefry costs as much as a position."""
    lanes = fold(seeds[None], jnp.arange(plan.copies + 1, dtype=jnp.uint32)[:, None]).reshape(-1, 2)
    blocks = math.ceil(sum(map(_words, plan.bits)) / 2)
    drawn = fold(lanes[None], jnp.arange(positions * blocks, dtype=jnp.uint32)[:, None])
    first, second = jnp.moveaxis(drawn.reshape(positions, blocks, len(lanes), 2), -1, 0)
    return first, second


def _unpack(words: UInt32[Array, "lanes words"]) -> Float[Array, "lanes bits"]:
    # Unpack two halves and join them: XLA then computes the noise once, in a plain loop. Otherwise it unpacks each bit
    # inside the loops of the network and turns them into scalar code, which is four times slower on CPUs.
    half = len(words) // 2
    return jnp.concatenate([signs(part).reshape(len(part), -1) for part in (words[:half], words[half:])])


def _pass_token(
    plan: _Plan, params: Params, states: State, inputs: tuple[Int[Array, " windows"], _Words]
) -> tuple[State, _Passed]:
    """Predict a token, score the noise on each tap of the prediction, and consume the token."""
    token, halves = inputs
    model, copies, sigma = plan.model, plan.copies, plan.sigma
    words = jnp.concatenate(halves).T
    noisy = copies * len(token)
    everyone, others = _repeat(token, copies + 1), _repeat(token, copies)
    losses, before, _ = jax.vmap(partial(interpret(partial(predict_and_record, model)), params))(states, everyone)
    clean = jax.tree.map(lambda leaf: leaf[noisy:], states)
    clean_losses = _repeat(losses[noisy:], copies)
    errors = {}
    for number, name in enumerate(plan.noisy, start=1):
        noise = plan.family(number, words[:noisy])
        if name == LOGITS:
            differences = _differences_of_logits(plan, before[name][noisy:], noise, others)
        else:
            value = _repeat(before[name][noisy:], copies)
            value = value + sigma[name] * noise[:, : plan.taps.predict[name]].reshape(value.shape)
            found = jax.vmap(partial(interpret(partial(loss_from, model, name)), params))(
                _repeat(clean, copies), value, others
            )
            differences = found - clean_losses
        errors[name] = _by_window(plan, differences / sigma[name], noise)[:, : plan.taps.predict[name]]
    if LOGITS in plan.taps.predict and LOGITS not in plan.noisy:
        probabilities = jax.nn.softmax(before[LOGITS][noisy:])
        errors[LOGITS] = probabilities - jax.nn.one_hot(token, probabilities.shape[-1])
    is_noisy = (jnp.arange(len(everyone)) < noisy).astype(jnp.float32)
    noise = plan.family(0, words) * is_noisy[:, None]
    after = jax.vmap(partial(interpret(partial(_consume_noisily, plan)), params))(states, everyone, noise)
    return after, _Passed(clean, losses, errors)


def _errors_of_state(
    plan: _Plan,
    losses: Float[Array, "positions all_copies windows"],
    finite: Bool[Array, " windows"],
    tokens: Int[Array, "positions windows"],
    words: _Words,
) -> dict[str, Float[Array, "positions windows entries"]]:
    """Estimate the gradient with respect to the pre-activations of the state, at every position."""
    if not plan.taps.consume:
        return {}
    differences = jnp.where(finite[None, None], losses[:, :-1] - losses[:, -1:], 0.0)
    discounts = sorted({plan.discount[name] for name in plan.taps.consume})
    later = [_later(differences, tokens, discount).reshape(len(tokens), -1) for discount in discounts]

    def weigh(_: None, inputs: tuple[list[Array], _Words]) -> tuple[None, dict[str, Array]]:
        later, halves = inputs
        noise = plan.family(0, jnp.concatenate(halves).T[: later[0].size])
        # Multiply by the noise of all taps, even if one needs only a part: a product is faster than slicing the noise.
        errors = [_split(_by_window(plan, differences, noise), plan.taps.consume) for differences in later]
        which = {name: discounts.index(plan.discount[name]) for name in plan.taps.consume}
        return None, {name: errors[i][name] / plan.sigma[name] for name, i in which.items()}

    return jax.lax.scan(weigh, None, (later, words))[1]


def _repeat(tree: PyTree, times: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times), tree)


def _blank(is_void: Bool[Array, " windows"], leaf: Array) -> Array:
    return jnp.where(is_void.reshape(1, -1, *[1] * (leaf.ndim - 2)), 0, leaf)


def _by_window(plan: _Plan, differences: Float[Array, " lanes"], noise: Float[Array, "lanes bits"]) -> Array:
    """Return the mean of (difference * noise) over the copies of each window, [windows, bits]."""
    copies = plan.copies
    differences = differences / copies
    if plan.packed:
        return jnp.sum((differences[:, None] * noise).reshape(copies, -1, noise.shape[1]), axis=0)
    is_own = _is_own(len(differences) // copies, copies)  # a product is the fastest sum on CPUs
    return jnp.matmul(jnp.where(is_own, differences[None], 0.0), noise, precision=HIGHEST)


def _is_own(windows: int, copies: int) -> Bool[Array, "windows lanes"]:
    """Return which lanes are noisy copies of each window."""
    return jnp.arange(windows * copies)[None] % windows == jnp.arange(windows)[:, None]


def _words(bits: int) -> int:
    return math.ceil(bits / BITS)


def _split(noise: Float[Array, "*lanes entries"], sizes: Mapping[str, int]) -> dict[str, Array]:
    ends = accumulate(sizes.values())
    return {name: noise[..., end - size : end] for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _differences_of_logits(
    plan: _Plan, logits: Float[Array, "windows entries"], noise: Float[Array, "lanes bits"], token: Array
) -> Float[Array, " lanes"]:
    """Return how much ±sigma on the logits adds to the loss, in closed form and without another exponential.

    It is log Σ_v p_v exp(σ ε_v) - σ ε_token, where exp(σ ε) = cosh σ + ε sinh σ for ε = ±1.
    """
    (windows, entries), sigma = logits.shape, plan.sigma[LOGITS]
    probabilities = jnp.pad(jax.nn.softmax(logits), ((0, 0), (0, noise.shape[1] - entries)))
    if plan.packed:
        mean = jnp.sum(probabilities[None] * noise.reshape(plan.copies, windows, -1), axis=-1).reshape(-1)
    else:
        means = jnp.matmul(probabilities, noise.T, precision=HIGHEST)
        mean = jnp.sum(jnp.where(_is_own(windows, plan.copies), means, 0.0), axis=0)
    chosen = jnp.take_along_axis(noise, token[:, None], axis=1)[:, 0]
    return jnp.log(math.cosh(sigma) + math.sinh(sigma) * mean) - sigma * chosen


def _consume_noisily(plan: _Plan, params: Params, state: State, token: Array, noise: Float[Array, " entries"]) -> State:
    parts = _split(noise, plan.taps.consume)

    def add(name: str, value: Array) -> Array:
        if name not in parts:
            return value
        return value + plan.sigma[name] * parts[name].reshape(value.shape)

    return consume(plan.model, params, state, token, changed_by(add))


def _later(
    differences: Float[Array, "positions copies windows"], tokens: Int[Array, "positions windows"], discount: float
) -> Float[Array, "positions copies windows"]:
    """Return the discounted sum of the differences after each position, up to the end of its document."""

    def add(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        difference, token = inputs
        # After STOP the state starts anew: noise before it has no effect on later losses.
        same_document = jnp.where(token[None] == STOP, 0.0, later)
        return difference + discount * same_document, same_document

    return jax.lax.scan(add, jnp.zeros_like(differences[0]), (differences, tokens), reverse=True)[1]
