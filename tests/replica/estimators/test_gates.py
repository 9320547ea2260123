"""Noise on the state as it is read, and credit by gates: against `jax.grad` of losses that keep just this credit.

The references are written with `stop_gradient` where the credit of `esjax.replica.estimators.gates` does not go: into
the matrix product of a gru, and through the memory of the layers above. They are computed in float64.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.tokens import STOP
from esjax.models import Model, gru, lru, lstm
from esjax.models.lru import LruState
from esjax.models.lstm import LstmState
from esjax.models.member import Member
from esjax.models.mingru import KEEP, MinGruState, mingru
from esjax.models.model import Params, State, Tap, untouched
from esjax.models.sequence import token_loss
from esjax.replica.estimators import gates
from esjax.replica.estimators.feedback import shapes_of
from esjax.replica.estimators.gates import chain_of, make_estimate_chunk
from esjax.replica.estimators.taps import Estimate, find_taps

VOCAB, HIDDEN = 6, 4
TEXTS = jnp.array([[2, 3, STOP, 5, 2, 4, 4, 3], [4, 5, 0, 2, 3, 3, STOP, 2]])
"""Documents end in the middle of both."""

MODELS = {
    "gru": gru(VOCAB, HIDDEN, 5),
    "mingru": mingru(VOCAB, HIDDEN, 5, n_layers=1, gate_tokens=3),
    "mingru, two layers": mingru(VOCAB, HIDDEN, 5, n_layers=2, gate_tokens=2),
    "lstm": lstm(VOCAB, HIDDEN, 5, n_layers=1),
    "lru": lru(VOCAB, HIDDEN, 5, n_layers=1, gate_tokens=2),
}
SIGMA = 0.002
COPIES = 8
"""At least as many as the widths, 4 to 6: the noise of the copies is orthogonal."""

stop = jax.lax.stop_gradient


class Rules(NamedTuple):
    """Where the credit of a reference goes; other values than these make a wrong one."""

    gate: float = 1.0
    shift: int = 0
    ends: bool = True
    above: bool = True


RIGHT = Rules()


def gru_step(rules: Rules, params: Any, state: Array, token: Array) -> tuple[Array, Array]:
    """Keep the state through the update gate alone (RFLO), not through the matrix product."""
    x = jnp.split(params.embedding[token], 3)
    y = jnp.split(stop(state) @ params.recurrent.matrix + params.recurrent.bias, 3)
    reset, update = jax.nn.sigmoid(x[0] + y[0]), jax.nn.sigmoid(x[1] + y[1])
    kept = rules.gate * state + (1 - rules.gate) * stop(state)
    after = update * kept + (1 - update) * jnp.tanh(x[2] + reset * y[2])
    return after, after


def lstm_step(rules: Rules, params: Any, state: Any, token: Array) -> tuple[Any, Any]:
    """Keep the cell through the forget gate alone; the output is a function of the cell within its token."""
    ((cell, hidden),) = state
    a = params.embedding[token] + stop(hidden) @ params.recurrent[0].matrix + params.recurrent[0].bias
    take, keep, new, show = jnp.split(a, 4)
    kept = rules.gate * cell + (1 - rules.gate) * stop(cell)
    cell = jax.nn.sigmoid(keep) * kept + jax.nn.sigmoid(take) * jnp.tanh(new)
    after = (LstmState(cell, jax.nn.sigmoid(show) * jnp.tanh(cell)),)
    return after, after


def lru_step(rules: Rules, params: Any, state: LruState, token: Array) -> tuple[LruState, LruState]:
    """Leave nothing out: the recurrence of a layer is linear and elementwise, so its credit is exact."""
    after = MODELS["lru"].consume(params, state, token)
    return after, after


STEPS = {"gru": gru_step, "lstm": lstm_step, "lru": lru_step}


def mingru_step(rules: Rules, params: Any, state: MinGruState, token: Array) -> tuple[MinGruState, MinGruState]:
    """Carry each layer on by itself; the next prediction alone reads a later layer as a function of the one below."""
    tokens = jnp.concatenate([token[None], state.tokens])
    rows = [table[tokens[i]] for i, table in enumerate(params.embedding)]

    def layer(given: Array, old: Array) -> Array:
        gate, candidate = jnp.split(given, 2)
        keep = jax.nn.sigmoid(gate + KEEP)
        return keep * (rules.gate * old + (1 - rules.gate) * stop(old)) + (1 - keep) * jnp.tanh(candidate)

    carried = [layer(sum(rows[1:], rows[0]) + params.bias, state.hidden[0])]
    read = [*carried]
    for (matrix, bias), old in zip(params.layers, state.hidden[1:], strict=True):
        carried.append(layer(stop(carried[-1]) @ matrix + bias, old))
        passed = layer(read[-1] @ stop(matrix) + stop(bias), stop(old))
        read.append(carried[-1] + (passed - stop(passed) if rules.above else 0 * passed))
    return MinGruState(tuple(read), tokens[:-1]), MinGruState(tuple(carried), tokens[:-1])


def reference(
    name: str, params: Params, texts: Array, begin: State | None = None, burn_in: int = 0, rules: Rules = RIGHT
) -> Params:
    """Return the gradient of the sum of all losses, as far as credit goes, in float64."""
    model, step = MODELS[name], STEPS.get(name, mingru_step)

    def loss(params: Params, text: Array, begin: State | None) -> Array:
        read = carried = model.initial_state(params) if begin is None else begin
        total, reads = jnp.zeros(()), []
        for token in text:
            reads.append(read)
            read, carried = step(rules, params, carried, token)
            if rules.ends:
                fresh, choose = model.initial_state(params), partial(jnp.where, token == STOP)
                read, carried = jax.tree.map(choose, fresh, read), jax.tree.map(choose, fresh, carried)
        for i in range(burn_in, len(text) - rules.shift):
            total += token_loss(model.predict(params, reads[i]), text[i + rules.shift])
        return total

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        begin = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64 if leaf.dtype == np.float32 else None), begin)
        run = jax.jit(jax.grad(lambda params: jnp.sum(jax.vmap(lambda *one: loss(params, *one))(texts, begin))))
        if begin is None:
            run = jax.jit(jax.grad(lambda params: jnp.sum(jax.vmap(lambda one: loss(params, one, None))(texts))))
        return jax.tree.map(np.asarray, run(wide))


KEYS = {"gru": 2, "mingru": 1, "mingru, two layers": 4, "lstm": 3, "lru": 4}
"""Keys of parameters at which noise takes no unit of the head across the kink of its relu."""


@cache
def params_of(name: str) -> Params:
    """Draw parameters at which all of them matter, the start state and the biases too."""
    leaves, treedef = jax.tree.flatten(MODELS[name].init(jax.random.key(KEYS[name])))
    keys = jax.random.split(jax.random.key(KEYS[name] + 100), len(leaves))
    moved = [leaf + 0.5 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


@cache
def make(name: str, sigma: float = SIGMA, copies: int = COPIES, **changes: Any) -> Callable[..., Estimate]:
    """Make and compile once what several tests call."""
    model = MODELS[name]
    taps = find_taps(model, model.init(jax.random.key(0)))
    settings: dict[str, Any] = {"burn_in": 0, "exact_logits": True, "lanes": 64} | changes
    return jax.jit(
        make_estimate_chunk(model, taps, sigma=dict.fromkeys(chain_of(taps), sigma), copies=copies, **settings)
    )


def feedback_of(name: str, seed: int | None) -> list[Array]:
    """Draw feedback matrices; None: zeros."""
    model, rng = MODELS[name], np.random.default_rng(seed or 0)
    widths = [*chain_of(find_taps(model, model.init(jax.random.key(0)))).values()]
    scale = 0.0 if seed is None else 0.5
    return [jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in shapes_of(widths)]


def seeds_of(chunk: int, windows: int) -> Array:
    return pair_seeds(stream_seed(0, 0), chunk, jnp.arange(windows, dtype=jnp.uint32))


def begin_of(name: str, windows: int = 2) -> State:
    """Make states that windows begin with, other than the start of a document."""
    hidden = [jnp.asarray(np.random.default_rng(i).normal(0, 0.5, (windows, HIDDEN)), jnp.float32) for i in range(2)]
    if name == "gru":
        return hidden[0]
    if name == "lstm":
        return (LstmState(*hidden),)
    if name == "lru":
        return LruState((hidden[0],), hidden[1], jnp.full((windows, 1), 3, jnp.int32))
    layers, last = (1, 2) if name == "mingru" else (2, 1)
    return MinGruState(tuple(hidden[:layers]), jnp.full((windows, last), 3, jnp.int32))


def flat(tree: Params) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def off(found: Params, right: Params) -> float:
    """Return the largest error of a leaf, as a share of the leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    return max(float(np.linalg.norm(got - exact) / np.linalg.norm(exact)) for got, exact in pairs)


THERE = jnp.ones(2, bool)


@pytest.mark.parametrize(
    ("name", "burn_in"),
    [
        *[("gru", 0), ("gru", 1), ("mingru", 1), ("mingru, two layers", 0), ("mingru, two layers", 1)],
        *[("lstm", 0), ("lru", 1)],
        *(pytest.param(*one, marks=pytest.mark.nightly) for one in (("lstm", 1), ("lru", 0))),
    ],
)
def test_with_orthogonal_noise_it_is_the_credit_of_the_gates(name: str, burn_in: int) -> None:
    """Without a burn-in, logits are exact and windows begin a document; else logits have noise and windows go on.

    Orthogonal noise of ±sigma finds the slope of a loss but for terms of order sigma. For a mingru of one layer the
    reference is plain `jax.grad` of the loss, which is tested below.
    """
    params, begin = params_of(name), begin_of(name) if burn_in else None
    estimate = make(name, burn_in=burn_in, exact_logits=burn_in == 0)
    found = estimate(params, feedback_of(name, 1), seeds_of(0, 2), TEXTS, THERE, begin)
    right = reference(name, params, TEXTS, begin, burn_in)
    assert off(found.gradient, right) < 2 * SIGMA
    if name != "lru":  # which begins with zeros
        assert np.linalg.norm(flat(right.start)) > 0.1  # the start of a document gets its gradient, too


def test_for_one_layer_of_mingru_this_credit_is_the_exact_gradient() -> None:
    model, params = MODELS["mingru"], params_of("mingru")
    exact = jax.grad(lambda params: sum(len(text) * Member(model, params).cross_entropy(text) for text in TEXTS))(
        params
    )
    assert off(reference("mingru", params, TEXTS), exact) < 1e-5


def test_noise_on_a_layer_passes_through_the_layers_above_within_a_token() -> None:
    """Reference: `jax.grad` of the loss of one token by the lower layer's output, through `consume` and `predict`."""
    name = "mingru, two layers"
    model, params = MODELS[name], params_of(name)
    state = jax.tree.map(lambda leaf: leaf[0], begin_of(name))
    after = model.consume(params, state, jnp.int32(5))

    def loss(output: Array) -> Array:
        def tap(name: str, value: Array, activation: Any = lambda value: value) -> Array:
            return output if name == "state_1" else activation(value)

        return token_loss(model.predict(params, model.consume(params, state, jnp.int32(5), tap)), jnp.int32(2))

    direct = jax.grad(lambda output: token_loss(model.predict(params, after._replace(hidden=output)), jnp.int32(2)))
    slope, alone = jax.grad(loss)(after.hidden[0]), direct(after.hidden)[0]
    taps = find_taps(model, params)
    chain = chain_of(taps)
    plan = gates._Plan(model, taps, dict.fromkeys(chain, SIGMA), COPIES, chain, [*chain][:-1])
    rows = jax.tree.map(lambda leaf: leaf[None], (after, state, jnp.int32(5), jnp.int32(2)))
    words = gates._draw(plan, seeds_of(0, 1), 1)
    found = jax.jit(lambda params, *given: gates._score(plan, params, [], given))(params, rows, words)
    np.testing.assert_allclose(found.errors["state_1"][0], slope, atol=2 * SIGMA)
    assert np.linalg.norm(slope - alone) > 0.1


WRONG = {
    "the gate is left out": Rules(gate=0.0),
    "shifted by a position": Rules(shift=1),
    "documents do not end": Rules(ends=False),
    "layers above are passed by": Rules(above=False),
}


@pytest.mark.parametrize("why", ["flipped sign", *WRONG])
def test_the_bound_tells_another_credit_apart(why: str) -> None:
    """Wrong references are off by far more than the bound above."""
    name = "mingru, two layers" if why == "layers above are passed by" else "gru"
    params = params_of(name)
    right = reference(name, params, TEXTS)
    wrong = reference(name, params, TEXTS, rules=WRONG[why]) if why in WRONG else jax.tree.map(np.negative, right)
    assert off(wrong, right) > 20 * 2 * SIGMA


def test_with_two_copies_it_is_right_on_average() -> None:
    """Feedback of any values changes no mean.

    Bound: the mean of n draws is off by their standard error, which is known from the draws; a norm of it by no more
    than half again as much, for dozens of entries.
    """
    params, chunks, windows = params_of("gru"), 8, 256
    estimate = make("gru", copies=2)
    texts = jnp.broadcast_to(TEXTS[0], (windows, TEXTS.shape[1]))
    matrices = feedback_of("gru", 1)
    draws = [
        flat(estimate(params, matrices, seeds_of(i, windows), texts, jnp.ones(windows, bool)).gradient) / windows
        for i in range(chunks)
    ]
    right = flat(reference("gru", params, TEXTS[:1]))
    standard_error = np.linalg.norm(np.std(draws, axis=0, ddof=1)) / np.sqrt(chunks)
    assert 0 < standard_error < 0.05 * np.linalg.norm(right)
    assert np.linalg.norm(np.mean(draws, axis=0) - right) < 1.5 * standard_error + 2 * SIGMA * np.linalg.norm(right)


def test_feedback_of_zeros_changes_nothing() -> None:
    estimate, params = make("gru", copies=2), params_of("gru")
    with_zeros, without = (
        estimate(params, given, seeds_of(0, 2), TEXTS, THERE) for given in (feedback_of("gru", None), [])
    )
    jax.tree.map(np.testing.assert_array_equal, with_zeros.gradient, without.gradient)
    assert [matrix.shape for matrix in with_zeros.correlations] == [(5, HIDDEN), (VOCAB, 5)]
    assert without.correlations == []


@pytest.mark.parametrize("seed", range(4))
def test_the_reverse_scan_is_that_of_traces_that_run_forward(seed: int) -> None:
    """Reference: eligibility traces. A trace e_t = u_t + gate_{t-1} e_{t-1} holds how much a parameter with immediate
    effects u has changed the state so far, and Σ error_t e_t is its gradient; nothing in it goes back in time.
    """
    rng = np.random.default_rng(seed)
    positions, count, entries = 9, 3, 5
    errors, gated, effects = rng.normal(size=(3, positions, count, entries))
    gated[rng.random((positions, count)) < 0.2] = 0  # where a document ends
    trace, gradient = np.zeros((count, entries)), np.zeros((count, entries))
    for t in range(positions):
        trace = effects[t] + (gated[t - 1] * trace if t else 0)
        gradient += errors[t] * trace
    flat_errors, flat_gates = (jnp.asarray(part.reshape(-1, entries), jnp.float32) for part in (errors, gated))
    credit = np.asarray(gates._credit(flat_errors, flat_gates, count), np.float64).reshape(positions, count, entries)
    # 27 products of size 1 through a scan of float32.
    np.testing.assert_allclose((credit * effects).sum(axis=0), gradient, rtol=1e-4, atol=1e-4)


def test_windows_that_are_void_or_not_there_count_for_nothing() -> None:
    """Beside them, the others come to what they come to without them; in the feedback's correlations as well."""
    params, estimate, matrices = params_of("gru"), make("gru", copies=2), feedback_of("gru", 1)
    texts, seeds = jnp.concatenate([TEXTS, TEXTS]), seeds_of(0, 4)
    begin = begin_of("gru", 4)
    broken = begin.at[1].set(jnp.nan)
    found = estimate(params, matrices, seeds, texts, jnp.array([True, True, False, True]), broken)
    assert found.finite.tolist() == [True, False, False, True]
    kept = jnp.array([0, 3, 3, 3])
    there = jnp.array([True, True, False, False])
    alone = estimate(params, matrices, seeds[kept], texts[kept], there, begin[kept])
    for got, right in ((found.gradient, alone.gradient), (found.correlations, alone.correlations)):
        np.testing.assert_allclose(flat(got), flat(right), rtol=1e-5, atol=1e-5)
        assert np.abs(flat(right)).max() > 0.1
    np.testing.assert_allclose(found.end[0], alone.end[0], rtol=1e-6)


def test_taps_of_the_state_are_in_the_order_of_its_leaves() -> None:
    """In whichever order the model calls them."""

    def consume(params: Array, state: tuple[Array, Array], token: Array, tap: Tap = untouched) -> tuple[Array, Array]:
        second = tap("second", 0.5 * state[1])
        return tap("first", 0.25 * state[0] + params[token]), second

    model = Model(
        init=lambda key: jnp.zeros(VOCAB),
        initial_state=lambda params: (jnp.zeros(()), jnp.zeros(2)),
        predict=lambda params, state, tap=untouched: tap("logits", state[0] * params),
        consume=consume,
        tapped=True,
        state_taps=("first", "second"),
    )
    assert [*find_taps(model, jnp.zeros(VOCAB)).state.items()] == [("first", 1), ("second", 2)]


@pytest.mark.parametrize("copies", [4, 8, 24, 29])
def test_noise_is_orthogonal_where_copies_reach_the_width(copies: int) -> None:
    """Reference: products of the columns over the copies of a block, 8 for a width of 5; with 4 copies chance alone."""
    taps = find_taps(MODELS["gru"], params_of("gru"))
    chain = chain_of(taps)
    plan = gates._Plan(MODELS["gru"], taps, dict.fromkeys(chain, SIGMA), copies, chain, ["hidden"])
    words = gates._draw(plan, seeds_of(0, 3), 4)[:, : plan.words("hidden")]
    noise = np.asarray(gates._noise(plan, "hidden", words))
    assert noise.shape == (copies, 12, 5)
    assert set(np.unique(noise)) == {-1.0, 1.0}
    assert len(np.unique(noise.reshape(copies, -1).T[:, :4], axis=0)) > 2  # not the same at all places
    for first in range(0, copies - copies % 8, 8):
        block = noise[first : first + 8]
        np.testing.assert_array_equal(
            np.einsum("crn,crm->rnm", block, block), np.broadcast_to(8 * np.eye(5), (12, 5, 5))
        )
    if copies == 4:
        assert np.abs(np.einsum("crn,crm->rnm", noise, noise) - 4 * np.eye(5)).any()
    if copies == 24:
        assert (noise[:8] != noise[8:16]).any()


def test_a_recurrence_that_is_not_elementwise_is_refused() -> None:
    """A gru whose gate reads the state past its tap: an entry then depends on the others."""
    model = gru(VOCAB, HIDDEN, 5)

    def consume(params: Any, state: Array, token: Array, tap: Tap = untouched) -> Array:
        mixed = state + 0.1 * jnp.sum(state)
        return tap("state", model.consume(params, mixed, token, untouched))

    mixing = model._replace(consume=consume)
    params = model.init(jax.random.key(0))
    gates.check_elementwise(model, find_taps(model, params), params)
    with pytest.raises(ValueError, match="the recurrence is not elementwise: entries of 'state' depend"):
        gates.check_elementwise(mixing, find_taps(mixing, params), params)
