"""From tokens that members wrote to the losses of their pairs: call tool and reward, collect, count failures."""

import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int
from numpy import ndarray

from esjax.averages import NamedMean, join_means
from esjax.config.custom_names import Code, name_of
from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, replace
from esjax.cores import available_cores
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.models.custom import Custom
from esjax.paths import given_path
from esjax.rewards.calls import SHOWN, Call, Failure, Kind, Scored, Texts, make_call
from esjax.rewards.decoding import decode_all
from esjax.rewards.pool import CLOSED, Pool
from esjax.rewards.prompts import (
    Prompt,
    PromptTokens,
    digest_of,
    encode_prompts,
    read_prompts,
    split_prompts,
    tokens_of,
)
from esjax.rewards.tools import ToolUse, WriteOn

WHERE = "put the run's prompts there, or name their place: `esjax resume`, or on a host `join`, --reward.prompts FILE"
"""Way out for prompts that are elsewhere."""


@runtime_checkable
class _Caller(Protocol):
    """Makes calls of a function: a `Pool`, or this process."""

    calls: int
    """Calls that have ended so far, about."""

    def load(self) -> Failure | None: ...

    def score(self, texts: Texts) -> list[Future[Scored]]: ...

    def close(self) -> None: ...


class Scorer:
    """Scores what members wrote.

    Attributes:
        prompts: The training prompts, encoded.
        held_out: The held-out prompts.
        vocabulary: Turns texts into tokens and back.
        stops: Tokens that end a completion.
        tool: Calls the tool; None without one.
        failures: Calls that failed so far.
    """

    def __init__(
        self,
        config: RewardConfig,
        prompts: Sequence[Prompt],
        vocabulary: Vocabulary,
        reward: tuple[str, _Caller],
        tool: tuple[str, _Caller] | None,
        tell: Callable[[str], None],
    ) -> None:
        """Set up with names and callers; use `make_scorer`."""
        trained, self.held_out = split_prompts(prompts, config.held_out)
        self.prompts = encode_prompts(trained, vocabulary)
        self._texts, self._answers = _arrays(trained)
        self.stops = tokens_of(config.stop, "stop", vocabulary)
        self.vocabulary = vocabulary
        self.failures = 0
        self._reward, self._tell = reward, tell
        self._callers = [(f"reward {reward[0]}", reward[1])]
        self._reported: set[str] = set()
        self._means: list[NamedMean] = []
        self.tool: ToolUse | None = None
        if tool is not None:
            name, caller = tool
            self._callers.append((f"tool {name}", caller))
            pauses = tokens_of(config.tool_at, "tool_at", vocabulary)

            def call(texts: Texts) -> Scored:
                return _collect(caller.score(texts), 1)

            def report(texts: Texts, failure: Failure) -> None:
                self._failed(f"tool {name}", texts, failure)

            self.tool = ToolUse(pauses, config.tool_calls, vocabulary, call, report)

    def finish(
        self,
        drawn: Int[ndarray, "pairs prompts"],
        tokens: Int[ndarray, "pairs members prompts length"],
        write_on: WriteOn,
    ) -> tuple[Int[ndarray, "pairs members prompts length"], Bool[ndarray, " pairs"]]:
        """Call the tool for members that paused, and let them write on.

        Args:
            drawn: Numbers of each pair's prompts.
            tokens: What the members of each pair wrote after them.
            write_on: Continues the texts.

        Returns:
            The completions, and whether a call of the tool failed.
        """
        assert self.tool is not None
        numbers = _for_members(drawn, tokens)
        encoded = PromptTokens(self.prompts.tokens[numbers], self.prompts.lengths[numbers])
        prompts = self._texts[numbers].tolist()
        written = self.tool.finish(prompts, encoded, tokens.reshape(-1, tokens.shape[-1]), write_on)
        return written.tokens.reshape(tokens.shape), np.any(written.failed.reshape(len(tokens), -1), axis=1)

    def losses(
        self,
        drawn: Int[ndarray, "pairs prompts"],
        tokens: Int[ndarray, "pairs members prompts length"],
        failed: Bool[ndarray, " pairs"],
    ) -> Callable[[], Float32[ndarray, "pairs members"]]:
        """Begin to score members' completions.

        Args:
            drawn: Numbers of each pair's prompts.
            tokens: What the members of each pair wrote after them.
            failed: Pairs that get no loss, since a call of the tool failed.

        Returns:
            A function that waits for the losses, minus the mean reward over a member's prompts. A pair whose call
            failed gets NaN.
        """
        numbers = _for_members(drawn, tokens)
        prompts, answers = self._texts[numbers].tolist(), self._answers[numbers].tolist()
        wait_for = self._begin(prompts, answers, tokens.reshape(-1, tokens.shape[-1]), len(numbers) // len(drawn))

        def wait() -> Float32[ndarray, "pairs members"]:
            scored = wait_for()
            of_pairs = [means for number, means in scored.means.items() if not failed[number]]  # a call for each pair
            found = [NamedMean(name, value, 1) for means in of_pairs for name, value in means.items()]
            self._means = join_means([*self._means, *found])
            losses = -np.array(scored.values).reshape(tokens.shape[:3]).mean(axis=2).astype(np.float32)
            losses[failed] = np.nan
            return losses

        return wait

    def take_means(self) -> list[NamedMean]:
        """Return the mean of each reward that has a name, over the pairs of `losses` since the last time."""
        means, self._means = self._means, []
        return means

    def rewards(
        self, prompts: Sequence[Prompt], tokens: Int[ndarray, "completions length"], size: int
    ) -> Float64[ndarray, " completions"]:
        """Score completions.

        Args:
            prompts: The prompt of each completion.
            tokens: The completions.
            size: Number of completions in each call; it divides their number.

        Returns:
            The rewards; NaN in a call that failed.
        """
        texts, answers = _arrays(prompts)
        return np.array(self._begin(texts.tolist(), answers.tolist(), tokens, size)().values)

    @property
    def calls(self) -> int:
        """Calls that have ended so far, about."""
        return sum(caller.calls for _, caller in self._callers)

    def load(self) -> None:
        """Start the processes, and wait until they have loaded the reward and the tool.

        Raises:
            EsjaxError: One of them cannot load it.
        """
        for what, caller in self._callers:
            if (failure := caller.load()) is not None:
                raise EsjaxError(f"the {what} cannot be called: {failure.reason}")

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for _, caller in self._callers:
            caller.close()

    def _begin(
        self, prompts: list[str], answers: list[Any], tokens: Int[ndarray, "completions length"], size: int
    ) -> Callable[[], Scored]:
        """Begin to call the reward, and return a function that waits for the results."""
        name, caller = self._reward
        texts = Texts(size, prompts, decode_all(self.vocabulary, tokens), answers)
        futures = caller.score(texts)

        def wait() -> Scored:
            scored = _collect(futures, size)
            for number, failure in scored.failures.items():
                self._failed(f"reward {name}", texts.part(number, number + 1), failure)
            return scored

        return wait

    def _failed(self, what: str, texts: Texts, failure: Failure) -> None:
        if failure.kind == CLOSED:
            return
        self.failures += 1
        kind = f"{what}: {failure.kind}"
        if kind not in self._reported:
            self._reported.add(kind)
            self._tell(
                f"the {what} failed: {failure.reason}; prompt {texts.prompts[0][:SHOWN]!r}, completion "
                f"{texts.completions[0][:SHOWN]!r}. Such pairs do not count; more failures of this kind are not shown"
            )


def _arrays(prompts: Sequence[Prompt]) -> tuple[ndarray, ndarray]:
    """Return the texts and the answers of prompts as arrays of objects, which numpy draws from fast."""
    found = np.empty((2, len(prompts)), object)
    for number, prompt in enumerate(prompts):
        found[:, number] = prompt
    return found[0], found[1]


def _for_members(
    drawn: Int[ndarray, "pairs prompts"], tokens: Int[ndarray, "pairs members prompts length"]
) -> Int[ndarray, " texts"]:
    """Return the number of the prompt of each text that members wrote."""
    return np.repeat(drawn[:, None], tokens.shape[1], axis=1).ravel()


def _collect(futures: Sequence[Future[Scored]], size: int) -> Scored:
    """Wait for the results of calls of `size` texts each, and join them."""
    scored = Scored.nothing()
    for future in futures:
        scored.add(future.result(), size)
    return scored


class _Here:
    """Makes calls in this process, at once."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.calls = 0

    def load(self) -> None:
        pass

    def score(self, texts: Texts) -> list[Future[Scored]]:
        scored = Scored.nothing()
        for number in range(texts.calls):
            scored.add_call(self._call(texts, number), texts.size)
            self.calls += 1
        future: Future[Scored] = Future()
        future.set_result(scored)
        return [future]

    def close(self) -> None:
        pass


def begin(config: Config, custom: Custom) -> Config:
    """Record in the settings of a new run a hash of its prompts, which all of its hosts must share.

    Raises:
        EsjaxError: There is a reward in Python without prompts, or the other way round; or the prompts cannot be read.
    """
    check_reward(config, custom)
    if config.reward.prompts is None:
        return config
    return replace(config, reward=replace(config.reward, digest=digest_of(read_prompts(config.reward.prompts))))


def move_prompts(config: Config, place: str) -> Config:
    """Return settings that name a new place of a run's prompts.

    Raises:
        EsjaxError: The run has no prompts, or these are not its own, or they cannot be read.
    """
    if not config.writes:
        raise EsjaxError("the run has no prompts; leave the new place of its prompts out")
    moved = replace(config, reward=replace(config.reward, prompts=str(given_path(place))))
    _same_prompts(moved.reward)
    return moved


def _same_prompts(config: RewardConfig) -> list[Prompt]:
    """Read the prompts of a run, and compare them with the recorded hash."""
    assert config.prompts is not None
    try:
        prompts = read_prompts(config.prompts)
    except EsjaxError as error:
        raise EsjaxError(f"{error}; {WHERE}") from error
    if config.digest and digest_of(prompts) != config.digest:
        raise EsjaxError(f"the prompts {config.prompts!r} are not those that the run was begun with; {WHERE}")
    return prompts


def check_reward(config: Config, custom: Custom) -> None:
    """Check that a reward in Python has prompts, and that prompts and a tool have such a reward.

    Raises:
        EsjaxError: Something is missing.
    """
    if custom.text_reward is not None and not config.writes:
        raise EsjaxError(
            f"the reward {name_of(custom.text_reward)} scores completions of prompts; name their file: "
            "--reward.prompts FILE, in Python esjax.Config(reward=esjax.RewardConfig(prompts=FILE))"
        )
    if custom.tool is not None and custom.text_reward is None:
        raise EsjaxError(
            f"the tool {name_of(custom.tool)} is for text that a reward in Python scores; give --reward.function, or "
            "leave the tool out"
        )
    if custom.text_reward is None and config.writes:
        raise EsjaxError(
            f"reward.prompts {config.reward.prompts} is for a reward in Python, (prompts, completions) -> list of "
            "floats; give one as --reward.function PATH.py:FUNCTION, in Python reward=, or leave the prompts out"
        )


def make_scorer(config: Config, custom: Custom, vocabulary: Vocabulary, tell: Callable[[str], None]) -> Scorer | None:
    """Make the scorer of a run; None for a run without a reward in Python.

    Raises:
        EsjaxError: The prompts cannot be read or are not those of the run, or the reward cannot be given to processes.
    """
    check_reward(config, custom)
    reward, settings = custom.text_reward, config.reward
    if reward is None or settings.prompts is None:
        return None
    if jax.process_count() > 1:
        raise EsjaxError(
            "a reward in Python is scored by one process; leave --distributed out, and start a host for each process"
        )
    prompts = _same_prompts(settings)
    processes = len(available_cores()) if settings.processes is None else settings.processes

    def caller_of(kind: Kind, function: Callable[..., Any]) -> tuple[str, _Caller]:
        if processes:
            code = code_of(custom, kind, function)
            return name_of(function), Pool(code, processes, settings.seconds, kind, settings.weights)
        return name_of(function), _Here(make_call(kind, function, settings.weights))

    tool = None if custom.tool is None else caller_of("tool", custom.tool)
    return Scorer(settings, prompts, vocabulary, caller_of("reward", reward), tool, tell)


def code_of(custom: Custom, kind: Kind, function: Callable[..., Any]) -> Code:
    """Return the file that a worker process finds a function in.

    Raises:
        EsjaxError: It is not a function at the top of a file that can be imported.
    """
    if kind in custom.code:
        return custom.code[kind]
    name, module = getattr(function, "__qualname__", "."), sys.modules.get(getattr(function, "__module__", ""))
    file = inspect.getsourcefile(module) if module is not None and hasattr(module, "__file__") else None
    if file is None or module is None or module.__name__ == "__main__" or getattr(module, name, None) is not function:
        raise EsjaxError(
            f"the {kind} {name_of(function)} is not a function at the top of an imported file, so worker processes "
            "cannot load it; put it into a file and give PATH.py:FUNCTION, or set reward.processes 0 to call it in "
            "this process"
        )
    return Code.of(str(Path(file).absolute()), name, Path(file).read_bytes())
