"""Member-tokens per second of evaluation and of a whole step, in comparison with alternatives.

Rivals in JAX are tried with one device per core, with one device and a thread per core, and with several numbers of
members at a time. The fastest setting is timed in turns, with products in float32 and in bfloat16. For an rnn, numpy
runs as one process with all threads, and as one process per core with one thread each. The peak is a large float32
matrix product, the faster of JAX's and numpy's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.measure import Candidate, Spread, all_threads, alternate, elsewhere, fastest, one_thread, spread
from bench.ours import VOCAB, evaluation, member_tokens, random_tokens, replica_of, step
from bench.report import Report, Row, print_row
from bench.rivals import NumpyRnn, Rival, evosax_open_es, forward, normal_low_rank
from bench.settings import Models, Throughput
from esjax.config.models import GruConfig, MinGruConfig, RnnConfig
from esjax.config.settings import Config, DataConfig, EsConfig, Precision, replace
from esjax.core.noise import round_products
from esjax.core.rules import HIGHEST
from esjax.devices.mesh import local_mesh
from esjax.models import build_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE_BYTES = 2**29, 2**33
"""Most bytes of a dense population of a rival, on CPUs and on an accelerator; it limits the number of members."""

AT_ONCE = (512, 256, 1024, 128), (2**15, 2**17)
"""Sequences of all members at a time that rivals try on each device, on CPUs and on an accelerator."""

FORWARD_AT_ONCE = (512, 256, 1024, 2048, 128), (2**15, 2**17, 2**18)
"""The same for the forward pass, which stores no noise."""


class Size(NamedTuple):
    """A model and its population."""

    model: RnnConfig | GruConfig | MinGruConfig
    sequences: int
    population: int

    @property
    def config(self) -> Config:
        """Settings of a run that exchanges losses; with gradient sums, there would be no losses to time."""
        return Config(
            es=EsConfig(population_size=self.population, exchange="losses"),
            model=self.model,
            data=DataConfig(batch_size=self.sequences),
        )

    @property
    def operations(self) -> int:
        """Floating-point operations of the matrix products of a token, noise not counted."""
        hidden = self.model.hidden_size
        if isinstance(self.model, RnnConfig):
            return 2 * (self.model.n_layers * hidden**2 + 4 * hidden**2 + 4 * hidden * VOCAB)
        return 2 * (3 * hidden**2 + hidden * self.model.head_size + self.model.head_size * VOCAB)


def run(settings: Throughput) -> Report:
    """Measure every size."""
    rows = [print_row(measure(size, settings)) for size in sizes(settings)]
    notes = [
        "M/s are millions of member-tokens a second; a ratio is the median of those of each round, and their extremes.",
    ]
    return Report(rows, partial(plot, rows), notes)


def sizes(settings: Models) -> list[Size]:
    """List the sizes to measure."""
    scale = settings.scale or (1 if _on_cpu() else 16)
    rnns = [
        Size(RnnConfig(hidden_size=hidden, n_layers=layers), sequences, scale * members)
        for hidden, layers, sequences, members in settings.sizes
    ]
    grus = [
        Size(GruConfig(hidden_size=hidden, head_size=head), sequences, scale * members)
        for hidden, head, sequences, members in settings.grus
    ]
    return rnns + grus


def measure(size: Size, settings: Throughput) -> Row:
    """Measure one size."""
    config, mesh = size.config, local_mesh()
    in_bfloat16 = replace(config, es=replace(config.es, precision="bfloat16"))
    with ExitStack() as stack:
        candidates = rivals(size, settings)
        if _on_cpu() and settings.processes:
            alone = stack.enter_context(elsewhere(rivals, size, settings, environment=all_threads()))
            candidates = {
                f"{name}{how}": of[name]
                for name in candidates
                for how, of in (("", candidates), (", one device", alone))
            }
        turns: dict[str, Candidate] = {}
        for name, chosen in (("", config), (", bfloat16", in_bfloat16)):
            replica = replica_of(chosen, mesh)
            turns |= {f"evaluation{name}": evaluation(chosen, replica), f"step{name}": step(chosen, replica)}
        best = {}
        for kind in ("forward", "bfloat16 forward", *settings.rivals, "peak"):
            of_kind = {name: one for name, one in candidates.items() if name.startswith(f"{kind}:")}
            best[kind] = fastest(of_kind, settings.choose_seconds)
            turns[kind] = candidates[best[kind]]
            # Use the best setting of float32 for bfloat16: a second search would take as long again.
            if kind in settings.rivals:
                turns[f"bfloat16 {kind}"] = candidates[f"bfloat16 {best[kind]}"]
        if isinstance(size.model, RnnConfig):
            turns |= in_numpy(size, settings.numpy_tokens)
            if settings.processes:
                there = elsewhere(
                    in_numpy, size, settings.numpy_tokens, environment=one_thread(), processes=os.cpu_count() or 1
                )
                turns["numpy, a process a core"] = stack.enter_context(there)["numpy"]
        rates = alternate(turns, settings.rounds)
    return row_of(size, rates, settings.rivals) | {
        "chosen": best,
        "rates": {name: list(values) for name, values in rates.items()},
    }


def row_of(size: Size, rates: Mapping[str, np.ndarray], rivals: Sequence[str]) -> dict[str, Any]:
    """Make the row of ratios, round by round."""
    rate = {**rates}
    if rivals:
        rate["best rival"] = np.max([rates[name] for name in rivals], axis=0)
        rate["best rival, bfloat16"] = np.max([rates[f"bfloat16 {name}"] for name in rivals], axis=0)
    rate["peak"] = rates["peak"] / size.operations
    name = size.model.__struct_config__.tag
    second = size.model.n_layers if isinstance(size.model, RnnConfig) else size.model.head_size

    def ratio(one: str, two: str) -> Spread | None:
        return spread(rate[one] / rate[two]) if two in rate else None

    return {
        "model": name,
        "hidden": size.model.hidden_size,
        "layers, or head": second,
        "sequences": size.sequences,
        "population": size.population,
        "evaluation M/s": float(np.median(rates["evaluation"])) / 1e6,
        "step M/s": float(np.median(rates["step"])) / 1e6,
        "evaluation ÷ numpy": ratio("evaluation", "numpy"),
        "÷ numpy, a process a core": ratio("evaluation", "numpy, a process a core"),
        "evaluation ÷ forward": ratio("evaluation", "forward"),
        "evaluation, bfloat16 ÷ float32": ratio("evaluation, bfloat16", "evaluation"),
        "evaluation ÷ forward, both bfloat16": ratio("evaluation, bfloat16", "bfloat16 forward"),
        **{f"step ÷ {rival}": ratio("step", rival) for rival in rivals},
        "step ÷ best rival": ratio("step", "best rival"),
        "step, bfloat16 ÷ best rival, bfloat16": ratio("step, bfloat16", "best rival, bfloat16"),
        "evaluation ÷ peak": ratio("evaluation", "peak"),
    }


def rivals(size: Size, settings: Throughput) -> dict[str, Candidate]:
    """Make the rivals in JAX, with several numbers of members at a time; nothing is compiled yet."""
    config, mesh, es = size.config, local_mesh(), size.config.es
    model, burn_in = build_model(config.model, VOCAB), config.data.burn_in
    params = model.init(jax.random.key(0))
    room = DENSE_BYTES[not _on_cpu()] // sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    dense = max(2 * mesh.size, min(es.population, 2 ** int(np.log2(room))))
    length = burn_in + config.data.window
    tokens = jnp.asarray(random_tokens((es.population * size.sequences, length)), jnp.int32)
    of_pairs = tokens[: len(tokens) // 2].reshape(es.pairs, size.sequences, length)
    work = member_tokens(config)
    candidates = peak(settings.peak)
    shared: dict[str, Any] = {"burn_in": burn_in, "sigma": es.sigma, "optimizer": optax.adam(0.01)}
    precisions: tuple[tuple[str, Precision], ...] = ("", "float32"), ("bfloat16 ", "bfloat16")
    for prefix, precision in precisions:
        weights = jax.tree.map(partial(round_products, precision=precision), params)
        for at_once in settings.at_once or FORWARD_AT_ONCE[not _on_cpu()]:
            pass_ = jax.jit(forward(model, mesh, burn_in, at_once))
            candidates[f"{prefix}forward: {at_once}"] = Candidate(partial(pass_, weights, tokens), work)
        for at_once in settings.at_once or AT_ONCE[not _on_cpu()]:
            members = max(1, at_once // size.sequences)
            of_kind = shared | {"precision": precision}
            make = partial(evosax_open_es, model, mesh, population=dense, at_once=members, **of_kind)
            dense_work = work * dense // es.population
            candidates[f"{prefix}evosax: {at_once}"] = _step_of(make, params, tokens[: size.sequences], dense_work)
            of_kind |= {"pairs": es.pairs, "rank": 1, "at_once": max(1, members // 2)}
            for how, kept in (("kept", True), ("grown again", False)):
                make = partial(normal_low_rank, model, mesh, kept=kept, **of_kind)
                candidates[f"{prefix}normal, {how}: {at_once}"] = _step_of(make, params, of_pairs, work)
    return candidates


def _step_of(make: Callable[[], Rival], params: object, tokens: jax.Array, work: int) -> Candidate:
    """Make the rival at its first call, since most settings are never called."""
    step, state, number = None, None, 0

    def call() -> object:
        nonlocal step, state, number
        if step is None:
            rival = make()
            step, state = jax.jit(rival.step), rival.init(params)
        number += 1
        state = step(state, jax.random.key(number), tokens)
        return state

    return Candidate(call, work)


def in_numpy(size: Size, tokens_a_call: int) -> dict[str, Candidate]:
    """Make the numpy candidate, with a number of member-tokens per call, at least those of a pair."""
    config = size.config
    model = build_model(config.model, VOCAB)
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(model.init(jax.random.key(0)))]
    rnn = NumpyRnn(params, config.es.deviation, config.data.burn_in)
    tokens = random_tokens((size.sequences, config.data.burn_in + config.data.window)).astype(np.int64)
    work = 2 * size.sequences * config.data.window
    pairs = max(1, tokens_a_call // work)
    return {"numpy": Candidate(lambda: [rnn.pair(seed, tokens) for seed in range(pairs)], pairs * work)}


def peak(rows: int) -> dict[str, Candidate]:
    """Make large matrix products, by JAX on every device, and on CPUs by numpy."""
    mesh = local_mesh()
    matrices = jnp.ones((mesh.size, rows, rows))
    product = jax.jit(lambda one, two: jnp.matmul(one, two, precision=HIGHEST))
    spread_out = jax.device_put(matrices, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names)))
    operations = 2 * rows**3
    candidates = {"peak: jax": Candidate(lambda: product(spread_out, spread_out), mesh.size * operations)}
    if _on_cpu():
        square = np.ones((rows, rows), np.float32)
        candidates["peak: numpy"] = Candidate(lambda: square @ square, operations)
    return candidates


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the rates of all candidates, by size."""
    axes = figure.add_subplot()
    names = [name for name in rows[0]["rates"] if name != "peak" and all(name in row["rates"] for row in rows)]
    for i, name in enumerate(names):
        places = np.arange(len(rows)) + (i - len(names) / 2) * 0.8 / len(names)
        axes.bar(places, [np.median(row["rates"][name]) for row in rows], 0.8 / len(names), align="edge", label=name)
    axes.set_xticks(
        range(len(rows)),
        [" ".join(str(row[key]) for key in ("model", "hidden", "layers, or head", "sequences")) for row in rows],
    )
    axes.set(yscale="log", xlabel="model, hidden, layers or head, sequences a member", ylabel="member-tokens a second")
    axes.legend()


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
