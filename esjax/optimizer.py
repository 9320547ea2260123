"""The optax transformation of a run: by settings, or any other that needs no more than an update of this kind has."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PyTree

from esjax.config import OptimConfig
from esjax.core.units import in_units
from esjax.errors import EsjaxError
from esjax.models.model import Params

DECAY_STEPS = 100
"""Step at which inverse_sqrt has fallen to 71%, unless the settings say another."""


def learning_rate(config: OptimConfig, steps: int | None) -> optax.Schedule:
    """Build the learning rate as a function of the step.

    After a linear warm-up of `warmup_steps`: constant; cosine, down to 0 at `decay_steps`; or inverse_sqrt, which
    falls as 1 / sqrt(1 + step / decay_steps) and needs no end to be known.

    Args:
        config: Settings of the optimizer.
        steps: Length of the run, in place of `decay_steps` where that is not set.

    Raises:
        EsjaxError: The schedule is cosine and has no end.
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
    """Return the number of steps after which the learning rate is 0 for good; None: it never is.

    Args:
        config: Settings of the optimizer.
        steps: See `learning_rate`.
    """
    end = config.decay_steps or steps
    if config.schedule != "cosine" or end is None:
        return None
    return max(end, config.warmup_steps + 1)


def make_optimizer(config: OptimConfig, steps: int | None) -> optax.GradientTransformation:
    """Build the optimizer by name: adam (Kingma & Ba 2015) or sgd with momentum, with decoupled weight decay."""
    if config.optimizer == "adam":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    else:
        direction = optax.trace(config.momentum)
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    return optax.chain(direction, *decay, optax.scale_by_learning_rate(learning_rate(config, steps)))


@struct.dataclass
class _KeptKey:
    """A typed random key as plain integers, which can be saved, hashed and sent."""

    data: PyTree
    kind: str = struct.field(pytree_node=False)


def kept(optimizer: optax.GradientTransformation, takes_value: bool = True) -> optax.GradientTransformationExtraArgs:
    """Let the state of any optax transformation consist of plain arrays.

    Args:
        optimizer: Any optax transformation; its state may hold typed random keys.
        takes_value: Whether it is given the keyword `value`, the loss of the step.
    """

    def stored(state: PyTree) -> PyTree:
        def store(leaf: Any) -> Any:
            leaf = jnp.asarray(leaf)
            return _KeptKey(jax.random.key_data(leaf), str(jax.random.key_impl(leaf))) if _is_key(leaf) else leaf

        return jax.tree.map(store, state)

    def live(state: PyTree) -> PyTree:
        def restore(leaf: Any) -> Any:
            return jax.random.wrap_key_data(leaf.data, impl=leaf.kind) if isinstance(leaf, _KeptKey) else leaf

        return jax.tree.map(restore, state, is_leaf=lambda leaf: isinstance(leaf, _KeptKey))

    def init(params: PyTree) -> PyTree:
        return stored(optimizer.init(params))

    def update(
        gradient: PyTree, state: PyTree, params: PyTree | None = None, *, value: Any = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        more: dict[str, Any] = {"value": value} if takes_value else {}
        updates, state = optimizer.update(gradient, live(state), params, **more)
        return updates, stored(state)

    return optax.GradientTransformationExtraArgs(init, update)


def fit_optimizer(
    optimizer: optax.GradientTransformation, params: Params, units: PyTree
) -> optax.GradientTransformationExtraArgs:
    """Try one update with an optimizer, without computing anything.

    Args:
        optimizer: Any optax transformation.
        params: The first parameters.
        units: Unit of each leaf.

    Returns:
        The optimizer, see `kept`. It is given `value`, if it takes that.

    Raises:
        EsjaxError: It needs more than gradients, parameters and the loss of the step, or changes shapes or types.
    """
    problems: list[str] = []
    for takes_value in (True, False):
        tried = kept(optimizer, takes_value)
        try:
            state = jax.eval_shape(in_units(tried, units).init, params)
            updates, after = jax.eval_shape(
                lambda state: in_units(tried, units).update(params, state, params, value=jnp.float32(0)), state
            )
        except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
            problems.append(f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")[:300])
            continue
        for what, wanted, found in (("updates", params, updates), ("state after an update", state, after)):
            changed = _difference(wanted, found)
            if changed:
                raise EsjaxError(
                    f"the optimizer cannot be used: its {what} must have the shapes and types of "
                    f"{'the parameters' if what == 'updates' else 'its state before'}, but {changed}"
                )
        return tried
    refuses_value = "'value'" in problems[0]
    raise EsjaxError(
        f"the optimizer cannot be used: {problems[refuses_value]}; it is given estimated gradients, the "
        "parameters in their own tree, and value=, the mean loss of the step; give an optax transformation that needs "
        "no more, without a line search or a second set of parameters"
    )


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _difference(wanted: PyTree, found: PyTree) -> str:
    """Name the first leaf whose shape or type differs, or ""."""
    if jax.tree.structure(wanted) != jax.tree.structure(found):
        return "they have another structure"
    leaves = jax.tree_util.tree_flatten_with_path(wanted)[0]
    for (path, one), other in zip(leaves, jax.tree.leaves(found), strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            name = jax.tree_util.keystr(path) or "the only leaf"
            return f"{name} is {other.dtype}{list(other.shape)}, not {one.dtype}{list(one.shape)}"
    return ""
