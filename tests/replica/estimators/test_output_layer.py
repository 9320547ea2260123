"""The exact gradient of the output layer against `jax.grad`, and where it takes part."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jaxtyping import Array
from reference_models import busy

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, OptimConfig
from esjax.core.seeds import pair_seeds, stream_seed
from esjax.data.packing import draw_windows
from esjax.errors import EsjaxError
from esjax.models import Model, gru, rnn, sequence_model
from esjax.models.member import Loss, Member, cross_entropy
from esjax.replica.estimators.estimator import LossEstimator, SumEstimator, make_estimator
from esjax.replica.estimators.output_layer import PAIRS, STEPS, make_output_gradient
from esjax.replica.replica import Replica
from esjax.replica.streams import WINDOWS

VOCAB = 7
SIGMA, SLOPE = 0.1, 1.7
WINDOWS_OF_ALL = np.random.default_rng(0).integers(0, VOCAB, (3 * PAIRS, 2, 6)).astype(np.int32)
"""Windows of two sequences for three times the pairs, with ends of documents among them."""


def logits(params: Any, tokens: Array) -> Array:
    return jnp.tanh(params["in"][tokens]) @ params["out"]["kernel"] + params["out"]["bias"][None]


def init(key: Array) -> Any:
    return {"in": jnp.zeros((VOCAB, 4)), "out": {"kernel": jnp.zeros((4, VOCAB)), "bias": jnp.zeros(VOCAB)}}


MODELS = {
    "gru": gru(VOCAB, 4, 5),
    "rnn": rnn(VOCAB, 4, 2),
    "sequence": sequence_model(init, logits, 4)._replace(output_layer="out"),  # shorter than a window
}


def params_of(model: Model) -> Any:
    return busy(model.init(jax.random.key(0)))


def is_output(model: Model, params: Any) -> list[bool]:
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    return [f"{path}/".startswith(f"{model.output_layer}/") for path in paths]


def found(model: Model, params: Any, windows: np.ndarray = WINDOWS_OF_ALL, devices: int = 1, **changes: Any) -> Any:
    """Put the exact gradient into an estimate that is 3 everywhere."""
    settings: dict[str, Any] = {"burn_in": 1, "groups": 1} | changes
    burn_in, groups = settings["burn_in"], settings["groups"]
    data = DataConfig(burn_in=burn_in, window=6 - burn_in, batch_size=2)
    run = make_output_gradient(
        model,
        model.units(params),
        lambda all_windows, pairs: all_windows[pairs],
        data,
        SIGMA,
        groups,
        mesh_of(devices),
    )
    three = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), params)
    return jax.jit(run)(three, params, jnp.float32(SLOPE), jnp.asarray(windows))


def exact(model: Model, params: Any, windows: np.ndarray, burn_in: int) -> Any:
    """Return the gradient of the mean cross entropy over all windows."""

    def loss(params: Any) -> Array:
        member = Member(model, params)
        return jnp.mean(jax.vmap(partial(member.cross_entropy, burn_in=burn_in))(jnp.asarray(windows).reshape(-1, 6)))

    return jax.jit(jax.grad(loss))(params)


def check(model: Model, params: Any, got: Any, right: Any, tokens: int) -> None:
    """Compare the output layer with 2 sigma slope times a gradient, and all else with 3.

    Each of the windows is rounded to steps: half a step is the most that it is off. Sums in float32 add a little.
    """
    factor = 2 * SIGMA * SLOPE
    leaves = (is_output(model, params), *map(jax.tree.leaves, (got, right, model.units(params))))
    for chosen, one, gradient, unit in zip(*leaves, strict=True):
        if chosen:
            bound = factor * (2 * PAIRS) * 0.5 / (STEPS * tokens * unit)
            assert bound < 0.01 * factor * np.abs(gradient).max()
            np.testing.assert_allclose(one, factor * gradient, rtol=1e-4, atol=bound + 1e-6)
        else:
            assert (one == 3).all()


@pytest.mark.parametrize(("name", "groups", "burn_in"), [("gru", 1, 0), ("rnn", 3, 2), ("sequence", 3, 2)])
def test_it_is_the_gradient_of_the_mean_cross_entropy(name: str, groups: int, burn_in: int) -> None:
    """Of the windows of 128 pairs, every third of the pairs if three of them share windows; on 1 and 4 devices."""
    model = MODELS[name]
    params = params_of(model)
    got = found(model, params, groups=groups, burn_in=burn_in)
    right = exact(model, params, WINDOWS_OF_ALL[: groups * PAIRS : groups], burn_in)
    check(model, params, got, right, PAIRS * 2 * (6 - burn_in))
    shared = found(model, params, devices=4, groups=groups, burn_in=burn_in)
    jax.tree.map(np.testing.assert_array_equal, got, shared)


def test_windows_whose_loss_is_not_finite_count_as_0() -> None:
    """Reference: the gradient without the window with a broken token, over as many tokens."""
    model, windows, broken = MODELS["gru"], WINDOWS_OF_ALL[:PAIRS] % (VOCAB - 1), VOCAB - 1
    params = params_of(model)
    params = params._replace(embedding=params.embedding.at[broken].set(jnp.nan))
    rest = exact(model, params, np.delete(windows.reshape(-1, 6), 35, axis=0), 1)
    rest = jax.tree.map(lambda leaf: leaf * (1 - 1 / (2 * PAIRS)), rest)
    windows[17, 1, 2] = broken  # the window of number 35
    check(model, params, found(model, params, windows), rest, PAIRS * 2 * 5)


def test_parts_that_have_no_room_are_cut_off() -> None:
    """Reference: a window's part is at most 2^31 over the number of windows, as a power of two, with its sign."""
    model = MODELS["gru"]
    params = params_of(model)
    params = params._replace(
        head_hidden=jax.tree.map(jnp.zeros_like, params.head_hidden)._replace(bias=jnp.full(5, 1e30)),
        head_output=params.head_output._replace(matrix=jnp.zeros((5, VOCAB))),
    )
    windows = WINDOWS_OF_ALL[:PAIRS].reshape(-1, 6)
    gradients = jax.vmap(lambda window: exact(model, params, window, 1).head_output.bias)(jnp.asarray(windows))
    signs = np.sign(gradients)
    room = 2 ** int(np.log2((2**31 - 1) / len(windows)))
    right = 2 * SIGMA * SLOPE * room * signs.sum(axis=0) / (STEPS * len(windows) * 5 * 5**-0.5)
    got = found(model, params).head_output.matrix
    np.testing.assert_allclose(got, np.broadcast_to(right, (5, VOCAB)), rtol=1e-5)


CONFIG = Config(
    seed=4,
    data=DataConfig(window=5, batch_size=2, new_tokens_interval=2),
    es=EsConfig(population_size=64, chunk_pairs=4, sigma=SIGMA, pairing="split", pairs_per_window=3),
    optim=OptimConfig(average=0.0),
    model=GruConfig(hidden_size=4, head_size=5),
)


@pytest.mark.usefixtures("lenient_promotion")
def test_an_update_moves_the_output_layer_along_it() -> None:
    """Reference: `jax.grad` over the windows of the step, drawn by the public functions; plain gradient descent.

    Weights of 0 leave all but the output layer in its place. Step 2 has the second set of windows.
    """
    stream, model = WINDOWS_OF_ALL.reshape(-1).astype(np.uint8), MODELS["gru"]
    host = Replica(CONFIG, model, stream, mesh_of(2), optimizer=optax.sgd(0.5))
    host.skip()
    host.skip()
    before = params_of(model)
    host.use_params(before)
    host.apply(np.arange(8), np.zeros((8, 2), np.int8), 0.01, SLOPE)
    seeds = pair_seeds(stream_seed(4, WINDOWS), 1, jnp.arange(PAIRS, dtype=jnp.uint32))
    right = exact(model, before, np.asarray(draw_windows(jnp.asarray(stream), seeds, 2, 6)), 1)
    moved = jax.tree.map(lambda new, old, unit: (old - new) / unit**2 / 0.5, host.state.params, before, model.unit)
    moved = jax.tree.map(
        lambda leaf, chosen: leaf if chosen else leaf + 3,
        moved,
        jax.tree.unflatten(jax.tree.structure(before), is_output(model, before)),
    )
    check(model, before, moved, right, PAIRS * 2 * 5)


def make(model: Model, loss: Loss | None = None, data: Any = None, **es: Any) -> LossEstimator | SumEstimator:
    params = model.init(jax.random.key(0))
    config = Config(data=DataConfig(**(data or {})), es=EsConfig(**{"population_size": 64} | es))
    return make_estimator(config, model, params, model.units(params), loss)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "custom loss": ({"loss": cross_entropy(1)}, "the gradient of a custom loss or reward is not known"),
    "model that does not say": ({"model": MODELS["gru"]._replace(output_layer="")}, r"Model\.output_layer"),
    "sums": ({"exchange": "sums"}, r"it needs es\.exchange losses"),
    "blocks": ({"data": {"block_tokens": 1000}}, r"data\.block_tokens sends parts"),
}


@pytest.mark.parametrize("why", IMPOSSIBLE)
def test_where_it_is_impossible_auto_takes_noise_and_exact_is_refused(why: str) -> None:
    given, reason = IMPOSSIBLE[why]
    given = {"model": MODELS["gru"]} | given
    for setting in ("auto", "noise"):
        estimator = make(**given, output_layer=setting)
        assert isinstance(estimator, SumEstimator) or not estimator.is_output_exact
        assert len(estimator.zeros) == 8  # a sum for each leaf
    with pytest.raises(EsjaxError, match=rf"es\.output_layer exact: .*{reason}.*; set es\.output_layer to noise"):
        make(**given, output_layer="exact")


@pytest.mark.parametrize("name", MODELS)
def test_where_it_is_possible_the_output_layer_has_no_noise(name: str) -> None:
    model = MODELS[name]
    leaves = is_output(model, model.init(jax.random.key(0)))
    for setting, is_exact in [("auto", True), ("exact", True), ("noise", False)]:
        estimator = make(model, output_layer=setting)
        assert isinstance(estimator, LossEstimator)
        assert estimator.is_output_exact is is_exact
        assert len(estimator.zeros) == len(leaves) - is_exact * sum(leaves)
