"""From tokens that members wrote to the losses of their pairs: decode, call the reward, collect, count failures."""

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32, Float64, Int
from numpy import ndarray

from esjax.config.custom_names import Code, name_of
from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, replace
from esjax.data.tokens import STOP
from esjax.data.vocabulary import FIRST, UNKNOWN_MARK, Vocabulary
from esjax.errors import EsjaxError
from esjax.models.custom import Custom
from esjax.rewards.calls import Failure, Scored, TextReward, Texts, call, takes_answers
from esjax.rewards.pool import CLOSED, Pool
from esjax.rewards.prompts import Prompt, digest_of, encode_prompts, read_prompts, split_prompts, stop_tokens

SHOWN = 80
"""Most characters of a prompt or a completion that a message shows."""


@runtime_checkable
class _Caller(Protocol):
    """Makes calls: a `Pool`, or this process."""

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
        stops: Tokens that end a completion.
        failures: Calls that failed so far.
    """

    def __init__(
        self,
        config: RewardConfig,
        prompts: Sequence[Prompt],
        vocabulary: Vocabulary,
        caller: _Caller,
        name: str,
        tell: Callable[[str], None],
    ) -> None:
        """Set up; use `make_scorer`."""
        self._texts, self.held_out = split_prompts(prompts, config.held_out)
        self.prompts = encode_prompts(self._texts, vocabulary)
        self.stops = stop_tokens(config.stop, vocabulary)
        self.vocabulary = vocabulary
        self.failures = 0
        self._caller, self._name, self._tell = caller, name, tell
        self._reported: set[str] = set()

    def losses(
        self, drawn: Int[ndarray, "pairs prompts"], tokens: Int[ndarray, "pairs members prompts length"]
    ) -> Callable[[], Float32[ndarray, "pairs members"]]:
        """Begin to score members' completions.

        Args:
            drawn: Numbers of each pair's prompts.
            tokens: What the members of each pair wrote after them.

        Returns:
            A function that waits for the losses, minus the mean reward over a member's prompts. A pair whose call
            failed gets NaN.
        """
        members = tokens.shape[1]
        prompts = [self._texts[number] for row in drawn.tolist() for number in row * members]
        rewards = self.rewards(prompts, tokens.reshape(-1, tokens.shape[-1]), members * drawn.shape[1])

        def wait() -> Float32[ndarray, "pairs members"]:
            return -rewards().reshape(tokens.shape[:3]).mean(axis=2).astype(np.float32)

        return wait

    def rewards(
        self, prompts: Sequence[Prompt], tokens: Int[ndarray, "completions length"], size: int
    ) -> Callable[[], Float64[ndarray, " completions"]]:
        """Begin to score completions.

        Args:
            prompts: The prompt of each completion.
            tokens: The completions.
            size: Number of completions in each call; it divides their number.

        Returns:
            A function that waits for the rewards; NaN in a call that failed.
        """
        completions = decode_all(self.vocabulary, tokens)
        texts = Texts(size, [one.text for one in prompts], completions, [one.answer for one in prompts])
        futures = self._caller.score(texts)

        def wait() -> Float64[ndarray, " completions"]:
            scored = Scored([], {})
            for future in futures:
                scored.add(future.result(), size)
            for number, failure in scored.failures.items():
                self._failed(texts.part(number, number + 1), failure)
            return np.array(scored.rewards)

        return wait

    @property
    def calls(self) -> int:
        """Calls that have ended so far, about."""
        return self._caller.calls

    def load(self) -> None:
        """Start the processes, and wait until they have loaded the reward.

        Raises:
            EsjaxError: One of them cannot load it.
        """
        failure = self._caller.load()
        if failure is not None:
            raise EsjaxError(f"the reward {self._name} cannot be called: {failure.reason}")

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        self._caller.close()

    def _failed(self, texts: Texts, failure: Failure) -> None:
        if failure.kind == CLOSED:
            return
        self.failures += 1
        if failure.kind not in self._reported:
            self._reported.add(failure.kind)
            self._tell(
                f"the reward {self._name} failed: {failure.reason}; prompt {texts.prompts[0][:SHOWN]!r}, completion "
                f"{texts.completions[0][:SHOWN]!r}. Such pairs do not count; more failures of this kind are not shown"
            )


class _Here:
    """Makes calls in this process, at once."""

    def __init__(self, reward: TextReward) -> None:
        self._reward, self._with_answers = reward, takes_answers(reward)
        self.calls = 0

    def load(self) -> None:
        pass

    def score(self, texts: Texts) -> list[Future[Scored]]:
        scored = Scored([], {})
        for number in range(texts.calls):
            scored.add_call(call(self._reward, texts.part(number, number + 1), self._with_answers), texts.size)
            self.calls += 1
        future: Future[Scored] = Future()
        future.set_result(scored)
        return [future]

    def close(self) -> None:
        pass


def decode_all(vocabulary: Vocabulary, tokens: Int[ndarray, "texts length"]) -> list[str]:
    """Decode many texts that STOP fills up, as `Vocabulary.decode` does one."""
    if vocabulary.kind != "char" or "\0" in vocabulary.symbols:
        return [vocabulary.decode(row) for row in tokens]
    table = np.full(vocabulary.size, UNKNOWN_MARK)
    table[FIRST:] = vocabulary.symbols
    table[STOP] = ""  # numpy drops it at the end of a string
    return np.ascontiguousarray(table[tokens]).view(f"<U{tokens.shape[1]}").ravel().tolist()


def begin(config: Config, custom: Custom) -> Config:
    """Record in the settings of a new run a hash of its prompts, which all of its hosts must share.

    Raises:
        EsjaxError: There is a reward in Python without prompts, or the other way round; or the prompts cannot be read.
    """
    check_reward(config, custom)
    if config.reward.prompts is None:
        return config
    return replace(config, reward=replace(config.reward, digest=digest_of(read_prompts(config.reward.prompts))))


def check_reward(config: Config, custom: Custom) -> None:
    """Check that a reward in Python has prompts, and that prompts have such a reward.

    Raises:
        EsjaxError: One of the two is missing.
    """
    if custom.text_reward is not None and not config.writes:
        raise EsjaxError(
            f"the reward {name_of(custom.text_reward)} scores completions of prompts; name their file: "
            "--reward.prompts FILE, in Python esjax.Config(reward=esjax.RewardConfig(prompts=FILE))"
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
    try:
        prompts = read_prompts(settings.prompts)
    except EsjaxError as error:
        raise EsjaxError(f"{error}; put the prompts there that the run was begun with") from error
    if settings.digest and digest_of(prompts) != settings.digest:
        raise EsjaxError(f"the prompts {settings.prompts!r} are not those that the run was begun with; put these there")
    processes = _cores() if settings.processes is None else settings.processes
    caller = Pool(code_of(custom, reward), processes, settings.seconds) if processes else _Here(reward)
    return Scorer(settings, prompts, vocabulary, caller, name_of(reward), tell)


def code_of(custom: Custom, reward: TextReward) -> Code:
    """Return the file that a worker process finds a reward in.

    Raises:
        EsjaxError: It is not a function at the top of a file that can be imported.
    """
    if "reward" in custom.code:
        return custom.code["reward"]
    name, module = getattr(reward, "__qualname__", "."), sys.modules.get(getattr(reward, "__module__", ""))
    file = inspect.getsourcefile(module) if module is not None and hasattr(module, "__file__") else None
    if file is None or module is None or module.__name__ == "__main__" or getattr(module, name, None) is not reward:
        raise EsjaxError(
            f"the reward {name_of(reward)} is not a function at the top of an imported file, so worker processes "
            "cannot load it; put it into a file and give PATH.py:FUNCTION, or set reward.processes 0 to call it in "
            "this process"
        )
    return Code(str(Path(file).absolute()), name, hashlib.sha256(Path(file).read_bytes()).hexdigest())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
