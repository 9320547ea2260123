"""The contract between an architecture and everything that trains, scores or samples it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key

from esjax.core.units import initial_units

Params = Any
"""A pytree of float32 arrays."""

State = Any
"""A pytree of arrays: what the network remembers of the tokens it has consumed."""

Logits = Float[Array, " vocabulary"]
Token = Int[Array, ""]

Tap = Callable[[str, Array], Array]
"""`(name, pre-activation) -> pre-activation`: given to a model, so that noise can be put on what its layers compute."""


def untouched(name: str, value: Array) -> Array:
    """Leave a pre-activation as it is: the tap of a plain forward pass."""
    return value


class Model(NamedTuple):
    """Pure functions for one sequence; batches and populations are made outside, by `jax.vmap`.

    A prediction is read from the state *before* the token it predicts is consumed. Keeping `predict` and
    `consume` apart makes it impossible for a model to see the token it is scored on. A model that is made to read whole
    sequences gives `logits` as well, and is scored by it; `esjax.models.sequence_model` makes the rest from it.

    Attributes:
        init: `(key) -> params`.
        initial_state: `(params) -> state` at the start of a document.
        predict: `(params, state) -> logits` of the next token, shape [vocabulary].
        consume: `(params, state, token) -> state` after the token.
        unit: A pytree like `params` of positive floats: the size of a typical entry of each leaf. Perturbations
            and updates are multiples of it, so that sigma and the learning rate mean the same for every leaf and
            for every width. None: from the first parameters, see `esjax.core.initial_units`.
        tapped: Whether `predict` and `consume` take one argument more, `tap: Tap = untouched`, and call it on each
            pre-activation, under a name of its own, before anything else uses it. Needed for `es.space activation`
            alone; there, a parameter is trained if it has a part in some pre-activation.
        logits: `(params, tokens) -> logits` of whole sequences, [length] to [length, vocabulary]: row i predicts the
            token after tokens[i]. A document begins with STOP. None: sequences are scored token by token.
        context: Tokens that `logits` takes at most. Longer texts are scored in overlapping pieces.
    """

    init: Callable[[Key[Array, ""]], Params]
    initial_state: Callable[[Params], State]
    predict: Callable[..., Logits]
    consume: Callable[..., State]
    unit: Params | None = None
    tapped: bool = False
    logits: Callable[[Params, Int[Array, " length"]], Float[Array, "length vocabulary"]] | None = None
    context: int = 0

    def units(self, first: Params) -> Params:
        """Return the unit of each leaf: the model's own, or those of the first parameters."""
        return initial_units(first) if self.unit is None else self.unit

    def step(self, params: Params, state: State, token: Token) -> tuple[State, Logits]:
        """Predict one token, then consume it.

        Returns:
            The state after the token, and the logits with which the token was predicted.
        """
        return self.consume(params, state, token), self.predict(params, state)


ModelFactory = Callable[[int], Model]
"""`(vocab_size) -> model`."""
