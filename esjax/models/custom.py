"""What a run may be given beside its settings."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from esjax.config.custom_names import OPTIONS, Code, identities, name_of, name_of_optimizer
from esjax.config.settings import ModelConfig
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.models import Model, build_model
from esjax.models.check import check_model
from esjax.models.member import Loss, Member
from esjax.models.model import ModelFactory

Reward = Callable[[Member, Int[Array, " length"], Key[Array, ""]], Float[Array, ""]]
"""`(member, tokens, key) -> reward`, like a `Loss`, but higher is better."""


WANTED = {
    "model": "a function from the number of token ids to an esjax.Model, or PATH.py:FUNCTION, or for one with a name "
    "the setting model, esjax.GruConfig() for example",
    "loss": "a function, or PATH.py:FUNCTION",
    "reward": "a function, or PATH.py:FUNCTION",
    "optimizer": "an optax transformation, optax.adam(1e-2) for example, or PATH.py:FUNCTION, or for one with a name "
    "the setting optim.optimizer",
}
"""What may be given, by kind."""


@dataclass(frozen=True)
class Custom:
    """A model, a loss or a reward, an optimizer of one's own, each in place of the one that the settings name.

    Attributes:
        model: Builds the model from the number of token ids.
        loss: Loss of one member on one sequence.
        reward: Reward of one member on one sequence; there is a loss or a reward, not both.
        optimizer: Any optax transformation.
        code: By kind, the code of what was named as PATH.py:FUNCTION, see `esjax.models.custom_code`.
    """

    model: ModelFactory | None = None
    loss: Loss | None = None
    reward: Reward | None = None
    optimizer: optax.GradientTransformation | None = None
    code: Mapping[str, Code] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.loss is not None and self.reward is not None:
            raise EsjaxError("there is a loss and a reward; give one of them")
        for kind in OPTIONS:
            check_given(kind, getattr(self, kind))
        for kind, function in (("loss", self.loss), ("reward", self.reward)):
            if function is not None:
                _check_arguments(f"the {kind} {name_of(function)}", function)

    def names(self) -> dict[str, str]:
        """Name what there is, by kind."""
        given = {kind: getattr(self, kind) for kind in OPTIONS}
        return {
            kind: (name_of_optimizer if kind == "optimizer" else name_of)(value)
            for kind, value in given.items()
            if value is not None
        }

    def identities(self) -> dict[str, str]:
        """Return what hosts have to have in common with their coordinator, see `custom_names.identities`."""
        return identities(self.names(), self.code)

    def words(self) -> list[str]:
        """Write the options that give the same on the command line.

        Raises:
            EsjaxError: Something is no code in a file.
        """
        for kind, name in self.names().items():
            if kind not in self.code:
                raise EsjaxError(
                    f"other processes cannot be given the {kind} {name}; put it into a file and name that, "
                    "PATH.py:FUNCTION"
                )
        return [word for kind, one in self.code.items() for word in (OPTIONS[kind], str(one))]

    @default_flags()
    def build(self, config: ModelConfig, vocab_size: int) -> Model:
        """Build the model: its own, once it was seen to keep the contract, or the one that the settings name."""
        if self.model is None:
            return build_model(config, vocab_size)
        return check_model(f"the model {name_of(self.model)}", self.model(vocab_size), vocab_size)

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


def check_given(kind: str, value: object) -> None:
    """See that something may be given.

    Raises:
        EsjaxError: It is neither None nor what its kind has to be.
    """
    parts = [getattr(value, part, None) for part in ("init", "update")] if kind == "optimizer" else [value]
    if value is not None and not all(map(callable, parts)):
        raise EsjaxError(f"{kind} is {_shown(value)}; give {WANTED[kind]}")


def _shown(value: object) -> str:
    """Show a text as it is, and tell of anything else what it is."""
    if isinstance(value, str):
        return repr(value)
    return f"the function {name_of(value)}" if inspect.isroutine(value) else f"a {type(value).__name__}"


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


NOTHING_CUSTOM = Custom()
