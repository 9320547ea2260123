"""Every architecture through what a run can do: train, hosts, resume, replay, generate, weights in files, sweeps.

Those in the tests of single functions are there with one layer; here each has all of its parts.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from loopback import Loopback
from small import VOCAB

import esjax
from esjax.config.models import (
    MODELS,
    GruConfig,
    LlamaConfig,
    LruConfig,
    LstmConfig,
    MinGruConfig,
    ModelConfig,
    RnnConfig,
    Rwkv7Config,
    TransformerConfig,
)
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.core.seeds import pair_seeds
from esjax.data.packing import draw_windows, pack_stream
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.hosts.executor import Executor
from esjax.models import Model, build_model
from esjax.models.member import Member
from esjax.replica.replica import Replica
from esjax.runs.checkpoint import digest
from esjax.training.local_steps import LocalSteps

pytestmark = pytest.mark.usefixtures("lenient_promotion")

SMALL: dict[str, ModelConfig] = {
    "rnn": RnnConfig(hidden_size=4, n_layers=2),
    "gru": GruConfig(hidden_size=4, head_size=6, n_layers=2),
    "lstm": LstmConfig(hidden_size=4, head_size=6, n_layers=2),
    "mingru": MinGruConfig(hidden_size=4, head_size=6, n_layers=2),
    "lru": LruConfig(hidden_size=4, mlp_size=6, n_layers=2),
    "transformer": TransformerConfig(hidden_size=8, mlp_size=6, n_heads=2, context=8),
    "llama": LlamaConfig(hidden_size=8, mlp_size=6, n_layers=1, n_heads=2, n_kv_heads=1, context=8),
    "rwkv7": Rwkv7Config(hidden_size=8, head_size=4, mlp_size=6, n_layers=2, gate_size=3),
}
AT_NIGHT = [pytest.param(name, marks=pytest.mark.nightly) for name in ("gru", "lstm", "transformer", "rwkv7")]
NEW = ["lru", *AT_NIGHT]
"""Those that no other test trains; at night what other models do alike."""

STREAM = np.random.default_rng(2).integers(0, VOCAB, 200).astype(np.uint8)


def settings(name: str, **es: Any) -> Config:
    data = DataConfig(window=5, batch_size=2)
    return Config(seed=4, data=data, es=EsConfig(**{"population_size": 16} | es), model=SMALL[name])


@cache
def built(name: str) -> Model:
    return build_model(SMALL[name], VOCAB)


def silent(line: str) -> None:
    pass


def test_every_architecture_is_here() -> None:
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.parametrize("name", NEW)
def test_a_run_goes_on_is_replayed_and_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    """Reference: the weights of the run, and what it writes. A replay knows of no break at step 1."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(30)))
    data = DataConfig(text=str(text), window=5, held_out=0.2)
    config = Config(steps=1, ledger=True, data=data, es=EsConfig(population_size=8), model=SMALL[name])
    list(esjax.train(config, tmp_path / "run", tell=silent))
    run = esjax.resume(tmp_path / "run", steps=2, tell=silent)
    assert np.isfinite([info.held_out or np.nan for info in run][-1])
    replayed = esjax.replay(tmp_path / "run", tell=silent)
    assert (replayed.agrees, int(replayed.state.step)) == (True, 2)
    jax.tree.map(np.testing.assert_array_equal, replayed.state.average, run.params)
    (file,) = esjax.export(tmp_path / "run", tmp_path / "w.safetensors")
    esjax.import_weights(file, tmp_path / "back")
    back = esjax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, run.params)
    assert back.generate("the ", seed=1, max_tokens=9) == run.generate("the ", seed=1, max_tokens=9)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["gru", "lstm", "lru", "transformer", "rwkv7"])
def test_hosts_make_the_updates_of_one_machine(name: str) -> None:
    """Reference: the state machines of hosts, with every message between them; bytes of updates, and digests."""
    config = settings(name, chunk_pairs=4)
    here, there = (Replica(config, built(name), STREAM, mesh_of(1)) for _ in range(2))
    ours: list[tuple[int, bytes]] = []
    theirs: list[tuple[int, bytes]] = []
    local = LocalSteps(config, here, custom={}, record=lambda *update: ours.append(update))
    hosts = Loopback(
        config, Executor(there, VOCAB, tell=silent), custom={}, record=lambda *update: theirs.append(update)
    )
    for _ in range(2):
        local.take()
        hosts.step()
    assert ours == theirs
    assert digest(here.state) == digest(there.state)


@pytest.mark.parametrize("name", ["lstm", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("gru", "lru"))])
def test_noise_on_activations_trains_every_weight(name: str) -> None:
    config = settings(name, space="activation")
    replica = Replica(config, built(name), STREAM, mesh_of(1))
    first = jax.tree.map(np.asarray, replica.state.params)
    local = LocalSteps(config, replica, custom={}, record=lambda *update: None)
    for _ in range(2):
        assert not local.take().concluded.trouble
    moved = jax.tree.map(lambda one, two: bool((one != two).any()), first, replica.state.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize("name", ["transformer", "llama", "rwkv7"])
def test_without_taps_noise_on_activations_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(EsjaxError, match=r"the model has no taps for es\.space activation; give it some"):
        Replica(settings(name, space="activation"), built(name), STREAM, mesh_of(1))


@pytest.mark.nightly
def test_a_sweep_takes_their_names(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(30)))
    data = DataConfig(text=str(text), window=4, held_out=0.2)
    config = Config(steps=1, data=data, es=EsConfig(population_size=4))
    outcomes = list(esjax.sweep({"model": ["lru", "lstm"]}, config, out=tmp_path / "sweep", tell=silent))
    assert [(outcome.values, outcome.state) for outcome in outcomes] == [
        ({"model": name}, "finished") for name in ("lru", "lstm")
    ]


@pytest.mark.parametrize("name", SMALL)
def test_no_token_of_a_window_is_padding(name: str) -> None:
    """Reference: the text, of which windows are runs; and the mean of the nats of all their tokens but the burn-in.

    So the share of padding is 0: a document that is shorter than a window is followed by others.
    """
    documents = [np.arange(2, 2 + length, dtype=np.int32) for length in (1, 2, 3, 4, 5)]
    stream = pack_stream(documents)
    windows = draw_windows(jnp.asarray(stream), pair_seeds(0, 0, 8), 2, 7)
    text = stream.tobytes()
    assert all(text.find(np.asarray(window).tobytes()) >= 0 for window in windows.reshape(-1, 7))
    member = Member(built(name), built(name).init(jax.random.key(0)))
    window = windows[0, 0]
    nats = np.asarray(jax.jit(member.nats)(window))
    assert (nats > 0).all()
    np.testing.assert_allclose(jax.jit(partial(member.cross_entropy, burn_in=1))(window), nats[1:].mean(), rtol=1e-5)
    assert STOP in stream.tolist()
