"""(params, seeds, tokens) -> losses: the only place that makes a population of a model."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from esjax.config import Precision
from esjax.member import Member
from esjax.models.model import Model, Params
from esjax.models.primitives import round_matrices
from esjax.noise import Space, fold

PAIRS_AXIS = "pairs"
"""Mesh axis over which the population is spread."""

Gathered = TypeVar("Gathered")
"""A pytree of arrays of one type that can be added up."""

Loss = Callable[[Member, Int[Array, " length"], Key[Array, ""]], Float[Array, ""]]
"""`(member, tokens, key) -> loss` of one member on one sequence; lower is better. Both members of a pair get the same
tokens and the same key, and no two sequences of a run the same key: what is drawn from it is common to the pair."""

DRAWS = 2**32 - 1
"""Number of the keys of losses among what is folded into a pair's seed: the noise counts its blocks from 0."""

Evaluate = Callable[
    [Params, UInt32[Array, "pairs 2"], Int[Array, "pairs sequences length"]],
    Float[Array, "pairs 2"],
]
EvaluateChunks = Callable[..., Float[Array, "chunks chunk_pairs 2"]]


def cross_entropy(burn_in: int) -> Loss:
    """Make the default loss: mean nats per token over a window, its first `burn_in` tokens read and not scored.

    Args:
        burn_in: Tokens, at least 0, that only prepare the state.
    """

    def loss(member: Member, tokens: Int[Array, " length"], key: Key[Array, ""]) -> Float[Array, ""]:
        return member.cross_entropy(tokens, burn_in)

    return loss


def make_evaluate(
    model: Model,
    space: Space,
    loss: Loss,
    mesh: Mesh,
    chunk_pairs: int,
    precision: Precision = "float32",
) -> Evaluate:
    """Make the function that scores both members of every pair.

    Args:
        model: The architecture.
        space: How members differ from the parameters.
        loss: Loss of one member on one sequence.
        mesh: Devices that share the population; one axis, `PAIRS_AXIS`.
        chunk_pairs: Pairs that one device evaluates at a time: as many as its cache or memory likes. Another number
            may change the last bit of a loss; another number of devices does not.
        precision: See `make_evaluate_chunk`.

    Returns:
        `(params, seeds, tokens) -> losses`: the mean loss of the members +ε and -ε over their sequences, which
        are the same for both. Any number of pairs; jit it.
    """
    size = max(chunk_pairs, 2)  # XLA drops an axis of 1, and may then sum in another order
    evaluate_chunk = make_evaluate_chunk(model, space, loss, precision)
    evaluate_chunks = make_evaluate_chunks(evaluate_chunk, lambda given: given, mesh)

    def evaluate(
        params: Params, seeds: UInt32[Array, "pairs 2"], tokens: Int[Array, "pairs sequences length"]
    ) -> Float[Array, "pairs 2"]:
        pairs = len(seeds)
        chunks = -(-pairs // size)

        def in_chunks(x: Array) -> Array:
            padding = [(0, chunks * size - pairs)] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, padding).reshape(chunks, size, *x.shape[1:])

        losses = evaluate_chunks(jnp.int32(chunks), (in_chunks(seeds), in_chunks(tokens)), params)
        return losses.reshape(-1, 2)[:pairs]

    return evaluate


def make_evaluate_chunks(
    evaluate_chunk: Evaluate, draw: Callable[..., tuple[Array, Array]], mesh: Mesh
) -> EvaluateChunks:
    """Make the function that scores chunks of pairs, dealt to the devices.

    Args:
        evaluate_chunk: See `make_evaluate_chunk`.
        draw: `(names, *arguments) -> seeds, tokens` of the pairs of one chunk.
        mesh: Devices that share the population; one axis, `PAIRS_AXIS`.

    Returns:
        `(count, names, params, *arguments) -> losses` scores the first `count` chunks; the others get 0. Names are
        whatever pairs are drawn by, arrays [chunks, chunk_pairs, ...]. Jit it.
    """

    def score(chunk: Array, losses: Array, names: PyTree, params: Params, *arguments: Any) -> Array:
        of_chunk = jax.tree.map(lambda leaf: leaf[chunk], names)
        return losses.at[chunk].set(evaluate_chunk(params, *draw(of_chunk, *arguments)))

    deal = make_deal(mesh, score)

    def evaluate_chunks(
        count: Int[Array, ""], names: PyTree, params: Params, *arguments: Any
    ) -> Float[Array, "chunks chunk_pairs 2"]:
        shape = jax.tree.leaves(names)[0].shape[:2]
        return deal(count, jnp.zeros((*shape, 2)), names, params, *arguments)

    return evaluate_chunks


def make_evaluate_chunk(model: Model, space: Space, loss: Loss, precision: Precision = "float32") -> Evaluate:
    """Make the function `(params, seeds, tokens) -> losses` for the pairs that one device evaluates at a time.

    Args:
        model: The architecture.
        space: How members differ from the parameters.
        loss: Loss of one member on one sequence.
        precision: Type of what matrix products multiply; bfloat16 is for models that are `factored`.
    """
    signs = jnp.array([1.0, -1.0])

    def pair_losses(
        params: Params, seed: UInt32[Array, "2"], tokens: Int[Array, "sequences length"]
    ) -> Float[Array, "2"]:
        noise = space.sample_pair(seed)
        keys = draw_keys(seed, len(tokens))

        def member_loss(sign: Float[Array, ""]) -> Float[Array, ""]:
            member = Member(model, round_matrices(space.perturb(params, noise, sign), precision))
            if len(tokens) == 1:  # an axis of one costs XLA's loops a tenth of their speed
                return loss(member, tokens[0], keys[0])
            return jnp.mean(jax.vmap(partial(loss, member))(tokens, keys))

        return jax.vmap(member_loss)(signs)

    return jax.vmap(pair_losses, in_axes=(None, 0, 0))


def draw_keys(seed: UInt32[Array, "2"], sequences: int) -> Key[Array, " sequences"]:
    """Derive the keys that a loss is given for the sequences of a pair, from the seed of its perturbation."""
    data = fold(fold(seed, jnp.uint32(DRAWS))[None], jnp.arange(sequences, dtype=jnp.uint32))
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def make_deal(mesh: Mesh, work: Callable[..., Gathered]) -> Callable[..., Gathered]:
    """Deal chunks of pairs to the devices in turn, and add up what each of them gathers.

    Args:
        mesh: The devices; one axis, `PAIRS_AXIS`.
        work: `(chunk, gathered, *arguments) -> gathered` adds one chunk, given by its number, to what a device has
            gathered so far.

    Returns:
        `(count, zeros, *arguments) -> gathered`, a whole copy on every device. The number of chunks may be traced: one
        program serves for any number. Each device begins with `zeros`.
    """

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    def deal(count: Int[Array, ""], zeros: Gathered, *arguments: Any) -> Gathered:
        device = jax.lax.axis_index(PAIRS_AXIS)
        turns = (count - device + mesh.size - 1) // mesh.size

        def take_turn(turn: Array, gathered: Gathered) -> Gathered:
            return work(turn * mesh.size + device, gathered, *arguments)

        # As one vector: on CPUs each array that is added up by itself is a meeting of all devices.
        flat, unravel = ravel_pytree(jax.lax.fori_loop(0, turns, take_turn, zeros))
        return unravel(jax.lax.psum(flat, PAIRS_AXIS))

    return deal
