"""Steps on one machine, against those of a coordinator and a host, and against the functions of the core."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from loopback import Loopback

from esjax import core
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, OptimConfig
from esjax.core.seeds import PERTURBATIONS, pair_seeds, stream_seed
from esjax.data.delivery import Blocks
from esjax.data.packing import draw_windows
from esjax.data.tokens import STOP
from esjax.hosts.executor import Executor
from esjax.models import build_model
from esjax.models.member import cross_entropy, over_sequences
from esjax.replica.replica import Replica
from esjax.replica.streams import WINDOWS
from esjax.runs.checkpoint import digest
from esjax.training.local_steps import LocalSteps

pytestmark = pytest.mark.usefixtures("lenient_promotion")

VOCAB = 11
STREAM = np.random.default_rng(2).integers(0, VOCAB, 500).astype(np.uint8)


def config_of(block_tokens: int | None = None, **es: Any) -> Config:
    return Config(
        seed=4,
        data=DataConfig(window=5, batch_size=2, new_tokens_interval=2, block_tokens=block_tokens),
        es=EsConfig(**{"population_size": 40, "chunk_pairs": 4} | es),
        model=GruConfig(hidden_size=4, head_size=8),
    )


def replica_of(config: Config, **given: Any) -> Replica:
    return Replica(config, build_model(config.model, VOCAB), STREAM, mesh_of(2), **given)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config_of(), id="losses"),
        pytest.param(config_of(pairing="split", pairs_per_window=5), id="split"),
        pytest.param(config_of(exchange="sums"), id="sums"),
        pytest.param(config_of(output_layer="noise"), id="noise on the output"),
        pytest.param(config_of(space="activation", copies=2), id="gates"),
        pytest.param(config_of(space="activation", credit="discount", copies=2), id="discount"),
        pytest.param(config_of(block_tokens=64), id="blocks"),
    ],
)
def test_updates_are_those_of_a_coordinator_and_a_host(config: Config) -> None:
    """Reference: the state machines of hosts, with every message between them; bytes of updates, and digests."""
    blocks = Blocks(STREAM, VOCAB, config.seed, 64) if config.data.block_tokens else None
    here, there = replica_of(config), replica_of(config)
    ours: list[tuple[int, bytes]] = []
    theirs: list[tuple[int, bytes]] = []
    local = LocalSteps(config, here, custom={}, record=lambda *update: ours.append(update), blocks=blocks)
    hosts = Loopback(
        config,
        Executor(there, VOCAB, tell=lambda line: None),
        custom={},
        record=lambda *update: theirs.append(update),
        block=blocks,
    )
    for _ in range(4):
        local.take()
        hosts.step()
    assert ours == theirs
    assert digest(here.state) == digest(there.state)


def test_a_step_is_that_of_the_core() -> None:
    """Reference: evaluate, shape and estimate, and plain gradient descent in units, to the bit.

    Rows of the embedding that a pair does not read are left out; a model may begin with STOP.
    """
    config = Config(
        seed=4,
        data=DataConfig(window=5, batch_size=2),
        es=EsConfig(population_size=40, chunk_pairs=4, output_layer="noise"),
        optim=OptimConfig(average=0.0),
        model=GruConfig(hidden_size=4, head_size=8),
    )
    optimizer = optax.sgd(0.5)
    replica = replica_of(config, optimizer=optimizer)
    model, params = replica.model, jax.tree.map(np.asarray, replica.state.params)
    LocalSteps(config, replica, custom={}).take()

    noise = core.low_rank(config.es.deviation, config.es.rank, units=replica.units)
    pairs = jnp.arange(20, dtype=jnp.uint32)
    windows = draw_windows(jnp.asarray(STREAM), pair_seeds(stream_seed(4, WINDOWS), 0, pairs), 2, 6)
    seeds = pair_seeds(stream_seed(4, PERTURBATIONS), 0, pairs)
    losses = jax.jit(core.evaluate(over_sequences(model, cross_entropy(1)), noise, chunk_pairs=4))
    shaped = core.shape(np.asarray(losses(params, seeds, windows)))
    rows = {"embedding": jnp.pad(windows.reshape(20, -1), [(0, 0), (0, 1)], constant_values=STOP)}

    @jax.jit
    def step(params: Any, weights: Any, scale: Any) -> Any:
        gradient = core.estimate(noise)(params, seeds, core.Shaped(weights, scale, 0), rows=rows)
        scaled = core.in_units(optimizer, replica.units)
        updates, _ = scaled.update(gradient, scaled.init(params), params)
        return optax.apply_updates(params, updates)

    expected = step(params, shaped.weights, np.float32(shaped.scale))
    jax.tree.map(np.testing.assert_array_equal, replica.state.params, expected)


def test_the_output_layer_moves_with_the_slope_of_the_losses() -> None:
    """Reference: the losses of the step, shaped, and applied with their slope; the same with a slope of 0 moves all
    but the output layer.
    """
    config = config_of()
    replica, other, still = replica_of(config), replica_of(config), replica_of(config)
    first = jax.tree.map(np.asarray, replica.state.params)
    LocalSteps(config, replica, custom={}).take()
    shaped = core.shape(other.losses(np.arange(20)))
    other.apply(np.arange(20), shaped.weights, shaped.scale, shaped.slope)
    still.apply(np.arange(20), shaped.weights, shaped.scale, 0.0)
    params = replica.state.params
    jax.tree.map(np.testing.assert_array_equal, params, other.state.params)
    jax.tree.map(np.testing.assert_array_equal, still.state.params, params._replace(head_output=first.head_output))
    assert all((leaf != before).any() for leaf, before in zip(params.head_output, first.head_output, strict=True))


def test_a_time_budget_is_one_range_of_pairs_from_the_first_on() -> None:
    """Reference: the losses of as many pairs, scored at once; the update is of these."""
    config = config_of(time_per_step=0.2)
    replica, other = replica_of(config), replica_of(config)
    done = LocalSteps(config, replica, custom={}).take()
    assert done.pairs % replica.device_batch == 0
    losses = other.losses(np.arange(done.pairs))
    assert done.concluded.loss is not None
    np.testing.assert_allclose(done.concluded.loss, losses.mean(), rtol=1e-6)
    np.testing.assert_array_equal(done.concluded.weights, core.shape(losses).weights)
