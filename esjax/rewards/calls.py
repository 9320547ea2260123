"""Calls of a reward or a tool, and what can go wrong in them. It imports no JAX, so worker processes start fast."""

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["reward", "tool"]
"""What is called."""

LARGEST = 1e9
"""Rewards of this size and more fail, as losses do (`esjax.core.shaping.LARGEST_LOSS`)."""

FLOATS = {float}
"""The types in a list of plain floats, which need no closer look."""

MOST_NAMES, LONGEST_NAME = 16, 64
"""Most rewards that a function returns by name, and most characters of a name: hosts send their means."""

SHOWN = 80
"""Most characters of a text that a message shows."""

LONGEST = 300
"""Most characters of an exception that a message shows."""


class Texts(NamedTuple):
    """Texts for several calls of equal size. Flat lists: these travel between processes fastest.

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
    """A call without results.

    Attributes:
        kind: Failures of one kind are reported once.
        reason: What happened, in one line.
    """

    kind: str
    reason: str


class Weighed(NamedTuple):
    """The result of a call of rewards that have names.

    Attributes:
        values: For each text, the weighted sum of its rewards.
        means: Mean over the texts of each reward.
    """

    values: list[float]
    means: Mapping[str, float]


Result = list[Any] | Weighed | Failure
"""The result of a call: for each text, its reward, or what a tool wrote; or why there is none."""


class Scored(NamedTuple):
    """Results of calls.

    Attributes:
        values: For each text, its reward, finite; or what a tool wrote. NaN in calls that failed.
        failures: The calls that failed, by their numbers.
        means: Mean of each reward that has a name, by the numbers of the calls.
    """

    values: list[Any]
    failures: dict[int, Failure]
    means: dict[int, Mapping[str, float]]

    @classmethod
    def nothing(cls) -> "Scored":
        """Return the results of no call."""
        return cls([], {}, {})

    def add(self, more: "Scored", size: int) -> None:
        """Append the results of later calls of `size` texts each."""
        calls = len(self.values) // size
        self.values.extend(more.values)
        self.failures.update({calls + number: failure for number, failure in more.failures.items()})
        self.means.update({calls + number: means for number, means in more.means.items()})

    def add_call(self, result: Result, size: int) -> None:
        """Append the result of one call."""
        if isinstance(result, list):
            self.values.extend(result)
        elif isinstance(result, Weighed):
            self.means[len(self.values) // size] = result.means
            self.values.extend(result.values)
        else:
            self.fail(result, 1, size)

    def fail(self, failure: Failure, calls: int, size: int) -> None:
        """Append calls that failed."""
        self.add(Scored([math.nan] * (calls * size), dict.fromkeys(range(calls), failure), {}), size)


Call = Callable[[Texts, int], Result]
"""`(texts, number) -> result`: makes one of the calls; whatever it raises is a failure."""


def make_call(kind: Kind, function: Callable[..., Any], weights: Mapping[str, float]) -> Call:
    """Make the function that makes a call and checks what it returns.

    Args:
        kind: What the function is.
        function: The reward or the tool.
        weights: Weights of rewards by their names; 1 for the others.
    """
    with_answers = kind == "reward" and takes_answers(function)

    def call(texts: Texts, number: int) -> Result:
        size, prompts, completions, answers = texts
        begin, end = number * size, number * size + size
        try:
            if kind == "tool":
                pairs = zip(prompts[begin:end], completions[begin:end], strict=True)
                return _inserted([function(prompt + completion) for prompt, completion in pairs])
            if with_answers:
                values = function(prompts[begin:end], completions[begin:end], answers=answers[begin:end])
            else:
                values = function(prompts[begin:end], completions[begin:end])
            return (
                _weighed(values, size, weights) if weights or type(values) is not list else _checked(values, size, "")
            )
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(traceback.format_exception_only(error)[-1].split())[:LONGEST]
            where = f"{Path(last.filename).name}, line {last.lineno}"
            return Failure(f"{type(error).__name__} {where}", f"{said} ({where})")

    return call


def takes_answers(reward: Callable[..., Any]) -> bool:
    """Return whether a reward has an argument `answers`."""
    try:
        return "answers" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of some builtins
        return False


def is_name(name: object) -> bool:
    """Return whether this may be the name of a reward."""
    return isinstance(name, str) and name.isidentifier() and len(name) <= LONGEST_NAME


def _inserted(values: list[Any]) -> Result:
    bad = [type(value).__name__ for value in values if not isinstance(value, str)]
    if bad:
        return Failure("type", f"it returned a {bad[0]}; it must return a string")
    "".join(values).encode()  # raises for half a character, which no vocabulary holds
    return values


def _weighed(values: Any, count: int, weights: Mapping[str, float]) -> Result:
    """Return the weighted sum of the rewards that have names, or the values if they are one list."""
    if not isinstance(values, Mapping):
        if weights:
            return Failure("weights", f"it returned a {type(values).__name__}; {_wants(weights)}")
        return _checked(values, count, "")
    if bad := [name for name in values if not is_name(name)]:
        shown = repr(bad[0])[:LONGEST]
        return Failure(
            "names", f"it returned the name {shown}; names are letters, digits and _, {LONGEST_NAME} at most"
        )
    if len(values) > MOST_NAMES:
        return Failure("names", f"it returned {len(values)} rewards; {MOST_NAMES} are the most")
    if not values or not weights.keys() <= values.keys():
        return Failure("weights", f"it returned the rewards {', '.join(values) or 'of no name'}; {_wants(weights)}")
    total, means = [0.0] * count, {}
    for name, some in values.items():
        found = _checked(some, count, f", {name}")
        if isinstance(found, Failure):
            return found
        weight = weights.get(name, 1.0)
        total = [one + weight * value for one, value in zip(total, found, strict=True)]
        means[name] = math.fsum(found) / count
    return Weighed(total, means)


def _wants(weights: Mapping[str, float]) -> str:
    return f"it must return a mapping from names to lists, with {', '.join(weights) or 'at least one'} (reward.weights)"


def _checked(values: Any, count: int, which: str) -> list[float] | Failure:
    """Return the values as floats, or what is wrong with them."""
    if type(values) is list and len(values) == count and {*map(type, values)} == FLOATS and _are_sound(values):
        return values
    wanted = f"it must return a list of {count} numbers, one for each completion{which}"
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
    bad = [value for value in rewards if not _are_sound([value])]
    if bad:
        return Failure("not finite", f"it returned {bad[0]}; rewards must be finite, and less than 1e9 in size")
    return rewards


def _are_sound(rewards: list[float]) -> bool:
    return all(-LARGEST < reward < LARGEST for reward in rewards)
