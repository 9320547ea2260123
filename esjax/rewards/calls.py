"""Calls of a reward, and what can go wrong in them. It imports no JAX, so worker processes start fast."""

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


class Texts(NamedTuple):
    """Texts to score in several calls of equal size. Flat lists: these travel between processes fastest.

    Attributes:
        size: Texts of a call.
        prompts: The prompt of each completion.
        completions: What was written after it.
        answers: The answer that belongs to each prompt, or None.
    """

    size: int
    prompts: list[str]
    completions: list[str]
    answers: list[Any]

    @property
    def calls(self) -> int:
        """The number of calls."""
        return len(self.completions) // self.size

    def part(self, first: int, last: int) -> "Texts":
        """Return the texts of calls `first` to `last - 1`."""
        begin, end = first * self.size, last * self.size
        return Texts(self.size, self.prompts[begin:end], self.completions[begin:end], self.answers[begin:end])


class Failure(NamedTuple):
    """A call without rewards.

    Attributes:
        kind: Failures of one kind are reported once.
        reason: What happened, in one line.
    """

    kind: str
    reason: str


class Scored(NamedTuple):
    """Results of calls.

    Attributes:
        rewards: The reward of each text, finite; NaN in calls that failed.
        failures: The calls that failed, by their numbers.
    """

    rewards: list[float]
    failures: dict[int, Failure]

    def add(self, more: "Scored", size: int) -> None:
        """Append the results of later calls of `size` texts each."""
        calls = len(self.rewards) // size
        self.rewards.extend(more.rewards)
        self.failures.update({calls + number: failure for number, failure in more.failures.items()})

    def add_call(self, result: "list[float] | Failure", size: int) -> None:
        """Append the result of one call."""
        if isinstance(result, Failure):
            self.fail(result, 1, size)
        else:
            self.rewards.extend(result)

    def fail(self, failure: Failure, calls: int, size: int) -> None:
        """Append calls that failed."""
        self.add(Scored([math.nan] * (calls * size), dict.fromkeys(range(calls), failure)), size)


def takes_answers(reward: TextReward) -> bool:
    """Return whether a reward takes answers as a third argument."""
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError:
        return False
    return True


def call(reward: TextReward, texts: Texts, with_answers: bool) -> list[float] | Failure:
    """Make one call and check what it returns; whatever it raises is a failure."""
    try:
        if with_answers:
            values = reward(texts.prompts, texts.completions, texts.answers)
        else:
            values = reward(texts.prompts, texts.completions)
        return _checked(values, texts.size)
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(traceback.format_exception_only(error)[-1].split())[:LONGEST]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return Failure(f"{type(error).__name__} {where}", f"{said} ({where})")


def _checked(values: Any, count: int) -> list[float] | Failure:
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
    bad = [value for value in rewards if not math.isfinite(value)]
    return Failure("not finite", f"it returned {bad[0]}; rewards must be finite") if bad else rewards
