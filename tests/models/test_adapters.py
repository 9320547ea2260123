"""Modules of flax and equinox in a run: trained, resumed, loaded, exported, over hosts, and to the bit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from framework_models import EquinoxGru, LinenGru, NnxTransformer

import esjax
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.errors import EsjaxError
from esjax.models.model import ModelFactory
from esjax.runs.checkpoint import digest
from esjax.training.run import Trainer, resume, train

CONTEXT = 20
MODELS: dict[str, Callable[[], ModelFactory]] = {
    "linen": lambda: esjax.linen_model(LinenGru, context=CONTEXT),
    "nnx": lambda: esjax.nnx_model(NnxTransformer, context=CONTEXT),
    "equinox": lambda: esjax.equinox_model(EquinoxGru, context=CONTEXT),
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    data = DataConfig(text=str(text), held_out=0.2, window=6)
    return Config(steps=4, data=data, es=EsConfig(population_size=32), ledger=True)


def state_of(run: Trainer) -> str:
    return digest(run._replica.state)


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize(
    "name", ["equinox", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("linen", "nnx"))]
)
def test_a_run_of_a_framework_model_is_resumed_replayed_loaded_and_exported(
    name: str, config: Config, tmp_path: Path
) -> None:
    model = MODELS[name]()
    run = train(config, tmp_path / "run", model=model)
    assert run._replica.units == esjax.initial_units(run.params)  # of its first weights
    infos = list(run)
    assert infos[-1].held_out is not None
    assert all(np.isfinite(info.loss) for info in infos)

    half = train(esjax.config.settings.replace(config, steps=2), tmp_path / "half", model=model)
    list(half)
    again = resume(tmp_path / "half", steps=4, model=model)
    assert [info.loss for info in again] == [info.loss for info in infos[2:]]
    assert state_of(again) == state_of(run)
    assert esjax.replay(tmp_path / "run", model=model).agrees

    loaded = esjax.load(tmp_path / "run", model=model)
    written = run.generate("the ", max_tokens=8, temperature=0.0)[0].text
    assert loaded.generate("the ", max_tokens=8, temperature=0.0)[0].text == written
    assert len(loaded.search("the ", beams=2, max_tokens=4)) == 2
    assert loaded.evaluate().nats_per_token == pytest.approx(infos[-1].held_out, rel=1e-6)

    (file,) = esjax.export(tmp_path / "run", tmp_path / "weights.safetensors", model=model)
    esjax.import_weights(file, tmp_path / "imported", model=model)
    copy = esjax.load(tmp_path / "imported", model=model)
    jax.tree.map(np.testing.assert_array_equal, copy.params, loaded.params)
    with pytest.raises(EsjaxError, match="was trained with a custom model"):
        esjax.load(tmp_path / "run")


HOST = """
import sys
sys.path.insert(0, sys.argv[2])
import esjax
from framework_models import LinenGru

esjax.join(sys.argv[1], model=esjax.linen_model(LinenGru, context=20), tell=lambda line: None)
"""


@pytest.mark.usefixtures("lenient_promotion")
def test_a_framework_model_over_hosts_is_the_local_run_to_the_bit(config: Config, tmp_path: Path) -> None:
    """Reference: the same settings trained alone. The host is a process of its own."""
    model = MODELS["linen"]()
    alone = train(config, tmp_path / "alone", model=model)
    losses = [info.loss for info in alone]
    server = esjax.serve(config, tmp_path / "shared", bind="tcp://127.0.0.1:0", model=model, tell=lambda line: None)
    hosts: list[subprocess.Popen[bytes]] = []

    def start_host(info: Any = None) -> None:
        if not hosts and (address := server.folder.address):
            hosts.append(subprocess.Popen([sys.executable, "-c", HOST, address, str(Path(__file__).parents[1])]))

    class Starter(esjax.Tracker):
        def start(self, run: esjax.TrackedRun) -> None:
            start_host()

    server.trackers = [Starter()]
    try:
        assert [info.loss for info in server] == losses
    finally:
        for host in hosts:
            host.wait(60)
    assert esjax.replay(tmp_path / "shared", model=model).agrees
    served, local = (esjax.load(tmp_path / name, model=model).params for name in ("shared", "alone"))
    jax.tree.map(np.testing.assert_array_equal, served, local)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_module_predicts_as_the_module_itself(name: str) -> None:
    """Reference: the module called as its library calls it."""
    model = MODELS[name]()(11)
    params = model.init(jax.random.key(3))
    tokens = jnp.array([1, 4, 7, 2])
    assert model.logits is not None
    logits = jax.jit(model.logits)(params, tokens)
    if name == "linen":
        expected: Any = LinenGru(11).apply(params, tokens)
    elif name == "equinox":
        expected = EquinoxGru(11, jax.random.key(3))(tokens)
    else:
        from flax import nnx

        expected = NnxTransformer(11, nnx.Rngs(jax.random.key(3)))(tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_a_module_with_other_variables_is_refused() -> None:
    class Normalised(nn.Module):
        vocab: int

        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=False)(nn.Embed(self.vocab, self.vocab)(tokens))

    model = esjax.linen_model(Normalised, context=8)(7)
    with pytest.raises(EsjaxError, match="variables batch_stats, params; only params can be trained"):
        model.init(jax.random.key(0))


def test_the_core_and_the_adapters_import_no_framework_until_they_are_used() -> None:
    code = (
        "import sys, esjax; esjax.linen_model, esjax.nnx_model, esjax.equinox_model, esjax.value_and_grad;"
        "print([name for name in ('flax.nnx', 'equinox') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
