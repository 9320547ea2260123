"""How a step's rate goes with devices, population, window and model size; and the memory that a population takes."""

import resource
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.ours import first_devices, replica_of, step
from bench.report import Report, Row, told
from bench.settings import Scaling
from esjax.config.settings import Config, DataConfig, EsConfig, GruConfig, replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(settings: Scaling) -> Report:
    """Measure each axis by itself, its values in turns."""
    rows = [told(row) for name, values in axes(settings).items() for row in measure(name, values, settings.rounds)]
    notes = ["Memory is the most that the process, or an accelerator, has held so far; rates are against the first."]
    return Report(rows, partial(plot, rows), notes)


def axes(settings: Scaling) -> dict[str, dict[int, tuple[Config, int]]]:
    """List settings and devices by the axis and the value on it.

    All exchange losses: left to itself a large population would exchange sums, and a curve would join two estimators.
    """
    es = EsConfig(population_size=settings.population, exchange="losses")
    base = Config(es=es)
    everywhere = len(jax.local_devices())
    counts = [count for count in (2**power for power in range(10)) if count < everywhere] + [everywhere]
    return {
        "devices": {count: (base, count) for count in counts},
        "population": {
            size: (replace(base, es=replace(es, population_size=size)), everywhere) for size in settings.populations
        },
        "window": {length: (replace(base, data=DataConfig(window=length)), everywhere) for length in settings.windows},
        "hidden": {
            width: (replace(base, model=GruConfig(hidden_size=width, head_size=2 * width)), everywhere)
            for width in settings.widths
        },
    }


def measure(axis: str, values: dict[int, tuple[Config, int]], rounds: int) -> Iterator[Row]:
    """Measure steps with each value of one setting."""
    candidates: dict[str, Candidate] = {}
    memory: dict[str, float] = {}
    for value, (config, devices) in values.items():
        candidate = step(config, replica_of(config, first_devices(devices)))
        try:
            jax.block_until_ready(candidate.call())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield {"axis": axis, "value": value, "step M/s": "out of memory"}
            continue
        candidates[str(value)], memory[str(value)] = candidate, _peak_memory()
    if not candidates:  # nothing had room, or nothing was asked for
        return
    rates = alternate(candidates, rounds)
    first = next(iter(rates.values()))
    for name, found in rates.items():
        yield {
            "axis": axis,
            "value": int(name),
            "step M/s": float(np.median(found)) / 1e6,
            "÷ first": spread(found / first),
            "memory MB": round(memory[name]),
        }


def _peak_memory() -> float:
    """Tell the most megabytes that were held so far: by the first device, or, on CPUs, by the process."""
    stats: dict[str, Any] | None = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e6
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most / 1e3


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw rates against each setting, and memory against the population."""
    rows = [row for row in rows if "÷ first" in row]
    names = list(dict.fromkeys(row["axis"] for row in rows))
    panels = figure.subplots(1, len(names))
    for panel, name in zip(panels, names, strict=True):
        mine = [row for row in rows if row["axis"] == name]
        values = [row["value"] for row in mine]
        rates = [row["step M/s"] for row in mine]
        panel.plot(values, rates, "o-")
        panel.set(xscale="log", xlabel=name, ylim=(0, 1.1 * max(rates)))
        panel.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        panel.minorticks_off()
        if name == "population":
            memory = panel.twinx()
            memory.plot(values, [row["memory MB"] for row in mine], "s--", color="C1")
            memory.set(ylabel="MB", ylim=(0, None))
    panels[0].set_ylabel("millions of member-tokens a second")
