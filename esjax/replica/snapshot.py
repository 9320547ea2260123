r"""A training state as one message, for a host that joins or whose state is wrong.

    "esjax snapshot 1\n", BLAKE2b-128 of all that follows, length of the list in bytes (uint32),
    the list as msgpack: name, type and shape of each array, the arrays one after another; all little-endian

The reader compares the list with its state and refuses another model. It never takes shapes or sizes from the message,
so a message cannot make it allocate memory.
"""

import hashlib
import struct
from itertools import zip_longest

import jax
import msgspec
import numpy as np
from jaxtyping import PyTree

from esjax.errors import EsjaxError
from esjax.replica.update import TrainState

_HEAD = b"esjax snapshot 1\n"
_HASH_BYTES = 16
_LENGTH = struct.Struct("<I")
_LISTED = len(_HEAD) + _HASH_BYTES + _LENGTH.size


def leaf_types(state: PyTree) -> dict[str, str]:
    """Describe each array of a state by its type and shape, in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def to_bytes(state: TrainState) -> bytes:
    """Write a state without loss of a bit."""
    listed = msgspec.msgpack.encode(list(leaf_types(state).items()))
    body = [_LENGTH.pack(len(listed)), listed, *(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state))]
    return b"".join([_HEAD, _hash(*body), *body])


def from_bytes(data: bytes, like: TrainState) -> TrainState:
    """Check and read a state.

    Args:
        data: Any bytes.
        like: A state with the same structure, shapes and types, and with the shardings for the arrays.

    Raises:
        EsjaxError: The bytes are not a snapshot of this version, are damaged, or hold the state of another model.
    """
    if data[: len(_HEAD)] != _HEAD or len(data) < _LISTED:
        raise EsjaxError("this is no snapshot of this version of esjax; use the same version on every host")
    body = memoryview(data)[len(_HEAD) + _HASH_BYTES :]
    if data[len(_HEAD) : len(_HEAD) + _HASH_BYTES] != _hash(body):
        raise EsjaxError("the snapshot has changed on its way; fetch it again")
    (length,) = _LENGTH.unpack_from(body)
    _check_list(body[_LENGTH.size :][:length], like)
    leaves, structure = jax.tree.flatten(like)
    arrays = body[_LENGTH.size + length :]
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    if len(arrays) != sum(sizes):
        raise EsjaxError(f"the snapshot holds {len(arrays):,} bytes of arrays, not {sum(sizes):,}; fetch it again")
    read = []
    for leaf, size in zip(leaves, sizes, strict=True):
        read.append(np.frombuffer(arrays[:size], leaf.dtype).reshape(leaf.shape))
        arrays = arrays[size:]
    return jax.tree.unflatten(structure, jax.device_put(read, [leaf.sharding for leaf in leaves]))


def _check_list(listed: memoryview, like: TrainState) -> None:
    expected = list(leaf_types(like).items())
    try:
        found = msgspec.msgpack.decode(listed, type=list[tuple[str, str]])
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: not UTF-8
        raise EsjaxError(f"the snapshot's list of arrays cannot be read: {error}"[:300]) from error
    for theirs, ours in zip_longest(found, expected):
        if theirs != ours:
            raise EsjaxError(
                f"the snapshot is the state of another model: it holds {theirs!r:.200}, not {ours!r:.200}; "
                "give every host the same settings"
            )


def _hash(*parts: bytes | memoryview) -> bytes:
    summary = hashlib.blake2b(digest_size=_HASH_BYTES)
    for part in parts:
        summary.update(part)
    return summary.digest()
