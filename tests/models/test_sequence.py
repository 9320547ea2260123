"""Models by whole sequences: scored at once or token by token, with the same numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from jaxtyping import Array
from small import VOCAB, dense_member

import esjax
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.models import Model, gru, sequence_model
from esjax.models.custom import Custom
from esjax.models.member import Member

WIDTH = 4


def init(key: Array) -> dict[str, Array]:
    keys = jax.random.split(key, 2)
    return {"in": jax.random.normal(keys[0], (VOCAB, WIDTH)), "out": jax.random.normal(keys[1], (WIDTH, VOCAB))}


def logits(params: dict[str, Array], tokens: Array) -> Array:
    """Read each token and all before it: a mean of embeddings that weighs the last one most."""
    decay = 0.5 ** jnp.arange(len(tokens), dtype=jnp.float32)
    seen = jnp.tril(jnp.stack([jnp.roll(decay[::-1], i + 1) for i in range(len(tokens))]))
    return jnp.tanh(seen @ params["in"][tokens]) @ params["out"]


def by_hand(params: dict[str, Array], before: list[int]) -> np.ndarray:
    """Reference: the logits after some tokens, in float64 numpy."""
    table, out = (np.asarray(params[name], np.float64) for name in ("in", "out"))
    state = sum(0.5**age * table[token] for age, token in enumerate(reversed(before)))
    return np.tanh(state) @ out


def nats_by_hand(params: dict[str, Array], tokens: list[int], context: int) -> list[float]:
    nats, before = [], [STOP]
    for token in tokens:
        scores = by_hand(params, before[-context:])
        nats.append(float(np.log(np.exp(scores).sum()) - scores[token]))
        before.append(token)
    return nats


TOKENS = [3, 2, 6, 4, 5, 2, 3, 3, 6]


def test_a_window_is_scored_as_token_by_token() -> None:
    model = sequence_model(init, logits, context=12)
    params = init(jax.random.key(0))
    member = Member(model, params)
    expected = nats_by_hand(params, TOKENS, 12)
    np.testing.assert_allclose(member.nats(jnp.array(TOKENS)), expected, rtol=1e-5)
    stepwise = Member(model._replace(logits=None), params)
    np.testing.assert_allclose(stepwise.nats(jnp.array(TOKENS)), expected, rtol=1e-5)
    np.testing.assert_allclose(member.cross_entropy(jnp.array(TOKENS), 2), np.mean(expected[2:]), rtol=1e-5)
    state = member.read(jnp.array(TOKENS[:4]))
    np.testing.assert_allclose(member.nats(jnp.array(TOKENS[4:]), state), expected[4:], rtol=1e-5)


@pytest.mark.parametrize("context", [1, 2, 3, 4, 8])
def test_while_writing_the_last_tokens_are_read_again(context: int) -> None:
    """Reference: the logits after the last `context` tokens, written out."""
    model = sequence_model(init, logits, context=context)
    params = init(jax.random.key(0))
    predict, consume = jax.jit(model.predict), jax.jit(model.consume)
    state, before = model.initial_state(params), [STOP]
    for token in TOKENS:
        np.testing.assert_allclose(predict(params, state), by_hand(params, before[-context:]), rtol=1e-4, atol=1e-5)
        state = consume(params, state, jnp.int32(token))
        before.append(token)


@pytest.mark.parametrize(("context", "length"), halved([2, 3, 4, 5, 8], [1, 4, 5, 9, 23]))
def test_a_long_text_is_scored_in_pieces_that_overlap_by_half(context: int, length: int) -> None:
    """Reference: each token from what its piece holds before it; the first piece begins with STOP."""
    tokens = (TOKENS * 3)[:length]
    params = init(jax.random.key(0))
    read, half, expected = [STOP, *tokens], max(context // 2, 1), []
    for place in range(length):
        piece = 0 if place < context else -(-(place + 1 - context) // half)
        before = read[piece * half : place + 1]
        scores = by_hand(params, before)
        expected.append(np.log(np.exp(scores).sum()) - scores[tokens[place]])
    model = sequence_model(init, logits, context=context)
    got = jax.jit(lambda params, tokens: Member(model, params).nats(tokens))(params, jnp.array(tokens))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_stepwise_model_may_be_scored_by_whole_sequences() -> None:
    """Reference: the same gru, token by token; it writes stepwise in either case."""
    plain = gru(VOCAB, 4, 6)

    def whole(params: Any, tokens: Array) -> Array:
        def step(state: Array, token: Array) -> tuple[Array, Array]:
            state = plain.consume(params, state, token)
            return state, plain.predict(params, state)

        start = jnp.where(tokens[0] == STOP, plain.initial_state(params), 0.0)
        _, rest = jax.lax.scan(step, start, tokens[1:])
        return jnp.concatenate([plain.predict(params, start)[None], rest])

    both, params = plain._replace(logits=whole, context=32), plain.init(jax.random.key(1))
    tokens = jnp.array(TOKENS)
    np.testing.assert_allclose(Member(both, params).nats(tokens), Member(plain, params).nats(tokens), rtol=1e-5)
    start = both.initial_state(params)
    np.testing.assert_array_equal(Member(both, params).generate(start, 5), Member(plain, params).generate(start, 5))


@pytest.mark.usefixtures("lenient_promotion")
def test_it_learns(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("abcd" * (3 + n % 5) for n in range(80)))

    def model(vocab_size: int) -> Model:
        def first(key: Array) -> dict[str, Array]:
            return {"in": jax.random.normal(key, (vocab_size, WIDTH)), "out": jnp.zeros((WIDTH, vocab_size))}

        return sequence_model(first, lambda params, tokens: params["in"][tokens] @ params["out"], context=8)

    config = Config(steps=60, data=DataConfig(text=str(text), held_out=0.2, window=6), es=EsConfig(population_size=256))
    infos = list(esjax.train(config, model=model))
    assert infos[0].loss > 1.6
    assert infos[-1].loss < 1.0


@pytest.mark.parametrize(
    ("function", "context", "words"),
    [
        (lambda params, tokens: params["out"], 4, r"returns float32\[4, 7\] for 6 tokens|float32\[6, 7\]"),
        (lambda params, tokens: tokens, 6, r"returns int32\[6\] for 6 tokens; it must return a float logit"),
        (logits, 0, "context of the model own is 0"),
    ],
)
def test_logits_of_another_form_are_refused(function: Any, context: int, words: str) -> None:
    def custom(vocab_size: int) -> Model:
        length = 6 if context == 4 else context
        made = sequence_model(init, function, max(length, 1))
        # The stepwise parts are checked first; here they are those of a model that keeps the contract.
        plain = sequence_model(init, logits, max(length, 1))
        return made._replace(predict=plain.predict, context=length)

    custom.__qualname__ = "own"
    with pytest.raises(EsjaxError, match=words):
        Custom(model=custom).build(GruConfig(), VOCAB)


def test_a_population_of_a_sequence_model_is_a_loop_over_members() -> None:
    """Reference: one member at a time, weights added up."""
    model = sequence_model(init, logits, context=12)
    params, tokens = init(jax.random.key(0)), jnp.array([TOKENS, TOKENS[::-1]])
    noise = esjax.low_rank(0.1)

    def loss(params: Any, tokens: Array) -> Array:
        return Member(model, params).cross_entropy(tokens)

    seeds = esjax.pair_seeds(0, 0, 2)
    losses = jax.jit(esjax.evaluate(loss, noise))(params, seeds, tokens)
    dense = dataclasses.replace(noise, units=noise.lay_out(params).units)
    alone = jax.jit(lambda seed, sign, tokens: loss(dense_member(dense, params, seed, sign), tokens))
    for pair in range(2):
        for side, sign in enumerate((1.0, -1.0)):
            np.testing.assert_allclose(losses[pair, side], alone(seeds[pair], sign, tokens[pair]), rtol=1e-5)
