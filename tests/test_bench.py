"""Benchmarks run, in small, and leave what they should; the rivals do what they are said to do."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bench import throughput
from bench.learners import arranged, ours
from bench.measure import Candidate, Spread, alternate, spread
from bench.ours import replica_of, step
from bench.report import Report, Row, to_table
from bench.rivals import NumpyRnn, Rival, evosax_open_es, normal_low_rank
from bench.settings import SHORT, Throughput
from conftest import mesh_of
from processes import environment
from small import MODELS, VOCAB, params_of

from esjax.config import Config, DataConfig, EsConfig, GruConfig
from esjax.data.corpus import load_corpus
from esjax.member import Member
from esjax.models import Model
from esjax.models.model import Params

RUN = Path(__file__).parents[1] / "experiments" / "run.py"

SGD = optax.sgd(1.0)

FIGURES = {
    "throughput": {"evaluation ÷ numpy", "evaluation ÷ forward", "step ÷ evosax", "step ÷ best rival", "rates"},
    "update": {"update ÷ evaluation", "update ÷ step", "population", "hosts", "hidden", "rank"},
    "learning": {"method", "step size", "trials", "held-out", "below 3.33: s", "below 3.33: M tokens", "curve"},
    "start": {"start of", "seconds"},
    "ablation": {"choice", "held-out", "worse by"},
    "scale_free": {"choice", "held-out", "worse by"},
    "scaling": {"axis", "value", "step M/s", "÷ first", "memory MB"},
    "activation": {"hidden", "step ÷ forward"},
    "exchange": {"hosts", "losses ÷ sums"},
    "cosines": {"space", "population", "cosine"},
    "workers": {"processes", "÷ one process"},
    "watching": {"trackers", "rate, watched ÷ alone"},
    "coordinator": {"how", "hosts", "own_ms"},
}


def spreads(value: Any) -> Iterator[dict[str, float]]:
    if isinstance(value, dict):
        if set(value) == set(Spread._fields):
            yield value
        else:
            for inner in value.values():
                yield from spreads(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from spreads(inner)


def test_benchmarks_run_and_leave_their_figures(tmp_path: Path) -> None:
    assert set(FIGURES) == set(SHORT)
    quick = ("update", "exchange", "watching")  # all of them take minutes
    command = [sys.executable, str(RUN), "bench", *quick, "--short", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for name, figures in ((name, FIGURES[name]) for name in quick):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["benchmark"] == name
        assert found["machine"]["cores"] >= 1
        assert found["settings"]
        assert found["rows"]
        for row in found["rows"]:
            assert figures <= set(row), name
        for value in spreads(found["rows"]):
            assert value["low"] <= value["median"] <= value["high"], name
            assert math.isfinite(value["low"]), name
        lines = (tmp_path / f"{name}.md").read_text().splitlines()
        assert sum(line.startswith("|") for line in lines) == len(found["rows"]) + 2
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_candidates_take_turns() -> None:
    called: list[str] = []
    candidates = {name: Candidate(partial(called.append, name), 6.0) for name in "ab"}
    rates = alternate(candidates, 3, least=1e-12)
    assert called[:4] == ["a", "a", "b", "b"]  # one call that may compile, and one that tells how long it takes
    assert called[4:] == ["a", "b"] * 3
    called.clear()
    alternate(candidates, 2, least=0.0)
    assert called == ["a", "b"] * 2
    assert {name: len(values) for name, values in rates.items()} == {"a": 3, "b": 3}


def test_losses_can_be_timed_at_the_populations_of_an_accelerator() -> None:
    for size in throughput.sizes(Throughput(scale=16)):
        replica = replica_of(size.config, mesh_of(1))
        assert size.population >= 1024
        assert replica.numbers == 0, size  # else it adds up, and `losses` finds no function to score with
        step(size.config, replica)


def test_a_table_shows_spreads_and_leaves_out_lists() -> None:
    rows: list[Row] = [{"a": spread(np.array([3.0, 1.0, 2.0])), "b": 1234567, "c": [1]}, {"a": None, "d": 0.125}]
    assert to_table(Report(rows, notes=["So."])).splitlines() == [
        "| a | b | d |",
        "| --- | --- | --- |",
        "| 2 [1, 3] | 1,234,567 |  |",
        "|  |  | 0.125 |",
        "",
        "So.",
    ]


def test_numpy_computes_the_same_loss() -> None:
    model = MODELS["rnn"]
    params = params_of(model)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (5, 9))  # STOP, 1, among them
    assert (tokens[:, :-1] == 1).any()
    expected = jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, 2))(jnp.asarray(tokens)))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    np.testing.assert_allclose(NumpyRnn(leaves, 0.1, 2).loss(leaves, tokens), expected, rtol=1e-6)


def cosine_with_gradient(rival: Rival, model: Model, params: Params, key: int, tokens: jax.Array) -> float:
    """Take a step of size 1 downhill, and compare it with the exact one; both in units."""
    state = jax.jit(rival.step)(rival.init(params), jax.random.key(key), tokens)
    units = model.units(params)
    change = jax.tree.map(lambda old, new, unit: (old - new) / unit, params, rival.params(state), units)
    windows = tokens.reshape(-1, tokens.shape[-1])

    def mean_loss(params: Params) -> jax.Array:
        return jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, 1))(windows))

    gradient = jax.tree.map(lambda leaf, unit: leaf * unit, jax.grad(mean_loss)(params), units)
    one, two = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (change, gradient))
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


@pytest.mark.usefixtures("lenient_promotion")
def test_rivals_go_along_the_gradient() -> None:
    """With n parameters and K pairs on the same windows the cosine is about 1 / sqrt(1 + n / K): 0.95 here."""
    model, pairs = MODELS["gru"], 2048
    params = params_of(model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    expected = (1 + parameters / pairs) ** -0.5
    window = jax.random.randint(jax.random.key(1), (4, 9), 0, VOCAB)
    mesh = mesh_of(4)
    dense = evosax_open_es(model, mesh, burn_in=1, population=2 * pairs, sigma=0.01, optimizer=SGD, at_once=256)
    with jax.numpy_rank_promotion("allow"):  # evosax's code needs it
        found = cosine_with_gradient(dense, model, params, 0, window)
    assert found == pytest.approx(expected, abs=0.05)  # ranks in place of losses cost a little
    low_rank = normal_low_rank(model, mesh, burn_in=1, pairs=pairs, sigma=0.01, rank=1, optimizer=SGD, at_once=256)
    same = jnp.broadcast_to(window, (pairs, *window.shape))
    # Products of two normals have heavier tails than one normal, which costs more.
    assert 0.8 < cosine_with_gradient(low_rank, model, params, 0, same) < expected + 0.02


@pytest.mark.usefixtures("lenient_promotion")
def test_the_own_arrangement_of_pairs_is_that_of_training() -> None:
    config = Config(
        data=DataConfig(text="builtin:pydoc", window=8),
        es=EsConfig(population_size=64),
        model=GruConfig(hidden_size=4, head_size=4),
    )
    corpus = load_corpus(config.data)
    learners = [ours(config, corpus), arranged(config, corpus)]
    tokens = [[learner.step(0.0) for _ in range(3)] for learner in learners]
    assert tokens[0] == tokens[1] == [64 * 8] * 3
    one, two = (jax.device_get(learner.params()) for learner in learners)
    jax.tree.map(np.testing.assert_array_equal, one, two)
