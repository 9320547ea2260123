"""Alternatives to compare with: numpy, evosax, low-rank noise drawn as normals, and a plain forward pass.

All but numpy score this library's models with its loss; the numpy model is written out here. On several devices each
scores a share of the members, `at_once` at a time, as this library's evaluation does.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from esjax.config.settings import Precision
from esjax.core.interpreter import interpret
from esjax.core.noise import round_products
from esjax.core.perturbed import PerturbedArray
from esjax.core.population import PAIRS_AXIS
from esjax.core.rules import HIGHEST
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.models.layers import Affine
from esjax.models.member import cross_entropy, over_sequences
from esjax.models.model import Model, Params

WEIGHED = 512
"""Most pairs whose noise a device draws again and sums at a time, as in this library."""


class Rival(NamedTuple):
    """An evolution strategy of another library or method.

    Attributes:
        init: `(params) -> state`.
        step: `(state, key, tokens) -> state`; jit it.
        params: `(state) -> params`.
    """

    init: Callable[[Params], Any]
    step: Callable[[Any, Key[Array, ""], Array], Any]
    params: Callable[[Any], Params]


def forward(
    model: Model, mesh: Mesh, burn_in: int, at_once: int
) -> Callable[[Params, Int[Array, "sequences length"]], Array]:
    """Make a plain forward pass: the loss of one set of weights on many sequences. Jit it."""
    loss = _loss(model, burn_in)

    def total(params: Params, tokens: Int[Array, "sequences length"]) -> Float[Array, " sequences"]:
        return spread_out(mesh, lambda window: loss(params, window[None]), tokens, at_once)

    return total


def evosax_open_es(
    model: Model,
    mesh: Mesh,
    *,
    burn_in: int,
    population: int,
    sigma: float,
    optimizer: optax.GradientTransformation,
    at_once: int,
    precision: Precision = "float32",
) -> Rival:
    """Make OpenES of evosax (Salimans et al. 2017): dense normal noise, antithetic pairs, centered ranks.

    All members score the same sequences, tokens [sequences, length]. It searches in units of each leaf, so that one
    sigma and one step size suit all leaves, as in this library. Products round to `precision`.
    """
    try:
        from evosax.algorithms import Open_ES
    except ImportError:
        raise EsjaxError("the rival evosax is not installed: pip install 'esjax[bench]'") from None
    example = model.init(jax.random.key(0))
    units, loss = model.units(example), _loss(model, burn_in)
    strategy = Open_ES(population, example, optimizer=optimizer, std_schedule=optax.constant_schedule(sigma))

    def init(params: Params) -> Any:
        in_units = jax.tree.map(lambda leaf, unit: leaf / unit, params, units)
        return strategy.init(jax.random.key(0), in_units, strategy.default_params)

    def to_params(solution: Params) -> Params:
        return jax.tree.map(lambda leaf, unit: leaf * unit, solution, units)

    def step(state: Any, key: Key[Array, ""], tokens: Int[Array, "sequences length"]) -> Any:
        members, state = strategy.ask(key, state, strategy.default_params)

        def member_loss(solution: Params) -> Float[Array, ""]:
            return loss(jax.tree.map(partial(round_products, precision=precision), to_params(solution)), tokens)

        losses = spread_out(mesh, member_loss, members, at_once)
        return strategy.tell(key, members, losses, state, strategy.default_params)[0]

    return Rival(init, step, lambda state: to_params(strategy.get_mean(state)))


def normal_low_rank(
    model: Model,
    mesh: Mesh,
    *,
    burn_in: int,
    pairs: int,
    sigma: float,
    rank: int,
    optimizer: optax.GradientTransformation,
    at_once: int,
    kept: bool,
    precision: Precision = "float32",
) -> Rival:
    """Make an evolution strategy with low-rank noise by `jax.random.normal`, one key per pair and leaf.

    Each pair has different sequences, tokens [pairs, sequences, length]. Shaping divides by the standard deviation of
    the pairs' differences.

    Args:
        model: The architecture.
        mesh: Devices that share the pairs.
        burn_in: Tokens of a sequence that are read and not scored.
        pairs: Pairs of a step.
        sigma: Standard deviation of the noise, in units of each leaf.
        rank: Rank of the noise of a matrix.
        optimizer: Turns the estimate, in units of each leaf, into the update.
        at_once: Pairs that a device scores at a time.
        kept: True: draw the noise of a step once and keep it for the update, which is faster and takes memory in
            proportion to the population. False: draw it again in the update, from the same keys, as published (Sarkar
            et al. 2025).
        precision: Type to which operands of matrix products are rounded while members are scored.
    """
    example = model.init(jax.random.key(0))
    units, loss = model.units(example), _loss(model, burn_in)
    signs = jnp.array([1.0, -1.0])

    def draw(key: Key[Array, ""]) -> _Noise:
        nodes, treedef = jax.tree.flatten(example, is_leaf=_is_layer)
        keys = jax.random.split(key, len(nodes))
        drawn = [_draw(node, key, rank) for node, key in zip(nodes, keys, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    def perturb(params: Params, noise: _Noise, sign: Float[Array, ""]) -> Params:
        def member(node: Any, epsilon: Any, unit: Any) -> Any:
            if not isinstance(epsilon, _Factors):
                return node + sign * sigma * unit * epsilon
            matrix, step = (node.matrix, unit.matrix) if isinstance(node, Affine) else (node, unit)
            left, right, size = epsilon.left[:, None], epsilon.right[None], sign * sigma / math.sqrt(rank)
            perturbed = PerturbedArray(matrix.astype(precision), left, right, size * step)
            if epsilon.shift is None:
                return perturbed
            return Affine(perturbed, node.bias + size * unit.bias * (epsilon.right @ epsilon.shift))

        return jax.tree.map(member, params, noise, units, is_leaf=_is_layer)

    def weigh_again(keys: Key[Array, " pairs"], weights: Float[Array, " pairs"]) -> Params:
        size = math.gcd(len(keys) // mesh.size, WEIGHED)
        shares, everywhere = PartitionSpec(PAIRS_AXIS), PartitionSpec()

        @partial(jax.shard_map, mesh=mesh, in_specs=shares, out_specs=everywhere, check_vma=False)
        def share(keys: Array, weights: Array) -> Params:
            def add(total: Params, group: tuple[Array, Array]) -> tuple[Params, None]:
                return jax.tree.map(jnp.add, total, _weigh(jax.vmap(draw)(group[0]), group[1])), None

            zero = jax.tree.map(jnp.zeros_like, example)
            total, _ = jax.lax.scan(add, zero, (keys.reshape(-1, size), weights.reshape(-1, size)))
            flat, unravel = ravel_pytree(total)
            return unravel(jax.lax.psum(flat, PAIRS_AXIS))

        return share(keys, weights)

    def step(
        state: tuple[Params, Any], key: Key[Array, ""], tokens: Int[Array, "pairs sequences length"]
    ) -> tuple[Params, Any]:
        params, opt_state = state
        keys = jax.random.split(key, pairs)
        noise = jax.vmap(draw)(keys) if kept else keys

        def pair_losses(pair: tuple[Any, Int[Array, "sequences length"]]) -> Float[Array, "2"]:
            noise, tokens = pair if kept else (draw(pair[0]), pair[1])

            def member_loss(sign: Float[Array, ""]) -> Float[Array, ""]:
                return loss(perturb(params, noise, sign), tokens)

            return jax.vmap(member_loss)(signs)

        losses = spread_out(mesh, pair_losses, (noise, tokens), at_once)
        difference = losses[:, 0] - losses[:, 1]
        weights = difference / (jnp.sqrt(jnp.mean(difference**2)) + 1e-12)
        total = _weigh(noise, weights) if kept else weigh_again(keys, weights)
        mean = jax.tree.map(lambda leaf: leaf / pairs, total)
        updates, opt_state = optimizer.update(mean, opt_state, params)
        return jax.tree.map(lambda leaf, unit, update: leaf + unit * update, params, units, updates), opt_state

    return Rival(lambda params: (params, optimizer.init(params)), step, lambda state: state[0])


class _Factors(NamedTuple):
    """Noise of a matrix, before the division by √rank."""

    left: Float[Array, "*pairs rows rank"]
    right: Float[Array, "*pairs columns rank"]
    shift: Float[Array, "*pairs rank"] | None
    """Where it has a bias, which is one more row of it."""


_Noise = Any
"""A pytree like the parameters, with `_Factors` in place of each matrix or layer. The axis of pairs comes first."""


def _is_layer(node: Any) -> bool:
    return isinstance(node, Affine)


def _draw(node: Any, key: Key[Array, ""], rank: int) -> Array | _Factors:
    """Draw the noise of a leaf, or of a layer."""
    matrix = node.matrix if isinstance(node, Affine) else node
    if matrix.ndim != 2:
        return jax.random.normal(key, matrix.shape)
    keys = jax.random.split(key, 3)
    left, right = (jax.random.normal(key, (size, rank)) for key, size in zip(keys[:2], matrix.shape, strict=True))
    return _Factors(left, right, jax.random.normal(keys[2], (rank,)) if isinstance(node, Affine) else None)


def _weigh(noise: _Noise, weights: Float[Array, " pairs"]) -> Params:
    """Sum weight * noise over pairs."""

    def total(epsilon: Array | _Factors) -> Array | Affine:
        if not isinstance(epsilon, _Factors):
            return jnp.tensordot(weights, epsilon, 1, precision=HIGHEST)
        right = epsilon.right * (weights / math.sqrt(epsilon.right.shape[-1]))[:, None, None]
        matrix = jnp.einsum("kmr,knr->mn", epsilon.left, right, precision=HIGHEST)
        if epsilon.shift is None:
            return matrix
        return Affine(matrix, jnp.einsum("kr,knr->n", epsilon.shift, right, precision=HIGHEST))

    return jax.tree.map(total, noise, is_leaf=lambda node: isinstance(node, _Factors))


def _loss(model: Model, burn_in: int) -> Callable[[Params, Int[Array, "sequences length"]], Float[Array, ""]]:
    """Make the mean loss over some sequences for weights that may be perturbed or rounded."""
    loss, key = over_sequences(model, cross_entropy(burn_in)), jax.random.key(0)
    return interpret(lambda params, tokens: loss(params, tokens, key))


def spread_out(mesh: Mesh, function: Callable[[Any], Array], inputs: Any, at_once: int) -> Array:
    """Map over the first axis: a share for each device, a fixed number at a time."""
    axis = PartitionSpec(PAIRS_AXIS)

    @partial(jax.shard_map, mesh=mesh, in_specs=axis, out_specs=axis, check_vma=False)
    def share(inputs: Any) -> Array:
        return jax.lax.map(function, inputs, batch_size=at_once)

    return share(inputs)


class NumpyRnn:
    """The `rnn` in numpy: scores one member at a time, its sequences as one batch."""

    def __init__(self, params: Sequence[np.ndarray], sigma: float, burn_in: int) -> None:
        """Store the weights.

        Args:
            params: The leaves in order: s0, U_1, E_1, ..., U_L, E_L, W1, W2.
            sigma: Standard deviation of the noise.
            burn_in: Tokens that are read and not scored.
        """
        self.params, self.sigma, self.burn_in = params, np.float32(sigma), burn_in

    def pair(self, seed: int, tokens: np.ndarray) -> tuple[float, float]:
        """Score both members of a pair on sequences, tokens [sequences, length]."""
        rng = np.random.default_rng(seed)
        noise = [self.sigma * rng.standard_normal(leaf.shape, np.float32) for leaf in self.params]
        plus = [leaf + more for leaf, more in zip(self.params, noise, strict=True)]
        minus = [leaf - more for leaf, more in zip(self.params, noise, strict=True)]
        return self.loss(plus, tokens), self.loss(minus, tokens)

    def loss(self, params: Sequence[np.ndarray], tokens: np.ndarray) -> float:
        """Return mean nats per token."""
        start, *layers, hidden, output = params
        rows = np.arange(len(tokens))
        state = np.repeat(start[None], len(tokens), axis=0)
        total = 0.0
        for position, token in enumerate(tokens.T):
            if position >= self.burn_in:
                logits = np.maximum(state @ hidden, 0) @ output
                logits -= logits.max(axis=1, keepdims=True)
                total += float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[rows, token]))
            for recurrent, embedding in zip(layers[::2], layers[1::2], strict=True):
                state = np.tanh(state + (state @ recurrent) * embedding[token])
            state[token == STOP] = start
        return total / (tokens.shape[1] - self.burn_in)
