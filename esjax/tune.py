"""Finds sigma and the discount for a run's weights as they are, by the cosine with the exact gradient."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from esjax.checkpoint import restore_newest
from esjax.config import Config, replace
from esjax.devices import local_mesh
from esjax.errors import EsjaxError
from esjax.gradient_cosine import gradient_cosines
from esjax.loading import load_run_corpus
from esjax.models.model import ModelFactory
from esjax.own import Own
from esjax.replica import Replica
from esjax.run_folder import RunFolder, a_or_an

SIGMAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Sizes of the noise that are tried, unless others are named."""

DISCOUNTS = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
"""Discounts that are tried, unless others are named."""

REPEATS = 4
"""Steps over which a cosine is averaged."""


class Tried(NamedTuple):
    """What a setting came to.

    Attributes:
        sigma: Size of the noise.
        discount: Discount, or None where there is none.
        cosine: Mean cosine of the estimate with the exact gradient.
        leaves: The same of each leaf.
        best: Whether it is the best so far.
    """

    sigma: float
    discount: float | None
    cosine: float
    leaves: dict[str, float]
    best: bool


def tune(
    path: str | Path,
    *,
    sigmas: Sequence[float] = SIGMAS,
    discounts: Sequence[float] = DISCOUNTS,
    space: str | None = None,
    repeats: int = REPEATS,
    model: ModelFactory | None = None,
    tell: Callable[[str], None] = print,
) -> Iterator[Tried]:
    """Try sizes of noise, then, in space activation, discounts with the best of them.

    Args:
        path: Run folder; its newest weights are used, and nothing is trained.
        sigmas: Sizes of the noise.
        discounts: Discounts.
        space: Another space than the run's.
        repeats: Steps over which a cosine is averaged.
        model: The run's own model, if it was trained with one.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        EsjaxError: It is no run folder, its text has changed, it has a loss or an optimizer of its own, or no
            checkpoint is whole.
    """
    folder = RunFolder(Path(path))
    own = Own(model=model)
    for kind in ("loss", "reward", "optimizer"):
        if kind in folder.own:
            raise EsjaxError(
                f"{str(path)!r} was trained with {a_or_an(kind)} of its own, {folder.own[kind]}, and tune knows only "
                "cross entropy and the optimizers of the settings; compare settings with esjax.sweep"
            )
    folder.check_own(own.names(), "esjax.tune.tune")
    corpus, config = load_run_corpus(folder), folder.config
    if space is not None:
        config = _with(config, space=space)
    size = corpus.vocabulary.size
    built = own.build(config.model, size)
    replica = Replica(folder.config, built, None, local_mesh())
    params = jax.device_get(restore_newest(folder.checkpoints, replica.state, tell).state.params)
    stream = corpus.stream()

    def attempt(best: Tried | None, **changes: Any) -> Tried:
        chosen = _with(config, **changes)
        found = [*gradient_cosines(chosen, built, params, stream, local_mesh(), repeats)]
        cosine = float(np.mean([compared.cosine for compared in found]))
        leaves = {name: float(np.mean([compared.leaves[name] for compared in found])) for name in found[0].leaves}
        discount = chosen.es.discount if chosen.es.space == "activation" else None
        return Tried(chosen.es.sigma, discount, cosine, leaves, best is None or cosine > best.cosine)

    best: Tried | None = None
    for sigma in sigmas:
        tried = attempt(best, sigma=sigma)
        best = tried if tried.best else best
        yield tried
    if best is None or best.discount is None:
        return
    tried_already = best.discount
    for discount in discounts:
        if discount != tried_already:
            tried = attempt(best, sigma=best.sigma, discount=discount)
            best = tried if tried.best else best
            yield tried


def _with(config: Config, **changes: Any) -> Config:
    try:
        return replace(config, es=replace(config.es, **changes))
    except EsjaxError as error:
        asked = ", ".join(f"es.{name} {value}" for name, value in changes.items())
        raise EsjaxError(f"{asked} does not go with the run's settings: {error}") from error
