"""Tools that members call while they write: a Python function puts its answer into the text, and they write on."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary
from esjax.rewards.calls import SHOWN, Failure, Scored, Texts
from esjax.rewards.decoding import decode_all
from esjax.rewards.prompts import PromptTokens

Ids = Int[ndarray, "texts longest"]
Counts = Int[ndarray, " texts"]

WriteOn = Callable[[Ids, Counts, Counts], Int[ndarray, "texts length"]]
"""`(tokens, lengths, begun) -> more`: lets members continue texts, see `esjax.rewards.writing.Prompted`."""


class Written(NamedTuple):
    """Completions that hold the answers of a tool.

    Attributes:
        tokens: The completions, int32 [texts, length]; STOP fills the rest of a row.
        failed: Whether a call of the tool failed, bool [texts].
    """

    tokens: Int[ndarray, "texts length"]
    failed: Bool[ndarray, " texts"]


class ToolUse:
    """Calls a tool for members, and lets them write on.

    Attributes:
        pauses: Tokens after which the tool is called.
    """

    def __init__(
        self,
        pauses: tuple[int, ...],
        most: int,
        vocabulary: Vocabulary,
        call: Callable[[Texts], Scored],
        report: Callable[[Texts, Failure], None],
    ) -> None:
        """Set up.

        Args:
            pauses: Tokens after which the tool is called.
            most: Most calls in a completion.
            vocabulary: Turns texts into tokens and back.
            call: Calls the tool with each of some texts, and waits for all answers.
            report: Called with each text for which the tool failed.
        """
        self.pauses = pauses
        self._most, self._vocabulary, self._call, self._report = most, vocabulary, call, report

    def finish(
        self,
        prompts: Sequence[str],
        encoded: PromptTokens,
        tokens: Int[ndarray, "texts length"],
        write_on: WriteOn,
    ) -> Written:
        """Call the tool for each text that paused, and let members write on, until none pauses.

        Args:
            prompts: The prompt of each text.
            encoded: The same prompts as tokens.
            tokens: What members wrote until they ended or paused.
            write_on: Continues texts. It gets all of them each time, so its arrays keep their shapes.
        """
        tokens, (texts, length) = tokens.copy(), tokens.shape
        rows, places = np.arange(texts), np.arange(length)
        failed, begun = np.zeros(texts, bool), np.zeros(texts, np.int32)
        whole = np.pad(encoded.tokens, [(0, 0), (0, length)], constant_values=STOP)
        for _ in range(self._most):
            ends = (tokens != STOP).sum(axis=1, dtype=np.int32)
            paused = np.isin(tokens[rows, ends - 1], self.pauses) & (begun < ends) & (ends < length)
            waiting = np.flatnonzero(paused & ~failed)
            if not len(waiting):
                break
            for row, answer in self._answers(prompts, tokens, waiting):
                if answer is None:
                    failed[row] = True
                    continue
                answer = answer[: length - ends[row]]
                tokens[row, ends[row] : ends[row] + len(answer)] = answer
            begun = np.where(paused, (tokens != STOP).sum(axis=1, dtype=np.int32), length)
            whole[rows[:, None], encoded.lengths[:, None] + places] = tokens
            more = write_on(whole, encoded.lengths + np.minimum(begun, length), begun)
            is_new = (places >= begun[:, None]) & ~failed[:, None]
            tokens = np.where(is_new, np.take_along_axis(more, np.maximum(places - begun[:, None], 0), axis=1), tokens)
        return Written(tokens, failed)

    def _answers(
        self, prompts: Sequence[str], tokens: Int[ndarray, "texts length"], waiting: Int[ndarray, " waiting"]
    ) -> Iterator[tuple[int, Int[ndarray, " answer"] | None]]:
        """Return the tool's answer for each of these rows; None where it failed."""
        texts = Texts(
            1,
            [prompts[row] for row in waiting],
            decode_all(self._vocabulary, tokens[waiting]),
            [None] * len(waiting),
        )
        answers, failures, _ = self._call(texts)
        for number, (row, answer) in enumerate(zip(waiting.tolist(), answers, strict=True)):
            failure = failures.get(number)
            encoded: Int[ndarray, " answer"] | None = None
            if failure is None and (unknown := self._vocabulary.unknown(answer)):
                shown = answer[:SHOWN]
                failure = Failure("unknown", f"it returned {shown!r}; the vocabulary does not hold {unknown[0]!r}")
            elif failure is None:
                encoded = self._vocabulary.encode_inner(answer)
                if (encoded == STOP).any():
                    encoded = None
                    failure = Failure("end", "it returned the token for the end of a document; leave that out")
            if failure is not None:
                self._report(texts.part(number, number + 1), failure)
            yield row, encoded
