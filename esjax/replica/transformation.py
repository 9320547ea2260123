"""Adapts any optax transformation as the optimizer of a run: tries one update, and keeps its state as plain arrays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import PyTree

from esjax.errors import EsjaxError
from esjax.models.model import Params


@struct.dataclass
class _KeptKey:
    """A typed random key stored as integers, which can be saved, hashed and sent."""

    data: PyTree
    kind: str = struct.field(pytree_node=False)


def kept(optimizer: optax.GradientTransformation, takes_value: bool = True) -> optax.GradientTransformationExtraArgs:
    """Wrap an optax transformation so that its state consists of plain arrays.

    Args:
        optimizer: Any optax transformation; its state may hold typed random keys.
        takes_value: Whether to pass the keyword `value`, the mean loss of the step.
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


def fit_optimizer(optimizer: optax.GradientTransformation, params: Params) -> optax.GradientTransformationExtraArgs:
    """Check an optimizer by tracing one update.

    Args:
        optimizer: Any optax transformation.
        params: The initial parameters.

    Returns:
        The wrapped optimizer, see `kept`; it gets `value` if it accepts it.

    Raises:
        EsjaxError: It needs more than gradients, parameters and the loss of the step, or changes shapes or types.
    """
    problems: list[str] = []
    for takes_value in (True, False):
        tried = kept(optimizer, takes_value)
        try:
            state = jax.eval_shape(tried.init, params)
            value = jax.ShapeDtypeStruct((), jnp.float32)
            updates, after = jax.eval_shape(partial(_update, tried), params, state, value)
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


def _update(
    optimizer: optax.GradientTransformationExtraArgs, params: Params, state: PyTree, value: Any
) -> tuple[PyTree, PyTree]:
    return optimizer.update(params, state, params, value=value)


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _difference(wanted: PyTree, found: PyTree) -> str:
    """Describe the first leaf whose shape or type differs; "" if there is none."""
    before: Any = jax.tree.structure(wanted)
    if before != jax.tree.structure(found):
        return "they have another structure"
    leaves = jax.tree_util.tree_flatten_with_path(wanted)[0]
    for (path, one), other in zip(leaves, jax.tree.leaves(found), strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            name = jax.tree_util.keystr(path) or "the only leaf"
            return f"{name} is {other.dtype}{list(other.shape)}, not {one.dtype}{list(one.shape)}"
    return ""
