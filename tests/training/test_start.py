"""Starting points: weights of a run or a file, decay toward them, and frozen parameters."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import esjax
from esjax.config.settings import Config, OptimConfig, replace
from esjax.core.units import in_units
from esjax.models.custom import Custom
from esjax.replica.estimators.frozen import trained_of
from esjax.replica.optimizer import make_optimizer
from esjax.runs.checkpoint import digest
from esjax.weights.first import first_params

pytestmark = pytest.mark.usefixtures("lenient_promotion")

RNN = esjax.RnnConfig(hidden_size=3)
SMALL: dict[str, Any] = {"population_size": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on a text of its own."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "text.txt").write_text("\n\n".join(f"abc cab bca {'abc'[n % 3] * n}" for n in range(20)))
    config = Config(
        steps=2,
        data=esjax.DataConfig(text=str(folder / "text.txt"), held_out=0.2, window=8),
        es=esjax.EsConfig(**SMALL),
        model=RNN,
    )
    with jax.numpy_dtype_promotion("standard"):
        for _ in esjax.train(config, folder / "base", tell=print):
            pass
        esjax.export(folder / "base", folder / "base.safetensors")
    return folder


def begin(base: Path, init: str = "base", **settings: Any) -> esjax.Trainer:
    return esjax.train(Config(init=str(base / init), es=esjax.EsConfig(**SMALL), **settings), tell=print)


def test_a_run_starts_with_the_averaged_weights_the_model_and_the_text_of_another(base: Path) -> None:
    run, old = begin(base, steps=1), esjax.load(base / "base")
    assert run.config.model == RNN
    assert run.config.data.text == str(base / "text.txt")
    assert run.corpus.vocabulary == old.vocabulary
    for params in (run._replica.state.params, run.params):
        jax.tree.map(np.testing.assert_array_equal, params, old.params)
    (info,) = [*run]
    assert info.held_out == pytest.approx(old.evaluate().nats_per_token, abs=0.5)


def test_a_run_starts_with_the_weights_of_a_file(base: Path) -> None:
    text = esjax.DataConfig(text=str(base / "text.txt"), held_out=0.2)
    run = begin(base, "base.safetensors", data=text)
    jax.tree.map(np.testing.assert_array_equal, run.params, esjax.load(base / "base").params)


def test_it_is_resumed_without_them_and_replayed_with_them(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "base", tmp_path / "base")
    config = Config(init=str(tmp_path / "base"), es=esjax.EsConfig(**SMALL), ledger=True)
    whole = esjax.train(replace(config, steps=3), tell=print)
    assert len([*whole]) == 3
    run = esjax.train(replace(config, steps=2), tmp_path / "run", tell=print)
    assert len([*run]) == 2
    (tmp_path / "base").rename(tmp_path / "moved")
    resumed = esjax.resume(tmp_path / "run", steps=3, tell=print)
    assert [info.step for info in resumed] == [3]
    assert digest(resumed._replica.state) == digest(whole._replica.state)
    with pytest.raises(esjax.EsjaxError, match="is neither a run folder nor a file of weights"):
        esjax.replay(tmp_path / "run")
    (tmp_path / "moved").rename(tmp_path / "base")
    replayed = esjax.replay(tmp_path / "run")
    assert replayed.digest == digest(whole._replica.state)
    shutil.rmtree(tmp_path / "run/checkpoints")
    lines: list[str] = []
    assert digest(esjax.resume(tmp_path / "run", steps=4, tell=lines.append)._replica.state) == replayed.digest
    assert f"rebuilt from the weights of {str(tmp_path / 'base')!r} and the ledger" in lines[-1]
    list(esjax.resume(tmp_path / "base", steps=3, tell=print))  # now they are others
    for again in (esjax.replay, esjax.resume):
        with pytest.raises(esjax.EsjaxError, match="are not those that the run began with"):
            again(tmp_path / "run", tell=print)


def test_behind_the_horizon_a_replay_does_not_need_them(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "base", tmp_path / "base")
    config = Config(
        init=str(tmp_path / "base"), es=esjax.EsConfig(**SMALL), ledger=True, ledger_horizon=1, keep_checkpoints=1
    )
    list(esjax.train(replace(config, steps=2), tmp_path / "run", tell=print))
    for steps in (4, 6):
        list(esjax.resume(tmp_path / "run", steps=steps, tell=print))
    shutil.rmtree(tmp_path / "base")
    replayed = esjax.replay(tmp_path / "run", tell=print)
    assert replayed.first
    assert replayed.agrees


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "nothing"}, "is neither a run folder nor a file of weights"),
        ({"init": "text.txt"}, "is neither a run folder nor a file of weights"),
        ({"model": esjax.GruConfig(hidden_size=9)}, "leave the settings of the model out"),
        ({"data": esjax.DataConfig(vocabulary="byte")}, "leave data.vocabulary out"),
        ({"data": esjax.DataConfig(vocab_size=3)}, "leave data.vocab_size out"),
        ({"data": esjax.DataConfig(symbols="xyz")}, "leave data.symbols out"),
    ],
)
def test_what_does_not_fit_the_weights_is_refused(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(esjax.EsjaxError, match=message):
        begin(base, **settings)


def test_the_anchor_pulls_toward_the_first_weights_in_units() -> None:
    """Reference: gradient 0, so each step leaves 1 - learning_rate * anchor of the distance."""
    config = OptimConfig(optimizer="sgd", learning_rate=0.5, schedule="constant", anchor=0.2)
    optimizer = in_units(make_optimizer(config, None), {"a": 4.0})
    start = {"a": np.array([1.0, 2.0], np.float32)}
    state, params = optimizer.init(start), {"a": np.array([2.0, 0.0], np.float32)}
    for _ in range(3):
        updates, state = optimizer.update({"a": np.zeros(2, np.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"], start["a"] + 0.9**3 * np.array([1.0, -2.0], np.float32), rtol=1e-6)


@pytest.mark.parametrize("more", [{}, {"space": "activation", "credit": "discount", "copies": 2}])
def test_frozen_parameters_keep_their_first_values(base: Path, more: dict[str, Any]) -> None:
    config = Config(
        init=str(base / "base"),
        steps=2,
        es=esjax.EsConfig(**SMALL | {"frozen": "*/embedding, head_hidden"} | more),
        optim=esjax.OptimConfig(weight_decay=0.5),
    )
    run = esjax.train(config, tell=print)
    before = dict(jax.tree_util.tree_leaves_with_path(jax.tree.map(np.array, run._replica.state.params)))
    assert len([*run]) == 2
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(run._replica.state.params)
        if (np.asarray(leaf) != np.asarray(before[path])).any()
    }
    everything = {jax.tree_util.keystr(path, simple=True, separator="/") for path in before}
    assert everything - changed >= {"layers/0/embedding", "head_hidden"}
    assert {"layers/0/recurrent", "head_output"} <= changed


def test_frozen_paths_name_parameters() -> None:
    params = {"in": {"kernel": np.zeros(1), "bias": np.zeros(1)}, "out": np.zeros(1)}
    cases = {
        "": ["in/bias", "in/kernel", "out"],
        "in": ["out"],
        "*/bias, out": ["in/kernel"],
        "in/k*": ["in/bias", "out"],
    }
    for frozen, trained in cases.items():
        is_trained = trained_of(frozen, params)
        assert [path for path in ("in/bias", "in/kernel", "out") if is_trained(path)] == trained
    with pytest.raises(esjax.EsjaxError, match=r"es\.frozen names 'inn'; the model has in/bias, in/kernel, out"):
        trained_of("in,inn", params)
    with pytest.raises(esjax.EsjaxError, match="leaves no parameter to train"):
        trained_of("*", params)


def test_gradient_sums_have_no_frozen_parameters() -> None:
    with pytest.raises(esjax.EsjaxError, match="for frozen ones set exchange to losses"):
        esjax.EsConfig(exchange="sums", frozen="embedding")


def test_code_of_weights_that_only_a_coordinator_names_is_not_run(base: Path, tmp_path: Path) -> None:
    code = tmp_path / "model.py"
    code.write_text(
        "import esjax\nfrom esjax.models import build_model\n\n\n"
        "def build(size):\n    return build_model(esjax.RnnConfig(hidden_size=3), size)\n"
    )
    config = Config(steps=1, data=esjax.DataConfig(text=str(base / "text.txt"), window=8), es=esjax.EsConfig(**SMALL))
    list(esjax.train(config, tmp_path / "custom", model=f"{code}:build", tell=print))
    code.write_text("raise SystemExit('it was run')\n")
    with pytest.raises(esjax.EsjaxError, match="holds a custom model, and the run has none"):
        first_params(replace(config, init=str(tmp_path / "custom")), Custom())
    record = tmp_path / "custom/run.json"
    fields = json.loads(record.read_text())
    assert fields["code"]["model"]
    record.write_text(json.dumps({**fields, "own": {}}))  # as an attacker may write it
    with pytest.raises(esjax.EsjaxError, match="holds a custom model, and the run has none"):
        first_params(replace(config, init=str(tmp_path / "custom")), Custom())
