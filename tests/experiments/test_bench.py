"""Benchmarks run, in small, and leave what they should; the rivals do what they are said to do."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bench import scaling, throughput
from bench.learners import arranged, mean_gradient, mean_of_peers, ours
from bench.measure import Candidate, Spread, alternate, elsewhere, fastest, spread
from bench.ours import replica_of, step
from bench.report import Report, Row, to_table
from bench.rivals import NumpyRnn, Rival, evosax_open_es, normal_low_rank
from bench.search import Choice, best_of, search
from bench.settings import SHORT, Scaling, Throughput
from bench.targets import compare
from bench.watching import median_of
from conftest import mesh_of
from processes import environment
from small import MODELS, VOCAB, params_of

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.corpus import load_corpus
from esjax.models import Model
from esjax.models.member import Member
from esjax.models.model import Params

RUN = Path(__file__).parents[2] / "experiments" / "run.py"

SGD = optax.sgd(1.0)

FIGURES = {
    "frameworks": {"model", "evaluation ÷ forward", "added up", "difference"},
    "throughput": {
        *("evaluation ÷ numpy", "evaluation ÷ forward", "step ÷ evosax", "step ÷ normal, kept"),
        *("step ÷ normal, grown again", "step ÷ best rival", "step, bfloat16 ÷ best rival, bfloat16", "rates"),
    },
    "update": {"update ÷ evaluation", "update ÷ step", "population", "hosts", "hidden", "rank"},
    "learning": {
        "method",
        "step size",
        "windows",
        "trials",
        "held-out",
        "below 3.33: s",
        "below 3.33: M tokens",
        "curve",
    },
    "growth": {"model", "width", "method", "weights", "M member-tokens", "bits/byte", "curve"},
    "start": {"start of", "seconds"},
    "rewards": {"reward", "measured", "value"},
    "ablation": {"choice", "held-out", "worse by"},
    "scale_free": {"choice", "held-out", "worse by"},
    "scaling": {"axis", "value", "step M/s", "÷ first", "memory MB"},
    "activation": {"hidden", "step ÷ forward"},
    "exchange": {"hosts", "losses ÷ sums"},
    "cosines": {"space", "population", "cosine", "standard error"},
    "bias": {"estimator", "leaf", "one", "all", "limit"},
    "execution": {"way", "chunk, pairs", "÷ defaults"},
    "workers": {"processes", "÷ one process"},
    "watching": {"compared", "rate ÷ alone", "share of the processors"},
    "coordinator": {"how", "hosts", "own_ms"},
    "liars": {"exchange", "how", "liar", "found after steps", "honest put aside", "held-out"},
    "floods": {"keys", "flood", "rate ÷ before", "rate ÷ equal load", "memory MB", "joined after s"},
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


EVERY_TIME = ("update", "activation", "exchange", "liars")
"""Benchmarks that run with the tests of every change; all of them run at night."""


@pytest.mark.parametrize("names", [EVERY_TIME, pytest.param((), marks=pytest.mark.nightly)], ids=["some", "all"])
def test_benchmarks_run_and_leave_their_figures(names: tuple[str, ...], tmp_path: Path) -> None:
    """In one process, whose programs need not be fast: compiling them is most of the work."""
    assert set(FIGURES) == set(SHORT)
    command = [sys.executable, str(RUN), "bench", *names, "--short", "--out", str(tmp_path)]
    hurried = environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=hurried)
    assert done.returncode == 0, done.stderr
    for name in names or FIGURES:
        figures = FIGURES[name]
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
    if not names:
        assert "rnn 16: evaluation ÷ numpy" in done.stdout  # the table of targets comes last


def test_the_interval_of_a_median_is_that_of_the_tables() -> None:
    """Of 100 values the 40th and the 61st, of 5 all."""
    assert median_of([float(number) for number in range(100, 0, -1)]) == Spread(50.5, 40.0, 61.0)
    assert median_of([5.0, 3.0, 1.0, 2.0, 4.0]) == Spread(3.0, 1.0, 5.0)


def test_candidates_take_turns() -> None:
    called: list[str] = []
    candidates = {name: Candidate(partial(called.append, name), 6.0) for name in "abc"}
    rates = alternate(candidates, 4, least=1e-12)
    assert "".join(called[:6]) == "aabbcc"  # one call that may compile, and one that tells how long it takes
    assert "".join(called[6:]) == "abc" + "acb" + "cab" + "cba"  # rotated by one, and every other one backwards
    called.clear()
    alternate(candidates, 1, least=0.0)
    assert "".join(called) == "abc"
    assert {name: len(values) for name, values in rates.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_fastest_is_so_at_the_median() -> None:
    """Sleeps, in calls: one to compile, one to be tried, and three more; b is slow once, d only seems fast at first."""
    sleeps = {
        "a": iter([0.0, 0.03, 0.03, 0.03, 0.03]),
        "b": iter([0.0, 0.02, 0.2, 0.01, 0.01]),
        "c": iter([0.0, 0.3]),
        "d": iter([0.0, 0.0, 0.05, 0.05, 0.05]),
    }
    candidates = {name: Candidate(partial(lambda name: time.sleep(next(sleeps[name])), name)) for name in sleeps}
    assert fastest(candidates) == "b"
    one_call = {name: Candidate(partial(time.sleep, 0.0)) for name in "ab"}
    late = {"c": Candidate(lambda: pytest.fail("there was no time left for it"))}
    assert fastest(one_call | late, seconds=0.0) in "ab"


def test_the_search_goes_outward_until_the_best_lies_between_others() -> None:
    asked: list[list[Choice]] = []

    def trials(choices: Sequence[Choice]) -> dict[Choice, float]:
        """A valley: 2 windows and a step size of 5, halfway from 3 to 9 in multiples of 3, are best."""
        asked.append([*choices])
        return {choice: abs(math.log(choice.rate / 5)) + abs(choice.windows - 2) for choice in choices}

    assert best_of(search(trials, [1 / 3, 1.0], [1, 2], extensions=5)) == Choice(3.0, 2)
    assert asked[0] == [Choice(1 / 3, 1), Choice(1.0, 1), Choice(1 / 3, 2), Choice(1.0, 2)]
    assert asked[1:] == [[Choice(3.0, 2)], [Choice(9.0, 2)]]  # and not on to 27, nor back
    asked.clear()
    assert best_of(search(trials, [81.0], [2], extensions=2)) == Choice(9.0, 2)  # then it may go no further
    assert asked[1:] == [[Choice(243.0, 2), Choice(27.0, 2)], [Choice(9.0, 2)]]


def test_candidates_elsewhere_start_with_other_settings_and_share_the_work() -> None:
    with elsewhere(of_environment, 3.0, environment={"BENCH_TEST": "x"}, processes=2) as candidates:
        assert candidates["x"].work == 6.0  # named by the variable in each of both processes
        candidates["x"].call()
    assert "BENCH_TEST" not in os.environ


def of_environment(work: float) -> dict[str, Candidate]:
    return {os.environ["BENCH_TEST"]: Candidate(list, work)}


@pytest.mark.nightly
def test_losses_can_be_timed_at_the_populations_of_an_accelerator() -> None:
    sizes = Throughput().sizes[:3]  # larger models have more weights than pairs, and exchange losses anyhow
    for size in throughput.sizes(Throughput(sizes=sizes, scale=16)):
        replica = replica_of(size.config, mesh_of(1))
        assert replica.vector_length == 0, size  # else it adds up, and `losses` finds no function to score with
        step(size.config, replica)


def test_a_curve_of_scaling_is_of_one_estimator() -> None:
    configs = [config for values in scaling.axes(Scaling()).values() for config, _ in values.values()]
    assert max(config.es.population for config in configs) == 2**18
    assert not any(config.es.sums(parameters=1) for config in configs)


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


def test_targets_are_set_beside_what_was_found(tmp_path: Path) -> None:
    def leave(name: str, *rows: Row) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))

    def ratio(median: float) -> dict[str, float]:
        return {"median": median, "low": 0.0, "high": 99.0}

    small = {"model": "rnn", "hidden": 16, "sequences": 8}
    leave(
        "throughput",
        {**small, "evaluation ÷ numpy": ratio(75.0), "step ÷ best rival": ratio(1.6), "evaluation ÷ forward": ratio(1)},
        {"model": "gru", "hidden": 32, "sequences": 1, "evaluation ÷ forward": ratio(0.94)},
    )
    leave(
        "learning",
        {"method": "full", "below 3.33: s": 9.0, "below 2.507: s": None, "below 1.988: s": None},
        {"method": "low rank 1", "below 3.33: s": 11.0, "below 2.507: s": None, "below 1.988: s": None},
        {"method": "gates", "below 3.33: s": 1.0, "below 2.507: s": 2.0, "below 1.988: s": 8.0},
    )
    leave("coordinator", {"how": "machine", "hosts": 256, "own_ms": 1.0}, {"hosts": 256, "own_ms": 20.5})
    rows = compare(tmp_path).rows
    assert {row["what"]: (row["found"], row["reached"]) for row in rows if row["reached"] != "not measured"} == {
        "rnn 16: evaluation ÷ numpy": (75.0, "yes"),
        "rnn 16: step ÷ best rival": (1.6, "no"),
        "evaluation ÷ forward, all sizes": (0.94, "no"),
        "seconds to 3.33, noise on weights": (9.0, "yes"),
        "seconds to 2.507, bigram, noise on weights": (None, "no"),
        "seconds to 1.988, trigram, on activations": (8.0, "yes"),
        "own ms a step, 256 hosts": (20.5, "no"),
    }
    assert {row["benchmark"] for row in rows} == {"throughput", "learning", "update", "start", "coordinator"}


def test_numpy_computes_the_same_loss() -> None:
    model = MODELS["rnn"]
    params = params_of(model)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (5, 9))  # STOP, 1, among them
    assert (tokens[:, :-1] == 1).any()
    expected = jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, 2))(jnp.asarray(tokens)))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    np.testing.assert_allclose(NumpyRnn(leaves, 0.1, 2).loss(leaves, tokens), expected, rtol=1e-6)


def stepped(rival: Rival, params: Params, tokens: jax.Array) -> Params:
    """Take a step of size 1 downhill."""
    return rival.params(jax.jit(rival.step)(rival.init(params), jax.random.key(0), tokens))


def cosine_with_gradient(model: Model, params: Params, after: Params, windows: jax.Array) -> float:
    """Compare a step with the exact one; both in units."""
    units = model.units(params)
    change = jax.tree.map(lambda old, new, unit: (old - new) / unit, params, after, units)

    def mean_loss(params: Params) -> jax.Array:
        return jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, 1))(windows))

    gradient = jax.tree.map(lambda leaf, unit: leaf * unit, jax.jit(jax.grad(mean_loss))(params), units)
    one, two = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (change, gradient))
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.nightly
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
        found = cosine_with_gradient(model, params, stepped(dense, params, window), window)
    assert found == pytest.approx(expected, abs=0.05)  # ranks in place of losses cost a little
    same = jnp.broadcast_to(window, (pairs, *window.shape))
    kept, again = (
        normal_low_rank(
            model, mesh, burn_in=1, pairs=pairs, sigma=0.01, rank=1, optimizer=SGD, at_once=256, kept=is_kept
        )
        for is_kept in (True, False)
    )
    after = [stepped(rival, params, same) for rival in (kept, again)]
    # Products of two normals have heavier tails than one normal, which costs more.
    assert 0.8 < cosine_with_gradient(model, params, after[0], window) < expected + 0.02
    # From the same keys comes the same noise, in groups or not; sums in another order differ in the last bits.
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=1e-4), *after)


@pytest.mark.nightly
def test_a_gradient_of_shares_is_that_of_the_whole_and_devices_meet_once() -> None:
    """Means of equal shares; sums in another order differ in the last bits of numbers of size 1."""
    model, mesh = MODELS["gru"], mesh_of(4)
    params = params_of(model)
    windows = jax.random.randint(jax.random.key(1), (8, 9), 0, VOCAB)

    def mean_loss(params: Params) -> jax.Array:
        return jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, 1))(windows))

    compiled = jax.jit(mean_gradient(model, mesh, 1)).lower(params, windows).compile()
    for found, expected in zip(
        jax.tree.leaves(compiled(params, windows)), jax.tree.leaves(jax.grad(mean_loss)(params)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (compiled.as_text() or "").count(" all-reduce(") == 1


def test_members_are_compared_with_those_that_share_their_window() -> None:
    losses = np.array([1.0, 3.0, 10.0, 20.0, 7.0], np.float32)
    np.testing.assert_array_equal(mean_of_peers(losses, 2), [2, 2, 15, 15, 7])
    np.testing.assert_array_equal(mean_of_peers(losses, 1), [np.float32(8.2)] * 5)


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.nightly
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
