"""Operations on perturbed arrays: the same numbers as on added-up ones, and nothing is added up."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from combinations import halved
from jax import lax
from jaxtyping import Array

from esjax.core.interpreter import AddedUp, interpret
from esjax.core.perturbed import PerturbedArray


def perturbed(shape: tuple[int, ...], cut: int, layers: int = 0, rank: int = 1, seed: int = 0) -> PerturbedArray:
    """Make a perturbed array whose rows are the axes `layers` to `cut`."""
    rng = np.random.default_rng(seed)
    left = (*shape[:cut], *[1] * (len(shape) - cut), rank)
    right = (*shape[:layers], *[1] * (cut - layers), *shape[cut:], rank)
    base, one, two = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (shape, left, right))
    return PerturbedArray(base, one, two, jnp.float32(-0.3), jnp.dtype("float32"), "w")


def written_out(value: PerturbedArray) -> np.ndarray:
    """Reference: base + Σ_r left_r * right_r * step, in float64."""
    left, right = (np.asarray(factor, np.float64) for factor in (value.left, value.right))
    return np.asarray(value.base, np.float64) + float(value.step) * (left * right).sum(axis=-1)  # type: ignore[arg-type]


def numbers(*shape: int, seed: int = 1) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.custom_vjp
def doubled(x: Array) -> Array:
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, slope: (2 * slope,))


@jax.custom_jvp
def multiplied(w: Array) -> Array:
    return numbers(6) @ w


multiplied.defjvp(lambda primals, tangents: (multiplied(*primals), multiplied(*tangents)))

TOKENS = jnp.array([3, 0, 5, 3])
KEPT: dict[str, tuple[PerturbedArray, Callable[[Array], Any]]] = {
    "vector times matrix": (perturbed((6, 4), 1), lambda w: numbers(6) @ w),
    "matrix times vector": (perturbed((6, 4), 1), lambda w: w @ numbers(4)),
    "batch times matrix": (perturbed((6, 4), 1), lambda w: numbers(3, 2, 6) @ w),
    "matrix times batch": (perturbed((6, 4), 1), lambda w: jnp.einsum("ij,abj->iab", w, numbers(3, 2, 4))),
    "times the transpose": (perturbed((6, 4), 1), lambda w: numbers(5, 4) @ w.T),
    "queries": (perturbed((6, 2, 4), 1), lambda w: jnp.einsum("td,dhk->thk", numbers(5, 6), w)),
    "attention out": (perturbed((2, 4, 6), 2), lambda w: jnp.einsum("thk,hkd->td", numbers(5, 2, 4), w)),
    "contracted on both sides of the cut": (
        perturbed((2, 4, 6), 1),
        lambda w: jnp.einsum("thk,hkd->td", numbers(5, 2, 4), w),
    ),
    "contracted in part": (perturbed((6, 2, 4), 2), lambda w: jnp.einsum("td,dhk->thk", numbers(5, 6), w)),
    "contracted wholly": (perturbed((6, 4), 1), lambda w: jnp.einsum("ij,tij->t", w, numbers(3, 6, 4))),
    "a layer each": (perturbed((3, 6, 4), 2, layers=1), lambda w: jnp.einsum("ld,ldk->lk", numbers(3, 6), w)),
    "layers of one input": (perturbed((3, 6, 4), 2, layers=1), lambda w: jnp.einsum("d,ldk->lk", numbers(6), w)),
    "vmap over layers": (perturbed((3, 6, 4), 2, layers=1), lambda w: jax.vmap(jnp.matmul)(numbers(3, 6), w)),
    "vmap over inputs": (perturbed((6, 4), 1), lambda w: jax.vmap(lambda x: jnp.tanh(x @ w))(numbers(5, 6))),
    "look-up of a token": (perturbed((6, 4), 1), lambda w: w[TOKENS[0]]),
    "look-up of tokens": (perturbed((6, 4), 1), lambda w: w[TOKENS]),
    "look-up by take": (perturbed((6, 4), 1), lambda w: jnp.take(w, TOKENS.reshape(2, 2), axis=0)),
    "look-up of columns": (perturbed((4, 6), 1), lambda w: jnp.take(w, TOKENS, axis=1)),
    "look-up with several axes": (perturbed((6, 2, 4), 1), lambda w: w[TOKENS]),
    "tied": (perturbed((6, 4), 1), lambda w: jnp.tanh(w[TOKENS]) @ w.T),
    "a layer by its number": (perturbed((3, 6, 4), 2, layers=1), lambda w: numbers(6) @ w[TOKENS[0] - 2]),
    "static part": (perturbed((6, 4), 1), lambda w: numbers(3) @ w[1:4, 1:]),
    "split": (perturbed((6, 4), 1), lambda w: [numbers(6) @ part for part in jnp.split(w, 2, axis=1)]),
    "reshape": (perturbed((6, 8), 1), lambda w: jnp.einsum("d,dhk->hk", numbers(6), w.reshape(6, 2, 4))),
    "reshape back": (perturbed((6, 2, 4), 1), lambda w: numbers(6) @ w.reshape(6, 8)),
    "reshape of rows": (perturbed((2, 3, 4), 2), lambda w: numbers(6) @ w.reshape(6, 4)),
    "swapped axes": (perturbed((6, 2, 4), 1), lambda w: jnp.einsum("d,hdk->hk", numbers(6), jnp.swapaxes(w, 0, 1))),
    "more axes": (perturbed((6, 4), 1), lambda w: numbers(3, 1, 6) @ w[None]),
    "cast there and back": (perturbed((6, 4), 1), lambda w: numbers(6) @ w.astype(jnp.float16).astype(jnp.float32)),
    "times a number": (perturbed((6, 4), 1), lambda w: numbers(6) @ (2.0 * w / 3.0)),
    "negative": (perturbed((6, 4), 1), lambda w: numbers(6) @ -w),
    "plus an array": (perturbed((6, 4), 1), lambda w: numbers(6, 4) + w),
    "jit": (perturbed((6, 4), 1), lambda w: jax.jit(lambda w: jnp.tanh(numbers(6) @ w))(w)),
    "checkpoint": (perturbed((6, 4), 1), lambda w: jax.checkpoint(lambda w: jnp.tanh(numbers(6) @ w))(w)),
    "custom_jvp": (perturbed((6, 4), 1), lambda w: jax.nn.relu(numbers(6) @ w)),
    "custom_jvp of the matrix": (perturbed((6, 4), 1), multiplied),
    "custom_vjp": (perturbed((6, 4), 1), lambda w: doubled(numbers(6) @ w)),
    "scan": (
        perturbed((4, 4), 1),
        lambda w: lax.scan(lambda h, x: (jnp.tanh(x + h @ w), h), numbers(4), numbers(5, 4)),
    ),
    "scan over layers": (
        perturbed((3, 4, 4), 2, layers=1),
        lambda w: lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), numbers(4), w)[0],
    ),
    "scan over layers, backwards": (
        perturbed((3, 4, 4), 2, layers=1),
        lambda w: lax.scan(lambda h, layer: (jnp.tanh(h @ layer), h), numbers(4), w, reverse=True),
    ),
    "scan over rows": (
        perturbed((6, 4), 1),
        lambda w: lax.scan(lambda h, row: (jnp.tanh(h * 2 + row), h), numbers(4), w),
    ),
    "scan backwards, unrolled": (
        perturbed((4, 4), 1),
        lambda w: lax.scan(lambda h, x: (x + h @ w, h), numbers(4), numbers(5, 4), reverse=True, unroll=2),
    ),
    "scan that carries the matrix": (
        perturbed((4, 4), 1),
        lambda w: lax.scan(lambda c, x: ((c[0], jnp.tanh(x + c[1] @ c[0])), None), (w, numbers(4)), numbers(5, 4))[0][
            1
        ],
    ),
    "while": (
        perturbed((4, 4), 1),
        lambda w: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, numbers(4)))[1],
    ),
    "fori_loop over layers": (
        perturbed((3, 4, 4), 2, layers=1),
        lambda w: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]), numbers(4)),
    ),
    "cond": (
        perturbed((4, 4), 1),
        lambda w: lax.cond(numbers(4)[0] > 0, lambda w: numbers(4) @ w, lambda w: w @ numbers(4), w),
    ),
}


@pytest.mark.parametrize(("name", "rank"), halved(KEPT, [1, 3]))
def test_an_operation_keeps_a_matrix_of_low_rank_and_its_numbers(name: str, rank: int) -> None:
    """Reference: the same function of the matrix written out. Nothing is added up."""
    example, function = KEPT[name]
    cut, layers = _cut_of(example)
    value = perturbed(example.shape, cut, layers, rank)
    added_up: list[AddedUp] = []
    got = jax.jit(interpret(function, added_up))(value)
    expected = function(jnp.asarray(written_out(value), jnp.float32))
    # float16 keeps 11 bits of the base; all else is float32, of sums of up to 24 terms.
    tolerance = 5e-3 if "cast" in name else 2e-5
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance), got, expected)
    assert added_up == []


def _cut_of(value: PerturbedArray) -> tuple[int, int]:
    assert isinstance(value.left, jax.Array)
    assert isinstance(value.right, jax.Array)
    varies = [(a != 1, b != 1) for a, b in zip(value.left.shape[:-1], value.right.shape[:-1], strict=True)]
    return sum(left for left, _ in varies), sum(left and right for left, right in varies)


ADDED_UP: dict[str, tuple[str, Callable[[Array], Any]]] = {
    "square": ("integer_pow", lambda w: numbers(6) @ w**2),
    "sine": ("sin", jnp.sin),
    "sum": ("reduce_sum", jnp.sum),
    "joined": ("concatenate", lambda w: numbers(12) @ jnp.concatenate([w, w])),
    "flattened": ("reshape", lambda w: numbers(24) @ w.reshape(-1)),
    "product of two": ("dot_general", lambda w: w.T @ w),
}


@pytest.mark.parametrize("name", ADDED_UP)
def test_what_has_no_rule_is_added_up_rightly_and_named(name: str) -> None:
    """Reference: the same function of the matrix written out."""
    operation, function = ADDED_UP[name]
    value = perturbed((6, 4), 1)
    added_up: list[AddedUp] = []
    got = jax.jit(interpret(function, added_up))(value)
    np.testing.assert_allclose(got, function(jnp.asarray(written_out(value), jnp.float32)), rtol=2e-5, atol=2e-5)
    assert {found.operation for found in added_up} == {operation}
    assert {(found.leaf, math.prod(found.shape)) for found in added_up} == {("w", 24)}


def test_a_loop_that_changes_what_it_carries_adds_it_up_and_keeps_its_numbers() -> None:
    def shrink(w: Array) -> Array:
        return lax.fori_loop(0, 3, lambda i, w: w * 0.5, w) @ numbers(4)

    value = perturbed((6, 4), 1)
    added_up: list[AddedUp] = []
    got = jax.jit(interpret(shrink, added_up))(value)
    np.testing.assert_allclose(got, written_out(value) / 8 @ np.asarray(numbers(4)), rtol=1e-5, atol=1e-6)
    assert added_up


def test_products_in_a_narrower_type_are_of_rounded_numbers() -> None:
    """Reference: bfloat16 factors multiplied in float64; the noise keeps its digits."""
    value = perturbed((40, 6), 1)
    rounded = PerturbedArray(
        value.base.astype(jnp.bfloat16), value.left, value.right, value.step, jnp.dtype("float32"), "w"
    )
    x = numbers(40)
    base, short = (np.asarray(array.astype(jnp.bfloat16), np.float64) for array in (value.base, x))
    step = written_out(value) - np.asarray(value.base, np.float64)
    got = interpret(lambda w: x @ w)(rounded)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, short @ base + np.asarray(x, np.float64) @ step, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(interpret(lambda w: w[3])(rounded), base[3] + step[3], rtol=1e-6, atol=1e-6)


def test_a_function_with_no_perturbed_argument_is_called_as_it_is() -> None:
    assert interpret(type)(3) is int
