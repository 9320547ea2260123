"""How well the estimate of a step points along the exact gradient, which backpropagation knows, of the same windows.

It needs no training, so settings of the estimator can be compared in seconds: the cosine of the two is what counts,
since Adam takes no notice of a gradient's size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Integer

from esjax.config import Config, replace
from esjax.data.packing import draw_windows
from esjax.evaluate import cross_entropy
from esjax.hosts.alone import Alone
from esjax.hosts.engine import Engine
from esjax.models.model import Model, Params
from esjax.noise import WINDOWS, pair_seeds, stream_seed
from esjax.replica import Replica

AT_ONCE = 256
"""Windows whose exact gradient is computed at a time."""


class Bearing(NamedTuple):
    """How an estimate lies to the exact gradient, both in units of each leaf.

    Attributes:
        cosine: Of the two as a whole.
        leaves: Of each leaf by its name; NaN where either is 0.
    """

    cosine: float
    leaves: dict[str, float]


def bearings(
    config: Config, model: Model, params: Params, stream: Integer[np.ndarray, " length"], mesh: Mesh, steps: int = 1
) -> Iterator[Bearing]:
    """Compare estimates with exact gradients, at the same parameters, with new windows and noise each step.

    Args:
        config: Settings; a fixed population is scored.
        model: The architecture.
        params: Where the gradient is taken.
        stream: Packed training documents.
        mesh: Devices that share the population.
        steps: Number of comparisons.
    """
    es = replace(config.es, time_per_step=None)
    optim = replace(config.optim, average=0.0)
    config = replace(config, es=es, optim=optim)
    # With this rule the change of the parameters is the estimate itself.
    replica = Replica(config, model, stream, mesh, optimizer=optax.sgd(1.0))
    alone = Alone(config, Engine(replica, tell=_nothing), replica=replica, record=_nothing)
    gradient = jax.jit(jax.grad(_total_loss, argnums=2), static_argnums=(0, 1))
    units = model.units(params)
    data, of_windows = config.data, stream_seed(config.seed, WINDOWS)
    length = data.burn_in + data.window
    for step in range(steps):
        replica.use_params(params)
        alone.step()
        estimate = jax.tree.map(lambda old, new, unit: (old - new) / unit, params, replica.state.params, units)
        seeds = pair_seeds(of_windows, step // data.new_tokens_interval, jnp.arange(es.pairs, dtype=jnp.uint32))
        windows = draw_windows(jnp.asarray(stream), seeds, data.batch_size, length).reshape(-1, length)
        parts = [
            gradient(model, data.burn_in, params, windows[first : first + AT_ONCE])
            for first in range(0, len(windows), AT_ONCE)
        ]
        exact = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
        yield _compare(estimate, jax.tree.map(lambda leaf, unit: leaf * unit, exact, units))


def _nothing(*_: object) -> None:
    pass


def _total_loss(model: Model, burn_in: int, params: Params, windows: Array) -> Array:
    loss = cross_entropy(burn_in)
    return jnp.sum(jax.vmap(lambda window: loss(model, params, window))(windows))


def _compare(estimate: Params, exact: Params) -> Bearing:
    paths = jax.tree_util.tree_flatten_with_path(exact)[0]
    names = [jax.tree_util.keystr(path).lstrip(".") for path, _ in paths]
    ours = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(estimate)]
    theirs = [np.asarray(leaf, np.float64).ravel() for _, leaf in paths]
    leaves = {name: _cosine(one, two) for name, one, two in zip(names, ours, theirs, strict=True)}
    return Bearing(_cosine(np.concatenate(ours), np.concatenate(theirs)), leaves)


def _cosine(one: np.ndarray, two: np.ndarray) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / size if size else float("nan")
