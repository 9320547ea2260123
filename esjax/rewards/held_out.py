"""Greedy reward and pass@k on held-out prompts."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

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
    prompts = Prompted(*map(jnp.asarray, encode_prompts(chosen, scorer.vocabulary)))
    greedy = make_write(model, config.length, 0.0, scorer.stops)
    sampled = make_write(model, config.length, config.temperature, scorer.stops)

    @jax.jit
    def write(params: Params, prompts: Prompted, keys: Key[Array, " samples"]) -> Array:
        samples = jax.vmap(sampled, (None, None, 0))(params, prompts, keys)
        return jnp.concatenate([greedy(params, prompts, keys[0])[None], samples]).swapaxes(0, 1)

    keys = jax.random.split(loss_key(seed), config.samples)
    texts = [prompt for prompt in chosen for _ in range(1 + config.samples)]

    @default_flags()
    def measure(params: Params) -> HeldOutRewards:
        tokens = np.asarray(write(params, prompts, keys))
        rewards = scorer.rewards(texts, tokens.reshape(-1, config.length), 1 + config.samples)()
        rewards = rewards.reshape(tokens.shape[:2])
        known = rewards[np.isfinite(rewards[:, 0]), 0]
        passed = (rewards[:, 1:] >= config.passing).any(axis=1)
        return HeldOutRewards(float(known.mean()) if len(known) else float("nan"), float(passed.mean()))

    return measure
