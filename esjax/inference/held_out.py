"""What is measured on the held-out documents while a run goes on: nats per token, or a loss of one's own."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key
from numpy import ndarray

from esjax.config.settings import Config
from esjax.core.seeds import loss_key, stream_seed
from esjax.data.packing import draw_windows, pack_stream
from esjax.flags import default_flags
from esjax.inference.language_model import LanguageModel
from esjax.models.member import Loss, Member, sequence_keys
from esjax.models.model import Params
from esjax.replica.streams import HELD_OUT

SEQUENCES = 1024
"""Windows over which a loss of one's own is averaged."""

Measure = Callable[[Params], float]
"""`(params) -> number`, lower is better; always of the same documents."""


@default_flags()
def make_measure(
    language_model: LanguageModel, config: Config, documents: Sequence[ndarray], objective: Loss | None
) -> Measure | None:
    """Make the function that a run is followed by.

    Args:
        language_model: The model's compiled functions.
        config: Settings of the run.
        documents: Encoded held-out documents; there may be none.
        objective: What is minimised in place of cross entropy. None: nothing.

    Returns:
        Mean nats per token over whole documents; or the mean of the objective over windows like those of training,
        drawn from these documents. None where there is nothing to measure: no document, or less text than a window.
    """
    if not documents:
        return None
    if objective is None:
        return partial(_nats, language_model, language_model.lanes(documents))
    stream, length = pack_stream(documents), config.data.burn_in + config.data.window
    if len(stream) < length:
        return None
    seed = stream_seed(config.seed, HELD_OUT)
    windows = draw_windows(jnp.asarray(stream), seed[None], SEQUENCES, length)[0]

    @jax.jit
    def mean(
        params: Params, windows: Int[Array, "sequences length"], keys: Key[Array, " sequences"]
    ) -> Float[Array, ""]:
        return jnp.mean(jax.vmap(partial(objective, Member(language_model.model, params)))(windows, keys))

    return partial(_number, mean, windows, sequence_keys(loss_key(seed), SEQUENCES))


def _nats(language_model: LanguageModel, lanes: tuple[Array, Array], params: Params) -> float:
    return language_model.loss(params, lanes)


@default_flags()
def _number(mean: Callable[..., Array], windows: Array, keys: Array, params: Params) -> float:
    return float(mean(params, windows, keys))
