"""Checks that a custom model keeps the interface `Model`, before anything is computed with it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from esjax.core.leaves import is_below, leaf_path
from esjax.errors import EsjaxError
from esjax.models.model import Model, Params, untouched


def check_model(name: str, model: object, vocab_size: int) -> Model:
    """Compare the shapes and types that a model's functions return with those that `Model` requires.

    Without this check, JAX would clamp a token id beyond too few logits to the last one and train on.

    Args:
        name: Name in error messages, such as "the model bigram".
        model: The return value of the factory.
        vocab_size: Number of token ids.

    Returns:
        The model.

    Raises:
        EsjaxError: It is not a `Model`, or one of its functions returns a wrong shape or type. An error inside one of
            its functions passes through, with a note that names the function.
    """
    if not isinstance(model, Model):
        raise EsjaxError(
            f"{name} returns a {type(model).__name__}; it must return an esjax.Model; "
            "linen_model, nnx_model and equinox_model make one of a module"
        )

    def shapes(part: str, *given: Any, tapped: bool = False) -> Any:
        function = getattr(model, part)
        more = (untouched,) if tapped else ()
        try:
            return jax.eval_shape(lambda *given: function(*given, *more), *given)
        except Exception as error:
            error.add_note(f"raised by {part} of {name}{', given a tap' if tapped else ''}")
            raise

    params = shapes("init", jax.random.key(0, impl="threefry2x32"))
    check_float32(params)
    unit: Any = jax.tree.structure(model.unit)
    if model.unit is not None and unit != jax.tree.structure(params):
        raise EsjaxError(f"unit of {name} is no tree like its parameters; give a number for each, or leave unit out")
    _check_paths(name, model, params)
    state, token = shapes("initial_state", params), jax.ShapeDtypeStruct((), jnp.int32)
    for tapped in {False, model.tapped}:
        logits = shapes("predict", params, state, tapped=tapped)
        if not (
            isinstance(logits, jax.ShapeDtypeStruct)
            and logits.shape == (vocab_size,)
            and jnp.issubdtype(logits.dtype, jnp.floating)
        ):
            raise EsjaxError(
                f"predict of {name} returns {_described(logits)}; it must return a float logit for each of the "
                f"{vocab_size} token ids, float32[{vocab_size}]"
            )
        after = shapes("consume", params, state, token, tapped=tapped)
        if _described(after) != _described(state):
            raise EsjaxError(
                f"consume of {name} returns {_described(after)}, and initial_state {_described(state)}; a state must "
                "keep its form, shapes and types"
            )
    if model.states is not None:
        _check_states(name, shapes, params, state)
    if model.logits is not None:
        _check_logits(name, shapes, params, model.context, vocab_size)
    return model


def _check_paths(name: str, model: Model, params: Params) -> None:
    """Check that the paths of a model name parameters, and that stacked ones have an axis of layers before others."""
    known = {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    given = {
        "output_layer": [model.output_layer] if model.output_layer else [],
        "embeddings": list(model.embeddings),
        "stacked": list(model.stacked),
    }
    for field, paths in given.items():
        for prefix in paths:
            if not any(is_below(path, prefix) for path in known):
                raise EsjaxError(
                    f"{field} of {name} is {prefix!r}, which names no parameter; there are {', '.join(known)}"
                )
    for path, leaf in known.items():
        if len(leaf.shape) < 2 and any(is_below(path, prefix) for prefix in model.stacked):
            raise EsjaxError(
                f"stacked of {name} names {path}, whose shape {list(leaf.shape)} has no axis of layers before others; "
                "name the paths of stacked parameters alone"
            )


def _check_states(name: str, shapes: Callable[..., Any], params: Params, state: Any) -> None:
    tokens = jax.ShapeDtypeStruct((2,), jnp.int32)
    found = _described(shapes("states", params, state, tokens))
    wanted = _described(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), state))
    if found != wanted:
        raise EsjaxError(
            f"states of {name} returns {found} for 2 tokens; it must return the state after each, {wanted}"
        )


def _check_logits(name: str, shapes: Callable[..., Any], params: Params, context: int, vocab_size: int) -> None:
    if context < 1:
        raise EsjaxError(f"context of {name} is {context}; name the tokens that its logits take at most, 1 or more")
    logits = shapes("logits", params, jax.ShapeDtypeStruct((context,), jnp.int32))
    is_array = isinstance(logits, jax.ShapeDtypeStruct) and jnp.issubdtype(logits.dtype, jnp.floating)
    if not (is_array and logits.shape == (context, vocab_size)):
        raise EsjaxError(
            f"logits of {name} returns {_described(logits)} for {context} tokens; it must return a float logit for "
            f"each token and each of the {vocab_size} token ids, float32[{context}, {vocab_size}]"
        )


def check_float32(params: Params) -> None:
    """Check that all parameters are float32. Real arrays need it, too: their types may differ from the traced ones.

    Raises:
        EsjaxError: A parameter has another type.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        kind = getattr(leaf, "dtype", type(leaf).__name__)  # a Python number has no dtype
        if kind != jnp.float32:
            raise EsjaxError(f"parameter {jax.tree_util.keystr(path)} of the model is {kind}; make it float32")


def _described(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: _Shape(f"{leaf.dtype}{list(leaf.shape)}"), tree))


class _Shape(str):
    """A string that is printed without quotes inside a pytree."""

    __slots__ = ()
    __repr__ = str.__str__
