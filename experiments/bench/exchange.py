"""Cost of a step for a host that exchanges losses, or gradient sums, by the number of hosts.

With losses, a host scores its share of the pairs, then draws the noise of all pairs again. With gradient sums, it draws
the noise of its share alone, and sends and receives one number for each weight. Noise is on weights. One process is
timed, as one of several hosts with equal shares.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bench.measure import Candidate, alternate, spread
from bench.ours import replica_of
from bench.report import Report, Row
from bench.settings import Exchange
from esjax.config.models import GruConfig
from esjax.config.settings import Config, EsConfig
from esjax.devices.mesh import local_mesh
from esjax.exchange.update_record import pack_sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(settings: Exchange) -> Report:
    """Measure every population with every number of hosts."""
    rows = [measure(population, hosts, settings) for population in settings.populations for hosts in settings.hosts]
    return Report(rows, partial(plot, rows))


def measure(population: int, hosts: int, settings: Exchange) -> Row:
    """Measure both ways."""
    model = GruConfig(hidden_size=settings.hidden)
    by_losses, by_sums = (
        replica_of(Config(es=EsConfig(population_size=population, exchange=exchange), model=model), local_mesh())
        for exchange in ("losses", "sums")
    )
    pairs = np.arange(population // 2, dtype=np.uint32)
    weights = np.random.default_rng(1).integers(-127, 128, len(pairs)).astype(np.int8)
    share = pairs[: max(by_losses.chunk_pairs, len(pairs) // hosts)]

    def losses() -> object:
        by_losses.losses(share)
        by_losses.apply(pairs, weights, 0.0)
        return by_losses.state

    def sums() -> object:
        by_sums.apply_sum(by_sums.sums(share), 0.0)
        return by_sums.state

    rates = alternate({"losses": Candidate(losses), "sums": Candidate(sums)}, settings.rounds)
    return {
        "population": population,
        "hosts": hosts,
        "losses ms": 1e3 / float(np.median(rates["losses"])),
        "sums ms": 1e3 / float(np.median(rates["sums"])),
        "losses ÷ sums": spread(rates["sums"] / rates["losses"]),
        "bytes up, losses": 8 * len(share),
        "bytes up, sums": len(pack_sums(by_sums.sums(share)[None])[1]),
        "bytes down, losses": len(pairs),
        "bytes down, sums": len(pack_sums(by_sums.sums(pairs)[None])[1]),
    }


def plot(rows: Sequence[Row], figure: "Figure") -> None:
    """Draw the ratio against hosts."""
    axes = figure.add_subplot()
    for population in dict.fromkeys(row["population"] for row in rows):
        mine = [row for row in rows if row["population"] == population]
        ratios = [row["losses ÷ sums"].median for row in mine]
        axes.plot([row["hosts"] for row in mine], ratios, "o-", label=f"population {population:,}")
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.set(xlabel="hosts", ylabel="time with losses ÷ with sums", xscale="log")
    axes.legend()
