"""A model with weights: predicts, reads, generates and scores. A custom loss takes one as its first argument."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from esjax.data.tokens import STOP, UNK
from esjax.models.model import Logits, Model, Params, State, Tap, Token
from esjax.models.sequence import sequence_nats, token_loss

PIECE = 256
"""Tokens of a long text that a model with `states` reads at a time."""


def consume(model: Model, params: Params, state: State, token: Token, tap: Tap | None = None) -> State:
    """Return the state after a token; after STOP, the initial state, since the next token begins another document.

    `tap` is for models that are `tapped`. A model with `resets` False reads on after STOP.
    """
    after = model.consume(params, state, token, tap) if tap else model.consume(params, state, token)
    if not model.resets:
        return after
    fresh = model.initial_state(params)
    return jax.tree.map(lambda fresh, after: jnp.where(token == STOP, fresh, after), fresh, after)


class Member(NamedTuple):
    """A model with perturbed or unperturbed weights, for one sequence at a time, in jitted code.

    Attributes:
        model: The architecture.
        params: The weights.
    """

    model: Model
    params: Params

    def initial_state(self) -> State:
        """Return the state at the start of a document."""
        return self.model.initial_state(self.params)

    def predict(self, state: State) -> Logits:
        """Predict the next token.

        Returns:
            Logits of all token ids, [vocabulary].
        """
        return self.model.predict(self.params, state)

    def consume(self, state: State, token: Token) -> State:
        """Return the state after a token; after STOP, the state at the start of a document."""
        return consume(self.model, self.params, state, token)

    def read(
        self, tokens: Int[Array, " length"], state: State | None = None, count: Int[Array, ""] | None = None
    ) -> State:
        """Consume tokens and return the state after them.

        Args:
            tokens: Ids; may be empty.
            state: State to begin with. None: the start of a document.
            count: Number of first tokens to consume. None: all.
        """
        if state is None and self.model.read is not None and len(tokens) < self.model.context:
            return self.model.read(self.params, tokens, len(tokens) if count is None else count)
        first = self.initial_state() if state is None else state
        if count is None and self._reads_at_once(tokens):
            return self._around(first, tokens)[1]
        if count is None:
            return jax.lax.scan(lambda state, token: (self.consume(state, token), None), first, tokens)[0]

        def read(state: State, place: tuple[Array, Token]) -> tuple[State, None]:
            after, is_there = self.consume(state, place[1]), place[0] < count
            return jax.tree.map(lambda after, before: jnp.where(is_there, after, before), after, state), None

        return jax.lax.scan(read, first, (jnp.arange(len(tokens)), tokens))[0]

    def states(self, tokens: Int[Array, " length"], state: State | None = None) -> State:
        """Return the state before each token, with a leading axis like `tokens`; arguments as for `read`."""

        def read(state: State, token: Token) -> tuple[State, State]:
            return self.consume(state, token), state

        first = self.initial_state() if state is None else state
        if self._reads_at_once(tokens):
            return self._around(first, tokens)[0]
        return jax.lax.scan(read, first, tokens)[1]

    def _reads_at_once(self, tokens: Int[Array, " length"]) -> bool:
        return self.model.states is not None and len(tokens) > 0

    def _around(self, first: State, tokens: Int[Array, " length"]) -> tuple[State, State]:
        """Return the state before each token and the state after the last, of a model with `states`."""
        assert self.model.states is not None
        after = self.model.states(self.params, first, tokens)
        every = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, after)
        return jax.tree.map(lambda leaf: leaf[:-1], every), jax.tree.map(lambda leaf: leaf[-1], every)

    def nats(self, tokens: Int[Array, " length"], state: State | None = None) -> Float[Array, " length"]:
        """Score the prediction of each token: its -log probability, in nats, at least 0.

        Args:
            tokens: Ids.
            state: State to begin with. None: the start of a document.
        """
        if state is None and self.model.logits is not None:
            return sequence_nats(partial(self.model.logits, self.params), self.model.context, tokens)

        def score(state: State, token: Token) -> tuple[State, Float[Array, ""]]:
            scored = token_loss(self.predict(state), token)
            return self.consume(state, token), scored

        first = self.initial_state() if state is None else state
        if self._reads_at_once(tokens):
            return self._nats_of_pieces(first, tokens)
        return jax.lax.scan(score, first, tokens)[1]

    def _nats_of_pieces(self, first: State, tokens: Int[Array, " length"]) -> Float[Array, " length"]:
        """Score tokens by a model with `states`; a long text in pieces, so that memory stays small."""

        def score(state: State, piece: Int[Array, " piece"]) -> tuple[State, Float[Array, " piece"]]:
            before, after = self._around(state, piece)
            return after, jax.vmap(token_loss)(jax.vmap(self.predict)(before), piece)

        length = len(tokens)
        if length <= PIECE:
            return score(first, tokens)[1]
        pieces = jnp.pad(tokens, (0, -length % PIECE)).reshape(-1, PIECE)
        return jax.lax.scan(score, first, pieces)[1].reshape(-1)[:length]

    def cross_entropy(self, tokens: Int[Array, " length"], burn_in: int = 0) -> Float[Array, ""]:
        """Average the nats of a window's tokens; the first `burn_in` are read and not scored."""
        if self.model.logits is not None or self.model.states is not None:
            return jnp.mean(self.nats(tokens)[burn_in:])
        return jnp.mean(self.nats(tokens[burn_in:], self.read(tokens[:burn_in])))

    def generate(
        self,
        state: State,
        length: int,
        key: Key[Array, ""] | None = None,
        temperature: float = 1.0,
        stops: Sequence[int] = (),
        pauses: Sequence[int] = (),
        first: Int[Array, ""] | int = 0,
    ) -> Int[Array, " length"]:
        """Generate tokens. All tokens after the first STOP are STOP; UNK never occurs.

        Args:
            state: State to begin with.
            length: Number of tokens, fixed, so that all members of a population generate in parallel.
            key: Random key. None: each token is the most probable one.
            temperature: Divides the logits before a token is drawn, above 0.
            stops: Further tokens at which a text ends; STOP takes their place.
            pauses: Further tokens after which a text ends; they stay in it.
            first: Position of the first token among those that were generated with this key; each position has its own
                random numbers.
        """

        def write(carry: tuple[State, Array], position: Array) -> tuple[tuple[State, Array], Array]:
            state, ended = carry
            logits = self.predict(state).at[UNK].set(-jnp.inf)
            if key is not None:
                drawn = jax.random.gumbel(jax.random.fold_in(key, first + position), logits.shape, logits.dtype, "low")
                logits = logits / temperature + drawn
            token = jnp.argmax(logits)
            if stops:
                ended |= jnp.any(token == jnp.array(stops, jnp.int32))
            token = jnp.where(ended, STOP, token).astype(jnp.int32)
            ended = token == STOP
            if pauses:
                ended |= jnp.any(token == jnp.array(pauses, jnp.int32))
            return (self.consume(state, token), ended), token

        return jax.lax.scan(write, (state, jnp.bool_(False)), jnp.arange(length))[1]


Loss = Callable[[Member, Int[Array, " length"], Key[Array, ""]], Float[Array, ""]]
"""`(member, tokens, key) -> loss` of one member on one sequence; lower is better. Both members of a pair get the same
tokens and the same key. No two sequences of a run have the same key."""


def cross_entropy(burn_in: int) -> Loss:
    """Make the default loss: mean nats per token of a window.

    Args:
        burn_in: Number of first tokens, at least 0, that are read to prepare the state and not scored.
    """

    def loss(member: Member, tokens: Int[Array, " length"], key: Key[Array, ""]) -> Float[Array, ""]:
        return member.cross_entropy(tokens, burn_in)

    return loss


PairLoss = Callable[[Params, Int[Array, "sequences length"], Key[Array, ""]], Float[Array, ""]]
"""`(params, windows, key) -> loss` of one member on the windows of its pair."""


def over_sequences(model: Model, loss: Loss) -> PairLoss:
    """Make `(params, windows, key) -> loss` for `esjax.core.evaluate`: the mean over a pair's sequences."""

    def mean(params: Params, windows: Int[Array, "sequences length"], key: Key[Array, ""]) -> Float[Array, ""]:
        member, keys = Member(model, params), sequence_keys(key, len(windows))
        if len(windows) == 1:  # an axis of size 1 makes XLA's loops 10% slower
            return loss(member, windows[0], keys[0])
        return jnp.mean(jax.vmap(partial(loss, member))(windows, keys))

    return mean


def sequence_keys(key: Key[Array, ""], sequences: int) -> Key[Array, " sequences"]:
    """Derive the key of each sequence of a pair from the pair's key."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(sequences, dtype=jnp.uint32))
