"""Noise on the state as the prediction reads it, and credit for earlier tokens by the gates of the cell.

A clean copy of the model reads each window. At every position, noisy copies of the prediction start from the clean
state: ±sigma is added to one tap, and the mean of (loss difference * noise / sigma) over the copies estimates the
gradient of this token's loss with respect to that tap (node perturbation: Widrow & Lehr 1990, section VII). No noise is
carried on to later tokens, so all positions are independent and the loss of a token contains no noise of another.

The effect of a state on later tokens passes through the cell. In an elementwise recurrence, such as a gated unit, an
entry of the state lives on in the same entry, multiplied by its gate: λ_t = error_t + gate_t * λ_{t+1}. For a model
whose gates do not read the state this is the exact gradient (Zucchet et al. 2023, section 3); otherwise it leaves out
what entries do to each other and, as in RFLO (Murray 2019), to their own gates; SnAp-1 (Menick et al. 2021, section 3)
adds the latter. The same numbers follow from eligibility traces that run forward in time. In a model of several layers,
noise on a layer's output also passes through the layers above within a token, and not through their memory.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
from esjax.models.sequence import token_loss
from esjax.replica.estimators.feedback import guess
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
        chain: Number of entries of each tap, from the state to the logits.
        noisy: Taps that get noise.
    """

    model: Model
    taps: Taps
    sigma: Mapping[str, float]
    copies: int
    chain: dict[str, int]
    noisy: list[str]

    def sign_rows(self, name: str) -> int:
        """Return how many rows of random signs the copies of a tap need: one for each orthogonal block of copies."""
        return math.ceil(self.copies / self.block(name))

    def block(self, name: str) -> int:
        """Return how many copies have orthogonal noise: the width as a power of two if the copies reach it, else 1."""
        size = 1 << (self.chain[name] - 1).bit_length()
        return size if self.copies >= size else 1

    def words(self, name: str) -> int:
        """Return the number of random words of a tap, for each token."""
        return self.sign_rows(name) * math.ceil(self.chain[name] / BITS)


def chain_of(taps: Taps) -> dict[str, int]:
    """Return the number of entries of each tap that gets an error, from the state to the logits."""
    return {**taps.state, **taps.predict}


def check_elementwise(model: Model, taps: Taps, params: Params) -> None:
    """Check that the recurrence is elementwise, at the first parameters, one state and one token.

    Raises:
        ValueError: An entry of a new state depends on other entries of the old one, with the other taps given.
    """
    plan = _Plan(model, taps, {}, 1, {}, [])
    key = jax.random.key(0, impl="threefry2x32")

    @jax.jit
    def derivatives(params: Params) -> list[tuple[Array, Array]]:
        leaves = _leaves(model.initial_state(params))
        moved = {i: leaf + jax.random.uniform(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)}
        signs = [
            jax.random.rademacher(jax.random.fold_in(key, len(leaves) + i), leaf.shape, jnp.float32)
            for i, leaf in enumerate(leaves)
        ]
        state, token = _replace(model.initial_state(params), moved), jnp.int32(STOP)
        each = _gates(plan, params, state, token)
        together = _gates(plan, params, state, token, signs)
        return [(one * sign.ravel(), other) for one, sign, other in zip(each, signs, together, strict=True)]

    # The derivative along signs is that along ones, times the signs, if and only if no entry depends on another.
    for name, (right, found) in zip(taps.state, derivatives(params), strict=True):
        if not np.allclose(right, found, rtol=1e-3, atol=1e-5):
            raise ValueError(
                f"the recurrence is not elementwise: entries of {name!r} depend on other entries of the old state; "
                "give a tap to every pre-activation that reads it"
            )


def make_estimate_chunk(
    model: Model,
    taps: Taps,
    *,
    sigma: Mapping[str, float],
    copies: int,
    burn_in: int,
    exact_logits: bool,
    lanes: int,
    precision: Precision = "float32",
) -> EstimateChunk:
    """Make the function that estimates the gradient from a chunk of windows.

    Args:
        model: The architecture, with `state_taps`.
        taps: Its taps, see `find_taps`.
        sigma: Standard deviation of the noise on each tap, above 0.
        copies: Noisy copies of each prediction and tap, at least 1. If they reach the width of a tap, as a power of
            two, their noise is orthogonal: rows of a Hadamard matrix times random signs of the columns.
        burn_in: First tokens of a window that only prepare the state; they get no noise.
        exact_logits: Use the exact gradient with respect to the logits, with no noise on them.
        lanes: Copies that are evaluated at a time.
        precision: Type to which operands of the copies' matrix products are rounded; sums are float32.
    """
    chain = chain_of(taps)
    plan = _Plan(model, taps, sigma, copies, chain, [name for name in chain if not (exact_logits and name == LOGITS)])

    def estimate_chunk(
        params: Params,
        feedback: list[Array],
        seeds: UInt32[Array, "windows 2"],
        windows: Int[Array, "windows length"],
        are_there: Bool[Array, " windows"],
        begin: State | None = None,
    ) -> Estimate:
        rounded = jax.tree.map(partial(round_products, precision=precision), params)
        count, length = windows.shape
        tokens = windows.T

        def read(state: State, token: Int[Array, " windows"]) -> tuple[State, State]:
            return jax.vmap(partial(interpret(partial(consume, model)), rounded))(state, token), state

        first = jax.vmap(lambda _: model.initial_state(params))(seeds) if begin is None else begin
        end, states = jax.lax.scan(read, first, tokens)

        # What came before a window is unknown; with STOP in its place, noise does not pass to the layers above there.
        before = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:1], leaf[:-1]]), states)
        token_before = jnp.concatenate([jnp.full_like(tokens[:1], STOP), tokens[:-1]])
        rows = (states, before, token_before, tokens)
        rows = jax.tree.map(lambda leaf: leaf[burn_in:].reshape(-1, *leaf.shape[2:]), rows)
        words = _draw(plan, seeds, length - burn_in)
        found = _in_blocks(partial(_score, plan, rounded, feedback), max(1, lanes // copies), (rows, words))

        by_position = found.losses.reshape(-1, count)
        finite = are_there & jnp.all(found.finite.reshape(-1, count), axis=0)

        def clear(values: Float[Array, "rows entries"]) -> Float[Array, "rows entries"]:
            return jnp.where(jnp.tile(finite, len(values) // count)[:, None], values, 0.0)

        errors, measured, guessed = jax.tree.map(clear, (found.errors, found.measured, found.guessed))
        links = pairwise(chain) if feedback else ()
        correlations = [jnp.matmul(guessed[after].T, measured[name], precision=HIGHEST) for name, after in links]

        # From here on for all positions, of which the first `burn_in` have no error.
        errors = jax.tree.map(lambda values: jnp.pad(values, ((burn_in * count, 0), (0, 0))), errors)
        states, tokens = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (states, tokens))
        states = jax.tree.map(lambda leaf: jnp.where(_along_rows(finite, length, leaf), leaf, 0), states)
        starts = _give_credit(plan, params, states, tokens, errors, count, is_start=begin is None)

        def start(params: Params) -> Float[Array, ""]:
            leaves = _leaves(model.initial_state(params))
            products = [jnp.sum(error * leaf.ravel()) for error, leaf in zip(starts, leaves, strict=True)]
            return sum(products, jnp.float32(0))

        gradient = gradient_from(model, params, states, tokens, errors, start)
        return Estimate(gradient, by_position.mean(axis=0), finite, end, correlations)

    return estimate_chunk


def _give_credit(
    plan: _Plan,
    params: Params,
    states: State,
    tokens: Int[Array, " rows"],
    errors: dict[str, Float[Array, "rows entries"]],
    count: int,
    is_start: bool,
) -> list[Array]:
    """Turn the errors of states into the errors of the taps that make them, in place.

    Args:
        plan: The layout.
        params: The parameters.
        states: States before each token; positions one after another, each with `count` windows.
        tokens: The tokens.
        errors: Errors by the name of the tap; those of a state are of the state before the token.
        count: Number of windows.
        is_start: Whether windows begin with the initial state.

    Returns:
        The error of each leaf of the initial state.
    """
    gates = jax.vmap(partial(_gates, plan, params))(states, tokens)
    is_last = (tokens == STOP)[:, None]
    starts = []
    for name, gate in zip(plan.taps.state, gates, strict=True):
        credit = _credit(errors[name], jnp.where(is_last, 0.0, gate), count)
        # A token makes the next state, so its tap gets that state's credit. After STOP that is the initial state.
        after = jnp.concatenate([credit[count:], jnp.zeros_like(credit[:count])])
        errors[name] = jnp.where(is_last, 0.0, after)
        fresh = jnp.where(is_last, after, 0.0)
        starts.append(_total(jnp.concatenate([fresh, credit[:count]]) if is_start else fresh))
    return starts


class _Scored(NamedTuple):
    """The results for some rows: tokens to predict.

    Attributes:
        losses: Loss of the clean prediction.
        finite: Whether the losses of all copies are finite.
        errors: Estimated gradient with respect to each tap: what was guessed, and what noise measured of the rest.
        measured: What noise measured, times the derivative of the activation.
        guessed: What the feedback guessed; the error itself for the logits, and without feedback.
    """

    losses: Float[Array, " rows"]
    finite: Bool[Array, " rows"]
    errors: dict[str, Float[Array, "rows entries"]]
    measured: dict[str, Float[Array, "rows entries"]]
    guessed: dict[str, Float[Array, "rows entries"]]


_Rows = tuple[State, State, Int[Array, " rows"], Int[Array, " rows"]]
"""For each token to predict: the state, the state and the token before it, and the token."""


def _score(
    plan: _Plan, params: Params, feedback: list[Array], given: tuple[_Rows, UInt32[Array, "rows words"]]
) -> _Scored:
    """Predict, and estimate the errors of all taps, from the logits down to the state."""
    rows, words = given
    states, _, _, tokens = rows
    called = interpret(partial(predict_and_record, plan.model))
    losses, values, derivatives = jax.vmap(partial(called, params))(states, tokens)
    finite = jnp.abs(losses) < LARGEST_LOSS
    errors: dict[str, Array] = {}
    measured: dict[str, Array] = {}
    guessed: dict[str, Array] = {}
    if LOGITS not in plan.noisy and LOGITS in plan.chain:
        probabilities = jax.nn.softmax(values[LOGITS])
        errors[LOGITS] = guessed[LOGITS] = probabilities - jax.nn.one_hot(tokens, probabilities.shape[-1])
    names = list(plan.chain)
    ends = np.cumsum([plan.words(name) for name in plan.noisy])
    for number, name in reversed([*enumerate(plan.noisy)]):
        noise = _noise(plan, name, words[:, ends[number] - plan.words(name) : ends[number]])
        noisy = _noisy_losses(plan, params, name, rows, values, plan.sigma[name] * noise)
        finite &= jnp.all(jnp.abs(noisy) < LARGEST_LOSS, axis=0)
        differences = (noisy - losses[None]) / plan.sigma[name]
        derivative = derivatives[name].reshape(len(tokens), -1) if name in derivatives else jnp.float32(1)
        expected = jnp.zeros(noise.shape[1:])
        has_guess = number < len(feedback)
        if has_guess:
            expected = guess(guessed[names[number + 1]], feedback[number]) * derivative
            differences = differences - jnp.sum(noise * expected[None], axis=-1)
        rest = jnp.mean(differences[..., None] * noise, axis=0)
        errors[name], measured[name] = expected + rest, rest * derivative
        guessed[name] = expected if has_guess else errors[name]
    return _Scored(losses, finite, errors, measured, guessed)


def _noisy_losses(
    plan: _Plan,
    params: Params,
    name: str,
    rows: _Rows,
    values: dict[str, Array],
    noise: Float[Array, "copies rows entries"],
) -> Float[Array, "copies rows"]:
    """Score predictions with noise on one tap."""
    states, _, _, tokens = rows
    if name in plan.taps.state:
        scored = interpret(partial(_loss_reading, plan, name))
        return jax.vmap(jax.vmap(partial(scored, params)), (None, 0))(rows, noise)
    scored = interpret(partial(loss_from, plan.model, name))
    moved = values[name][None] + noise.reshape(plan.copies, *values[name].shape)
    return jax.vmap(jax.vmap(partial(scored, params)), (None, 0, None))(states, moved, tokens)


def _loss_reading(
    plan: _Plan, name: str, params: Params, row: tuple[State, State, Array, Array], noise: Float[Array, " entries"]
) -> Array:
    """Score a prediction that reads a state with noise on one layer, which passes on through the layers above it."""
    state, before, token_before, token = row
    number = list(plan.taps.state).index(name)
    leaves = _leaves(state)
    noisy = leaves[number] + noise.reshape(leaves[number].shape)
    if number + 1 == len(leaves):
        moved = _replace(state, {number: noisy})
    else:
        tap = changed_by(lambda tapped, computed: noisy if tapped == name else computed)
        above = _leaves(plan.model.consume(params, before, token_before, tap))[number + 1 :]
        is_start = token_before == STOP
        passed = {number + 1 + i: jnp.where(is_start, leaves[number + 1 + i], leaf) for i, leaf in enumerate(above)}
        moved = _replace(state, {number: noisy, **passed})
    return token_loss(plan.model.predict(params, moved), token)


def _gates(
    plan: _Plan, params: Params, state: State, token: Array, along: Sequence[Array] | None = None
) -> list[Float[Array, " entries"]]:
    """Return the gate of each entry of the state: the derivative of the new entry by the old one alone.

    `along` is a direction for each leaf in place of ones.
    """
    values: dict[str, Array] = {}

    def record(name: str, value: Array) -> Array:
        values[name] = value
        return value

    plan.model.consume(params, state, token, changed_by(record))

    def renew(number: int, name: str, leaf: Array) -> Array:
        new: list[Array] = []

        def hold(tapped: str, computed: Array) -> Array:
            if tapped == name:
                new.append(computed)
            return computed if tapped == name else values[tapped]

        plan.model.consume(params, _replace(state, {number: leaf}), token, changed_by(hold))
        return new[0]

    leaves = _leaves(state)
    directions = along or [jnp.ones_like(leaf) for leaf in leaves]
    return [
        jax.jvp(partial(renew, number, name), (leaf,), (direction,))[1].ravel()
        for number, (name, leaf, direction) in enumerate(zip(plan.taps.state, leaves, directions, strict=True))
    ]


def _credit(
    errors: Float[Array, "rows entries"], gates: Float[Array, "rows entries"], count: int
) -> Float[Array, "rows entries"]:
    """Return error_t + gate_t * credit_{t+1} for each position, the positions of `count` windows as rows."""

    def back(later: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        error, gate = inputs
        credit = error + gate * later
        return credit, credit

    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, count, leaf.shape[-1]), (errors, gates))
    return jax.lax.scan(back, jnp.zeros_like(parts[0][0]), parts, reverse=True)[1].reshape(errors.shape)


def _leaves(state: State) -> list[Array]:
    """Return the leaves of a state that are of floating type."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _replace(state: State, changed: Mapping[int, Array]) -> State:
    """Replace some of the leaves of floating type, by their numbers among these."""
    leaves, treedef = jax.tree.flatten(state)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    for number, leaf in changed.items():
        leaves[places[number]] = leaf
    return jax.tree.unflatten(treedef, leaves)


def _along_rows(finite: Array, positions: int, leaf: Array) -> Array:
    return jnp.tile(finite, positions).reshape(-1, *[1] * (leaf.ndim - 1))


def _total(rows: Float[Array, "rows entries"]) -> Float[Array, " entries"]:
    """Sum over rows by a product: XLA may change the order of a plain sum with the number of devices."""
    return jnp.matmul(jnp.ones((1, len(rows))), rows, precision=HIGHEST)[0]


def _draw(plan: _Plan, seeds: UInt32[Array, "windows 2"], positions: int) -> UInt32[Array, "rows words"]:
    """Draw the random words of all tokens, one row for each: positions one after another, each with all windows."""
    blocks = -(-sum(plan.words(name) for name in plan.noisy) // 2)
    drawn = fold(seeds[None], jnp.arange(positions * blocks, dtype=jnp.uint32)[:, None])
    return jnp.moveaxis(drawn.reshape(positions, blocks, len(seeds), 2), 1, 2).reshape(positions * len(seeds), -1)


def _noise(plan: _Plan, name: str, words: UInt32[Array, "rows words"]) -> Float[Array, "copies rows entries"]:
    """Make the signs of all copies: random ones, or rows of a Hadamard matrix times random signs of its columns."""
    width, block = plan.chain[name], plan.block(name)
    drawn = signs(words.reshape(len(words), plan.sign_rows(name), -1)).reshape(len(words), plan.sign_rows(name), -1)
    drawn = jnp.moveaxis(drawn[..., :width], 1, 0)
    if block == 1:
        return drawn
    rows = jnp.asarray(_hadamard(block)[:, :width])
    return (drawn[:, None] * rows[None, :, None]).reshape(-1, len(words), width)[: plan.copies]


def _hadamard(size: int) -> np.ndarray:
    """Return Sylvester's matrix of ±1 with orthogonal rows; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _in_blocks(work: partial[_Scored], size: int, rows: PyTree) -> _Scored:
    """Call `work` on blocks of rows, so that its intermediate results fit a cache, and join the results."""
    total = len(jax.tree.leaves(rows)[0])
    size = min(size, total)
    blocks = -(-total // size)
    if blocks == 1:
        return work(rows)

    def cut(leaf: Array) -> Array:
        padded = jnp.pad(leaf, [(0, blocks * size - total), *[(0, 0)] * (leaf.ndim - 1)])
        return padded.reshape(blocks, size, *leaf.shape[1:])

    found = jax.lax.map(work, jax.tree.map(cut, rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:total], found)
