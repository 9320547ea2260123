"""The held-out loss during training: nats per token, or a custom loss or reward."""

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
"""Windows over which a custom loss is averaged."""

Measure = Callable[[Params], float]
"""`(params) -> number`, lower is better, always on the same documents."""


@default_flags()
def make_measure(
    language_model: LanguageModel, config: Config, documents: Sequence[ndarray], objective: Loss | None
) -> Measure | None:
    """Make the function that measures the held-out loss.

    Args:
        language_model: The model's compiled functions.
        config: Settings of the run.
        documents: Encoded held-out documents; may be empty.
        objective: Custom loss that replaces cross entropy, or None.

    Returns:
        A function that returns the mean nats per token over whole documents; with an objective, its mean over 1024
        windows of these documents, as long as those of training. None if there is no document or less text than a
        window.
    """
    if not documents:
        return None
    if objective is None:
        return partial(_nats, language_model, language_model.lanes(documents))
    stream, length = pack_stream(documents), config.data.window_length
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
