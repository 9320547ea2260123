"""Custom: a model, a loss or reward, a tool, and an optimizer that replace those of the settings."""

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
from esjax.config.models import ModelConfig
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.models import Model, build_model
from esjax.models.custom.check import check_model
from esjax.models.member import Loss, Member
from esjax.models.model import ModelFactory

Reward = Callable[..., Any]
"""`(member, tokens, key) -> reward`, like a `Loss`, but higher is better. Or a reward in Python, which scores text:
`(prompts, completions) -> list of floats`, see docs/rewards.md."""

Tool = Callable[[str], str]
"""`(text) -> answer`: called while a member writes, see docs/rewards.md."""

WANTED = {
    "model": "a function from the number of token ids to an esjax.Model, or PATH.py:FUNCTION, or for one with a name "
    "the setting model, esjax.GruConfig() for example",
    "loss": "a function, or PATH.py:FUNCTION",
    "reward": "a function, or PATH.py:FUNCTION",
    "tool": "a function, or PATH.py:FUNCTION",
    "optimizer": "an optax transformation, optax.adam(1e-2) for example, or PATH.py:FUNCTION, or for one with a name "
    "the setting optim.optimizer",
}
"""Accepted values of each kind, for error messages."""


@dataclass(frozen=True)
class Custom:
    """A custom model, loss or reward, tool, and optimizer. Each replaces that of the settings; None keeps it.

    Attributes:
        model: `(vocab_size) -> model`.
        loss: Loss of one member on one sequence.
        reward: Reward of one member on one sequence, or in Python over texts; excludes `loss`.
        tool: Tool that members call while they write for a reward in Python.
        optimizer: Any optax transformation.
        code: By kind, the file and function if PATH.py:FUNCTION was given, see `esjax.models.custom.code`.

    Raises:
        EsjaxError: There is a loss and a reward, or one of the values cannot be used.
    """

    model: ModelFactory | None = None
    loss: Loss | None = None
    reward: Reward | None = None
    tool: Tool | None = None
    optimizer: optax.GradientTransformation | None = None
    code: Mapping[str, Code] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if self.loss is not None and self.reward is not None:
            raise EsjaxError("there is a loss and a reward; give one of them")
        for kind in OPTIONS:
            check_given(kind, getattr(self, kind))
        for kind, function in (("loss", self.loss), ("reward", self.reward)):
            if function is not None and function is not self.text_reward:
                _check_arguments(f"the {kind} {name_of(function)}", function)

    def names(self) -> dict[str, str]:
        """Return the name of each custom part, by kind."""
        given = {kind: getattr(self, kind) for kind in OPTIONS}
        return {
            kind: (name_of_optimizer if kind == "optimizer" else name_of)(value)
            for kind, value in given.items()
            if value is not None
        }

    def identities(self) -> dict[str, str]:
        """Return what must be equal on hosts and their coordinator, see `custom_names.identities`."""
        return identities(self.names(), self.code)

    def words(self) -> list[str]:
        """Return the command-line options for the same custom parts.

        Raises:
            EsjaxError: A part was not given as PATH.py:FUNCTION.
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
        """Build the custom model and check it, or build the model that the settings name.

        Raises:
            EsjaxError: The custom model does not keep the interface `Model`.
        """
        if self.model is None:
            return build_model(config, vocab_size)
        return check_model(f"the model {name_of(self.model)}", self.model(vocab_size), vocab_size)

    @property
    def text_reward(self) -> Callable[..., Any] | None:
        """The reward, if it is one in Python, over text. None: there is none, or a jitted one."""
        return self.reward if self.reward is not None and _scores_text(self.reward) else None

    @property
    def objective(self) -> Loss | None:
        """The function to minimise in jitted code: the loss, or minus the reward. None: cross entropy, or text_reward.

        While it is traced, it raises EsjaxError unless the function returns one float32.
        """
        function, kind = (self.loss, "loss") if self.reward is None else (self.reward, "reward")
        if function is None or self.text_reward is not None:
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
    """Check a custom part.

    Raises:
        EsjaxError: It is neither None nor a valid value of its kind.
    """
    parts = [getattr(value, part, None) for part in ("init", "update")] if kind == "optimizer" else [value]
    if value is not None and not all(map(callable, parts)):
        raise EsjaxError(f"{kind} is {_shown(value)}; give {WANTED[kind]}")


def _shown(value: object) -> str:
    """Return a string in quotes, the name of a function, or the type of any other value."""
    if isinstance(value, str):
        return repr(value)
    return f"the function {name_of(value)}" if inspect.isroutine(value) else f"a {type(value).__name__}"


def _check_arguments(name: str, function: Loss | Reward) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled functions have no signature
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        also = ", or (prompts, completions) to score text" if name.startswith("the reward") else ""
        raise EsjaxError(f"{name} takes {signature}; it must take (member, tokens, key){also}") from error


def _scores_text(reward: Reward) -> bool:
    """Return whether the first arguments of a reward are named prompts and completions."""
    try:
        names = tuple(inspect.signature(reward).parameters)
    except (TypeError, ValueError):  # some compiled functions have no signature
        return False
    return names[:2] == ("prompts", "completions")


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
