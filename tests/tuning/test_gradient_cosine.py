"""How an estimate lies to the exact gradient, and the search that follows from it."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import mesh_of

from esjax.cli.infer import conclusion
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.data.packing import pack_stream
from esjax.errors import EsjaxError
from esjax.models import gru
from esjax.training.run import train
from esjax.tuning.gradient_cosine import GradientCosine, _compare, gradient_cosines
from esjax.tuning.sigma import Tried, tune

pytestmark = pytest.mark.usefixtures("lenient_promotion")

VOCAB = 6
MODEL = gru(VOCAB, 4, 6)
STREAM = pack_stream([np.random.default_rng(i).integers(2, VOCAB, 20).astype(np.int32) for i in range(40)])
DATA = DataConfig(window=6, burn_in=3)


def found(es: EsConfig, steps: int) -> list[GradientCosine]:
    params = MODEL.init(jax.random.key(1))
    louder = params.head_output._replace(matrix=10 * params.head_output.matrix)  # a start that has something to say
    params = params._replace(head_output=louder)
    return [*gradient_cosines(Config(es=es, data=DATA), MODEL, params, STREAM, mesh_of(2), steps)]


def test_the_cosine_by_hand() -> None:
    """(3, 4) and (4, 3): 24/25 of leaf a, 0 of the orthogonal leaf b; as a whole (24 + 0) / (√26 √29)."""
    ours = {"a": np.array([3.0, 4.0]), "b": np.array([1.0, 0.0])}
    exact = {"a": np.array([4.0, 3.0]), "b": np.array([0.0, 2.0])}
    compared = _compare(ours, exact, 58.0)
    assert compared.leaves == pytest.approx({"a": 24 / 25, "b": 0.0})
    assert compared.cosine == pytest.approx(24 / np.sqrt(26 * 29))
    assert compared.dispersion == pytest.approx(58 / 29)


def test_a_leaf_without_gradient_has_no_direction() -> None:
    assert np.isnan(_compare({"a": np.zeros(2)}, {"a": np.ones(2)}, 1.0).leaves["a"])


@pytest.mark.parametrize(
    "es",
    [
        EsConfig(space="low_rank", sigma=0.02, population_size=8192, exchange="sums"),
        EsConfig(space="activation", credit="discount", sigma=0.02, population_size=8192, copies=32, discount=1.0),
        EsConfig(space="activation", sigma=0.002, population_size=8192, copies=32),
    ],
    ids=["weights", "discount", "gates"],
)
def test_many_pairs_point_along_the_gradient(es: EsConfig) -> None:
    """The law 1/√(1 + n r/K) gives 0.9 for 4096 pairs, 244 parameters and r = 4; a wrong sign would give -0.9.

    With a discount the learned first state has no part in a pre-activation, and stays as it is. Gates of a gru leave
    out what entries of the state do to each other.
    """
    (compared,) = found(es, steps=1)
    assert compared.cosine > 0.85
    if es.credit == "discount" and es.space == "activation":
        assert np.isnan(compared.leaves.pop("start"))
        assert min(compared.leaves.values()) > 0.97
    elif es.space == "activation":
        assert min(compared.leaves.values()) > 0.5
        assert compared.cosine > 0.9


def test_activations_need_far_fewer_members_than_weights() -> None:
    """The reason for them; with 64 members and 200 parameters the law gives weights 0.4."""
    spaces = EsConfig(space="activation", copies=8, population_size=64), EsConfig(population_size=64)
    activation, weights = (np.mean([compared.cosine for compared in found(es, steps=6)]) for es in spaces)
    assert activation > 1.3 * weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    (folder / "text.txt").write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    data = DataConfig(text=str(folder / "text.txt"), window=8)
    es = EsConfig(space="activation", credit="discount", population_size=256)
    config = Config(steps=3, data=data, es=es, model=GruConfig(hidden_size=8, head_size=8))
    with jax.numpy_dtype_promotion("standard"):
        for _ in train(config, folder / "run"):
            pass
    return folder / "run"


def test_tuning_tries_sigmas_and_then_discounts(run: Path) -> None:
    """Far too much noise is worse than little of it, and the run stays as it is."""
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    tried = [*tune(run, sigmas=(0.05, 5.0), discounts=(0.3, 0.7), repeats=2)]
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert [(one.sigma, one.discount) for one in tried] == [(0.05, 0.7), (5.0, 0.7), (0.05, 0.3)]
    assert tried[1].cosine < tried[0].cosine
    assert not any(one.current for one in tried)  # the run has sigma 0.2


def test_credit_by_gates_has_no_discount_to_try(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    data, es = DataConfig(text=str(tmp_path / "text.txt"), window=8), EsConfig(space="activation", population_size=64)
    [*train(Config(steps=1, data=data, es=es, model=GruConfig(hidden_size=8, head_size=8)), tmp_path / "run")]
    tried = [*tune(tmp_path / "run", sigmas=(0.02,), discounts=(0.3, 0.7), repeats=1)]
    assert [(one.sigma, one.discount, one.current) for one in tried] == [(0.02, None, True)]


def test_discounts_are_tried_with_the_runs_own_sigma_unless_another_is_seen_to_be_better(run: Path) -> None:
    tried = [*tune(run, sigmas=(0.19, 0.2), discounts=(0.3,), repeats=2)]
    assert [one.current for one in tried] == [False, True, False]
    assert tried[2].sigma == 0.2  # nobody sees a difference of 5% of sigma in two steps


def tried(sigma: float, *cosines: float, current: bool = False) -> Tried:
    return Tried(sigma, None, cosines, {}, current)


@pytest.mark.parametrize(
    ("all_tried", "said"),
    [
        # Differences of 0.0100 and 0.0101: what both repeats have in common is larger, and cancels.
        ([tried(0.1, 0.1, 0.2), tried(0.2, 0.09, 0.1899)], "best: --es.sigma 0.1"),
        (
            [tried(0.1, 0.0154, 0.0150), tried(0.2, 0.0140, 0.0163, current=True), tried(0.4, 0.001, 0.0006)],
            "no difference seen between --es.sigma 0.1, --es.sigma 0.2; the run's own, --es.sigma 0.2, is among them; "
            "more --repeats show smaller differences",
        ),
        ([tried(0.1, 0.3, 0.3)], "nothing to compare --es.sigma 0.1 with; name another --sigma"),
        ([tried(0.1, float("nan"))], "no setting has a cosine with the exact gradient: an estimate is 0 or not finite"),
        (
            [Tried(0.1, 0.7, (0.2, 0.2), {}, True), Tried(0.1, 0.5, (0.3, 0.3), {}, False)],
            "best: --es.sigma 0.1 --es.discount 0.5",
        ),
    ],
)
def test_a_best_setting_is_named_where_differences_exclude_zero(all_tried: list[Tried], said: str) -> None:
    assert conclusion(all_tried) == said


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(EsjaxError, match=str(tmp_path)):
        next(tune(tmp_path))


@pytest.mark.parametrize("kind", ["loss", "reward"])
def test_a_run_for_something_else_than_cross_entropy_is_not_tuned(run: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**about, "own": {kind: "right"}}))
    with pytest.raises(EsjaxError, match=f"with a custom {kind}, right, and tune supports only cross entropy"):
        next(tune(tmp_path / "run"))
