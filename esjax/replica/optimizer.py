"""From settings to an optax transformation. `esjax.replica.transformation` adapts custom ones."""

from typing import Any

import jax
import optax

from esjax.config.settings import OptimConfig
from esjax.errors import EsjaxError

DECAY_STEPS = 100
"""Default number of steps after which inverse_sqrt has fallen to 71%."""


def learning_rate(config: OptimConfig, steps: int | None) -> optax.Schedule:
    """Build the learning rate as a function of the step.

    After a linear warm-up of `warmup_steps` it is constant; cosine, which reaches 0 at `decay_steps`; or inverse_sqrt,
    which falls as 1 / sqrt(1 + step / decay_steps) and needs no planned end.

    Args:
        config: Settings of the optimizer.
        steps: Length of the run: the end of a cosine without `decay_steps`.

    Raises:
        EsjaxError: The schedule is cosine and neither `decay_steps` nor `steps` is set.
    """
    peak = config.learning_rate
    if config.schedule == "cosine":
        end = config.decay_steps or steps
        if end is None:
            raise EsjaxError("optim.schedule cosine needs optim.decay_steps or steps, to know where it ends")
        after = optax.cosine_decay_schedule(peak, max(end - config.warmup_steps, 1))
    elif config.schedule == "inverse_sqrt":

        def after(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
            return peak * (1 + step / (config.decay_steps or DECAY_STEPS)) ** -0.5
    else:
        after = optax.constant_schedule(peak)
    if config.warmup_steps == 0:
        return after
    # The first step is (1 / warmup_steps) of the peak, not 0: a step of size 0 would be wasted.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def last_step(config: OptimConfig, steps: int | None) -> int | None:
    """Return the number of steps after which the learning rate stays 0; None if it never does.

    Args:
        config: Settings of the optimizer.
        steps: See `learning_rate`.
    """
    end = config.decay_steps or steps
    if config.schedule != "cosine" or end is None:
        return None
    return max(end, config.warmup_steps + 1)


def make_optimizer(config: OptimConfig, steps: int | None) -> optax.GradientTransformation:
    """Build the named optimizer: adam (Kingma & Ba 2015, algorithm 1) or sgd with momentum, with decoupled decays.

    Raises:
        EsjaxError: See `learning_rate`.
    """
    if config.optimizer == "adam":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    else:
        direction = optax.trace(config.momentum)
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    decay += [_toward_start(config.anchor)] if config.anchor else []
    return optax.chain(direction, *decay, optax.scale_by_learning_rate(learning_rate(config, steps)))


def _toward_start(strength: float) -> optax.GradientTransformation:
    """Add `strength` times the distance of each weight from its first value, which the state keeps."""

    def update(updates: optax.Updates, start: optax.Params, params: optax.Params | None = None) -> tuple[Any, Any]:
        moved = jax.tree.map(lambda update, now, first: update + strength * (now - first), updates, params, start)
        return moved, start

    return optax.GradientTransformation(lambda params: params, update)
