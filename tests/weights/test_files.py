"""Weights out and back: what is imported is what was exported, and says the same."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from jaxtyping import Array
from safetensors import safe_open

import esjax
from esjax.config.models import GruConfig, RnnConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import load
from esjax.models import Model, gru
from esjax.training.run import resume, train
from esjax.tuning.sigma import tune
from esjax.weights.files import export, import_weights
from esjax.weights.safetensors import name_tensors

pytestmark = pytest.mark.usefixtures("lenient_promotion")

MODELS = {
    "gru": Config(model=GruConfig(hidden_size=4, head_size=6)),
    "rnn": Config(model=RnnConfig(hidden_size=4, n_layers=2)),
    "bytes": Config(model=RnnConfig(hidden_size=4), data=DataConfig(vocabulary="byte")),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train runs of two steps, each when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n\n".join(f"the cät sat on the mat {n} times" for n in range(40)))

    def run(name: str) -> Path:
        if not (folder / name).exists():
            config = MODELS[name]
            data = replace(config.data, text=str(folder / "text.txt"), window=4, held_out=0.2)
            config = replace(config, steps=2, data=data, es=EsConfig(population_size=8))
            for _ in train(config, folder / name, tell=lambda line: None):
                pass
        return folder / name

    return run


def assert_same(one: Path, other: Path) -> None:
    """See that two folders hold the same model: each weight, and what it says and scores."""
    first, second = load(one), load(other)
    assert name_tensors(first.params).keys() == name_tensors(second.params).keys()
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.vocabulary == second.vocabulary
    assert first.generate("the ", seed=3, max_tokens=20) == second.generate("the ", seed=3, max_tokens=20)


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_come_back_as_they_were(runs: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    (file,) = export(runs(name), tmp_path / "w.safetensors")
    import_weights(file, tmp_path / "back")
    assert_same(runs(name), tmp_path / "back")
    loaded = load(tmp_path / "back")
    assert loaded.config == load(runs(name)).config
    evaluation = load(runs(name)).evaluate()
    assert loaded.evaluate()[:4] == evaluation[:4]
    # Which text the n-gram models would have to be fitted to is not known here.
    assert (len(evaluation.baselines), loaded.evaluate().baselines) == (3, {})
    assert "imported weights and no text" in loaded.evaluate().note
    (again,) = export(tmp_path / "back", tmp_path / "again.safetensors")
    tensors = [safetensors.numpy.load_file(path) for path in (file, again)]
    assert tensors[0].keys() == tensors[1].keys()


def test_safetensors_hold_the_averaged_weights_by_name(runs: Callable[[str], Path], tmp_path: Path) -> None:
    (file,) = export(runs("rnn"), tmp_path / "w.safetensors")
    params = load(runs("rnn")).params
    newest = train(load(runs("rnn")).config)
    list(newest)
    assert not np.array_equal(newest._replica.state.params.start, params.start)  # the average is something else
    tensors = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(tensors["layers.1.embedding"], params.layers[1].embedding)
    np.testing.assert_array_equal(tensors["start"], params.start)
    assert set(tensors) == {
        *("start", "head_hidden", "head_output"),
        *(f"layers.{i}.{matrix}" for i in (0, 1) for matrix in ("recurrent", "embedding")),
    }
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert (metadata["weights"], metadata["step"]) == ("average", "2")
    assert "hidden_size: 4" in metadata["settings"]
    assert "ä" in json.loads(metadata["vocabulary"])["symbols"]


def test_npy_comes_back_as_it_was(runs: Callable[[str], Path], tmp_path: Path) -> None:
    files = export(runs("rnn"), tmp_path / "w.npy")
    assert [file.name for file in files] == ["w.npy", "w.chars.json"]
    import_weights(files[0], tmp_path / "back")
    assert_same(runs("rnn"), tmp_path / "back")
    # And the other way round: the same bytes.
    again = export(tmp_path / "back", tmp_path / "again.npy")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_npy_is_the_originals_layout(runs: Callable[[str], Path], tmp_path: Path) -> None:
    """D, V, L; s0; U_i and E_i of each layer; W1; W2; row by row."""
    flat = np.load(export(runs("rnn"), tmp_path / "w.npy")[0])
    params = load(runs("rnn")).params
    parts = [params.start, *(part for layer in params.layers for part in layer), params.head_hidden, params.head_output]
    assert flat[:3].tolist() == [4, params.head_output.shape[1], 2]
    np.testing.assert_array_equal(flat[3:], [x for part in parts for x in np.asarray(part).ravel(order="C")])
    assert flat.dtype == np.float32


def own_model(vocab_size: int) -> Model:
    return gru(vocab_size, hidden_size=3, head_size=3)


def test_a_model_of_ones_own_is_given_again(runs: Callable[[str], Path], tmp_path: Path) -> None:
    config = load(runs("gru")).config
    list(train(config, tmp_path / "own", model=own_model, tell=lambda line: None))
    with pytest.raises(EsjaxError, match="a custom model, own_model; give it again"):
        export(tmp_path / "own")
    (file,) = export(tmp_path / "own", model=own_model)
    assert file == tmp_path / "own.safetensors"
    with pytest.raises(EsjaxError, match="a custom model, own_model; give it again"):
        import_weights(file, tmp_path / "back")
    import_weights(file, tmp_path / "back", model=own_model)
    jax.tree.map(
        np.testing.assert_array_equal,
        load(tmp_path / "own", model=own_model).params,
        load(tmp_path / "back", model=own_model).params,
    )
    (plain,) = export(runs("gru"), tmp_path / "plain.safetensors")
    with pytest.raises(EsjaxError, match="leave model= out"):
        import_weights(plain, tmp_path / "more", model=own_model)


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "out", "format", "said"),
    [
        ("gru", "w.npy", None, "npy is for the model rnn, and"),
        ("bytes", "w.npy", None, "this run is of bytes"),
        ("rnn", "w.npz", None, "ends in .safetensors or .npy"),
        ("rnn", "w", "npy", "ends in .npy"),
        ("rnn", "w.npy", "safetensors", "ends in .safetensors"),
        ("rnn", "there.npy", None, "there.npy' exists already"),
        ("rnn", "table.npy", None, "table.chars.json' exists already"),
        ("rnn", "there.safetensors", None, "there.safetensors' exists already"),
        ("rnn", "none/w.safetensors", None, "cannot write"),
    ],
)
def test_an_export_that_cannot_be_is_one_line_and_leaves_nothing(
    runs: Callable[[str], Path], tmp_path: Path, name: str, out: str, format: Any, said: str
) -> None:
    there = {"there.npy", "table.chars.json", "there.safetensors"}
    for file in there:
        (tmp_path / file).write_text("mine")
    with pytest.raises(EsjaxError) as caught:
        export(runs(name), tmp_path / out, format)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(there, "mine")


def changed(file: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """Write a file again with other tensors or metadata."""
    with safe_open(file, "numpy") as opened:
        metadata = dict(opened.metadata())
    tensors = safetensors.numpy.load_file(file)
    change(tensors, metadata)
    file.write_bytes(safetensors.numpy.save(tensors, metadata))


def spoil(tensors: dict[str, Array]) -> None:
    tensors["start"] = tensors["start"] * np.float32("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, m: t.pop("start"), "start is absent, not float32[4]"),
        (lambda t, m: t.update(more=np.zeros(2, np.float32)), "more is float32[2], not absent"),
        (lambda t, m: t.update(start=np.zeros(5, np.float32)), "start is float32[5], not float32[4]"),
        (lambda t, m: t.update(start=np.zeros(4, np.float16)), "start is float16[4], not float32[4]"),
        (lambda t, m: spoil(t), "not finite"),
        (lambda t, m: m.pop("esjax"), "was not written by esjax export"),
        (lambda t, m: m.update(esjax="2"), "was not written by esjax export"),
        (lambda t, m: m.update(settings="es: {sigma: x}"), "settings in"),
        (lambda t, m: m.update(vocabulary='{"kind": "char", "symbols": ["a", "a"]}'), "metadata"),
        (lambda t, m: m.update(vocabulary="{"), "metadata"),
        (lambda t, m: m.pop("vocabulary"), "metadata"),
        (lambda t, m: m.update(own="[]"), "metadata"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line_and_no_run_is_made(
    runs: Callable[[str], Path], tmp_path: Path, change: Any, said: str
) -> None:
    (file,) = export(runs("rnn"), tmp_path / "w.safetensors")
    changed(file, change)
    with pytest.raises(EsjaxError) as caught:
        import_weights(file, tmp_path / "back")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"\xff" * 100, (2**62).to_bytes(8, "little") + b"{}"])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(EsjaxError, match=r"cannot read '.*w.safetensors' as safetensors: ."):
        import_weights(tmp_path / "w.safetensors", tmp_path / "back")


@pytest.mark.parametrize(
    ("weights", "characters", "said"),
    [
        ("w.bin", None, "neither .safetensors nor .npy"),
        ("w.npy", None, "needs its table of characters: give --chars, or put '.*w.chars.json' there"),
        ("w.safetensors", "c.json", "leave --chars out"),
    ],
)
def test_the_suffix_tells_what_is_needed(tmp_path: Path, weights: str, characters: str | None, said: str) -> None:
    with pytest.raises(EsjaxError, match=said):
        import_weights(tmp_path / weights, tmp_path / "back", characters=characters)


def test_from_python(runs: Callable[[str], Path], tmp_path: Path) -> None:
    assert (esjax.export, esjax.import_weights) == (export, import_weights)
    folder = tmp_path / "run.1"
    folder.symlink_to(runs("gru"))
    assert [file.name for file in export(folder)] == ["run.1.safetensors"]


def test_weights_are_used_without_the_optimizer_they_were_trained_by(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    """Reference: the run's own weights, still in memory."""
    run = train(load(runs("gru")).config, tmp_path / "run", optimizer=optax.adamw(0.1), tell=lambda line: None)
    list(run)
    loaded = load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, run.params)
    assert loaded.step == run.step
    import_weights(*export(tmp_path / "run"), tmp_path / "back")
    assert_same(tmp_path / "run", tmp_path / "back")
    assert next(tune(tmp_path / "run", repeats=1)).sigma == 0.025
    with pytest.raises(EsjaxError, match=r"with a custom optimizer, scale_by_adam.*; give it again: --optim\.cus"):
        resume(tmp_path / "run")


def test_of_two_exports_to_one_file_at_once_one_succeeds(runs: Callable[[str], Path], tmp_path: Path) -> None:
    start = threading.Barrier(2)

    def write(name: str) -> str:
        path = runs(name)
        start.wait()
        try:
            export(path, tmp_path / "one.safetensors")
        except EsjaxError as error:
            return str(error)
        return name

    for name in ("gru", "rnn"):
        runs(name)
    with ThreadPoolExecutor(2) as pool:
        winner, said = sorted(pool.map(write, ["gru", "rnn"]), key=len)
    assert "exists already" in said
    import_weights(tmp_path / "one.safetensors", tmp_path / "back")
    assert_same(runs(winner), tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"one.safetensors", "back"}
