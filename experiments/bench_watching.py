"""What watching costs: the rate of one run while it is shown to everything there is, and while it is shown to nothing.

    python experiments/bench_watching.py --seconds 120 --track tensorboard wandb trackio

One run goes on all the time. In every other phase each step is written to a run folder, shown in a terminal's line of
progress, served to Prometheus (and read there every second), and handed to the trackers. Neighbouring phases are
compared, so that what else the machine does meets both alike. Since a busy machine makes rates uncertain all the same,
this process's processor time per member-token is compared as well: what of it is more while the run is watched comes to
a share of the machine's processors (watching is work a second, not work a step, so a slowed run says too much of it).
Prints a line of JSON for each pair of phases, and the medians with the middle half of all pairs at the end.
"""

import json
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

import esjax

esjax.prepare_devices()

from rich.console import Console  # noqa: E402

from esjax.config import Config, GruConfig  # noqa: E402
from esjax.metrics_server import MetricsServer  # noqa: E402
from esjax.progress import Progress  # noqa: E402
from esjax.run_folder import RunFolder  # noqa: E402
from esjax.step_info import StepInfo  # noqa: E402
from esjax.trackers import JsonLines, find_trackers, tracked_run  # noqa: E402
from esjax.tracking import Watch  # noqa: E402

SKIPPED = 2
"""Steps at the start of a phase that are not counted: what the phase before left to do falls into them."""


@dataclass(frozen=True)
class Bench:
    """Compare a run that is watched with one that is not."""

    track: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ("tensorboard",)
    """Trackers: tensorboard, wandb, trackio."""

    seconds: float = 120.0
    """Seconds of all phases."""

    phase: float = 3.0
    """Seconds of a phase."""

    hidden: int = 32
    """Width of the model."""

    population: int = 4096
    """Members: the smaller, the more steps there are to tell of."""


class Phase(NamedTuple):
    """What was counted in a phase.

    Attributes:
        rate: Member-tokens a second.
        processor: Nanoseconds of this process's processors per member-token.
        steps: Number of steps.
    """

    rate: float
    processor: float
    steps: int


def count(steps: Iterator[StepInfo], seconds: float, watch: Watch | None, progress: Progress | None) -> Phase:
    """Train for a while, and tell of each step, or not."""
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
    """Do as Prometheus does, but more often."""
    while not over.wait(1.0):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read()


def main(bench: Bench) -> None:
    """Take turns, and compare."""
    model = GruConfig(hidden_size=bench.hidden, head_size=2 * bench.hidden)
    config = Config(model=model, es=esjax.EsConfig(population_size=bench.population), evaluate_time=1e9)
    run = esjax.train(config)
    server = MetricsServer(0)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = RunFolder.create(Path(place) / "run", config, run.corpus.vocabulary, run.corpus.digest)
        watch = stack.enter_context(Watch([*find_trackers(bench.track), server], print))
        watch.start(tracked_run(folder, run.baselines, 0), JsonLines(folder))
        terminal = Console(
            file=stack.enter_context((Path(place) / "terminal").open("w")), force_terminal=True, width=150
        )
        steps = iter(run)
        with Progress(terminal, run.baselines, run.limits) as progress:
            count(steps, 10.0, watch, progress)  # compiled, all trackers begun, all that they need imported
        rates, shares = list[float](), list[float]()
        for number in range(max(int(bench.seconds / bench.phase / 2), 1)):
            phases: dict[bool, Phase] = {}
            for watched in (False, True) if number % 2 else (True, False):
                if watched:
                    over = threading.Event()
                    reader = threading.Thread(target=read_metrics, args=(server, over))
                    reader.start()
                    with Progress(terminal, run.baselines, run.limits) as progress:
                        phases[True] = count(steps, bench.phase, watch, progress)
                    over.set()
                    reader.join()
                else:
                    phases[False] = count(steps, bench.phase, None, None)
            rates.append(phases[True].rate / phases[False].rate)
            more = phases[True].processor - phases[False].processor
            shares.append(1e-9 * more * phases[True].rate / (os.cpu_count() or 1))
            line = {"watched": phases[True]._asdict(), "alone": phases[False]._asdict()}
            print(json.dumps({**line, "rate_ratio": rates[-1], "processor_share": shares[-1]}), flush=True)
        steps.close()  # type: ignore[attr-defined]
    print(json.dumps({"track": bench.track, "rate_ratio": summary(rates), "processor_share": summary(shares)}))


def summary(ratios: list[float]) -> dict[str, float]:
    """Median, and the middle half."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "low": low, "high": high, "pairs": len(ratios)}


if __name__ == "__main__":
    main(tyro.cli(Bench))
