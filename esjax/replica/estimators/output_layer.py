"""The exact gradient of the output layer, which then needs no noise.

For cross entropy it is (softmax - one-hot target) times the layer's input, averaged over tokens: the delta rule (Widrow
& Hoff 1960), which needs no backward pass. Every host computes it from the same windows of the step, so nothing is
sent. Each window's part is rounded to integers, whose sum is the same in any order. A product that sums over all
windows would not do: XLA may divide a long sum among as many threads as there are cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from esjax.core.leaves import is_below, leaf_names
from esjax.core.population import deal
from esjax.models.member import Member
from esjax.models.model import Model, Params, State
from esjax.models.sequence import sequence_nats, token_loss

PAIRS = 128
"""Pairs of a step whose windows the exact gradient is averaged over."""

CHUNK = 32
"""Pairs whose windows a device reads at a time."""

STEPS = 2**10
"""Resolution of a window's gradient, in steps per nat and unit."""

LARGEST = 2**20
"""Largest number of a window's part, so that the sum over up to 2^10 windows fits into 32 bits."""

DrawWindows = Callable[..., Int[Array, "pairs sequences length"]]
"""`(*source, pairs) -> windows`, where `source` is what windows are drawn from: the text, seeds, and the step."""

OutputGradient = Callable[..., Params]
"""`(gradient, params, slope, *source) -> gradient`: the exact gradient of the output layer in place of the estimate."""

Chosen = dict[int, Array]
"""Leaves of the output layer, by their positions among all leaves."""


def output_paths(params: Params, output_layer: str) -> list[int]:
    """Return the positions of the output layer's leaves among all leaves."""
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    return [i for i, (path, _) in enumerate(named) if is_below("/".join(leaf_names(path)), output_layer)]


def make_output_gradient(
    model: Model, units: PyTree, draw: DrawWindows, burn_in: int, sigma: float, groups: int, mesh: Mesh
) -> OutputGradient:
    """Make the function that puts the exact gradient of the output layer into an estimate.

    Args:
        model: The architecture, which names its `output_layer`.
        units: Unit of each leaf.
        draw: Draws windows.
        burn_in: First tokens of a window that are not scored.
        sigma: Standard deviation of the noise on the other layers. An estimate is about 2 * sigma * slope times the
            gradient, see `esjax.core.Shaped`; the exact gradient is multiplied by the same factor.
        groups: Number of neighbouring pairs that read the same windows; one of them is taken.
        mesh: Devices that share the windows.
    """
    of_leaf = jax.tree.leaves(units)

    def output_gradient(gradient: Params, params: Params, slope: Float[Array, ""], *source: Any) -> Params:
        leaves, found = jax.tree.leaves(params), output_paths(params, model.output_layer)

        def add(chunk: Array, total: Chosen, params: Params, chosen: Chosen, *source: Any) -> Chosen:
            pairs = (chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)).astype(jnp.uint32) * groups
            windows = draw(*source, pairs)
            windows = windows.reshape(-1, windows.shape[-1])
            states = None if model.logits is not None else jax.vmap(Member(model, params).states)(windows)

            def add_window(total: Chosen, inputs: tuple[Array, State | None]) -> tuple[Chosen, None]:
                part = jax.grad(partial(_nats, model, burn_in))(chosen, params, *inputs)
                return {i: total[i] + _whole(part[i] * (of_leaf[i] * STEPS)) for i in found}, None

            return jax.lax.scan(add_window, total, (windows, states))[0]

        chosen = {i: leaves[i] for i in found}
        zeros = {i: jnp.zeros(leaf.shape, jnp.int32) for i, leaf in chosen.items()}
        total = deal(mesh, add)(jnp.int32(PAIRS // CHUNK), zeros, params, chosen, *source)
        shape = jax.eval_shape(draw, *source, jax.ShapeDtypeStruct((PAIRS,), jnp.uint32)).shape
        tokens = shape[0] * shape[1] * (shape[2] - burn_in)
        factor = 2 * sigma * slope / (STEPS * tokens)
        return _put(gradient, {i: leaf.astype(jnp.float32) * (factor / of_leaf[i]) for i, leaf in total.items()})

    return output_gradient


def _nats(
    model: Model, burn_in: int, chosen: Chosen, params: Params, window: Int[Array, " length"], states: State | None
) -> Float[Array, ""]:
    """Sum the nats of a window, by a model of which the chosen leaves alone are differentiated.

    Vectors enter as products with ones, so that their gradient is a product, too: XLA may change the order of a plain
    sum with the number of devices.
    """
    if model.logits is not None:
        whole = _put(params, chosen)
        return jnp.sum(sequence_nats(partial(model.logits, whole), model.context, window)[burn_in:])
    tokens, states = window[burn_in:], jax.tree.map(lambda leaf: leaf[burn_in:], states)
    ones = jnp.ones((len(tokens), 1))
    rows = {
        i: jnp.matmul(ones, leaf[None], precision="highest") if leaf.ndim == 1 else leaf for i, leaf in chosen.items()
    }
    axes = {i: 0 if leaf.ndim == 1 else None for i, leaf in chosen.items()}

    def score(chosen: Chosen, state: State, token: Array) -> Float[Array, ""]:
        return token_loss(model.predict(_put(params, chosen), state), token)

    return jnp.sum(jax.vmap(score, (axes, 0, 0))(rows, states, tokens))


def _put(params: Params, chosen: Chosen) -> Params:
    """Replace leaves by their positions."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])


def _whole(part: Float[Array, "..."]) -> Int[Array, "..."]:
    """Round to integers; what is not finite counts as 0."""
    return jnp.rint(jnp.clip(jnp.where(jnp.isfinite(part), part, 0.0), -LARGEST, LARGEST)).astype(jnp.int32)
