"""Member-tokens a second of evaluation and of a whole step, beside what a user would take instead.

Rivals in JAX are tried with one device a core and with one device and a thread a core, and with several numbers of
members at a time; the fastest of these takes part in the turns. numpy runs as one process with its own threads, and
as a process a core with a thread each. The peak is a large float32 matrix product, the faster of JAX's and numpy's.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.measure import Candidate, all_threads, alternate, elsewhere, fastest, one_thread, spread
from bench.ours import VOCAB, evaluation, member_tokens, random_tokens, replica_of, step
from bench.report import Report, Row
from bench.rivals import NumpyRnn, Rival, evosax_open_es, forward, normal_low_rank
from bench.settings import Throughput
from esjax.config import Config, DataConfig, EsConfig, RnnConfig, replace
from esjax.devices import local_mesh
from esjax.models import build_model
from esjax.models.primitives import HIGHEST, round_matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE_BYTES = 2**29, 2**34
"""Bytes of a dense population that a rival is given at most, on CPUs and on an accelerator: fewer members, then."""

AT_ONCE = (256, 1024), (2**13, 2**15)
"""Sequences that a device has at a time, over all members, of which rivals try each; on CPUs, and on an accelerator."""

NUMPY_TOKENS = 2**15
"""Member-tokens that numpy does in a call, or those of a pair."""


class Size(NamedTuple):
    """An rnn and its population."""

    hidden: int
    layers: int
    sequences: int
    population: int

    @property
    def config(self) -> Config:
        """Settings of a run. With sums, which large populations exchange by themselves, no losses could be timed."""
        return Config(
            es=EsConfig(population_size=self.population, exchange="losses"),
            model=RnnConfig(hidden_size=self.hidden, n_layers=self.layers),
            data=DataConfig(batch_size=self.sequences),
        )

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of a token, noise not counted."""
        return 2 * (self.layers * self.hidden**2 + 4 * self.hidden**2 + 4 * self.hidden * VOCAB)


def run(settings: Throughput) -> Report:
    """Measure every size."""
    rows = [measure(size, settings) for size in sizes(settings)]
    notes = [
        "M/s are millions of member-tokens a second; a ratio is the median of those of each round, and their extremes.",
    ]
    return Report(rows, partial(plot, rows), notes)


def sizes(settings: Throughput) -> list[Size]:
    """List what is measured."""
    scale = settings.scale or (1 if _on_cpu() else 16)
    return [Size(hidden, layers, sequences, scale * members) for hidden, layers, sequences, members in settings.sizes]


def measure(size: Size, settings: Throughput) -> Row:
    """Measure one size."""
    config, mesh = size.config, local_mesh()
    replica = replica_of(config, mesh)
    in_bfloat16 = replace(config, es=replace(config.es, precision="bfloat16"))
    coarse = replica_of(in_bfloat16, mesh)
    with ExitStack() as stack:
        candidates = rivals(size, settings)
        if _on_cpu():
            there = stack.enter_context(elsewhere(rivals, size, settings, environment=all_threads()))
            candidates |= {f"{name}, one device": candidate for name, candidate in there.items()}
        turns: dict[str, Candidate] = {"evaluation": evaluation(config, replica), "step": step(config, replica)}
        turns["evaluation, bfloat16"] = evaluation(in_bfloat16, coarse)
        turns["step, bfloat16"] = step(in_bfloat16, coarse)
        chosen = {}
        for kind in ("forward", "bfloat16 forward", "evosax", "normal low rank", "peak"):
            chosen[kind] = fastest({name: one for name, one in candidates.items() if name.startswith(kind)})
            turns[kind] = candidates[chosen[kind]]
        turns |= in_numpy(size)
        cores = os.cpu_count() or 1
        alone = stack.enter_context(elsewhere(in_numpy, size, environment=one_thread(), processes=cores))
        turns["numpy, a process a core"] = alone["numpy"]
        rates = alternate(turns, settings.rounds)
    best = np.maximum(rates["evosax"], rates["normal low rank"])
    return {
        "hidden": size.hidden,
        "layers": size.layers,
        "sequences": size.sequences,
        "population": size.population,
        "evaluation M/s": float(np.median(rates["evaluation"])) / 1e6,
        "step M/s": float(np.median(rates["step"])) / 1e6,
        "evaluation ÷ numpy": spread(rates["evaluation"] / rates["numpy"]),
        "÷ numpy, a process a core": spread(rates["evaluation"] / rates["numpy, a process a core"]),
        "evaluation ÷ forward": spread(rates["evaluation"] / rates["forward"]),
        "evaluation, bfloat16 ÷ float32": spread(rates["evaluation, bfloat16"] / rates["evaluation"]),
        "evaluation ÷ forward, both bfloat16": spread(rates["evaluation, bfloat16"] / rates["bfloat16 forward"]),
        "step ÷ evosax": spread(rates["step"] / rates["evosax"]),
        "step ÷ normal low rank": spread(rates["step"] / rates["normal low rank"]),
        "step ÷ best rival": spread(rates["step"] / best),
        "step, bfloat16 ÷ best rival": spread(rates["step, bfloat16"] / best),
        "evaluation ÷ peak": spread(rates["evaluation"] * size.operations / rates["peak"]),
        "chosen": chosen,
        "rates": {name: list(values) for name, values in rates.items()},
    }


def rivals(size: Size, settings: Throughput) -> dict[str, Candidate]:
    """Make the rivals in JAX, with several numbers of members at a time, and the peak; nothing is compiled yet."""
    config, mesh, es = size.config, local_mesh(), size.config.es
    model, burn_in = build_model(config.model, VOCAB), config.data.burn_in
    params = model.init(jax.random.key(0))
    room = DENSE_BYTES[not _on_cpu()] // sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    dense = max(2 * mesh.size, min(es.population_size, 2 ** int(np.log2(room))))
    length = burn_in + config.data.window
    tokens = jnp.asarray(random_tokens((es.population_size * size.sequences, length)), jnp.int32)
    of_pairs = tokens[: len(tokens) // 2].reshape(es.pairs, size.sequences, length)
    work = member_tokens(config)
    candidates = peak(settings.peak)
    for at_once in settings.at_once or AT_ONCE[not _on_cpu()]:
        members = max(1, at_once // size.sequences)
        shared = {"burn_in": burn_in, "sigma": es.sigma, "optimizer": optax.adam(0.01)}
        pass_ = jax.jit(forward(model, mesh, burn_in, at_once))
        candidates[f"forward {at_once}"] = Candidate(partial(pass_, params, tokens), work)
        candidates[f"bfloat16 forward {at_once}"] = Candidate(
            partial(pass_, round_matrices(params, "bfloat16"), tokens), work
        )
        rival = evosax_open_es(model, mesh, population=dense, at_once=members, **shared)
        dense_work = work * dense // es.population_size
        candidates[f"evosax {at_once}"] = _step_of(rival, params, tokens[: size.sequences], dense_work)
        pairs = max(1, members // 2)
        rival = normal_low_rank(model, mesh, pairs=es.pairs, rank=1, at_once=pairs, **shared)
        candidates[f"normal low rank {at_once}"] = _step_of(rival, params, of_pairs, work)
    return candidates


def _step_of(rival: Rival, params: object, tokens: jax.Array, work: int) -> Candidate:
    state, number, jitted = rival.init(params), 0, jax.jit(rival.step)

    def call() -> object:
        nonlocal state, number
        number += 1
        state = jitted(state, jax.random.key(number), tokens)
        return state

    return Candidate(call, work)


def in_numpy(size: Size) -> dict[str, Candidate]:
    """Make the loop in numpy."""
    config = size.config
    model = build_model(config.model, VOCAB)
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(model.init(jax.random.key(0)))]
    rnn = NumpyRnn(params, config.es.sigma, config.data.burn_in)
    tokens = random_tokens((size.sequences, config.data.burn_in + config.data.window)).astype(np.int64)
    work = 2 * size.sequences * config.data.window
    pairs = max(1, NUMPY_TOKENS // work)
    return {"numpy": Candidate(lambda: [rnn.pair(seed, tokens) for seed in range(pairs)], pairs * work)}


def peak(rows: int) -> dict[str, Candidate]:
    """Make large matrix products, by JAX on every device, and on CPUs by numpy."""
    mesh = local_mesh()
    matrices = jnp.ones((mesh.size, rows, rows))
    product = jax.jit(lambda one, two: jnp.matmul(one, two, precision=HIGHEST))
    spread_out = jax.device_put(matrices, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names)))
    operations = 2 * rows**3
    candidates = {"peak jax": Candidate(lambda: product(spread_out, spread_out), mesh.size * operations)}
    if _on_cpu():
        square = np.ones((rows, rows), np.float32)
        candidates["peak numpy"] = Candidate(lambda: square @ square, operations)
    return candidates


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the rates of all candidates, by size."""
    axes = figure.add_subplot()
    names = [name for name in rows[0]["rates"] if name != "peak"]
    for i, name in enumerate(names):
        places = np.arange(len(rows)) + (i - len(names) / 2) * 0.8 / len(names)
        axes.bar(places, [np.median(row["rates"][name]) for row in rows], 0.8 / len(names), align="edge", label=name)
    axes.set_xticks(range(len(rows)), ["{hidden}, {layers}, {sequences}".format(**row) for row in rows])
    axes.set(yscale="log", xlabel="hidden, layers, sequences a member", ylabel="member-tokens a second")
    axes.legend()


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
