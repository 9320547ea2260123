"""What a run may be given beside its settings."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from esjax.config import ModelConfig
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.member import Loss, Member
from esjax.models import Model, build_model
from esjax.models.check import check_model
from esjax.models.model import ModelFactory

Reward = Callable[[Member, Int[Array, " length"], Key[Array, ""]], Float[Array, ""]]
"""`(member, tokens, key) -> reward`, like a `Loss`, but higher is better."""


@dataclass(frozen=True)
class Own:
    """A model, a loss or a reward, an optimizer of one's own, each in place of the one that the settings name.

    Attributes:
        model: Builds the model from the number of token ids.
        loss: Loss of one member on one sequence.
        reward: Reward of one member on one sequence; there is a loss or a reward, not both.
        optimizer: Any optax transformation.
    """

    model: ModelFactory | None = None
    loss: Loss | None = None
    reward: Reward | None = None
    optimizer: optax.GradientTransformation | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and self.reward is not None:
            raise EsjaxError("there is a loss and a reward; give one of them")
        if self.model is not None and not callable(self.model):
            raise EsjaxError(
                f"model is {_shown(self.model)}; give a function from the number of token ids to an esjax.Model, or "
                "for one with a name the setting model, esjax.GruConfig() for example"
            )
        if self.optimizer is not None and not all(
            callable(getattr(self.optimizer, part, None)) for part in ("init", "update")
        ):
            raise EsjaxError(
                f"optimizer is {_shown(self.optimizer)}; give an optax transformation, optax.adam(1e-2) for example, "
                "or for one with a name the setting optim.optimizer"
            )
        for kind, function in (("loss", self.loss), ("reward", self.reward)):
            if function is not None:
                _check_arguments(f"the {kind} {_name_of(function)}", function)

    def names(self) -> dict[str, str]:
        """Name what there is, by kind."""
        return {kind: _name_of(value) for kind, value in vars(self).items() if value is not None}

    @default_flags()
    def build(self, config: ModelConfig, vocab_size: int) -> Model:
        """Build the model: its own, once it was seen to keep the contract, or the one that the settings name."""
        if self.model is None:
            return build_model(config, vocab_size)
        return check_model(f"the model {_name_of(self.model)}", self.model(vocab_size), vocab_size)

    @property
    def objective(self) -> Loss | None:
        """What is minimised: the loss, or the reward with its sign turned. None: cross entropy.

        When it is traced, it raises EsjaxError unless the function returns one float32.
        """
        function, kind = (self.loss, "loss") if self.reward is None else (self.reward, "reward")
        if function is None:
            return None
        name = f"the {kind} {self.names()[kind]}"

        def objective(member: Member, tokens: Int[Array, " length"], key: Key[Array, ""]) -> Float[Array, ""]:
            try:
                result = function(member, tokens, key)
            except Exception as error:
                error.add_note(f"raised by {name}, given a member, tokens of shape {tokens.shape}, and a key")
                raise
            value = _one_number(name, result)
            return -value if kind == "reward" else value

        return objective


def _name_of(value: object) -> str:
    if isinstance(value, partial):
        return _name_of(value.func)
    return getattr(value, "__qualname__", type(value).__name__)


def _shown(value: object) -> str:
    """Show a text as it is, and tell of anything else what it is."""
    if isinstance(value, str):
        return repr(value)
    return f"the function {_name_of(value)}" if inspect.isroutine(value) else f"a {type(value).__name__}"


def _check_arguments(name: str, function: Loss | Reward) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a compiled function nothing is known
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise EsjaxError(f"{name} takes {signature}; it must take (member, tokens, key)") from error


def _one_number(name: str, value: Any) -> Float[Array, ""]:
    if not isinstance(value, float | int | np.generic | np.ndarray | jax.Array):
        raise EsjaxError(f"{name} returns a {type(value).__name__}; it must return one float32 number")
    shape, dtype = jnp.shape(value), jax.dtypes.result_type(value)
    if shape:
        raise EsjaxError(f"{name} returns an array of shape {shape}; it must return one number, a mean for example")
    if dtype != jnp.float32:
        raise EsjaxError(f"{name} returns {dtype}; make it float32, with .astype(jnp.float32) for example")
    return jnp.asarray(value)


NOTHING_OWN = Own()
