"""The interface of a language model, for training, scoring and generation."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Key

from esjax.core.units import initial_units

Params = Any
"""A pytree of float32 arrays."""

State = Any
"""A pytree of arrays: the state of the network after the tokens that it has consumed."""

Logits = Float[Array, " vocabulary"]
Token = Int[Array, ""]

Activation = Callable[[Array], Array]
"""An elementwise function."""


Tap = Callable[..., Array]
"""`(name, value, activation=identity) -> activation(value)`: a model calls it on its pre-activations, so that noise can
be added to them."""


def identity(value: Array) -> Array:
    """Return the value: the activation of a tap that names none."""
    return value


def untouched(name: str, value: Array, activation: Activation = identity) -> Array:
    """Return the activation of a pre-activation without noise: the tap of a plain forward pass."""
    return activation(value)


class Model(NamedTuple):
    """Pure functions for one sequence. Callers make batches and populations of them by `jax.vmap`.

    A token is predicted from the state *before* it is consumed. With `predict` and `consume` as separate functions, a
    model cannot see the token that it is scored on. A model that reads whole sequences has `logits` as well and is
    scored by that; `esjax.models.sequence_model` makes the other functions from it.

    Attributes:
        init: `(key) -> params`.
        initial_state: `(params) -> state` at the start of a document.
        predict: `(params, state) -> logits` of the next token, shape [vocabulary].
        consume: `(params, state, token) -> state` after the token.
        unit: A pytree like `params` of positive floats, the unit of each leaf: the size of a typical entry. None: from
            the initial parameters, see `esjax.core.initial_units`.
        tapped: Whether `predict` and `consume` take a last argument `tap: Tap = untouched` and call it on each
            pre-activation, under a unique name, before any other use. The taps of `predict` are a chain: each value is
            computed from the one before, the first from the state, and the last, "logits", is the result. Needed for
            `es.space activation` alone, which trains the parameters that enter some pre-activation.
        state_taps: For `es.credit gates`: names of taps in `consume` on its result, one for each leaf of the state of
            floating type, in their order. The recurrence must be elementwise: with the other taps given, an entry of a
            new leaf depends on the same entry of the old leaf alone. Empty: it is not, or the model does not say.
        states: `(params, state, tokens) -> states` after each token, with a leading axis like `tokens`, for a
            recurrence that is parallel over tokens; after STOP, the initial state. None: `consume`, token by token.
        logits: `(params, tokens) -> logits` of a whole sequence, [length] to [length, vocabulary]: row i predicts the
            token after tokens[i]. A document begins with STOP. None: sequences are scored token by token.
        context: Most tokens that `logits` takes. Longer texts are scored in overlapping pieces.
        read: `(params, tokens, count) -> state` after the first `count` tokens of a document, all at once; `tokens`
            holds fewer than `context`. None: documents are read token by token.
        shortened: `(tokens) -> model`: the same model for documents of at most that many tokens, STOP before the first
            included, with smaller states. None: its states do not grow with the context.
        resets: Whether callers put the initial state in place of the state after STOP, the end of a document. False:
            the model reads on across it, as `logits` does.
        stacked: Paths of parameters that hold one array per layer along their first axis, with all that is below them.
            Each layer then gets separate noise.
        embeddings: Paths of parameters whose rows are looked up by token and used for nothing else, such as `embedding`
            or `params/Embed_0`. Noise on rows of tokens that a window does not hold is then left out.
        output_layer: Path of the parameters of the last layer, which makes the logits and is used for nothing else.
            With cross entropy this layer then gets its exact gradient in place of noise, see `es.output_layer`. Empty:
            the model does not say.
    """

    init: Callable[[Key[Array, ""]], Params]
    initial_state: Callable[[Params], State]
    predict: Callable[..., Logits]
    consume: Callable[..., State]
    unit: Params | None = None
    tapped: bool = False
    state_taps: tuple[str, ...] = ()
    states: Callable[[Params, State, Int[Array, " length"]], State] | None = None
    logits: Callable[[Params, Int[Array, " length"]], Float[Array, "length vocabulary"]] | None = None
    context: int = 0
    read: Callable[[Params, Int[Array, " length"], Int[Array, ""] | int], State] | None = None
    shortened: "Callable[[int], Model] | None" = None
    resets: bool = True
    stacked: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    output_layer: str = ""

    def units(self, first: Params) -> Params:
        """Return the unit of each leaf: `unit`, or units made from the initial parameters `first`."""
        return initial_units(first) if self.unit is None else self.unit

    def step(self, params: Params, state: State, token: Token) -> tuple[State, Logits]:
        """Predict one token, then consume it.

        Returns:
            The state after the token, and the logits that predicted the token, [vocabulary].
        """
        return self.consume(params, state, token), self.predict(params, state)


ModelFactory = Callable[[int], Model]
"""`(vocab_size) -> model`."""
