"""A state comes back bit by bit, and whatever is wrong with its bytes is one error.

The references are the bits of the arrays, and the format packed by hand.
"""

import hashlib
import struct
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgspec
import numpy as np
import optax
import pytest
from conftest import mesh_of
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from esjax.errors import EsjaxError
from esjax.replica.estimators.feedback import first_feedback
from esjax.replica.snapshot import from_bytes, leaf_types, to_bytes
from esjax.replica.update import TrainState, init_state

HEAD = b"esjax snapshot 1\n"
START = len(HEAD) + 16


def array(dtype: type, *shape: int) -> np.ndarray:
    """Draw an array of any bits: floats hold NaNs of every kind."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(count).bytes(count), dtype).reshape(shape)


def make_state() -> TrainState:
    params = {"matrix": jnp.asarray(array(np.float32, 5, 4)), "vector": jnp.zeros(3), "scalar": jnp.float32(-0.0)}
    # Integers and bfloat16, as the states of optimizers may hold them.
    moments = {
        "half": jnp.asarray(array(ml_dtypes.bfloat16, 7)),
        "bytes": jnp.asarray(array(np.int8, 2, 3)),
        "seeds": jnp.asarray(array(np.uint32, 2)),
        "none": jnp.zeros((0, 4)),
    }
    state = init_state(params, optax.adam(0.1))
    return replace(state, step=jnp.int32(7), opt_state=(state.opt_state, moments), average=params)


STATE = make_state()
LIKE = jax.eval_shape(make_state)
DATA = to_bytes(STATE)


def bits(state: TrainState) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


def sealed(body: bytes) -> bytes:
    """Put the right head and hash before any bytes."""
    return HEAD + hashlib.blake2b(body, digest_size=16).digest() + body


def listed(names: Any, arrays: bytes = b"") -> bytes:
    """Pack a snapshot by hand, around any list."""
    packed = msgspec.msgpack.encode(names)
    return sealed(struct.pack("<I", len(packed)) + packed + arrays)


NAMES = list(leaf_types(STATE).items())
ARRAYS = b"".join(content for _, _, content in bits(STATE))


def refused(data: bytes, like: TrainState = LIKE) -> str:
    with pytest.raises(EsjaxError) as caught:
        from_bytes(data, like)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_a_state_comes_back_bit_by_bit() -> None:
    # Among the bits are NaNs with a payload, in both float types.
    matrix, half = np.asarray(STATE.params["matrix"]), np.asarray(STATE.opt_state[1]["half"])
    nan = np.array([0x7FC12345, 0xFFABCDEF], np.uint32).view(np.float32)
    half_nan = np.array([0x7FC1, 0xFFAB], np.uint16).view(ml_dtypes.bfloat16)
    state = replace(
        STATE,
        params={**STATE.params, "matrix": jnp.asarray(np.where(np.eye(5, 4) > 0, nan[0], matrix))},
        average={**STATE.average, "vector": jnp.asarray(np.array([*nan, 1], np.float32))},
        opt_state=(STATE.opt_state[0], {**STATE.opt_state[1], "half": jnp.asarray(np.array([*half_nan, *half[2:]]))}),
    )
    read = from_bytes(to_bytes(state), LIKE)
    assert bits(read) == bits(state)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (read, state)]
    assert structures[0] == structures[1]
    assert nan.tobytes() in to_bytes(state)
    assert half_nan.tobytes() in to_bytes(state)


@given(st.binary(min_size=40, max_size=40))
def test_any_bits_come_back(content: bytes) -> None:
    floats = jnp.asarray(np.frombuffer(content, np.float32))
    state = TrainState(
        jnp.int32(0),
        {"floats": floats},
        (),
        jnp.asarray(np.frombuffer(content, ml_dtypes.bfloat16)),
        (),
        (),
        first_feedback([]),
    )
    read = from_bytes(to_bytes(state), state)
    assert np.asarray(read.params["floats"]).tobytes() == np.asarray(read.average).tobytes() == content


def test_the_bytes_are_what_the_format_says() -> None:
    assert listed(NAMES, ARRAYS) == DATA
    assert (".step", "int32[]") in NAMES
    assert (".params['matrix']", "float32[5, 4]") in NAMES
    assert (".opt_state[1]['half']", "bfloat16[7]") in NAMES


def test_equal_states_are_equal_bytes_wherever_they_lie() -> None:
    everywhere = NamedSharding(mesh_of(4), PartitionSpec())
    assert to_bytes(jax.device_put(STATE, everywhere)) == DATA


@pytest.mark.parametrize("devices", [1, 4])
def test_the_arrays_lie_where_those_of_the_likeness_do(devices: int) -> None:
    sharding = NamedSharding(mesh_of(devices), PartitionSpec())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), LIKE)
    for alike in (like, jax.device_put(STATE, sharding)):
        read = from_bytes(DATA, alike)
        assert bits(read) == bits(STATE)
        assert {leaf.sharding for leaf in jax.tree.leaves(read)} == {sharding}


def test_a_snapshot_cut_off_anywhere_is_refused() -> None:
    for length in range(len(DATA)):
        refused(DATA[:length])


def test_a_snapshot_with_more_behind_it_is_refused() -> None:
    refused(DATA + b"\0")


@given(st.integers(0, 8 * len(DATA) - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    changed = bytearray(DATA)
    changed[bit // 8] ^= 1 << bit % 8
    refused(bytes(changed))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    refused(data)
    refused(HEAD + data)


@given(st.binary(max_size=200), st.integers(0, len(DATA) - START), st.integers(0, 40))
def test_what_somebody_changed_and_sealed_again_is_refused_or_other_numbers(
    data: bytes, start: int, replaced: int
) -> None:
    refused(sealed(data))
    body = DATA[START:]
    changed = body[:start] + data + body[start + replaced :]
    if len(changed) == len(body) and changed.startswith(body[: -len(ARRAYS)]):  # only numbers are changed
        read = from_bytes(sealed(changed), LIKE)
        assert b"".join(content for _, _, content in bits(read)) == changed[-len(ARRAYS) :]
    else:
        refused(sealed(changed))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_any_other_list_is_refused(names: Any) -> None:
    refused(listed(names, ARRAYS))


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (NAMES[:-1], "holds None"),
        ([*NAMES, ("more", "int8[]")], "not None"),
        ([*NAMES, NAMES[0]], "not None"),
        ([NAMES[1], NAMES[0], *NAMES[2:]], ".step"),
        ([(NAMES[0][0], "int64[]"), *NAMES[1:]], "int64"),
        ([(NAMES[0][0], "int32[1]"), *NAMES[1:]], "int32"),
        ([("\n" * 10**6, "\x1b[2J" * 10**6)], "another model"),
        (dict(NAMES), "cannot be read"),
        ([[name, kind, 0] for name, kind in NAMES], "cannot be read"),
        ([[name, {"x" * 10**6: 1}] for name, _ in NAMES], "cannot be read"),
    ],
)
def test_a_list_that_differs_is_refused_with_the_first_difference(names: Any, what: str) -> None:
    assert what in refused(listed(names, ARRAYS))


@pytest.mark.parametrize("declared", [0, 1, 2**31, 2**32 - 1])
def test_a_list_of_any_declared_length_is_refused(declared: int) -> None:
    refused(sealed(struct.pack("<I", declared) + DATA[START + 4 :]))


@pytest.mark.parametrize(
    "packed", [b"\x91" * 10**6, b"\xdd\xff\xff\xff\xff", b"\x91\xdb\xff\xff\xff\xff", b"\x81" * 10**6]
)
def test_hostile_msgpack_is_refused(packed: bytes) -> None:
    """Deep nesting and huge declared lengths."""
    refused(sealed(struct.pack("<I", len(packed)) + packed))


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_arrays_of_another_size_are_refused(change: int) -> None:
    arrays = ARRAYS[:change] if change < 0 else ARRAYS + bytes(change)
    assert f"holds {len(arrays):,} bytes of arrays, not {len(ARRAYS):,}" in refused(listed(NAMES, arrays))


def test_the_state_of_another_model_is_refused() -> None:
    wider = replace(LIKE, params={**LIKE.params, "vector": jax.ShapeDtypeStruct((4,), jnp.float32)})
    message = refused(DATA, wider)
    assert "float32[3]" in message
    assert "float32[4]" in message
    assert "vector" in message
    other = replace(LIKE, opt_state=jax.eval_shape(optax.sgd(0.1).init, LIKE.params))
    assert "another model" in refused(DATA, other)


def test_another_version_is_named() -> None:
    assert "use the same version" in refused(b"esjax snapshot 2\n" + DATA[len(HEAD) :])
