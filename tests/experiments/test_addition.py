"""The example of addition: its reward knows right answers from wrong ones, wherever a window begins."""

from pathlib import Path

import addition
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from esjax.config.settings import replace
from esjax.data.packing import pack_stream
from esjax.data.tokens import STOP
from esjax.data.vocabulary import fit_vocabulary
from esjax.models import Model
from esjax.models.member import Member
from esjax.training.run import train

SUMS = addition.make_text().splitlines()
VOCABULARY = fit_vocabulary("char", SUMS, None)
CERTAIN = 30.0
"""Logit of what the calculator writes next; the others have 0."""


def calculator(off_by: int) -> Model:
    """A model that reads two digits and writes their sum, or a number that is off by a little."""
    digits = jnp.asarray(VOCABULARY.encode("0123456789"))

    def predict(params: Array, state: Array) -> Array:
        total = state[0] + state[1] + off_by
        ones, tens = digits[total % 10], digits[total // 10]
        written = jnp.stack([jnp.where(total > 9, tens, ones), jnp.where(total > 9, ones, STOP), jnp.int32(STOP)])
        return CERTAIN * jax.nn.one_hot(written[jnp.clip(state[2] - 4, 0, 2)], VOCABULARY.size)

    def consume(params: Array, state: Array, token: Array) -> Array:
        digit = jnp.argmax(digits == token)
        at = state[2]
        return jnp.stack([jnp.where(at == 0, digit, state[0]), jnp.where(at == 2, digit, state[1]), at + 1])

    return Model(lambda key: jnp.zeros(1), lambda params: jnp.zeros(3, jnp.int32), predict, consume)


@pytest.mark.parametrize(("off_by", "right"), [(0, 1.0), (1, 0.0), (-1, 0.0)])
def test_only_the_sum_itself_is_right(off_by: int, right: float) -> None:
    """Reference: a calculator that is right, or wrong, whatever it is asked; 9+9+1 and 0+0-1 are wrong as well."""
    stream, window = pack_stream([VOCABULARY.encode(line) for line in SUMS]), 14
    windows = np.stack([stream[first : first + window] for first in range(len(stream) - window + 1)])
    member, key = Member(calculator(off_by), jnp.zeros(1)), jax.random.key(0)
    plain, hinted = addition.make_reward(0.0), addition.make_reward(0.1)
    rewards = jax.vmap(lambda window: plain(member, window, key))(jnp.asarray(windows))
    np.testing.assert_array_equal(rewards, right)
    hints = jax.vmap(lambda window: hinted(member, window, key))(jnp.asarray(windows)) - rewards
    # What is right is certain; of a wrong answer, one token at least has the probability e^-30.
    assert (jnp.abs(hints) < 1e-3).all() if right else (hints < -2.9).all()


@pytest.mark.usefixtures("lenient_promotion")
def test_answers_are_read_from_a_run(tmp_path: Path) -> None:
    text = tmp_path / "sums.txt"
    text.write_text(addition.make_text())
    config = replace(addition.make_config(text, 1.0), steps=1, seconds=None)
    config = replace(config, es=replace(config.es, population_size=16))
    run = train(config, model=lambda size: calculator(0), reward=addition.make_reward(0.1), tell=lambda line: None)
    answers = addition.answers(run)
    assert addition.count_right(answers) == 100
    assert answers["7+8="] == "15"
    assert addition.count_right({**answers, "7+8=": "16", "0+0=": ""}) == 98
