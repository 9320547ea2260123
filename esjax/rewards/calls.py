"""One call of a reward, and what can go wrong in it. It imports no JAX, so worker processes start fast."""

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TextReward = Callable[..., Sequence[float]]
"""`(prompts, completions) -> rewards` or `(prompts, completions, answers) -> rewards`: lists of equal length; higher is
better. The order of the texts has no meaning."""

LONGEST = 300
"""Most characters of an exception that a message shows."""


class Call(NamedTuple):
    """The texts of one call, all those of a pair.

    Attributes:
        prompts: The prompt of each completion.
        completions: What was written after it.
        answers: The answer that belongs to each prompt, or None.
    """

    prompts: list[str]
    completions: list[str]
    answers: list[Any]


class Failure(NamedTuple):
    """A call without rewards.

    Attributes:
        kind: Failures of one kind are reported once.
        reason: What happened, in one line.
    """

    kind: str
    reason: str


Result = list[float] | Failure
"""The rewards of a call, finite, or why there are none."""


def takes_answers(reward: TextReward) -> bool:
    """Return whether a reward takes answers as a third argument."""
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError:
        return False
    return True


def run(reward: TextReward, call: Call, with_answers: bool) -> Result:
    """Call a reward and check what it returns; whatever it raises is a failure."""
    arguments = call if with_answers else call[:2]
    try:
        values = reward(*arguments)
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(traceback.format_exception_only(error)[-1].split())[:LONGEST]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return Failure(f"{type(error).__name__} {where}", f"{said} ({where})")
    return check(values, len(call.completions))


def check(values: Any, count: int) -> Result:
    """Return the values as floats, or what is wrong with them."""
    wanted = f"it must return a list of {count} numbers, one for each completion"
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        return Failure("type", f"it returned a {type(values).__name__}; {wanted}")
    if len(values) != count:
        return Failure("length", f"it returned {len(values)} values; {wanted}")
    rewards = []
    for value in values:
        if type(value) is not float:
            if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of numpy, JAX or PyTorch
                value = value.item()
            if not isinstance(value, numbers.Real):
                return Failure("item type", f"it returned a {type(value).__name__} in its list; {wanted}")
        rewards.append(float(value))
    if bad := next((value for value in rewards if not math.isfinite(value)), None):
        return Failure("not finite", f"it returned {bad}; rewards must be finite")
    return rewards
