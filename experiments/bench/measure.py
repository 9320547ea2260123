"""Times candidates for the same work in turns, so that whatever else the machine does meets all of them alike.

Every figure that is reported is a ratio of two rates of the same round; its spread is over the rounds.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax
import numpy as np

LEAST_SECONDS = 0.2
"""A candidate is called as often in a round as takes so long."""


FINALISTS = 3
"""Of several settings of a rival, those that are timed more than once."""


class Candidate(NamedTuple):
    """One way of doing some work.

    Attributes:
        call: Does it; what it returns is waited for.
        work: Amount that a call does: member-tokens, or floating-point operations.
    """

    call: Callable[[], Any]
    work: float = 1.0


class Spread(NamedTuple):
    """A figure over the rounds: its median, and its extremes."""

    median: float
    low: float
    high: float


def spread(values: np.ndarray) -> Spread:
    """Tell the median and the extremes."""
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


def alternate(candidates: Mapping[str, Candidate], rounds: int, least: float = LEAST_SECONDS) -> dict[str, np.ndarray]:
    """Time all candidates in turns; the first call of each, which may compile, does not count, nor does a second.

    Each round begins with another one, and every other round goes backwards: what one leaves behind, in caches or in
    the processor's clock, does not always meet the same next one.

    Args:
        candidates: By name.
        rounds: How often it is each one's turn, at least 1.
        least: Seconds that a turn takes at least. 0: a turn is a call, and the first one counts.

    Returns:
        Work a second of each candidate and round.
    """
    calls = dict.fromkeys(candidates, 1)
    for name, candidate in candidates.items() if least else ():
        jax.block_until_ready(candidate.call())
        calls[name] = max(1, math.ceil(least / _seconds(candidate, 1)))
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name in _order(list(candidates), number):
            candidate = candidates[name]
            rates[name].append(candidate.work * calls[name] / _seconds(candidate, calls[name]))
    return {name: np.asarray(values) for name, values in rates.items()}


def _order(names: list[str], number: int) -> list[str]:
    first = number % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if number % 2 else order


def fastest(candidates: Mapping[str, Candidate], seconds: float = 60.0, rounds: int = 3) -> str:
    """Name the fastest of a few candidates, so that a rival is measured at its best setting.

    One call of each finds the few that may be the fastest; of these the median over some rounds decides.

    Args:
        candidates: By name, the most promising first.
        seconds: After these no further ones are tried, but for a second one.
        rounds: Turns of those that may be the fastest.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    until, tried = time.perf_counter() + seconds, dict[str, float]()
    for name, candidate in candidates.items():
        if len(tried) >= 2 and time.perf_counter() > until:
            break
        jax.block_until_ready(candidate.call())  # compiles
        tried[name] = candidate.work / _seconds(candidate, 1)
    best = sorted(tried, key=lambda name: -tried[name])[:FINALISTS]
    rates = alternate({name: candidates[name] for name in best}, rounds, least=0.0)
    return max(best, key=lambda name: float(np.median(rates[name])))


def _seconds(candidate: Candidate, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(candidate.call())
    return max(time.perf_counter() - started, 1e-9)


@contextmanager
def elsewhere(
    make: Callable[..., Mapping[str, Candidate]],
    *arguments: Any,
    environment: Mapping[str, str],
    processes: int = 1,
) -> Iterator[dict[str, Candidate]]:
    """Make candidates in processes of their own, whose libraries start with other settings.

    Args:
        make: `(*arguments) -> candidates`, a function of a module; called in each process.
        arguments: What it is given.
        environment: Variables that are set when the processes start.
        processes: How many work at the same time; together they do so many times the work.
    """
    spawn = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    with ExitStack() as stack:
        lines = []
        os.environ.update(environment)
        try:
            for _ in range(processes):
                line, theirs = spawn.Pipe()
                process = spawn.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
                process.start()
                theirs.close()
                stack.callback(process.join)
                stack.callback(line.close)
                lines.append(line)
        finally:
            os.environ.clear()
            os.environ.update(before)
        work = [line.recv() for line in lines]

        def call(name: str) -> None:
            for line in lines:
                line.send(name)
            for line in lines:
                line.recv()

        yield {name: Candidate(lambda name=name: call(name), sum(of[name] for of in work)) for name in work[0]}


def _serve(line: Connection, make: Callable[..., Mapping[str, Candidate]], arguments: tuple[Any, ...]) -> None:
    candidates = make(*arguments)
    line.send({name: candidate.work for name, candidate in candidates.items()})
    while True:
        try:
            name = line.recv()
        except EOFError:
            return
        jax.block_until_ready(candidates[name].call())
        line.send(None)


def all_threads() -> dict[str, str]:
    """Environment for one CPU device with a thread a core: JAX as it comes."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_cpu_multi_thread_eigen=false", "")
    cache = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    return {"XLA_FLAGS": flags.strip(), "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": cache}


def one_thread() -> dict[str, str]:
    """Environment for numpy with one thread."""
    return dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
