"""The estimator that the settings choose: what is perturbed, and what hosts exchange."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from esjax.config.settings import MOST_SUMMED_PAIRS, Config
from esjax.core.leaves import is_below
from esjax.core.noise import Noise, Totals
from esjax.core.population import evaluate
from esjax.core.shaping import LIMIT, STEPS_PER_DEVIATION
from esjax.errors import EsjaxError
from esjax.exchange.gradient_sums import ANYTHING, HEADROOM, LARGEST_CROSS_ENTROPY, TAIL, Bounds, Section, steps_per_nat
from esjax.models.member import Loss, PairLoss, cross_entropy, over_sequences
from esjax.models.model import Model, Params
from esjax.replica.estimators import discount, gates
from esjax.replica.estimators.carried_state import LARGEST_STATE, first_states
from esjax.replica.estimators.carried_state import STEPS as STATE_STEPS
from esjax.replica.estimators.feedback import shapes_of
from esjax.replica.estimators.frozen import trained_of
from esjax.replica.estimators.partial_sums import SumChunk, make_sum_of_activations, make_sum_of_weights
from esjax.replica.estimators.taps import LOGITS, find_taps


class LossEstimator(NamedTuple):
    """Noise on weights, where hosts exchange losses.

    Attributes:
        noise: How members differ.
        loss: `(params, windows, key) -> loss` of a member on the windows of its pair; unused for a reward in Python.
        zeros: Totals of 0, see `Layout.zeros`.
        pair_bytes: Bytes that the noise of a pair, its added-up weights and its logits take while it is evaluated.
        noise_bytes: Bytes that the noise of a pair takes while it is summed.
        embeddings: Paths of the parameters whose rows a pair reads by token, see `Model.embeddings`.
        is_output_exact: Whether the output layer has no noise and gets its exact gradient.
        bounds: What honest losses can be.
        logit_bytes: Bytes of the logits of a pair; 0 for a model that is scored token by token.
    """

    noise: Noise
    loss: PairLoss
    zeros: Totals
    pair_bytes: int
    noise_bytes: int
    embeddings: tuple[str, ...]
    is_output_exact: bool
    bounds: Bounds
    logit_bytes: int = 0

    @property
    def vector_length(self) -> int:
        """Length of a gradient sum: 0, since there is none."""
        return 0

    @property
    def scale(self) -> float:
        """Scale of a gradient sum: 0, since there is none."""
        return 0.0

    @property
    def most_pairs(self) -> int:
        """Most pairs whose noise is summed exactly at a time."""
        return self.noise.exact_pairs


class SumEstimator(NamedTuple):
    """Noise on weights or on activations, where hosts exchange gradient sums.

    Attributes:
        sum_chunk: `(state, chunk) -> vector` of integers, see `esjax.replica.estimators.partial_sums`.
        gradient: `(totals, scale, params) -> gradient`.
        zeros: Totals of 0, an array for each perturbed leaf.
        vector_length: Length of the vectors.
        scale: The estimate is `scale` times the sum of all vectors, over the number of pairs that are not void.
        most_pairs: Most pairs of a chunk.
        pair_bytes: Bytes that the noise of a pair, its added-up weights and its logits take while it is evaluated.
        bounds: What honest sums can be.
        feedback: Shapes of the matrices of learned feedback; none without it.
        logit_bytes: Bytes of the logits of a pair; 0 for a model that is scored token by token.
    """

    sum_chunk: SumChunk
    gradient: Callable[[Totals, Float[Array, ""], Params], Params]
    zeros: Totals
    vector_length: int
    scale: float
    most_pairs: int
    pair_bytes: int
    bounds: Bounds
    feedback: Sequence[tuple[int, int]] = ()
    logit_bytes: int = 0


CPU_LANES, ACCELERATOR_LANES = 2**9, 2**16
"""Noisy copies that a device evaluates at a time with credit by gates: few enough for a core's cache."""

CROSS_ENTROPY = Bounds(lowest_loss=-1.0, highest_loss=LARGEST_CROSS_ENTROPY)
"""Cross entropy is not below 0 but for rounding, and any model that learns stays far below the upper bound."""

Estimator = LossEstimator | SumEstimator
"""How a run estimates the gradient."""


def make_estimator(
    config: Config, model: Model, params: Params, units: PyTree, loss: Loss | None, packed: bool = False
) -> Estimator:
    """Make the estimator that the settings choose.

    Args:
        config: Settings.
        model: The architecture.
        params: Its parameters, for their shapes.
        units: Unit of each leaf.
        loss: Loss of one member on one window, the burn-in included. None: cross entropy.
        packed: Whether ±1 stay packed as bits until they are used, see `esjax.core.signs`; for accelerators.

    Raises:
        EsjaxError: The model or the loss cannot be used with noise on activations, or `es.chunk_pairs` is too large
            for exact sums.
    """
    estimator = _make(config, model, params, units, loss, packed)
    if isinstance(estimator, SumEstimator) and (config.es.chunk_pairs or 0) > estimator.most_pairs:
        raise EsjaxError(
            f"es.chunk_pairs must be at most {estimator.most_pairs}, so that sums are exact, got "
            f"{config.es.chunk_pairs}; lower it, or leave it out"
        )
    return estimator


def _make(config: Config, model: Model, params: Params, units: PyTree, loss: Loss | None, packed: bool) -> Estimator:
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    es, data = config.es, config.data
    if es.space == "activation":
        return _on_activations(config, model, params, units, loss, packed)
    is_custom = loss is not None or config.writes
    vector_length = size + TAIL if es.sums(size) else 0
    if (is_custom or es.frozen) and es.exchange == "auto":
        # Gradient sums have room for losses of the size of nats, where a custom loss may be larger, and for all leaves.
        vector_length = 0
    is_output_exact = _is_output_exact(config, model, is_custom, vector_length)
    is_trained = trained_of(es.frozen, params)
    noise = Noise(
        sigma=es.deviation,
        rank=es.rank if es.space == "low_rank" else 0,
        gaussian=es.noise == "gaussian",
        split=es.pairing == "split",
        units=units,
        where=(lambda path, leaf: is_trained(path) and not (is_output_exact and is_below(path, model.output_layer)))
        if is_output_exact or es.frozen
        else None,
        stacked=stacked_of(model),
        packed=packed,
    )
    layout = noise.lay_out(params)
    pair_loss = over_sequences(model, loss or cross_entropy(data.burn_in))
    evaluate_chunk = evaluate(pair_loss, noise, chunk_pairs=MOST_SUMMED_PAIRS, precision=es.precision)
    if loss is not None:  # refuse a loss that cannot be used now, not in the first step
        windows = np.zeros((2, data.batch_size, data.burn_in + data.window), np.int32)
        try:
            jax.eval_shape(evaluate_chunk, params, np.zeros((2, 2), np.uint32), windows)
        except EsjaxError as error:
            raise EsjaxError(str(error)) from None  # leaves out the many frames of JAX
    noise_bytes = 4 * layout.numbers
    added_up = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)) if layout.adds_up else 0
    logit_bytes = _logit_bytes(config, model, params)
    pair_bytes = noise_bytes + added_up + logit_bytes
    embeddings = () if is_custom or data.block_tokens is not None else model.embeddings
    bounds = ANYTHING if is_custom else CROSS_ENTROPY
    if not vector_length:
        return LossEstimator(
            noise, pair_loss, layout.zeros(), pair_bytes, noise_bytes, embeddings, is_output_exact, bounds, logit_bytes
        )
    is_sign = es.shaping == "sign"
    # An entry of a matrix with low-rank noise is a sum of `rank` products of ±1.
    section = Section("gradient", size, max(noise.rank, 1) * (1 if is_sign else LIMIT))
    bounds = bounds._replace(sections=(section,), room=es.pairs_with_room)
    sum_chunk = make_sum_of_weights(
        noise, evaluate_chunk, "sign" if is_sign else "zscore", es.pairs_with_room, embeddings
    )
    scale = 1.0 if is_sign else 1 / STEPS_PER_DEVIATION
    most_pairs = min(noise.exact_pairs, MOST_SUMMED_PAIRS)
    return SumEstimator(
        sum_chunk,
        layout.gradient,
        layout.zeros(),
        vector_length,
        scale,
        most_pairs,
        pair_bytes,
        bounds,
        logit_bytes=logit_bytes,
    )


def _logit_bytes(config: Config, model: Model, params: Params) -> int:
    """Return the bytes of the logits of a pair's windows; 0 for a model that is scored token by token."""
    if config.writes or (model.logits is None and model.states is None):
        return 0
    one = jax.eval_shape(lambda params: model.predict(params, model.initial_state(params)), params)
    return 2 * config.data.batch_size * config.data.window_length * 4 * one.size


def stacked_of(model: Model) -> Callable[[str, Any], bool]:
    """Return the function for `Noise.stacked`, see `Model.stacked`."""
    return lambda path, _: any(is_below(path, prefix) for prefix in model.stacked)


def _is_output_exact(config: Config, model: Model, is_custom: bool, vector_length: int) -> bool:
    """Return whether the output layer gets its exact gradient, with noise on weights.

    Raises:
        EsjaxError: The settings ask for it and it is impossible.
    """
    if config.es.output_layer == "noise":
        return False
    reason = ""
    if is_custom:
        reason = "the gradient of a custom loss or reward is not known"
    elif not model.output_layer:
        reason = "the model does not say which layer is its output (Model.output_layer)"
    elif vector_length:
        reason = "it needs es.exchange losses"
    elif config.data.block_tokens is not None:
        reason = "it needs the whole text on every host, and data.block_tokens sends parts"
    if reason and config.es.output_layer == "exact":
        raise EsjaxError(f"es.output_layer exact: {reason}; set es.output_layer to noise")
    return not reason


def _on_activations(
    config: Config, model: Model, params: Params, units: PyTree, loss: Loss | None, packed: bool
) -> SumEstimator:
    es, data = config.es, config.data
    if loss is not None:
        raise EsjaxError(
            "es.space activation works with cross entropy alone; for a custom loss or reward set es.space to low_rank"
        )
    if not model.tapped:
        raise EsjaxError(
            "the model has no taps for es.space activation; give it some (docs/extending.md), or perturb weights"
        )
    try:
        taps = find_taps(model, params)
    except ValueError as error:
        raise EsjaxError(f"es.space activation: {error}") from error
    if es.output_layer == "exact" and LOGITS not in taps.predict:
        raise EsjaxError(
            f"es.output_layer exact: the model has no tap {LOGITS!r} on the result of predict; set es.output_layer to "
            "noise, or tap it"
        )
    chain = gates.chain_of(taps)
    shared: dict[str, Any] = {
        "copies": es.noisy_copies,
        "burn_in": data.tokens_before,
        "exact_logits": es.output_layer != "noise",
        "precision": es.precision,
    }
    feedback: list[tuple[int, int]] = []
    if es.credit == "gates":
        if not taps.state:
            raise EsjaxError(
                "es.credit gates needs an elementwise recurrence, and the model does not say that it has one "
                "(Model.state_taps); set es.credit to discount"
            )
        try:
            gates.check_elementwise(model, taps, params)
        except ValueError as error:
            raise EsjaxError(f"es.credit gates: {error}, or set es.credit to discount") from error
        _check_names("layer_sigma", es.layer_sigma, [*chain])
        sigma = dict.fromkeys(chain, es.deviation) | es.layer_sigma
        lanes = ACCELERATOR_LANES if packed else CPU_LANES
        estimate_chunk = gates.make_estimate_chunk(model, taps, sigma=sigma, lanes=lanes, **shared)
        if es.feedback == "learned":
            feedback = shapes_of([*chain.values()])
    else:
        _check_names("layer_sigma", es.layer_sigma, [*taps.consume, *taps.predict])
        _check_names("layer_discount", es.layer_discount, [*taps.consume])
        estimate_chunk = discount.make_estimate_chunk(
            model,
            taps,
            sigma=dict.fromkeys([*taps.consume, *taps.predict], es.deviation) | es.layer_sigma,
            discount=dict.fromkeys(taps.consume, es.discount) | es.layer_discount,
            packed=packed,
            **shared,
        )
    tokens = data.batch_size * data.window
    steps = steps_per_nat(tokens * es.pairs_with_room)
    sum_chunk = make_sum_of_activations(model, estimate_chunk, units, es.pairs_with_room, tokens, steps)
    treedef = jax.tree.structure(params)

    def gradient(totals: Totals, scale: Float[Array, ""], params: Params) -> Params:
        whole = jax.tree.unflatten(treedef, totals)
        return jax.tree.map(lambda leaf, unit: leaf.astype(jnp.float32) * (scale / unit), whole, units)

    zeros = [jnp.zeros(leaf.shape, jnp.int32) for leaf in jax.tree.leaves(params)]

    noise = es.noisy_copies * (sum(taps.consume.values()) + max(taps.predict.values(), default=0))
    pair_bytes = 4 * data.batch_size * noise
    carried = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: first_states(config, model, params))))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    vector_length = size + sum(map(math.prod, feedback)) + carried + TAIL
    scale = 1 / (steps * tokens)
    most = steps * HEADROOM * tokens * (1 + 2.0**-20)  # the bound of a chunk is rounded to float32
    sections = (
        *(Section("gradient", leaf.size, most) for leaf in jax.tree.leaves(params)),
        *(Section("feedback", math.prod(shape), most) for shape in feedback),
        Section("states", carried, LARGEST_STATE * STATE_STEPS, carried // es.pairs),
    )
    bounds = CROSS_ENTROPY._replace(sections=sections, room=es.pairs_with_room)
    return SumEstimator(
        sum_chunk, gradient, zeros, vector_length, scale, MOST_SUMMED_PAIRS, pair_bytes, bounds, feedback
    )


def _check_names(setting: str, names: Iterable[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise EsjaxError(f"es.{setting} names {name!r}; the model has {', '.join(known)}")
