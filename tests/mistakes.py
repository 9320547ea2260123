"""Mistakes in calling the core, and their errors.

A program: under pytest, types are checked before the core sees them.
"""

import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import esjax

PAIRS = 8
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
NOISE = esjax.low_rank(0.1)
SEEDS = esjax.pair_seeds(1, 2, PAIRS)
BATCH = jnp.asarray(np.random.default_rng(1).normal(size=(PAIRS, 3)), jnp.float32)


def loss(params: Any, x: Array) -> Array:
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def many(params: Any, x: Array) -> Array:
    return x @ params["w"]


def no_pairs() -> Any:
    return esjax.pair_seeds(0, 0, 0)


MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "sigma": (ValueError, "sigma must be above 0", lambda: esjax.low_rank(0.0)),
    "rank": (ValueError, "rank must be at least 1", lambda: esjax.low_rank(0.1, 0)),
    "pairs": (ValueError, "pairs must be at least 1", no_pairs),
    "seed": (ValueError, "seed must be at least 0 and below 2\\^32, got -1", lambda: esjax.pair_seeds(-1, 0, 2)),
    "a loss of many numbers": (
        TypeError,
        r"the loss many returns float32\[2\]; it must return one number",
        lambda: esjax.evaluate(many, NOISE)(PARAMS, SEEDS, BATCH),
    ),
    "a loss of an integer": (
        TypeError,
        r"returns int32\[\]",
        lambda: esjax.evaluate(lambda params, x: jnp.int32(1), NOISE)(PARAMS, SEEDS, BATCH),
    ),
    "a loss of nothing": (
        TypeError,
        "returns a NoneType",
        lambda: esjax.evaluate(lambda params, x: None, NOISE)(PARAMS, SEEDS, BATCH),  # type: ignore[arg-type,return-value]
    ),
    "seeds": (
        ValueError,
        r"seeds must be uint32 \[pairs, 2\].* got int32\[8\]",
        lambda: esjax.evaluate(loss, NOISE)(PARAMS, jnp.arange(8), BATCH),
    ),
    "a batch of another length": (
        ValueError,
        r"leaf of the batch has shape \[5, 3\].*8 pairs",
        lambda: esjax.evaluate(loss, NOISE)(PARAMS, SEEDS, BATCH[:5]),
    ),
    "a leaf of a batch without an axis": (
        ValueError,
        r"batch\['y'\] has shape \[\]",
        lambda: esjax.evaluate(loss, NOISE)(PARAMS, SEEDS, {"x": BATCH, "y": jnp.float32(1)}),
    ),
    "a leaf that is no array": (
        TypeError,
        "leaf name of the parameters is a str",
        lambda: esjax.evaluate(loss, NOISE)({**PARAMS, "name": "gru"}, SEEDS, BATCH),
    ),
    "nothing to perturb": (
        TypeError,
        "no leaf of the parameters can be perturbed; there are: w, b|there are: b, w",
        lambda: esjax.evaluate(loss, esjax.full(0.1, where=lambda path, leaf: False))(PARAMS, SEEDS, BATCH),
    ),
    "units of another tree": (
        ValueError,
        "units must be a tree of numbers like the parameters",
        lambda: esjax.evaluate(loss, esjax.low_rank(0.1, units={"w": 1.0}))(PARAMS, SEEDS, BATCH),
    ),
    "a unit of 0": (
        ValueError,
        "the unit of b must be above 0",
        lambda: esjax.evaluate(loss, esjax.low_rank(0.1, units={"w": 1.0, "b": 0.0}))(PARAMS, SEEDS, BATCH),
    ),
    "no axis of layers": (
        ValueError,
        "leaf b of shape .* has no axis of layers",
        lambda: esjax.evaluate(loss, esjax.low_rank(0.1, stacked=lambda path, leaf: True))(PARAMS, SEEDS, BATCH),
    ),
    "losses of another shape": (ValueError, r"losses must be of shape \[pairs, 2\]", lambda: esjax.shape(BATCH)),
    "an unknown shaping": (
        ValueError,
        "method must be one of zscore, centered_rank, sign, raw, got 'rank'",
        lambda: esjax.shape(BATCH[:, :2], "rank"),  # type: ignore[arg-type]
    ),
    "weights of split pairs": (
        ValueError,
        r"weights must be of shape \[8, 2\] for 8 split pairs",
        lambda: esjax.estimate(esjax.low_rank(0.1, split=True))(PARAMS, SEEDS, esjax.shape(BATCH[:, :2])),
    ),
    "rows of other pairs": (
        ValueError,
        r"rows of w must be of shape \[8, reads\], got \[7, 2\]",
        lambda: esjax.estimate(NOISE)(PARAMS, SEEDS, esjax.shape(BATCH[:, :2]), rows={"w": jnp.zeros((7, 2), int)}),
    ),
    "one row of a pair, with no axis of reads": (
        ValueError,
        r"rows of w must be of shape \[8, reads\], got \[8\]",
        lambda: esjax.estimate(NOISE)(PARAMS, SEEDS, esjax.shape(BATCH[:, :2]), rows={"w": jnp.zeros(8, int)}),
    ),
}


def what_is_said() -> dict[str, tuple[str, str]]:
    """Call each, and return the type and the text of its error."""
    said = {}
    for name, (_, _, call) in MISTAKES.items():
        try:
            call()
            said[name] = ("", "")
        except Exception as error:
            said[name] = (type(error).__name__, str(error))
    return said


if __name__ == "__main__":
    print(json.dumps(what_is_said()))
