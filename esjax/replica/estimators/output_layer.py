"""The exact gradient of the output layer, which then needs no noise.

For cross entropy it is (softmax - one-hot target) times the layer's input, averaged over tokens: the delta rule (Widrow
& Hoff 1960), which needs no backward pass. Every host computes it from the same windows of the step, so nothing is
sent. Each window's part is rounded to integers, whose sum is the same in any order. A product that sums over all
windows would not do: XLA may divide a long sum among as many threads as there are cores.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from esjax.config.settings import DataConfig
from esjax.core.leaves import is_below, leaf_path
from esjax.core.population import deal
from esjax.models.member import Member
from esjax.models.model import Model, Params, State
from esjax.models.sequence import sequence_nats, token_loss
from esjax.replica.estimators.taps import as_products

PAIRS = 128
"""Pairs whose windows the exact gradient is averaged over: the first ones of a step, or more than it has."""

CHUNK = 32
"""Pairs whose windows a device reads at a time."""

STEPS = 2**13
"""Resolution of a window's gradient, in steps per nat and unit."""

DrawWindows = Callable[..., Int[Array, "pairs sequences length"]]
"""`(*source, pairs) -> windows`, where `source` is what windows are drawn from: the text, seeds, and the step."""

OutputGradient = Callable[..., Params]
"""`(gradient, params, slope, *source) -> gradient`: the exact gradient of the output layer in place of the estimate."""

Chosen = dict[int, Array]
"""Leaves of the output layer, by their positions among all leaves."""


def output_places(params: Params, output_layer: str) -> list[int]:
    """Return the positions of the output layer's leaves among all leaves."""
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    return [i for i, (path, _) in enumerate(named) if is_below(leaf_path(path), output_layer)]


def make_output_gradient(
    model: Model, units: PyTree, draw: DrawWindows, data: DataConfig, sigma: float, pairs_a_window: int, mesh: Mesh
) -> OutputGradient:
    """Make the function that puts the exact gradient of the output layer into an estimate.

    Args:
        model: The architecture, which names its `output_layer`.
        units: Unit of each leaf.
        draw: Draws windows.
        data: Settings of the windows.
        sigma: Standard deviation of the noise on the other layers. An estimate is about 2 * sigma * slope times the
            gradient, see `esjax.core.Shaped`; the exact gradient is multiplied by the same factor.
        pairs_a_window: Number of neighbouring pairs that read the same windows; one of them is taken.
        mesh: Devices that share the windows.
    """
    unit_of = jax.tree.leaves(units)
    sequences, window, burn_in = data.batch_size, data.window, data.burn_in
    largest = 2.0 ** math.floor(math.log2((2**31 - 1) / (PAIRS * sequences)))  # the sum of all parts fits into 32 bits

    def whole(part: Float[Array, "..."]) -> Int[Array, "..."]:
        """Round to integers; what is not finite counts as 0."""
        return jnp.rint(jnp.clip(jnp.where(jnp.isfinite(part), part, 0.0), -largest, largest)).astype(jnp.int32)

    def output_gradient(gradient: Params, params: Params, slope: Float[Array, ""], *source: Any) -> Params:
        leaves, found = jax.tree.leaves(params), output_places(params, model.output_layer)

        def add(chunk: Array, total: Chosen, params: Params, chosen: Chosen, *source: Any) -> Chosen:
            pairs = (chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)).astype(jnp.uint32) * pairs_a_window
            windows = draw(*source, pairs)
            windows = windows.reshape(-1, windows.shape[-1])
            states = None if model.logits is not None else jax.vmap(Member(model, params).states)(windows)

            def add_window(total: Chosen, inputs: tuple[Array, State | None]) -> tuple[Chosen, None]:
                part = jax.grad(partial(_nats, model, burn_in))(chosen, params, *inputs)
                return {i: total[i] + whole(part[i] * (unit_of[i] * STEPS)) for i in found}, None

            return jax.lax.scan(add_window, total, (windows, states))[0]

        chosen = {i: leaves[i] for i in found}
        zeros = {i: jnp.zeros(leaf.shape, jnp.int32) for i, leaf in chosen.items()}
        total = deal(mesh, add)(jnp.int32(PAIRS // CHUNK), zeros, params, chosen, *source)
        factor = 2 * sigma * slope / (STEPS * PAIRS * sequences * window)
        return _put(gradient, {i: leaf.astype(jnp.float32) * (factor / unit_of[i]) for i, leaf in total.items()})

    return output_gradient


def _nats(
    model: Model, burn_in: int, chosen: Chosen, params: Params, window: Int[Array, " length"], states: State | None
) -> Float[Array, ""]:
    """Sum the nats of a window, by a model of which the chosen leaves alone are differentiated."""
    if model.logits is not None:
        whole = _put(params, chosen)
        return jnp.sum(sequence_nats(partial(model.logits, whole), model.context, window)[burn_in:])
    tokens, states = window[burn_in:], jax.tree.map(lambda leaf: leaf[burn_in:], states)
    rows, axes = as_products(chosen, len(tokens))

    def score(chosen: Chosen, state: State, token: Array) -> Float[Array, ""]:
        return token_loss(model.predict(_put(params, chosen), state), token)

    return jnp.sum(jax.vmap(score, (axes, 0, 0))(rows, states, tokens))


def _put(tree: Params, chosen: Chosen) -> Params:
    """Replace leaves by their positions."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])
