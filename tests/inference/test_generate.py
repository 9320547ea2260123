"""Sampling and beam search against exhaustive enumeration and closed forms."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_models import busy, reference_losses
from small import MODELS, VOCAB, params_of

from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import FIRST, Vocabulary
from esjax.devices.mesh import local_mesh
from esjax.errors import EsjaxError
from esjax.inference.generate import Sampling, beam_search, sample
from esjax.inference.language_model import LanguageModel
from esjax.models.member import Member
from esjax.models.model import Model

MODEL = MODELS["gru"]
PARAMS = busy(params_of(MODEL))
LENGTH = 4
WRITE: dict[str, Any] = {"max_tokens": LENGTH, "count": 1, "seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sentences() -> dict[tuple[int, ...], float]:
    """Every text of at most LENGTH tokens with its log probability, by the float64 reference; UNK apart."""
    found = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        if STOP in tokens:
            tokens = (*tokens[: tokens.index(STOP)], *[STOP] * (LENGTH - tokens.index(STOP)))
        if UNK in tokens or tokens in found:
            continue
        ended = tokens.index(STOP) + 1 if STOP in tokens else LENGTH
        found[tokens] = -reference_losses("gru", PARAMS, np.array(tokens[:ended])).sum()
    return found


def fixed(logits: list[float]) -> Model:
    """A model that predicts the same whatever it read."""
    return Model(
        init=lambda key: jnp.zeros(1),
        initial_state=lambda params: jnp.zeros(1),
        predict=lambda params, state: jnp.asarray(logits, jnp.float32),
        consume=lambda params, state, token: state,
    )


def draws(model: Model, sampling: Sampling, count: int = 2000) -> np.ndarray:
    one = jax.jit(lambda keys: sample(model, jnp.zeros(1), jnp.zeros(1), keys, 1, sampling)[:, 0])
    return np.asarray(one(jax.random.split(jax.random.key(0), count)))


def test_a_wide_beam_search_finds_the_most_probable_texts_of_all() -> None:
    best = sorted(sentences().items(), key=lambda item: -item[1])[:10]
    beams = beam_search(MODEL, PARAMS, MODEL.initial_state(PARAMS), VOCAB**LENGTH, LENGTH)
    for row in range(10):
        assert tuple(np.asarray(beams.tokens[row]).tolist()) == best[row][0]
        np.testing.assert_allclose(beams.log_probability[row], best[row][1], rtol=1e-4)


def test_a_beam_of_one_is_greedy() -> None:
    state = MODEL.initial_state(PARAMS)
    beams = beam_search(MODEL, PARAMS, state, 1, 12)
    greedy = sample(MODEL, PARAMS, state, jax.random.key(0)[None], 12, Sampling(temperature=0.0))[0]
    np.testing.assert_array_equal(beams.tokens[0], greedy)


def test_beams_carry_their_own_probability() -> None:
    beams = beam_search(MODEL, PARAMS, MODEL.initial_state(PARAMS), 3, LENGTH)
    by_text = sentences()
    for tokens, log_probability in zip(np.asarray(beams.tokens), beams.log_probability, strict=True):
        np.testing.assert_allclose(log_probability, by_text[tuple(tokens.tolist())], rtol=1e-4)


def test_samples_follow_the_model() -> None:
    """Closed form: softmax without UNK; 2000 draws are within 5 √(p(1-p)/2000) of it."""
    logits = np.array([3.0, 0.5, 0.0, 1.0, -1.0])
    p = np.exp(logits) * (np.arange(5) != UNK)
    p /= p.sum()
    got = np.bincount(draws(fixed(logits.tolist()), Sampling()), minlength=5) / 2000
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / 2000)).all()


def test_temperature_sharpens() -> None:
    logits = np.array([-9.0, 0.5, 0.0, 1.0])
    p = np.exp(logits / 0.5) * (np.arange(4) != UNK)
    p /= p.sum()
    got = np.bincount(draws(fixed(logits.tolist()), Sampling(temperature=0.5)), minlength=4) / 2000
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / 2000)).all()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(top_k=1), {3}),
        (Sampling(top_k=2), {3, 1}),
        (Sampling(top_k=99), {1, 2, 3, 4}),
        # Without UNK the probabilities are .5, .3, .15, .05: 0.5 is reached by one token, 0.6 by two.
        (Sampling(top_p=0.4), {3}),
        (Sampling(top_p=0.6), {3, 1}),
        (Sampling(top_p=0.9), {3, 1, 2}),
        (Sampling(top_p=0.9, top_k=2), {3, 1}),
        (Sampling(temperature=0.0), {3}),
    ],
)
def test_cutting_off_the_tail(sampling: Sampling, allowed: set[int]) -> None:
    logits = np.log([0.9, 0.3, 0.15, 0.5, 0.05]).tolist()
    assert set(draws(fixed(logits), sampling).tolist()) == allowed


def language_model() -> LanguageModel:
    return LanguageModel(MODEL, Vocabulary("char", tuple("abcdefgh"[: VOCAB - FIRST])), local_mesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 2**31}, r"count times max_tokens must be below 2\^31, got 1 times 2147483648"),
        ({"count": 10**10}, r"count times max_tokens must be below 2\^31, got 10000000000 times 4"),
        ({"count": 2**20, "max_tokens": 2**11}, r"count times max_tokens must be below 2\^31"),
        ({"temperature": math.inf}, "temperature must be at least 0 and a finite float32, got inf"),
        ({"temperature": 1e39}, r"temperature must be at least 0 and a finite float32, got 1e\+39"),
        ({"beams": 3 * 10**9}, r"beams times max_tokens must be below 2\^31, got 3000000000 times 4"),
        ({"beams": 2**30, "max_tokens": 1}, rf"beams times the size of the vocabulary .* times {VOCAB}"),
        ({"beams": 1, "max_tokens": 2**31}, r"beams times max_tokens must be below 2\^31"),
    ],
)
def test_a_number_that_is_too_large_is_named(changes: dict[str, Any], message: str) -> None:
    """Reference: int32, in which places are counted, and float32."""
    call = language_model().search if "beams" in changes else language_model().write
    defaults = {} if "beams" in changes else WRITE
    with pytest.raises(EsjaxError, match=message):
        call(PARAMS, "", **{"max_tokens": LENGTH, **defaults, **changes})


def test_more_of_the_most_probable_tokens_than_there_are_is_all_of_them() -> None:
    assert language_model().write(PARAMS, "", **{**WRITE, "top_k": 3 * 10**9}) == language_model().write(
        PARAMS, "", **{**WRITE, "top_k": VOCAB}
    )


def test_nothing_follows_a_stop() -> None:
    keys = jax.random.split(jax.random.key(1), 20)
    tokens = np.asarray(sample(MODEL, PARAMS, MODEL.initial_state(PARAMS), keys, 30, Sampling()))
    assert (tokens == STOP).any()
    for row in tokens:
        ended = np.flatnonzero(row == STOP)
        assert not ended.size or (row[ended[0] :] == STOP).all()


def test_texts_written_together_are_those_written_alone() -> None:
    """Reference: one text at a time. They end at different lengths."""
    keys, start = jax.random.split(jax.random.key(1), 6), MODEL.initial_state(PARAMS)
    together = sample(MODEL, PARAMS, start, keys, 30, Sampling())
    alone = [sample(MODEL, PARAMS, start, key[None], 30, Sampling())[0] for key in keys]
    np.testing.assert_array_equal(together, alone)
    assert len({int(np.argmax(np.asarray(row) == STOP)) for row in alone}) > 1


def test_reading_a_prompt_is_consuming_it_token_by_token() -> None:
    prompt = jnp.array([3, 4, 2])
    state = MODEL.initial_state(PARAMS)
    for token in prompt:
        state = MODEL.consume(PARAMS, state, token)
    np.testing.assert_allclose(Member(MODEL, PARAMS).read(prompt), state, rtol=1e-6)
    empty = Member(MODEL, PARAMS).read(jnp.zeros(0, jnp.int32))
    np.testing.assert_array_equal(empty, MODEL.initial_state(PARAMS))
