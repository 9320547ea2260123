"""The cosine of the angle between an estimate and the exact gradient, by backpropagation, on the same windows.

It compares settings of the estimator within seconds, without training. Only the direction counts, since Adam divides by
the size of a gradient (Kingma & Ba 2015, section 2.1).
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Integer, PyTree

from esjax.config.settings import Config, replace
from esjax.core.leaves import leaf_path
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.packing import draw_windows
from esjax.flags import default_flags
from esjax.models.member import Member
from esjax.models.model import Model, Params
from esjax.replica.replica import Replica
from esjax.replica.streams import WINDOWS
from esjax.training.local_steps import LocalSteps

AT_ONCE = 256
"""Windows in one call of backpropagation."""


class GradientCosine(NamedTuple):
    """An estimate compared with the exact gradient, both in units of each leaf.

    Attributes:
        cosine: Cosine over all parameters.
        leaves: Cosine of each leaf, by path; NaN if either is 0.
        dispersion: Mean squared norm of the gradients of single windows, divided by the squared norm of their mean:
            roughly the number of windows after which the mean gradient exceeds its noise.
    """

    cosine: float
    leaves: dict[str, float]
    dispersion: float


def gradient_cosines(
    config: Config, model: Model, params: Params, stream: Integer[np.ndarray, " length"], mesh: Mesh, steps: int = 1
) -> Iterator[GradientCosine]:
    """Compare estimates with exact gradients at the same parameters, with new windows and noise in each step.

    Learned feedback begins with guesses of 0, and learns from one comparison to the next.

    Args:
        config: Settings; `es.time_per_step`, `optim.average` and `data.carry` are ignored.
        model: The architecture.
        params: Parameters at which the gradient is taken.
        stream: Packed training documents.
        mesh: Devices that share the population.
        steps: Number of comparisons.
    """
    for estimate, exact, squares in steps_of_estimates(config, model, params, stream, mesh, steps):
        yield _compare(estimate, exact, squares)


def steps_of_estimates(
    config: Config, model: Model, params: Params, stream: Integer[np.ndarray, " length"], mesh: Mesh, steps: int
) -> Iterator[tuple[Params, Params, float]]:
    """Yield the estimate of each step, the exact gradient of its windows, and the mean squared norm of theirs.

    Both are in units. The arguments are those of `gradient_cosines`.
    """
    es = replace(config.es, time_per_step=None)
    optim = replace(config.optim, average=0.0)
    config = replace(config, es=es, optim=optim, data=replace(config.data, carry=False))
    # With this optimizer the change of the parameters is the estimate itself.
    replica = Replica(config, model, stream, mesh, optimizer=optax.sgd(1.0))
    local = LocalSteps(config, replica, custom={})
    gradient = jax.jit(_gradient, static_argnums=(0, 1))
    units = replica.units
    data, of_windows = config.data, stream_seed(config.seed, WINDOWS)
    length = data.window_length

    @default_flags()
    def take(step: int) -> tuple[Params, Params, float]:
        replica.use_params(params)
        local.take()
        estimate = jax.tree.map(lambda old, new, unit: (old - new) / unit, params, replica.state.params, units)
        seeds = pair_seeds(
            of_windows, step // data.new_tokens_interval, jnp.arange(es.pairs, dtype=jnp.uint32) // es.pairs_a_window
        )
        windows = draw_windows(jnp.asarray(stream), seeds, data.batch_size, length).reshape(-1, length)
        parts = [
            gradient(model, data.burn_in, params, units, windows[first : first + AT_ONCE])
            for first in range(0, len(windows), AT_ONCE)
        ]
        exact, squares = jax.tree.map(partial(_mean, len(windows)), *parts)
        return estimate, exact, float(squares)

    yield from map(take, range(steps))


def _mean(count: int, *parts: Array) -> Array:
    return sum(parts[1:], parts[0]) / count


def _gradient(
    model: Model, burn_in: int, params: Params, units: PyTree, windows: Int[Array, "windows length"]
) -> tuple[Params, Array]:
    """Return the sum of the gradients of all windows, in units, and the sum of their squared norms."""

    def loss(params: Params, window: Int[Array, " length"]) -> Array:
        return Member(model, params).cross_entropy(window, burn_in)

    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, windows)
    gradients = jax.tree.map(lambda leaf, unit: leaf * unit, gradients, units)
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients))
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), gradients), jnp.asarray(squares)


def _compare(estimate: Params, exact: Params, squares: float) -> GradientCosine:
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(exact)[0]]
    ours = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(estimate)]
    theirs = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(exact)]
    leaves = {path: _cosine(one, two) for path, one, two in zip(paths, ours, theirs, strict=True)}
    whole = np.concatenate(theirs)
    return GradientCosine(_cosine(np.concatenate(ours), whole), leaves, squares / max(float(whole @ whole), 1e-300))


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / size if size else float("nan")
