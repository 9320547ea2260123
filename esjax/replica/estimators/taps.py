"""The taps of a model by name: their sizes and values, noise on one of them, and the gradient from their errors."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from esjax.core.rules import HIGHEST
from esjax.data.tokens import STOP
from esjax.models.model import Activation, Model, Params, State, Tap, identity
from esjax.models.sequence import token_loss

LOGITS = "logits"
"""Name of the tap on the logits. The effect of noise on them has a closed form, and so has the gradient: softmax minus
one-hot target."""

Errors = Mapping[str, Float[Array, "*rows entries"]]
"""Estimated gradients of the loss with respect to pre-activations, by name."""


class Taps(NamedTuple):
    """The number of entries of each tap, by name.

    Attributes:
        consume: Pre-activations of the state.
        predict: Pre-activations of a prediction.
        state: Leaves of the state, see `Model.state_taps`.
    """

    consume: dict[str, int]
    predict: dict[str, int]
    state: dict[str, int]


class Estimate(NamedTuple):
    """The estimate from a chunk of windows.

    Attributes:
        gradient: A pytree like the parameters: estimated gradient of the sum of the losses of all tokens.
        losses: Mean loss of each window, in nats per token.
        finite: Whether all losses of a window are finite; other windows are void.
        end: State of the clean copy after the window.
        correlations: What the feedback learns from, see `feedback.learn`: an array for each of its matrices.
    """

    gradient: Params
    losses: Float[Array, " windows"]
    finite: Bool[Array, " windows"]
    end: State
    correlations: list[Array]


EstimateChunk = Callable[
    [
        Params,
        list[Array],
        UInt32[Array, "windows 2"],
        Int[Array, "windows length"],
        Bool[Array, " windows"],
        State | None,
    ],
    Estimate,
]
"""`(params, feedback, seeds, windows, are_there, begin) -> estimate`. Windows with `are_there` False are padding and
count for nothing. `begin` holds the states that windows begin with; None: the state at the start of a document."""


def find_taps(model: Model, params: Params) -> Taps:
    """List the taps of a `tapped` model.

    Raises:
        ValueError: There is no tap, a name occurs twice, the tap "logits" is not the result of `predict`, or
            `Model.state_taps` does not name the taps of the new state in the order of its leaves.
    """
    found = Taps({}, {}, {})

    def record(sizes: dict[str, int], name: str, value: Array) -> Array:
        if any(name in others for others in found):
            raise ValueError(f"the model taps {name!r} twice; give each pre-activation a unique name")
        sizes[name] = value.size
        return value

    def run(params: Params) -> None:
        state = model.initial_state(params)
        values: dict[str, Array] = {}

        def predicted(name: str, value: Array) -> Array:
            values[name] = value
            return record(found.predict, name, value)

        def consumed(name: str, value: Array) -> Array:
            values[name] = value
            return record(found.state if name in model.state_taps else found.consume, name, value)

        logits = model.predict(params, state, changed_by(predicted))
        if logits is not values.get(LOGITS, logits):
            raise ValueError(f"the model changes its logits after tapping them; give the tap {LOGITS!r} another name")
        after = jax.tree.leaves(model.consume(params, state, jnp.int32(STOP), changed_by(consumed)))
        tapped = [values.get(name) for name in model.state_taps]
        floating = [leaf for leaf in after if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if tapped and [*map(id, tapped)] != [*map(id, floating)]:
            raise ValueError(
                f"the model names {', '.join(model.state_taps)} in state_taps; consume must return the values of these "
                "taps, one for each leaf of the state of floating type, in this order"
            )

    jax.eval_shape(run, params)
    if not found.consume and not found.predict:
        raise ValueError("the model taps nothing")
    return found._replace(state={name: found.state[name] for name in model.state_taps})


def changed_by(change: Callable[[str, Array], Array]) -> Tap:
    """Make a tap that replaces each value by `change(name, value)`."""

    def tap(name: str, value: Array, activation: Activation = identity) -> Array:
        return activation(change(name, value))

    return tap


def predict_and_record(
    model: Model, params: Params, state: State, token: Array
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Score a prediction.

    Returns:
        The loss, the pre-activations by name, and the derivatives of their activations.
    """
    values: dict[str, Array] = {}
    derivatives: dict[str, Array] = {}

    def tap(name: str, value: Array, activation: Activation = identity) -> Array:
        values[name] = value
        after, derivatives[name] = jax.jvp(activation, (value,), (jnp.ones_like(value),))
        return after

    return token_loss(model.predict(params, state, tap), token), values, derivatives


def loss_from(model: Model, name: str, params: Params, state: State, value: Array, token: Array) -> Array:
    """Score a prediction in which `value` replaces a pre-activation; XLA drops the layers before it."""
    tap = changed_by(lambda tapped, computed: value if tapped == name else computed)
    return token_loss(model.predict(params, state, tap), token)


def as_products(tree: PyTree, rows: int) -> tuple[PyTree, PyTree]:
    """Give vectors an axis of rows by a product with ones, so that their gradient is a product, too.

    XLA may change the order of a plain sum with the number of devices.

    Returns:
        The tree, and for each leaf 0 if it has the axis, else None, as `jax.vmap` takes it.
    """
    ones = jnp.ones((rows, 1))
    whole = jax.tree.map(lambda leaf: jnp.matmul(ones, leaf[None], precision=HIGHEST) if leaf.ndim == 1 else leaf, tree)
    return whole, jax.tree.map(lambda leaf: 0 if leaf.ndim == 1 else None, tree)


def gradient_from(
    model: Model,
    params: Params,
    states: State,
    tokens: Int[Array, " rows"],
    errors: Errors,
    more: Callable[[Params], Float[Array, ""]] = lambda params: jnp.float32(0),
) -> Params:
    """Turn errors into the gradient of the weights.

    No derivative passes a tap with an error, so the gradient of a layer's weights is the layer's input times the error
    of its output. Derivatives pass taps without an error, such as those on the gates of a cell.

    Args:
        model: The architecture.
        params: Its parameters.
        states: States, with a leading axis of rows.
        tokens: Tokens that are predicted from the states, and consumed.
        errors: Errors by the name of the tap.
        more: A term to add to what is differentiated.
    """

    def along(params: Params) -> Float[Array, ""]:
        whole, axes = as_products(params, tokens.size)
        products = jax.vmap(partial(_errors_times_values, model), in_axes=(axes, 0, 0, 0))
        return jnp.sum(products(whole, states, tokens, errors)) + more(params)

    found: Any = jax.grad(along)(params)
    return found


def _errors_times_values(model: Model, params: Params, state: State, token: Array, errors: Errors) -> Float[Array, ""]:
    """Sum error * value over all taps with an error, so that the gradient of the sum is the estimate."""
    parts = []

    def tap(name: str, value: Array, activation: Activation = identity) -> Array:
        if name not in errors:
            return activation(value)
        parts.append(jnp.sum(errors[name].reshape(value.shape) * value))
        return activation(jax.lax.stop_gradient(value))

    model.predict(params, state, tap)
    model.consume(params, state, token, tap)
    return sum(parts, jnp.float32(0))
