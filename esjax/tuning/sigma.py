"""Chooses sigma and the discount for the current weights of a run, by the cosine with the exact gradient."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from esjax.config.settings import Config, replace
from esjax.devices.mesh import local_mesh
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import load_custom_model, load_run_corpus, read_weights
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.runs.folder import RunFolder
from esjax.tuning.gradient_cosine import gradient_cosines
from esjax.tuning.intervals import front_runners, half_width

SIGMAS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Default values of sigma to try; a tenth of them for credit by gates."""

DISCOUNTS = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)
"""Default discounts to try."""

REPEATS = 8
"""Steps over which a cosine is averaged."""


class Tried(NamedTuple):
    """Cosines of one setting of the estimator.

    Attributes:
        sigma: Size of the perturbations, in units of each leaf; with noise on activations, as it is.
        discount: Discount; None for noise on weights, and for credit by gates.
        cosines: Cosine of the estimate with the exact gradient in each repeat. A repeat has the same windows and the
            same signs of the noise for all settings.
        leaves: Mean cosine of each leaf, by path.
        current: Whether these are the settings of the run.
    """

    sigma: float
    discount: float | None
    cosines: tuple[float, ...]
    leaves: dict[str, float]
    current: bool

    @property
    def cosine(self) -> float:
        """Mean over the repeats."""
        return float(np.mean(self.cosines))

    @property
    def interval(self) -> float:
        """Half of the 95% interval of the mean; infinity for a single repeat."""
        return half_width(self.cosines)


def not_told_apart(tried: Sequence[Tried]) -> list[Tried]:
    """Return the setting with the highest mean cosine, and those that do not differ from it significantly.

    Args:
        tried: Results of one call of `tune`.

    Returns:
        First the highest mean; then the settings for which the 95% interval of the difference of cosines, paired by
        repeat (Student's t), includes 0.
    """
    return [tried[i] for i in front_runners([one.cosines for one in tried])]


def tune(
    path: str | Path,
    *,
    sigmas: Sequence[float] | None = None,
    discounts: Sequence[float] = DISCOUNTS,
    space: str | None = None,
    repeats: int = REPEATS,
    text: str | None = None,
    model: ModelFactory | str | None = None,
    tell: Callable[[str], None] = print,
) -> Iterator[Tried]:
    """Measure the cosine for each sigma; with credit by discount, then for each discount at one sigma.

    That sigma is the run's, if it does not differ significantly from the best, see `not_told_apart`; otherwise the
    best. Nothing is trained, and the run is not changed.

    Args:
        path: Run folder; its newest weights are used.
        sigmas: Values of sigma to try. None: `SIGMAS`, or a tenth of each for credit by gates.
        discounts: Discounts to try.
        space: Value of `es.space` in place of the run's.
        repeats: Steps over which a cosine is averaged, at least 1; differences need at least 2.
        text: New place of the run's text, as in the setting data.text. None: the place in the settings.
        model: The custom model of the run, see `esjax.load`.
        tell: Called with a line for each damaged checkpoint, and if the code of the model has changed.

    Raises:
        EsjaxError: The path is not a run folder, its text has changed, the run has a custom loss or reward, or no
            checkpoint is whole.
    """
    if repeats < 1:
        raise EsjaxError(f"repeats must be at least 1, got {repeats}")
    folder = RunFolder(given_path(path))
    for kind in ("loss", "reward"):
        if kind in folder.custom:
            raise EsjaxError(
                f"{str(path)!r} was trained with a custom {kind}, {folder.custom[kind]}, and tune supports only cross "
                "entropy; compare settings with esjax.sweep"
            )
    custom = load_custom_model(folder, model, "esjax.tuning.sigma.tune", tell)
    corpus, config = load_run_corpus(folder, text), folder.config
    if space is not None:
        config = _with(config, space=space)
    size = corpus.vocabulary.size
    built = custom.build(config.model, size)
    params = jax.device_get(read_weights(folder, built, tell).params)
    stream = corpus.stream()

    def attempt(**changes: Any) -> Tried:
        chosen = _with(config, **changes)
        found = [*gradient_cosines(chosen, built, params, stream, local_mesh(), repeats)]
        cosines = tuple(compared.cosine for compared in found)
        leaves = {name: float(np.mean([compared.leaves[name] for compared in found])) for name in found[0].leaves}
        discount = chosen.es.discount if chosen.es.space == "activation" and not chosen.es.is_gated else None
        current = replace(folder.config.es, sigma=folder.config.es.deviation)
        return Tried(chosen.es.deviation, discount, cosines, leaves, chosen.es == current)

    if sigmas is None:
        sigmas = [sigma / 10 for sigma in SIGMAS] if config.es.is_gated else SIGMAS
    tried = []
    for sigma in sigmas:
        tried.append(attempt(sigma=sigma))
        yield tried[-1]
    ahead = not_told_apart(tried)
    if not ahead or ahead[0].discount is None:
        return
    base = next((one for one in ahead if one.current), ahead[0])
    for discount in discounts:
        if discount != base.discount:
            yield attempt(sigma=base.sigma, discount=discount)


def _with(config: Config, **changes: Any) -> Config:
    try:
        return replace(config, es=replace(config.es, **changes))
    except EsjaxError as error:
        asked = ", ".join(f"es.{name} {value}" for name, value in changes.items())
        raise EsjaxError(f"{asked} does not go with the run's settings: {error}") from error
