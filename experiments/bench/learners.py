"""Methods that train a model from the same initial weights on the same text, one step at a time."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from bench.rivals import evosax_open_es
from esjax.config.settings import Config, replace
from esjax.core import Noise, evaluate, pair_seeds, shape
from esjax.core.population import PAIRS_AXIS
from esjax.core.seeds import PERTURBATIONS, stream_seed
from esjax.core.units import in_units
from esjax.data.corpus import Corpus
from esjax.data.packing import draw_windows
from esjax.devices.mesh import local_mesh
from esjax.inference.language_model import LanguageModel
from esjax.models import Model, build_model
from esjax.models.custom import Custom
from esjax.models.member import Member, cross_entropy, over_sequences
from esjax.models.model import Params
from esjax.replica.estimators.estimator import stacked_of
from esjax.replica.optimizer import make_optimizer
from esjax.replica.replica import Replica
from esjax.replica.streams import INIT, WINDOWS
from esjax.replica.update import TrainState, init_state, make_apply
from esjax.training.run import Trainer

NEVER = 1e9
"""Setting `evaluate_time` of a run that the benchmark evaluates: so long that the run never does."""


Name = TypeVar("Name")
"""Key of a learner."""


class Learner(NamedTuple):
    """A run that can be paused and evaluated after any step.

    Attributes:
        step: `(done) -> tokens` does a few steps, waits for them, and returns how many (member-)tokens they read.
            `done` is the fraction of the run that is over, for schedules with an end.
        params: Returns the weights to evaluate.
        score: Held-out loss of weights, if the model is not that of the other learners.
    """

    step: Callable[[float], int]
    params: Callable[[], Params]
    score: Callable[[Params], float] | None = None


class Point(NamedTuple):
    """A point of a learning curve: seconds of training (evaluations excluded), tokens, and held-out nats per token."""

    seconds: float
    tokens: int
    held_out: float


def train_in_turns(
    learners: dict[Name, Learner], held_out: Callable[[Params], float], seconds: float, every: float
) -> dict[Name, list[Point]]:
    """Train all in turns of `every` seconds, each followed by an evaluation; only training steps are timed."""
    clocks = {name: [0.0, learner.step(0.0)] for name, learner in learners.items()}
    curves: dict[Name, list[Point]] = {name: [] for name in learners}
    for turn in range(1, max(1, round(seconds / every)) + 1):
        for name, learner in learners.items():
            clock = clocks[name]
            while clock[0] < turn * every:
                started = time.perf_counter()
                clock[1] += learner.step(min(1.0, clock[0] / seconds))
                clock[0] += time.perf_counter() - started
            curves[name].append(Point(clock[0], int(clock[1]), (learner.score or held_out)(learner.params())))
    return curves


def train_for_tokens(learner: Learner, held_out: Callable[[Params], float], tokens: int) -> float:
    """Train for a number of tokens and return the held-out loss."""
    read = 0
    while read < tokens:
        read += learner.step(read / tokens)
    return held_out(learner.params())


def scorer(config: Config, corpus: Corpus) -> Callable[[Params], float]:
    """Make the function that scores weights on the held-out documents, in nats per token."""
    trained = LanguageModel(build_model(config.model, corpus.vocabulary.size), corpus.vocabulary, local_mesh())
    lanes = trained.lanes(corpus.held_out)
    return lambda params: trained.loss(params, lanes)


def ours(config: Config, corpus: Corpus) -> Learner:
    """Train as `esjax train` does."""
    trainer = Trainer(replace(config, evaluate_time=NEVER), corpus, custom=Custom())
    steps, last = iter(trainer), 0

    def step(_: float) -> int:
        nonlocal last
        before, last = last, next(steps).member_tokens
        return last - before

    return Learner(step, lambda: trainer.params)


class _Setting(NamedTuple):
    """Model, weights, data and devices, which all methods begin with."""

    model: Model
    params: Params
    stream: Array
    mesh: Mesh
    windows_of: Callable[[Array, Array, int], Array]
    """`(step, pairs, sequences) -> windows`, the same as a run's own."""


def _set(config: Config, corpus: Corpus) -> _Setting:
    size, data = corpus.vocabulary.size, config.data
    model, mesh = build_model(config.model, size), local_mesh()
    stream = jnp.asarray(corpus.stream())
    params = model.init(jax.random.wrap_key_data(stream_seed(config.seed, INIT), impl="threefry2x32"))
    of_windows = stream_seed(config.seed, WINDOWS)

    def windows_of(step: Array, pairs: Array, sequences: int) -> Array:
        return draw_windows(stream, pair_seeds(of_windows, step, pairs), sequences, data.burn_in + data.window)

    return _Setting(model, params, stream, mesh, windows_of)


def mean_gradient(model: Model, mesh: Mesh, burn_in: int) -> Callable[[Params, Int[Array, "windows length"]], Params]:
    """Make `(params, windows) -> gradient` of the mean loss; jit it.

    Each device computes the gradient of its share, and the devices synchronise once. The compiler alone would
    synchronise them at every token of the backward pass.
    """

    def mean_loss(params: Params, windows: Array) -> Array:
        return jnp.mean(jax.vmap(lambda window: Member(model, params).cross_entropy(window, burn_in))(windows))

    everywhere, shares = PartitionSpec(), PartitionSpec(PAIRS_AXIS)

    @partial(jax.shard_map, mesh=mesh, in_specs=(everywhere, shares), out_specs=everywhere, check_vma=False)
    def gradient(params: Params, windows: Array) -> Params:
        flat, unravel = ravel_pytree(jax.grad(mean_loss)(params, windows))
        return unravel(jax.lax.pmean(flat, PAIRS_AXIS))

    return gradient


def backpropagation(config: Config, corpus: Corpus, batch: int, at_a_time: int = 10) -> Learner:
    """Train with exact gradients, and the optimizer, schedule and average of a run; `at_a_time` steps per call.

    The batch is rounded up to a multiple of the number of devices.
    """
    model, params, _, mesh, windows_of = _set(config, corpus)
    optimizer, units = make_optimizer(config.optim, None), model.units(params)
    gradient_of = mean_gradient(model, mesh, config.data.burn_in)
    apply = make_apply(optimizer, units, config.optim.average)
    batch += -batch % mesh.size

    def update(state: TrainState) -> TrainState:
        windows = windows_of(state.step, jnp.arange(batch, dtype=jnp.uint32), 1)[:, 0]
        return apply(state, gradient_of(state.params, windows), jnp.float32(0))[0]

    jitted, state = jax.jit(update), init_state(params, in_units(optimizer, units))

    def step(done: float) -> int:
        nonlocal state
        for _ in range(at_a_time):
            state = jitted(state)
        jax.block_until_ready(state)
        return at_a_time * batch * config.data.window

    return Learner(step, lambda: state.average)


def evosax(config: Config, corpus: Corpus, *, population: int, sequences: int, at_once: int) -> Learner:
    """Train with OpenES of evosax, with the run's optimizer and average; all members share their windows."""
    model, params, _, mesh, windows_of = _set(config, corpus)
    rival = evosax_open_es(
        model,
        mesh,
        burn_in=config.data.burn_in,
        population=population,
        sigma=config.es.deviation,
        optimizer=make_optimizer(config.optim, None),
        at_once=at_once,
    )

    def advance(number: Array, state: Any, average: Params) -> tuple[Any, Params]:
        windows = windows_of(number, jnp.arange(sequences, dtype=jnp.uint32), 1)[:, 0]
        state = rival.step(state, jax.random.fold_in(jax.random.key(config.seed), number), windows)
        share = 1 / (config.optim.average * number.astype(jnp.float32) + 1) if config.optim.average else 1.0
        average = jax.tree.map(lambda old, new: old + share * (new - old), average, rival.params(state))
        return state, average

    jitted, number = jax.jit(advance), 0
    state, average = rival.init(params), params

    def step(_: float) -> int:
        nonlocal state, average, number
        state, average = jax.block_until_ready(jitted(np.int32(number), state, average))
        number += 1
        return population * sequences * config.data.window

    return Learner(step, lambda: average)


def mean_of_peers(losses: np.ndarray, members_a_window: int) -> np.ndarray:
    """Return, for each member, the mean loss of the members with its window, or of all if windows are not shared."""
    if members_a_window == 1:
        return np.full_like(losses, losses.mean())
    windows = np.arange(len(losses)) // members_a_window
    return (np.bincount(windows, losses) / np.bincount(windows))[windows]


def arranged(config: Config, corpus: Corpus, *, paired: bool = True, pairs_a_window: int = 1) -> Learner:
    """Train with the library's functions in a different arrangement.

    Args:
        config: Settings.
        corpus: The text.
        paired: False: every member has different noise, and its loss is compared with a mean, see `mean_of_peers`, in
            place of the loss of the other member of a pair.
        pairs_a_window: Pairs (or members, unpaired) that share a window.
    """
    model, _, _, mesh, windows_of = _set(config, corpus)
    es, data = config.es, config.data
    count = es.pairs if paired else es.population
    chosen = replace(config, es=replace(es, population_size=2 * count, exchange="losses"))
    replica = Replica(chosen, model, None, mesh)
    rank = es.rank if es.space == "low_rank" else 0
    gaussian, stacked = es.noise == "gaussian", stacked_of(model)
    noise = Noise(es.deviation, rank, gaussian=gaussian, units=replica.units, stacked=stacked)
    loss = over_sequences(model, cross_entropy(data.burn_in))
    score = evaluate(loss, noise, mesh=mesh, chunk_pairs=replica.chunk_pairs)
    of_noise = stream_seed(config.seed, PERTURBATIONS)

    @jax.jit
    def losses_of(params: Params, number: Array) -> Array:
        pairs = jnp.arange(count, dtype=jnp.uint32)
        windows = windows_of(number, pairs // pairs_a_window, data.batch_size)
        return score(params, pair_seeds(of_noise, number, pairs), windows)

    def step(_: float) -> int:
        losses = np.array(losses_of(replica.state.params, replica.state.step))
        if not paired:  # -ε is scored, too, and ignored: tokens are compared here, not seconds
            losses[:, 1] = mean_of_peers(losses[:, 0], pairs_a_window)
        shaped = shape(losses, es.shaping, es.deviation)
        replica.apply(np.arange(count, dtype=np.uint32), shaped.weights, shaped.scale, shaped.slope)
        return es.population * data.batch_size * data.window

    return Learner(step, lambda: replica.state.average)
