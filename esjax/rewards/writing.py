"""Members read a prompt and write: jitted, the whole population in step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from esjax.models.member import Member, sequence_keys
from esjax.models.model import Model, Params
from esjax.rewards.prompts import PromptTokens


class Prompted(NamedTuple):
    """Texts that a member continues: prompts, or prompts and the beginning of what is written after them.

    Attributes:
        tokens: Ids, int32 [prompts, longest].
        lengths: Number of tokens of each text, int32 [prompts]; what follows them in a row is not read.
        begun: Tokens of each text that are part of the completion, int32 [prompts].
    """

    tokens: Int[Array, "prompts longest"]
    lengths: Int[Array, " prompts"]
    begun: Int[Array, " prompts"]


Write = Callable[[Params, Prompted, Key[Array, ""]], Int[Array, "prompts length"]]
"""`(params, prompts, key) -> tokens` of one member. Both members of a pair get the same prompts and the same key, so
differences between their texts come from their weights."""


def make_write(
    model: Model, length: int, temperature: float, stops: tuple[int, ...], pauses: tuple[int, ...] = ()
) -> Write:
    """Make the function that lets a member write after prompts, for `esjax.core.population.map_members`.

    Args:
        model: The architecture.
        length: Most tokens of a completion.
        temperature: Divides the logits before a token is drawn, at least 0; 0 takes the most probable token.
        stops: Tokens that end a completion, beside STOP.
        pauses: Tokens after which a tool is called: the last ones of their rows.

    Returns:
        `(params, prompts, key) -> tokens`, int32 [prompts, length]. STOP fills a row from the first of `stops` or the
        first STOP on, and after a token of `pauses`. UNK never occurs.
    """

    def write_one(member: Member, text: Prompted, key: Key[Array, ""]) -> Int[Array, " length"]:
        state = member.read(text.tokens, count=text.lengths)
        return member.generate(
            state, length, key if temperature else None, temperature or 1.0, stops, pauses, text.begun
        )

    def write(params: Params, prompts: Prompted, key: Key[Array, ""]) -> Int[Array, "prompts length"]:
        needed = 1 + prompts.tokens.shape[1] + length  # STOP, the prompt, the completion
        model_for = model if model.shortened is None else model.shortened(needed)
        member, keys = Member(model_for, params), sequence_keys(key, len(prompts.tokens))
        if len(prompts.tokens) == 1:  # an axis of size 1 makes XLA's loops slower
            return write_one(member, jax.tree.map(lambda leaf: leaf[0], prompts), keys[0])[None]
        return jax.vmap(partial(write_one, member))(prompts, keys)

    return write


def beginnings(prompts: PromptTokens) -> Prompted:
    """Return prompts as they are given to members, before anything is written."""
    return Prompted(
        jnp.asarray(prompts.tokens), jnp.asarray(prompts.lengths), jnp.zeros(len(prompts.lengths), jnp.int32)
    )


def shape_of(prompts: int, length: int) -> jax.ShapeDtypeStruct:
    """Return the shape and type of what one member writes."""
    return jax.ShapeDtypeStruct((prompts, length), jnp.int32)
