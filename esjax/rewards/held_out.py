"""Greedy reward and pass@k on held-out prompts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32
from numpy import ndarray

from esjax.config.reward import MOST_HELD_OUT, RewardConfig
from esjax.core.seeds import loss_key
from esjax.flags import default_flags
from esjax.models.model import Model, Params
from esjax.rewards.prompts import encode_prompts
from esjax.rewards.scoring import Scorer
from esjax.rewards.writing import Prompted, make_write


class HeldOutRewards(NamedTuple):
    """Rewards on held-out prompts. A call that fails is left out of the mean, and passes nothing.

    Attributes:
        greedy_reward: Mean reward of the completions of most probable tokens; NaN if all calls failed.
        pass_at_k: Fraction of the prompts for which one of k sampled completions, or more, passes (Chen et al. 2021,
            section 2.1, with k samples).
    """

    greedy_reward: float
    pass_at_k: float


MeasureRewards = Callable[[Params], HeldOutRewards]
"""`(params) -> rewards`, always on the same prompts and with the same random keys."""


@default_flags()
def make_measure_rewards(
    model: Model, config: RewardConfig, scorer: Scorer, seed: UInt32[Array, "2"]
) -> MeasureRewards | None:
    """Make the function that measures rewards on held-out prompts.

    Args:
        model: The architecture.
        config: Settings of rewards.
        scorer: Scores the completions.
        seed: Seed of the samples.

    Returns:
        The function; None if no prompt is held out.
    """
    chosen = scorer.held_out[:MOST_HELD_OUT]
    if not chosen:
        return None
    tool, size = scorer.tool, 1 + config.samples
    pauses = () if tool is None else tool.pauses
    greedy = make_write(model, config.length, 0.0, scorer.stops, pauses)
    sampled = make_write(model, config.length, config.temperature, scorer.stops, pauses)

    @jax.jit
    def write(params: Params, texts: Prompted, keys: Key[Array, " samples"]) -> Array:
        """Continue texts [prompts, 1 + samples, ...]: the first one of each prompt greedily."""
        first = jax.tree.map(lambda leaf: leaf[:, 0], texts)
        others = jax.tree.map(lambda leaf: leaf[:, 1:], texts)
        samples = jax.vmap(sampled, (None, 1, 0), 1)(params, others, keys)
        return jnp.concatenate([greedy(params, first, keys[0])[:, None], samples], axis=1)

    keys = jax.random.split(loss_key(seed), config.samples)
    texts = [prompt for prompt in chosen for _ in range(size)]
    encoded = encode_prompts(texts, scorer.vocabulary)

    @default_flags()
    def measure(params: Params) -> HeldOutRewards:
        def write_on(*text: ndarray) -> ndarray:
            shaped = [jnp.asarray(leaf.reshape(len(chosen), size, *leaf.shape[1:])) for leaf in text]
            return np.asarray(write(params, Prompted(*shaped), keys)).reshape(-1, config.length)

        tokens = write_on(*encoded, np.zeros_like(encoded.lengths))
        failed = np.zeros(len(texts), bool)
        if tool is not None:
            tokens, failed = tool.finish([one.text for one in texts], encoded, tokens, write_on)
        rewards = np.where(failed, np.nan, scorer.rewards(texts, tokens, size)).reshape(-1, size)
        known = rewards[np.isfinite(rewards[:, 0]), 0]
        passed = (rewards[:, 1:] >= config.passing).any(axis=1)
        return HeldOutRewards(float(known.mean()) if len(known) else float("nan"), float(passed.mean()))

    return measure
