"""Cost of watching: the rate of one run in watched phases and in unwatched ones.

One run trains throughout. In watched phases each step is written to a run folder, shown in the progress line of a
terminal, served to Prometheus (and read there every second), and passed to the trackers. Neighbouring phases are
compared, so that other load on the machine affects both alike; many short phases make the median certain. As a control,
unwatched phases are compared with each other in the same way. The processor time per member-token is compared as well:
the additional time of watched phases is given as a share of all processors of the machine. (Watching is work per
second, not per step: a ratio of times would depend on the speed of the run.)
"""

import math
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from bench.measure import Spread
from bench.report import Report
from bench.settings import Watching
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.runs.folder import RunFolder
from esjax.runs.step_info import StepInfo
from esjax.training.run import train
from esjax.watch.metrics_server import MetricsServer
from esjax.watch.progress import Progress
from esjax.watch.trackers import JsonLines, find_trackers, tracked_run
from esjax.watch.tracking import Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = {"watched": True, "alone": False}
"""Phases that are compared with unwatched ones, and whether they are watched."""

CERTAIN = 1.96
"""95% of a normal distribution lie within this number of standard deviations of its mean."""

SKIPPED = 2
"""Steps at the start of a phase that are not counted: they may contain remaining work of the phase before."""


class Phase(NamedTuple):
    """Measurements of a phase.

    Attributes:
        rate: Member-tokens a second.
        processor: Processor time of this process per member-token, in nanoseconds.
        steps: Number of steps.
    """

    rate: float
    processor: float
    steps: int


def count(steps: Iterator[StepInfo], seconds: float, watch: Watch | None, progress: Progress | None) -> Phase:
    """Train for some seconds, with or without watching each step."""
    until = time.perf_counter() + seconds
    marks: list[tuple[float, float, int]] = []
    while time.perf_counter() < until or len(marks) < SKIPPED + 2:
        info = next(steps)
        if watch is not None and progress is not None:
            watch.log(info)
            progress.update(info)
        marks.append((time.perf_counter(), time.process_time(), info.member_tokens))
    (at, used, tokens), (end, used_at_end, tokens_at_end) = marks[SKIPPED - 1], marks[-1]
    done = tokens_at_end - tokens
    return Phase(done / (end - at), 1e9 * (used_at_end - used) / done, len(marks) - SKIPPED)


def read_metrics(server: MetricsServer, over: threading.Event) -> None:
    """Read the metrics as Prometheus does, but more often."""
    while not over.wait(1.0):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read()


def run(settings: Watching) -> Report:
    """Take turns, and compare."""
    model = GruConfig(hidden_size=settings.hidden, head_size=2 * settings.hidden)
    es, data = EsConfig(population_size=settings.population), DataConfig(text=settings.text)
    config = Config(model=model, es=es, data=data, evaluate_time=1e9)
    trainer = train(config)
    server = MetricsServer(0)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = RunFolder.create(Path(place) / "run", config, trainer.corpus.vocabulary, trainer.corpus.digest)
        watch = stack.enter_context(Watch([*find_trackers(settings.track), server], print))
        watch.start(tracked_run(folder, trainer.baselines, 0), JsonLines(folder, print))
        terminal = Console(
            file=stack.enter_context((Path(place) / "terminal").open("w")), force_terminal=True, width=150
        )
        steps = iter(trainer)
        with Progress(terminal, trainer.baselines, trainer.limits) as progress:
            count(steps, settings.warm_up, watch, progress)  # compiles, starts the trackers and imports what they need
        rates: dict[str, list[float]] = {name: [] for name in COMPARED}
        shares: dict[str, list[float]] = {name: [] for name in COMPARED}

        def take(watched: bool) -> Phase:
            if not watched:
                return count(steps, settings.phase, None, None)
            over = threading.Event()
            reader = threading.Thread(target=read_metrics, args=(server, over))
            reader.start()
            with Progress(terminal, trainer.baselines, trainer.limits) as progress:
                phase = count(steps, settings.phase, watch, progress)
            over.set()
            reader.join()
            return phase

        for number in range(max(int(settings.seconds / settings.phase / 4), 1)):
            for name, watched in COMPARED.items():
                turns = (True, False) if number % 2 else (False, True)  # each comes first as often
                phases = {first: take(first and watched) for first in turns}
                rates[name].append(phases[True].rate / phases[False].rate)
                more = phases[True].processor - phases[False].processor
                shares[name].append(1e-9 * more * phases[True].rate / (os.cpu_count() or 1))
        steps.close()
    rows = [
        {
            "compared": name,
            "trackers": ", ".join(settings.track),
            "pairs of phases": len(rates[name]),
            "rate ÷ alone": median_of(rates[name]),
            "share of the processors": median_of(shares[name]),
        }
        for name in COMPARED
    ]
    return Report(rows, partial(plot, rates, shares), ["Medians, and where they are with a certainty of 95%."])


def median_of(values: Sequence[float]) -> Spread:
    """Return the median and its 95% confidence interval.

    The number of values below the true median is binomial, so the interval ends 1.96 √n / 2 values before and after the
    middle one of n sorted values.
    """
    ordered = sorted(values)
    rank = max(1, math.floor((len(ordered) - CERTAIN * math.sqrt(len(ordered))) / 2))
    return Spread(statistics.median(ordered), ordered[rank - 1], ordered[-rank])


def plot(rates: Mapping[str, Sequence[float]], shares: Mapping[str, Sequence[float]], figure: "Figure") -> None:
    """Draw the ratios of all pairs of phases."""
    above, below = figure.subplots(2, sharex=True)
    for name in rates:
        above.plot(rates[name], "o", label=name)
        below.plot(shares[name], "o")
    above.axhline(1, color="gray", linewidth=0.5)
    above.set(ylabel="rate ÷ alone")
    above.legend()
    below.axhline(0, color="gray", linewidth=0.5)
    below.set(xlabel="pair of phases", ylabel="share of the processors")
