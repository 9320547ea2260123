"""The exact gradient of the output layer, which then needs no noise.

For cross entropy it is (softmax - one-hot target) times the layer's input, averaged over tokens: the delta rule (Widrow
& Hoff 1960), which needs no backward pass. Every host computes it from the same windows of the step, so nothing is
sent. Parts are rounded to integers, whose sum does not depend on how devices share them.
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
from esjax.models.model import Model, Params
from esjax.models.sequence import sequence_nats, token_loss

PAIRS = 128
"""Pairs of a step whose windows the exact gradient is averaged over."""

CHUNK = 32
"""Pairs of a part; each part is rounded separately."""

STEPS = 2**10
"""Resolution of the summed gradient, in steps per nat and unit."""

LARGEST = 2**28
"""Largest number of a part, so that the sum over all parts fits into 32 bits."""

DrawWindows = Callable[..., Int[Array, "pairs sequences length"]]
"""`(*source, pairs) -> windows`, where `source` is what windows are drawn from: the text, seeds, and the step."""

OutputGradient = Callable[..., Params]
"""`(gradient, params, slope, *source) -> gradient`: the exact gradient of the output layer in place of the estimate."""


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

    def put(params: Params, chosen: dict[int, Array]) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, [chosen.get(i, leaf) for i, leaf in enumerate(leaves)])

    def nats(params: Params, window: Int[Array, " length"], chosen: dict[int, Array]) -> Float[Array, ""]:
        """Score a window by a model whose output layer alone is differentiated."""
        whole = put(params, chosen)
        if model.logits is not None:
            return jnp.sum(sequence_nats(partial(model.logits, whole), model.context, window)[burn_in:])
        states = jax.tree.map(lambda leaf: leaf[burn_in:], Member(model, params).states(window))
        logits = jax.vmap(partial(model.predict, whole))(states)
        return jnp.sum(jax.vmap(token_loss)(logits, window[burn_in:]))

    def output_gradient(gradient: Params, params: Params, slope: Float[Array, ""], *source: Any) -> Params:
        leaves, found = jax.tree.leaves(params), output_paths(params, model.output_layer)
        chosen = {i: leaves[i] for i in found}

        def add(
            chunk: Array, total: dict[int, Array], params: Params, chosen: dict[int, Array], *source: Any
        ) -> dict[int, Array]:
            pairs = (chunk * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)).astype(jnp.uint32) * groups
            windows = draw(*source, pairs)
            windows = windows.reshape(-1, windows.shape[-1])
            part = jax.grad(lambda chosen: jnp.sum(jax.vmap(lambda window: nats(params, window, chosen))(windows)))(
                chosen
            )
            return {i: total[i] + _whole(part[i] * (of_leaf[i] * STEPS)) for i in found}

        zeros = {i: jnp.zeros(leaf.shape, jnp.int32) for i, leaf in chosen.items()}
        total = deal(mesh, add)(jnp.int32(PAIRS // CHUNK), zeros, params, chosen, *source)
        shape = jax.eval_shape(draw, *source, jax.ShapeDtypeStruct((PAIRS,), jnp.uint32)).shape
        tokens = shape[0] * shape[1] * (shape[2] - burn_in)
        factor = 2 * sigma * slope / (STEPS * tokens)
        return put(gradient, {i: leaf.astype(jnp.float32) * (factor / of_leaf[i]) for i, leaf in total.items()})

    return output_gradient


def _whole(part: Float[Array, "..."]) -> Int[Array, "..."]:
    """Round to integers; what is not finite counts as 0."""
    return jnp.rint(jnp.clip(jnp.where(jnp.isfinite(part), part, 0.0), -LARGEST, LARGEST)).astype(jnp.int32)
