"""Members read a prompt and write: jitted, the whole population in step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from esjax.models.member import Member, sequence_keys
from esjax.models.model import Model, Params


class Prompted(NamedTuple):
    """The prompts of a pair.

    Attributes:
        tokens: Ids, int32 [prompts, longest].
        lengths: Number of tokens of each prompt, int32 [prompts]; what follows them in a row is not read.
    """

    tokens: Int[Array, "prompts longest"]
    lengths: Int[Array, " prompts"]


Write = Callable[[Params, Prompted, Key[Array, ""]], Int[Array, "prompts length"]]
"""`(params, prompts, key) -> tokens` of one member. Both members of a pair get the same prompts and the same key, so
differences between their texts come from their weights."""


def make_write(model: Model, length: int, temperature: float, stops: tuple[int, ...]) -> Write:
    """Make the function that lets a member write after prompts, for `esjax.core.population.map_members`.

    Args:
        model: The architecture.
        length: Most tokens of a completion.
        temperature: Divides the logits before a token is drawn, at least 0; 0 takes the most probable token.
        stops: Tokens that end a completion, beside STOP.

    Returns:
        `(params, prompts, key) -> tokens`, int32 [prompts, length]. STOP fills a row from the first of `stops` or the
        first STOP on. UNK never occurs.
    """

    def write_one(
        member: Member, tokens: Int[Array, " longest"], read: Int[Array, ""], key: Key[Array, ""]
    ) -> Int[Array, " length"]:
        state = member.read(tokens, count=read)
        return member.generate(state, length, key if temperature else None, temperature or 1.0, stops)

    def write(params: Params, prompts: Prompted, key: Key[Array, ""]) -> Int[Array, "prompts length"]:
        needed = 1 + prompts.tokens.shape[1] + length  # STOP, the prompt, the completion
        model_for = model if model.shortened is None else model.shortened(needed)
        member, keys = Member(model_for, params), sequence_keys(key, len(prompts.tokens))
        if len(prompts.tokens) == 1:  # an axis of size 1 makes XLA's loops slower
            return write_one(member, prompts.tokens[0], prompts.lengths[0], keys[0])[None]
        return jax.vmap(partial(write_one, member))(prompts.tokens, prompts.lengths, keys)

    return write


def shape_of(prompts: int, length: int) -> jax.ShapeDtypeStruct:
    """Return the shape and type of what one member writes."""
    return jax.ShapeDtypeStruct((prompts, length), jnp.int32)
