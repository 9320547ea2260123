"""A small model, its noise and its tokens, for tests of the core."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from esjax.core.noise import Layout, Noise, Precision, full, low_rank
from esjax.core.perturbed import PerturbedArray, is_perturbed
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.core.signs import draw
from esjax.models import Model, gru, rnn
from esjax.models.model import Params
from esjax.replica.estimators.estimator import stacked_of

VOCAB = 7
PAIRS = 12
MODELS = {
    "rnn": rnn(VOCAB, hidden_size=4, n_layers=2),
    "gru": gru(VOCAB, hidden_size=4, head_size=6),
}
DRAW = jax.jit(draw, static_argnames=("kind", "count"))


def noise_of(
    model: Model,
    *,
    space: str = "low_rank",
    noise: str = "rademacher",
    sigma: float = 0.1,
    rank: int = 1,
    split: bool = False,
    packed: bool = False,
) -> Noise:
    shared: dict[str, Any] = {"gaussian": noise == "gaussian", "split": split, "units": model.unit}
    if space != "full":
        shared["stacked"] = stacked_of(model)
    chosen = full(sigma, **shared) if space == "full" else low_rank(sigma, rank, **shared)
    return dataclasses.replace(chosen, packed=packed)


def layout_of(model: Model, **settings: Any) -> Layout:
    return noise_of(model, **settings).lay_out(params_of(model))


def params_of(model: Model) -> Params:
    return model.init(jax.random.key(3))


def seeds_of(pairs: int = PAIRS, step: int = 5) -> Array:
    return pair_seeds(stream_seed(1, 0), step, jnp.arange(pairs))


def tokens_of(pairs: int = PAIRS, sequences: int = 2, length: int = 6) -> Array:
    """Tokens with some STOPs (id 1) among them."""
    return jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (pairs, sequences, length)), jnp.int32)


def names_of(params: Params) -> list[str]:
    """List the paths of the leaves, such as "recurrent/bias"."""
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]


def epsilons_of(noise: Noise, params: Params, seeds: Array) -> list[np.ndarray]:
    """Write the ε of each leaf out in float64, from the numbers of the seeds alone; the axis of pairs comes last.

    Each leaf of `MODELS` takes its numbers in turn. A vector, and any leaf where noise is full, takes one for each
    entry. A matrix [m, n] takes m * rank and n * rank. A bias comes after its matrix and takes `rank`: together the two
    are one matrix [m + 1, n].
    """
    rank, pairs = noise.rank, seeds.shape[:-1]
    layout = noise.lay_out(params)
    kind = "gaussian" if noise.gaussian else "rademacher"
    numbers = np.asarray(DRAW(kind, seeds, count=layout.numbers), np.float64)
    place, found = 0, []

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        taken = numbers[place : place + math.prod(shape)].reshape(*shape, *pairs)
        place += math.prod(shape)
        return taken

    right = np.zeros(0)
    for name, leaf in zip(names_of(params), jax.tree.leaves(params), strict=True):
        if rank and leaf.ndim == 2:
            rows, columns = leaf.shape
            left, right = take(rows, rank), take(columns, rank)
            found.append(np.einsum("mr...,nr...->mn...", left, right) / math.sqrt(rank))
        elif rank and name.endswith("bias"):
            found.append(np.einsum("r...,nr...->n...", take(rank), right) / math.sqrt(rank))
        else:
            found.append(take(*leaf.shape))
    assert place == layout.numbers
    return found


def is_full(noise: Noise, name: str) -> bool:
    """Tell whether a leaf of `MODELS` has one entry of noise for each parameter."""
    return noise.rank == 0 or name == "start"


def added_up(params: Params) -> Params:
    """Write out the leaves of a member that are kept in factors."""
    return jax.tree.map(lambda leaf: leaf.added_up() if is_perturbed(leaf) else leaf, params, is_leaf=is_perturbed)


def kept_in_factors(params: Params) -> list[PerturbedArray]:
    """List the leaves of a member that are kept in factors."""
    leaves = jax.tree.leaves(params, is_leaf=is_perturbed)
    return [leaf for leaf in leaves if isinstance(leaf, PerturbedArray) and leaf.left is not None]


def dense_member(noise: Noise, params: Params, seed: Array, sign: Array | float) -> Params:
    """Make a member of plain arrays, from ε written out."""
    epsilon = noise.lay_out(params).epsilon(seed, params)
    return jax.tree.map(
        lambda leaf, unit, epsilon: leaf + sign * noise.sigma * unit * epsilon, params, noise.units, epsilon
    )


def member_of(
    noise: Noise, params: Params, seed: Array, sign: Array | float, precision: Precision = "float32"
) -> Params:
    """Make a member of a pair as a population has it, low-rank leaves in factors."""
    layout = noise.lay_out(params)
    return layout.member(params, layout.draw(seed), jnp.float32(sign), precision)
