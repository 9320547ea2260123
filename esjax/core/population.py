"""(params, seeds, batch) -> losses: runs both members of every pair. No other module does."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key, UInt32

from esjax.core.interpreter import AddedUp, interpret
from esjax.core.noise import Noise, Params, Precision
from esjax.core.seeds import loss_key, pair_seeds

PAIRS_AXIS = "pairs"
"""Name of the mesh axis along which a population is divided."""

CPU_PAIRS = 128
"""Pairs that a CPU evaluates at a time by default: few enough for the states of small networks to stay in its cache."""

Gathered = TypeVar("Gathered")
"""A pytree of arrays of one type."""

Loss = Callable[..., Float[Array, ""]]
"""`(params, example) -> loss` or `(params, example, key) -> loss` of one member on one example: a float scalar, lower
is better. Both members of a pair get the same example and the same key."""

Evaluate = Callable[..., Float[Array, "pairs 2"]]
"""`(params, seeds, batch, count=None) -> losses`, see `evaluate`."""


def evaluate(
    loss: Loss,
    noise: Noise,
    *,
    batch_axis: Any = 0,
    mesh: Mesh | None = None,
    chunk_pairs: int | None = None,
    precision: Precision = "float32",
) -> Evaluate:
    """Make the function that scores both members of every pair; jit it.

    Members with low-rank noise share the matrix products with the unperturbed weights; their own matrices are not added
    up (Sarkar et al. 2025, section 4). `explain` names the operations of `loss` that are an exception.

    Args:
        loss: Any JAX function `(params, example) -> scalar`, or `(params, example, key)` with a random key that both
            members of a pair share. `params` is any pytree.
        noise: How members differ, `low_rank(...)` or `full(...)`.
        batch_axis: 0: the leaves of `batch` have a leading axis of pairs, or of groups: with a quarter as many entries
            as pairs, four neighbouring pairs share each. None: one example for all pairs. Or a pytree prefix of these,
            as `jax.vmap` takes it for one argument.
        mesh: Devices that share the pairs. None: one device. If the devices are CPUs, wait for the results of each call
            (`jax.block_until_ready`): XLA's CPU devices can block each other when one runs ahead.
        chunk_pairs: Pairs that a device evaluates at a time, at least 2. It may change the last bit of a loss; the
            number of devices does not. None: 128 on CPUs, each device's whole share on accelerators.
        precision: Type to which the operands of products with perturbed matrices are rounded.

    Returns:
        `(params, seeds, batch, count=None) -> losses`. `seeds` is uint32 [pairs, 2], see `pair_seeds`. `losses` is
        float32 [pairs, 2]: of the members +ε and -ε of each pair. With `count`, which may be traced, only the first
        `count` pairs are evaluated, in whole chunks; the others get 0.

    The returned function raises, while it is traced:
        TypeError: `loss` does not return a float scalar, or a leaf of the parameters is not an array.
        ValueError: `seeds` or a leaf of the batch has the wrong shape.
    """
    return map_members(
        _called(loss),
        noise,
        jax.ShapeDtypeStruct((), jnp.float32),
        batch_axis=batch_axis,
        mesh=mesh,
        chunk_pairs=chunk_pairs,
        precision=precision,
    )


def map_members(
    function: Callable[[Params, Any, Key[Array, ""]], Any],
    noise: Noise,
    result: Any,
    *,
    batch_axis: Any = 0,
    mesh: Mesh | None = None,
    chunk_pairs: int | None = None,
    precision: Precision = "float32",
    by_member: bool = False,
) -> Callable[..., Any]:
    """Make the function that applies any function to both members of every pair; jit it.

    `evaluate` is this with a loss. Text that members write is another use, see `esjax.rewards.writing`.

    Args:
        function: Any JAX function `(params, example, key) -> result`, a pytree of arrays of one type.
        noise: See `evaluate`; so are the other arguments.
        result: A pytree of `jax.ShapeDtypeStruct`: what `function` returns for one member.
        batch_axis: See `evaluate`.
        mesh: See `evaluate`.
        chunk_pairs: See `evaluate`.
        precision: See `evaluate`.
        by_member: Whether each example has a leading axis of 2, with an entry for each member.

    Returns:
        `(params, seeds, batch, count=None) -> results`, a pytree like `result`, each leaf [pairs, 2, ...].
    """
    signs = jnp.array([1.0, -1.0], jnp.float32)

    def results(
        params: Params, seeds: UInt32[Array, "pairs 2"], batch: Any, count: Int[Array, ""] | int | None = None
    ) -> Any:
        layout = noise.lay_out(params)
        check_seeds(seeds)
        pairs = len(seeds)
        groups, axes = examples_of(batch, batch_axis, pairs)

        def of_pair(params: Params, seed: UInt32[Array, "2"], drawn: Any, example: Any) -> Any:
            key = loss_key(seed)

            def of_member(sign: Float[Array, ""], example: Any) -> Any:
                return interpret(function)(layout.member(params, drawn, sign, precision), example, key)

            return jax.vmap(of_member, in_axes=(0, 0 if by_member else None))(signs, example)

        def of_chunk(numbers: Int[Array, " chunk"], seeds: UInt32[Array, "chunk 2"], params: Params, batch: Any) -> Any:
            leaves, treedef = jax.tree.flatten(batch)
            chosen = [
                leaf if axis is None else leaf[numbers // (pairs // group)]
                for leaf, axis, group in zip(leaves, axes, groups, strict=True)
            ]
            examples = jax.tree.unflatten(treedef, chosen)
            along = (None, 0, 0, jax.tree.unflatten(treedef, axes))
            return jax.vmap(of_pair, in_axes=along)(params, seeds, layout.draw_all(seeds), examples)

        size = min(chunk_pairs or _chunk_pairs(mesh, pairs), pairs)
        size = max(size, 2)  # XLA drops an axis of size 1 and may then sum in another order
        chunks = -(-pairs // size)
        if chunks == 1 and mesh is None and count is None and pairs > 1:
            return of_chunk(jnp.arange(pairs, dtype=jnp.int32), seeds, params, batch)
        padded = jnp.pad(seeds, [(0, chunks * size - pairs), (0, 0)])

        def take(chunk: Array, found: Any, seeds: Array, params: Params, batch: Any) -> Any:
            numbers = chunk * size + jnp.arange(size, dtype=jnp.int32)
            part = of_chunk(jnp.minimum(numbers, pairs - 1), seeds[numbers], params, batch)
            return jax.tree.map(lambda found, part: found.at[chunk].set(part), found, part)

        todo = chunks if count is None else -(-jnp.asarray(count, jnp.int32) // size)
        nothing = jax.tree.map(lambda one: jnp.zeros((chunks, size, 2, *one.shape), one.dtype), result)
        found = deal(mesh, take)(jnp.int32(todo), nothing, padded, params, batch)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:pairs], found)

    return results


def explain(loss: Loss, noise: Noise, params: Params, example: Any) -> list[AddedUp]:
    """List the operations of a loss that have no rule, so that a low-rank member's matrix is added up for them.

    The loss is right all the same, but each member then needs a copy of the matrix. An empty list is best.

    Args:
        loss: See `evaluate`.
        noise: How members differ.
        params: The parameters.
        example: One example, as `loss` gets it.

    Returns:
        Operation, leaf and shape, each once, in the order of the operations.
    """
    added_up: list[AddedUp] = []
    seed, layout = pair_seeds(0, 0, 1)[0], noise.lay_out(params)
    call = interpret(_called(loss), added_up)
    jax.eval_shape(
        lambda params, example: call(layout.member(params, layout.draw(seed), jnp.float32(1)), example, loss_key(seed)),
        params,
        example,
    )
    return list(dict.fromkeys(added_up))


def deal(mesh: Mesh | None, work: Callable[..., Gathered]) -> Callable[..., Gathered]:
    """Deal chunks of pairs to the devices in turn and add up the results of all devices.

    Args:
        mesh: The devices. None: one device.
        work: `(chunk, gathered, *arguments) -> gathered` adds the result of chunk number `chunk` to `gathered`.

    Returns:
        `(count, zeros, *arguments) -> gathered`, the sum over `count` chunks, with a whole copy on every device.
        `count` may be traced, so one program serves any number of chunks. Each device starts from `zeros`.
    """
    if mesh is None:

        def alone(count: Int[Array, ""], zeros: Gathered, *arguments: Any) -> Gathered:
            return jax.lax.fori_loop(0, count, lambda chunk, gathered: work(chunk, gathered, *arguments), zeros)

        return alone

    axes, size = mesh.axis_names, mesh.size

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    def spread(count: Int[Array, ""], zeros: Gathered, *arguments: Any) -> Gathered:
        device = jax.lax.axis_index(axes)
        turns = (count - device + size - 1) // size

        def take_turn(turn: Array, gathered: Gathered) -> Gathered:
            return work(turn * size + device, gathered, *arguments)

        # As one vector: each all-reduce on CPUs makes all devices wait for each other.
        flat, unravel = ravel_pytree(jax.lax.fori_loop(0, turns, take_turn, zeros))
        return unravel(jax.lax.psum(flat, axes))

    return spread


def _chunk_pairs(mesh: Mesh | None, pairs: int) -> int:
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return CPU_PAIRS if platform == "cpu" else -(-pairs // (mesh.size if mesh else 1))


def _called(loss: Loss) -> Callable[[Params, Any, Array], Float[Array, ""]]:
    """Wrap a loss: pass the key if the loss takes one, and check that it returns a float scalar."""
    name = getattr(loss, "__name__", type(loss).__name__)
    with_key = _takes_key(loss)

    def call(params: Params, example: Any, key: Array) -> Float[Array, ""]:
        value = loss(params, example, key) if with_key else loss(params, example)
        is_array = hasattr(value, "dtype")
        kind = f"{value.dtype}{list(value.shape)}" if is_array else f"a {type(value).__name__}"
        is_float = jnp.issubdtype(value.dtype, jnp.floating) if is_array else isinstance(value, float)
        if not is_float or jnp.shape(value):
            raise TypeError(f"the loss {name} returns {kind}; it must return one number of floating type, float32[]")
        return jnp.asarray(value, jnp.float32)

    return call


def _takes_key(loss: Loss) -> bool:
    try:
        parameters = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):  # some compiled functions have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 2 and (
        positional[2].default is positional[2].empty or positional[2].name in ("key", "rng")
    )


def check_seeds(seeds: Any) -> None:
    """Raise ValueError unless the seeds are uint32 [pairs, 2]."""
    if jnp.ndim(seeds) != 2 or seeds.shape[1] != 2 or len(seeds) == 0 or seeds.dtype != jnp.uint32:
        kind = f"{getattr(seeds, 'dtype', type(seeds).__name__)}{list(jnp.shape(seeds))}"
        raise ValueError(f"seeds must be uint32 [pairs, 2], as esjax.pair_seeds makes them, got {kind}")


def examples_of(batch: Any, batch_axis: Any, pairs: int) -> tuple[list[int], list[int | None]]:
    """Return, for each leaf of a batch, how many examples it holds, and its axis of pairs (0 or None).

    Raises:
        ValueError: An axis is neither 0 nor None, or the size of a leaf does not divide the number of pairs.
    """
    named, _ = jax.tree_util.tree_flatten_with_path(batch)
    axes = [axis for axis, below in zip(*_broadcast_prefix(batch_axis, batch), strict=True) for _ in range(below)]
    groups = []
    for (path, leaf), axis in zip(named, axes, strict=True):
        if axis is None:
            groups.append(pairs)
            continue
        where = f"leaf {jax.tree_util.keystr(path) or 'of the batch'}".replace("leaf [", "leaf batch[")
        if axis != 0:
            raise ValueError(f"batch_axis must be 0 or None for each leaf, got {axis} for {where}")
        shape = jnp.shape(leaf)
        if not shape or shape[0] == 0 or pairs % shape[0]:
            raise ValueError(
                f"{where} has shape {list(shape)}; its first axis must be the {pairs} pairs, or groups that divide "
                "them; with batch_axis=None one example serves all pairs"
            )
        groups.append(shape[0])
    return groups, axes


def _broadcast_prefix(prefix: Any, tree: Any) -> tuple[list[Any], list[int]]:
    """Flatten a prefix of a pytree: return its values, None included, and the number of leaves below each."""
    values, treedef = jax.tree.flatten(prefix, is_leaf=lambda value: value is None)
    below: list[Any] = treedef.flatten_up_to(tree)  # type: ignore[attr-defined]
    return values, [len(jax.tree.leaves(part)) for part in below]
