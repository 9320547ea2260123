"""Times candidates for the same work in turns, so that other load on the machine affects all of them alike.

Every reported figure is a ratio of two rates of the same round; its spread is over the rounds.
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
"""Seconds of a turn: a candidate is called until they are over."""


FINALISTS = 3
"""Number of the fastest settings of a rival that are timed more than once."""


class Candidate(NamedTuple):
    """One way to do some work.

    Attributes:
        call: Does the work; the caller waits for the result.
        work: Amount of work of a call: member-tokens, or floating-point operations.
    """

    call: Callable[[], Any]
    work: float = 1.0


class Spread(NamedTuple):
    """A figure over the rounds: its median, and its extremes."""

    median: float
    low: float
    high: float


def spread(values: np.ndarray) -> Spread:
    """Return the median and the extremes."""
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


def alternate(candidates: Mapping[str, Candidate], rounds: int, least: float = LEAST_SECONDS) -> dict[str, np.ndarray]:
    """Time all candidates in turns. The first two calls of each do not count, since they may compile.

    Each round starts with a different candidate, and every other round runs backwards, so that effects of one candidate
    on the next, through caches or the processor's clock, even out.

    Args:
        candidates: Candidates by name.
        rounds: Number of turns of each, at least 1.
        least: Least seconds of a turn. 0: a turn is one call, and the first one counts.

    Returns:
        Work per second of each candidate and round.
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
    """Return the name of the fastest of several candidates, so that a rival is measured at its best setting.

    One call of each selects a few fast ones; the median over some rounds decides between these.

    Args:
        candidates: Candidates by name, the most promising first.
        seconds: After this time no further candidates are tried; at least two are.
        rounds: Turns of the few fast ones.
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
    """Make candidates that run in separate processes, whose libraries start with other settings.

    Args:
        make: `(*arguments) -> candidates`, a module-level function; called in each process.
        arguments: Its arguments.
        environment: Environment variables of the processes.
        processes: Number of processes that work at the same time; the work is multiplied by it.
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
    """Environment for one CPU device with one thread per core, the default of JAX."""
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_cpu_multi_thread_eigen=false", "")
    cache = jax.config.jax_compilation_cache_dir or ""  # type: ignore[attr-defined]
    return {"XLA_FLAGS": flags.strip(), "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": cache}


def one_thread() -> dict[str, str]:
    """Environment for numpy with one thread."""
    return dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")
