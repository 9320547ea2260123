"""REINFORCE (Williams 1992): the rival by backpropagation for rewards over text that a model writes.

The model writes a batch of documents, each of which gets a reward R. An estimate of the gradient of the mean reward is

    mean over the documents of (R - mean R) d/dparams log p(document)

with log p(document) the sum over its tokens, the STOP at its end included. The model is differentiated as it stands, by
`jax.grad` of what `esjax.Member` predicts. Optimizer, schedule and average are those of a run.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esjax.config.settings import OptimConfig
from esjax.core import in_units
from esjax.core.seeds import key_of
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import Vocabulary
from esjax.models.member import Member
from esjax.models.model import Model, Params
from esjax.replica.optimizer import make_optimizer
from esjax.replica.update import TrainState, init_state, make_apply
from esjax.rewards.decoding import decode_all


class Step(NamedTuple):
    """A step of REINFORCE.

    Attributes:
        reward: Mean reward of the documents that this step wrote.
        params: The averaged weights after it.
    """

    reward: float
    params: Params


def log_probability(model: Model, params: Params, tokens: Int[Array, " length"]) -> Float[Array, ""]:
    """Return the log probability of a document as `Member.generate` draws it at temperature 1: UNK never occurs.

    Args:
        model: The architecture.
        params: The weights.
        tokens: The document. Tokens after its first STOP do not count; without a STOP, it was cut off at this length.
    """
    member = Member(model, params)
    logits = jax.vmap(member.predict)(member.states(tokens)).at[:, UNK].set(-jnp.inf)
    drawn = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    stops = (tokens == STOP).astype(jnp.int32)
    stops_before = jnp.cumsum(stops) - stops
    return jnp.sum(jnp.where(stops_before == 0, drawn, 0.0))


def policy_gradient(
    model: Model, params: Params, tokens: Int[Array, "documents length"], rewards: Float[Array, " documents"]
) -> Params:
    """Return the gradient of minus the mean reward, estimated from documents that these weights wrote."""
    advantages = rewards - jnp.mean(rewards)

    def surrogate(params: Params) -> Float[Array, ""]:
        return -jnp.mean(advantages * jax.vmap(lambda one: log_probability(model, params, one))(tokens))

    return jax.grad(surrogate)(params)


def reinforce(
    model: Model,
    params: Params,
    vocabulary: Vocabulary,
    rewards_of: Callable[[Sequence[str]], Sequence[float]],
    optim: OptimConfig,
    *,
    documents: int,
    length: int,
    seed: int,
) -> Iterator[Step]:
    """Train by REINFORCE without end.

    Args:
        model: The architecture.
        params: The weights to start from.
        vocabulary: Turns tokens into texts.
        rewards_of: The reward of each text; higher is better.
        optim: Settings of the optimizer; a cosine needs its `decay_steps`.
        documents: Documents, and calls of the reward, in a step.
        length: Most tokens of a document.
        seed: Seed of what is written.
    """
    units = model.units(params)
    optimizer = make_optimizer(optim, None)
    apply = make_apply(optimizer, units, optim.average)
    state, key = init_state(params, in_units(optimizer, units)), key_of(seed)

    @jax.jit
    def write(params: Params, step: Int[Array, ""]) -> Int[Array, "documents length"]:
        member = Member(model, params)
        keys = jax.random.split(jax.random.fold_in(key, step), documents)
        return jax.vmap(lambda key: member.generate(member.initial_state(), length, key))(keys)

    @jax.jit
    def update(state: TrainState, tokens: Array, rewards: Array) -> TrainState:
        return apply(state, policy_gradient(model, state.params, tokens, rewards), -jnp.mean(rewards))[0]

    while True:
        tokens = write(state.params, state.step)
        rewards = np.array(rewards_of(decode_all(vocabulary, np.asarray(tokens))), np.float32)
        state = update(state, tokens, rewards)
        yield Step(float(rewards.mean()), state.average)
