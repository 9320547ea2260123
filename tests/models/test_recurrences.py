"""Recurrent models of several layers against float64 loops, and their parallel form against the steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from reference_models import busy, gru_layers, lru_layers, lstm_layers, rwkv7_layers, wide
from small import VOCAB, noise_of

import esjax
from esjax.config.models import Rwkv7Config
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.models import Model, gru, lru, lstm, member, mingru, rwkv7
from esjax.models.custom.check import check_model
from esjax.models.member import Member, consume

TOKENS = [3, 0, 1, 5, 6, 2, 2, 1, 1, 4, 3, 3, 5]
"""Two ends of a document (1) in a row among them."""

MODELS: dict[str, tuple[Model, Callable[[Any, list[int]], np.ndarray]]] = {
    "gru, two layers": (gru(VOCAB, 4, 6, 2), gru_layers),
    "lstm": (lstm(VOCAB, 4, 6, 1), lstm_layers),
    "lstm, two layers": (lstm(VOCAB, 4, 6, 2), lstm_layers),
    "lru": (lru(VOCAB, 4, 6, 2, 3), lru_layers),
    "lru of one token": (lru(VOCAB, 4, 6, 1, 1), lru_layers),
    "rwkv7": (rwkv7(VOCAB, 8, 4, 6, 3, 3), partial(rwkv7_layers, head_size=4)),
}
PARALLEL = {
    "mingru": mingru(VOCAB, 4, 6, 2, 3),
    "mingru of one token": mingru(VOCAB, 4, 6, 1, 1),
    "lru": MODELS["lru"][0],
    "lru of one token": MODELS["lru of one token"][0],
}


def params_of(model: Model) -> Any:
    return busy(model.init(jax.random.key(0)))


def stepwise(model: Model) -> Model:
    return model._replace(states=None)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_equations(name: str) -> None:
    model, reference = MODELS[name]
    params = params_of(model)

    def logits(params: Any, tokens: Array) -> Array:
        return jax.vmap(lambda state: model.predict(params, state))(Member(stepwise(model), params).states(tokens))

    expected = reference(wide(params), TOKENS)
    # float32 through up to three layers of sums of up to 16 products of size 1.
    np.testing.assert_allclose(jax.jit(logits)(params, jnp.array(TOKENS)), expected, atol=2e-4)
    assert np.abs(np.diff(expected, axis=0)).max() > 0.1


@pytest.mark.parametrize("name", PARALLEL)
def test_all_states_at_once_are_those_step_by_step(name: str) -> None:
    """From the middle of a document, over two ends of documents."""
    model = PARALLEL[name]
    params, tokens = params_of(model), jnp.array(TOKENS)
    state = Member(stepwise(model), params).read(jnp.array([4, 2]))

    def read(state: Any, token: Array) -> tuple[Any, Any]:
        after = consume(model, params, state, token)
        return after, after

    assert model.states is not None
    found, expected = model.states(params, state, tokens), jax.lax.scan(read, state, tokens)[1]
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    jax.tree.map(np.testing.assert_array_equal, found.tokens, expected.tokens)


@pytest.mark.parametrize("name", ["mingru", "lru"])
def test_members_read_and_score_in_parallel_as_step_by_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "PIECE", 5)
    model = PARALLEL[name]
    params, tokens = params_of(model), jnp.array(TOKENS)
    one, other = Member(model, params), Member(stepwise(model), params)
    np.testing.assert_allclose(one.nats(tokens), other.nats(tokens), atol=1e-4)
    np.testing.assert_allclose(one.cross_entropy(tokens, 2), other.cross_entropy(tokens, 2), rtol=1e-4)
    for got, expected in ((one.read(tokens), other.read(tokens)), (one.states(tokens), other.states(tokens))):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, expected)
    none = tokens[:0]
    jax.tree.map(np.testing.assert_array_equal, one.read(none), one.initial_state())
    assert one.nats(none).shape == (0,)


@pytest.mark.parametrize("name", [*MODELS, "mingru"])
def test_nothing_is_added_up(name: str) -> None:
    """A population shares every matrix: whole windows, and the steps of generation."""
    model = PARALLEL.get(name) or MODELS[name][0]
    params = params_of(model)

    def loss(params: Any, tokens: Array) -> Array:
        of = Member(model, params)
        written = of.generate(of.read(tokens), 3, jax.random.key(1))
        return of.cross_entropy(tokens, 1) + jnp.sum(written).astype(jnp.float32)

    assert esjax.explain(loss, noise_of(model), params, jnp.array(TOKENS)) == []


@pytest.mark.parametrize("name", ["lstm, two layers", "lru", "rwkv7"])
def test_they_keep_the_interface_and_carry_nothing_over_a_stop(name: str) -> None:
    model = MODELS[name][0]
    assert check_model(name, model, VOCAB) is model
    params = params_of(model)
    state = Member(stepwise(model), params).read(jnp.array([4, 2, 5]))
    jax.tree.map(
        np.testing.assert_array_equal, consume(model, params, state, jnp.int32(STOP)), model.initial_state(params)
    )


def test_states_of_another_form_are_refused() -> None:
    model = PARALLEL["lru of one token"]
    one = model._replace(states=lambda params, state, tokens: state)
    with pytest.raises(EsjaxError, match=r"states of own returns .* for 2 tokens; it must return"):
        check_model("own", one, VOCAB)


def test_sizes_of_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(EsjaxError, match="head_size must divide hidden_size, got 5 for 32"):
        Rwkv7Config(head_size=5)
