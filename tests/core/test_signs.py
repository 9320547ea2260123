"""Random signs: the bits of threefry, and the same whether they are drawn as numbers or kept as bits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import MODELS, kept_in_factors, member_of, noise_of, params_of, seeds_of

from esjax.core.perturbed import is_perturbed
from esjax.core.signs import PackedSigns, draw


def test_rademacher_bits_are_those_of_threefry() -> None:
    """Reference: the two words of each block `fold_in(seed, 0), fold_in(seed, 1), ...`, read bit by bit in Python.

    The first words of all blocks come before the second ones; a set bit of any word is one -1.
    """
    seed = seeds_of(1)[0]
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    blocks = [np.asarray(jax.random.key_data(jax.random.fold_in(key, block))) for block in range(2)]
    words = [int(block[half]) for half in range(2) for block in blocks]
    expected = [-1.0 if (word >> (31 - bit)) & 1 else 1.0 for word in words for bit in range(32)][:100]
    np.testing.assert_array_equal(draw("rademacher", seed, 100), np.array(expected, np.float32))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", [1, 3])
def test_packed_signs_are_the_same(name: str, rank: int) -> None:
    """Equality of two ways: factors kept as bits until they are used, or drawn as numbers."""
    params, seed = params_of(MODELS[name]), seeds_of()[2]
    packed, plain = (
        member_of(noise_of(MODELS[name], rank=rank, packed=is_packed), params, seed, -1.0)
        for is_packed in (True, False)
    )
    factored = kept_in_factors(packed)
    assert len(factored) == len(kept_in_factors(plain)) == {"rnn": 6, "gru": 4}[name]
    for one, other in zip(factored, kept_in_factors(plain), strict=True):
        for side in ("left", "right"):
            part = getattr(one, side)
            assert isinstance(part, PackedSigns)
            np.testing.assert_array_equal(part.unpack(), getattr(other, side))
        assert one.step == other.step
    for leaf, same in zip(*(jax.tree.leaves(member, is_leaf=is_perturbed) for member in (packed, plain)), strict=True):
        if not is_perturbed(leaf):
            np.testing.assert_array_equal(leaf, same)


@pytest.mark.parametrize("shape", [(70, 3), (40, 2, 3)])
def test_a_row_of_packed_signs_is_that_of_the_array(shape: tuple[int, ...]) -> None:
    """Rows that lie in one word, that begin with one, and that go on in the next one."""
    words = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 9), jnp.uint32)
    array = PackedSigns(words, 37, shape)
    assert set(np.unique(array.unpack())) == {-1.0, 1.0}
    size = math.prod(shape[1:])
    begins = 37 + size * np.arange(shape[0])
    crossing = begins // 32 != (begins + size - 1) // 32
    assert crossing.any()
    for number in (0, 1, 9, shape[0] - 1, int(np.argmax(crossing))):
        np.testing.assert_array_equal(array.row(jnp.int32(number)), array.unpack()[number : number + 1])
