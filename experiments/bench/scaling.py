"""Rate of a step by devices, population, window and model size; and memory by population."""

import resource
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.ours import first_devices, replica_of, step
from bench.report import Report, Row, print_row
from bench.settings import Scaling
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(settings: Scaling) -> Report:
    """Measure one axis after another, the values of each in turns."""
    rows = [print_row(row) for name, values in axes(settings).items() for row in measure(name, values, settings.rounds)]
    notes = ["Memory is the peak so far of the process, or of an accelerator; rates are relative to the first."]
    return Report(rows, partial(plot, rows), notes)


def axes(settings: Scaling) -> dict[str, dict[int, tuple[Config, int]]]:
    """List settings and devices by axis and value.

    All exchange losses. With `auto`, large populations would exchange gradient sums, and a curve would mix the two.
    """
    es = EsConfig(population_size=settings.population, exchange="losses")
    base = Config(es=es, model=GruConfig())
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
    if not candidates:  # nothing fitted into memory, or no values were given
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
    """Return the peak memory so far in megabytes: of the first device, or on CPUs of the process."""
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
