"""Architectures against an independent float64 numpy implementation, and their products against plain matrices."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from reference_models import STEPS, busy, mingru_step, reference_losses, wide
from small import MODELS, VOCAB, kept_in_factors, member_of, params_of

from esjax.config.models import MODELS as BY_NAME
from esjax.config.models import RnnConfig
from esjax.core.interpreter import interpret
from esjax.core.noise import low_rank, round_products
from esjax.core.perturbed import PerturbedArray
from esjax.data.tokens import STOP
from esjax.inference.score import make_score
from esjax.models import Model, build_model
from esjax.models.layers import Affine, affine, matmul
from esjax.models.member import Member, consume
from esjax.models.mingru import mingru

TOKENS = np.array([3, 0, 1, 5, 6, 2, 2, 1, 1, 4])
"""Two ends of a document (1) in a row among them."""


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_equations(name: str) -> None:
    model, params = MODELS[name], busy(params_of(MODELS[name]))
    state = reference = np.random.default_rng(1).normal(size=4)
    step = jax.jit(model.step)
    for token in TOKENS:
        got_state, got_logits = step(params, jnp.asarray(state, jnp.float32), jnp.int32(token))
        reference, logits = STEPS[name](wide(params), np.asarray(state, np.float64), int(token))
        # float32 through a handful of sums of up to 16 products of size 1: 1e-6 relative, times a few.
        np.testing.assert_allclose(got_logits, logits, atol=2e-5)
        np.testing.assert_allclose(got_state, reference, atol=2e-5)
        state = reference


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_the_scan_is_step_by_step(name: str, burn_in: int) -> None:
    model, params = MODELS[name], busy(params_of(MODELS[name]))
    expected = reference_losses(name, params, TOKENS)[burn_in:].mean()
    got = Member(model, params).cross_entropy(jnp.asarray(TOKENS, jnp.int32), burn_in)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_score_counts_just_the_tokens_of_documents(name: str) -> None:
    model, params = MODELS[name], busy(params_of(MODELS[name]))
    tokens = np.stack([TOKENS, TOKENS[::-1]]).astype(np.int32)
    scored = np.arange(10)[None, :] < np.array([[10], [7]])
    both = np.concatenate([reference_losses(name, params, row)[keep] for row, keep in zip(tokens, scored, strict=True)])
    score = jax.jit(make_score(model))
    np.testing.assert_allclose(score(params, jnp.asarray(tokens), jnp.asarray(scored)), both.mean(), rtol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_carried_over_a_stop(name: str) -> None:
    model, params = MODELS[name], busy(params_of(MODELS[name]))
    state = consume(model, params, jnp.full(4, 0.9), jnp.int32(STOP))
    np.testing.assert_array_equal(state, model.initial_state(params))


def test_a_state_of_any_type_and_value_is_kept_and_begins_anew() -> None:
    """A count, a number, and log probabilities, of which some are -inf before and after."""
    impossible = jnp.array([0.0, -jnp.inf])
    model = Model(
        init=lambda key: (),
        initial_state=lambda params: (jnp.int32(7), jnp.float32(0.5), impossible),
        predict=lambda params, state: jnp.zeros(VOCAB),
        consume=lambda params, state, token: (state[0] + 1, state[1] + 1, state[2][::-1]),
    )
    after = consume(model, (), (jnp.int32(9), jnp.float32(3.5), impossible), jnp.int32(STOP + 1))
    assert (int(after[0]), float(after[1]), after[2].tolist()) == (10, 4.5, [-np.inf, 0.0])
    fresh = consume(model, (), after, jnp.int32(STOP))
    assert (int(fresh[0]), float(fresh[1]), fresh[2].tolist()) == (7, 0.5, [0.0, -np.inf])
    assert fresh[0].dtype == jnp.int32


@pytest.mark.parametrize("gate_tokens", [1, 3])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_layers_of_mingru_are_the_equations(n_layers: int, gate_tokens: int) -> None:
    """State and logits after each token, through two ends of documents in a row."""
    model = mingru(VOCAB, 4, 6, n_layers, gate_tokens)
    params = busy(jax.eval_shape(model.init, jax.random.key(3)))
    state = model.initial_state(params)
    p, reads = wide(params), jax.jit(lambda *given: (consume(model, *given), model.predict(*given[:2])))
    first = [*p.start], [STOP] * (gate_tokens - 1)
    before: list[int] = []
    reference = first
    for token in TOKENS.tolist():
        state, got = reads(params, state, jnp.int32(token))
        reference, logits = mingru_step(p, reference, token)
        before = [token, *before]
        if token == STOP:
            reference, before = first, []
        # As for the other models: 1e-6 relative, times a few.
        np.testing.assert_allclose(got, logits, atol=2e-5)
        np.testing.assert_allclose(np.stack(state.hidden), reference[0], atol=2e-5)
        assert state.tokens.tolist() == [*before, *[STOP] * gate_tokens][: gate_tokens - 1]


def test_an_entry_of_mingru_depends_on_itself_alone() -> None:
    """Reference: the Jacobian of each layer's new state by its old one, with what the layers below pass on."""
    model = mingru(VOCAB, 4, 6, 2, 3)
    params = busy(jax.eval_shape(model.init, jax.random.key(3)))
    state = jax.tree.map(lambda leaf: leaf + 1, model.initial_state(params))
    jacobian = jax.jacobian(lambda hidden: model.consume(params, state._replace(hidden=hidden), jnp.int32(4)).hidden)
    found = np.asarray(jax.jit(jacobian)(state.hidden))  # [new layer, old layer, entries, entries]
    for layer in (0, 1):
        assert (np.diag(found[layer, layer]) != 0).all()
        np.testing.assert_array_equal(found[layer, layer], np.diag(np.diag(found[layer, layer])))
    assert (found[1, 0] != 0).all()
    assert not found[0, 1].any()


def test_an_entry_of_gru_depends_on_itself_alone_with_its_other_taps_given() -> None:
    """Reference: the Jacobian of the new state by the old, which is the diagonal matrix of the update gate."""
    model = MODELS["gru"]
    params = busy(params_of(model))
    state, values = jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32), {}

    def record(name: str, value: Array, activation: Callable[[Array], Array] = lambda value: value) -> Array:
        values[name] = value
        return activation(value)

    def given(name: str, value: Array, activation: Callable[[Array], Array] = lambda value: value) -> Array:
        return activation(value if name in model.state_taps else values[name])

    model.consume(params, state, jnp.int32(4), record)
    assert set(values) == {"reset", "update", "new", "state"}
    found = jax.jit(jax.jacobian(lambda state: model.consume(params, state, jnp.int32(4), given)))(state)
    np.testing.assert_allclose(found, np.diag(1 / (1 + np.exp(-np.asarray(values["update"])))), atol=1e-6)
    whole = jax.jit(jax.jacobian(lambda state: model.consume(params, state, jnp.int32(4))))(state)
    assert (whole - found != 0).all()


def lookup(matrix: Array, token: Array) -> Array:
    return matrix[token]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_factored_matrix_acts_like_the_added_up_one(rank: int) -> None:
    """Reference: products in float64 with matrix + step * left rightᵀ, written out."""
    rng = np.random.default_rng(2)
    weight, left, right, x = (
        rng.normal(size=shape).astype(np.float32) for shape in [(5, 3), (5, 1, rank), (1, 3, rank), (5,)]
    )
    matrix = PerturbedArray(jnp.asarray(weight), jnp.asarray(left), jnp.asarray(right), jnp.float32(-0.3))
    added_up = weight.astype(np.float64) - 0.3 * left[:, 0].astype(np.float64) @ right[0].T
    np.testing.assert_allclose(interpret(matmul)(jnp.asarray(x), matrix), x @ added_up, atol=5e-6)
    np.testing.assert_allclose(interpret(lookup)(matrix, jnp.int32(4)), added_up[4], atol=5e-6)
    bias = rng.normal(size=3).astype(np.float32)
    layer = Affine(matrix, jnp.asarray(bias))
    np.testing.assert_allclose(interpret(affine)(jnp.asarray(x), layer), x @ added_up + bias, atol=5e-6)
    plain = Affine(jnp.asarray(weight), jnp.asarray(bias))
    np.testing.assert_allclose(affine(jnp.asarray(x), plain), x @ weight.astype(np.float64) + bias, atol=5e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_perturbed_layer_is_a_perturbed_matrix_with_a_row_more(rank: int) -> None:
    """Reference: x with a 1 behind it times that matrix of factors, [rows + 1, columns], in float64."""
    rng, unit = np.random.default_rng(2), 0.7
    layer = Affine(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 3), (3,))))
    x, seed = rng.normal(size=5).astype(np.float32), jnp.array([3, 4], jnp.uint32)
    noise = low_rank(0.3, rank, gaussian=True, units=Affine(unit, unit))
    layout = noise.lay_out(layer)
    (left, right), _ = layout.sample(seed)
    numbers = jax.random.normal(jax.random.wrap_key_data(seed, impl="threefry2x32"), (layout.numbers,), jnp.float32)
    shift = np.asarray(numbers, np.float64)[-rank:]  # the bias comes after the matrix
    rows = np.concatenate([np.asarray(left, np.float64)[:, 0], shift[None]])
    base = np.concatenate([np.asarray(layer.matrix, np.float64), np.asarray(layer.bias, np.float64)[None]])
    added_up = base - 0.3 * unit * rows @ np.asarray(right, np.float64)[0].T / math.sqrt(rank)
    member = member_of(noise, layer, seed, -1.0)
    assert len(kept_in_factors(member)) == 1
    np.testing.assert_allclose(interpret(affine)(jnp.asarray(x), member), np.append(x, 1) @ added_up, atol=5e-6)
    # Neither part is ever there without its noise.
    np.testing.assert_allclose(member.matrix.added_up(), added_up[:-1], atol=5e-6)
    np.testing.assert_allclose(member.bias, added_up[-1], atol=5e-6)


@pytest.mark.parametrize("is_factored", [False, True])
def test_in_bfloat16_products_are_those_of_rounded_numbers(is_factored: bool) -> None:
    """Reference: float64. A product of two bfloat16 has 16 digits, and float32 holds 24."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((40,), (40, 6)))
    params, seed = {"matrix": jnp.asarray(weight), "vector": jnp.asarray(x)}, jnp.array([3, 4], jnp.uint32)
    if is_factored:
        noise = low_rank(0.5, 2, gaussian=True, where=lambda path, leaf: path == "matrix")
        rounded = member_of(noise, params, seed, 1.0, "bfloat16")
        more = 0.5 * 40**-0.5 * np.asarray(noise.lay_out(params).epsilon(seed, params)["matrix"], np.float64)
    else:
        rounded = jax.tree.map(partial(round_products, precision="bfloat16"), params)
        more = np.zeros((40, 6))
    np.testing.assert_array_equal(rounded["vector"], x)
    matrix = rounded["matrix"]
    assert matrix.base.dtype == jnp.bfloat16
    coarse, coarse_x = (np.asarray(jnp.asarray(value, jnp.bfloat16), np.float64) for value in (weight, x))
    product, row = interpret(matmul)(jnp.asarray(x), matrix), interpret(lookup)(matrix, jnp.int32(4))
    np.testing.assert_allclose(product, coarse_x @ coarse + x @ more, atol=1e-5)
    assert np.abs(coarse_x @ coarse - x.astype(np.float64) @ weight).max() > 1e-3
    np.testing.assert_allclose(row, coarse[4] + more[4], atol=1e-5)
    assert row.dtype == product.dtype == jnp.float32


def test_a_first_model_predicts_about_uniformly() -> None:
    for kind in BY_NAME.values():
        model = build_model(kind(), 80)

        @jax.jit
        def predict(key: Array, token: Array, model: Model = model) -> Array:
            params = model.init(key)
            return model.predict(params, consume(model, params, model.initial_state(params), token))

        assert (
            np.ptp(predict(jax.random.key(0), jnp.int32(9))) < 1.5
        )  # ±0.1-ish logits: a factor e^1.5 at the very most


@pytest.mark.parametrize("name", MODELS)
def test_the_unit_has_one_positive_number_a_leaf(name: str) -> None:
    model = MODELS[name]
    units = jax.tree.map(lambda leaf, unit: unit, params_of(model), model.unit)  # raises where they do not match
    assert all(unit > 0 for unit in jax.tree.leaves(units))


def test_the_start_of_the_rnn_is_learnable() -> None:
    """A state of zeros would stay zero whatever is read: the update is a product."""
    model = build_model(RnnConfig(hidden_size=8, n_layers=2), VOCAB)
    params = model.init(jax.random.key(0))
    states = [consume(model, params, model.initial_state(params), jnp.int32(token)) for token in (2, 3)]
    assert np.abs(states[0] - states[1]).max() > 0.1


def test_a_long_score_keeps_its_digits() -> None:
    """Closed form: log 7 for every token; a float32 sum of millions of losses, one by one, would drift by percents."""
    model = MODELS["gru"]
    params = jax.tree.map(jnp.zeros_like, params_of(model))
    tokens = jnp.full((1, 1_500_000), 3, jnp.int32)
    loss = jax.jit(make_score(model))(params, tokens, jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(loss, np.log(VOCAB), rtol=1e-5)
