"""Generation, evaluation and plots, for a run in training and for a loaded run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from esjax.data.corpus import Corpus, Split
from esjax.errors import EsjaxError
from esjax.inference.language_model import Evaluation, LanguageModel, Written
from esjax.models.model import Params
from esjax.runs.reader import RunView
from esjax.watch.downsampling import Axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunInference(ABC):
    """Base class of `Trainer` and `LoadedRun`.

    Attributes:
        baselines: Nats per token of the n-gram models over the held-out documents of the run's text; empty if not
            computed yet.
    """

    baselines: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def _now(self) -> tuple[LanguageModel, Params]:
        """Return the language model and the current parameters."""

    @abstractmethod
    def _text(self, text: str | None) -> Corpus:
        """Read a text, named as in the setting data.text, with the run's vocabulary. None: the run's text."""

    @abstractmethod
    def _training_text(self, text: Corpus) -> Corpus:
        """Return the text that the run was trained on; `text` is returned if it is that text.

        Raises:
            EsjaxError: The text is missing or has changed.
        """

    @abstractmethod
    def _view(self) -> RunView:
        """Return the run's settings and metrics."""

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 400,
        count: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[Written]:
        """Sample continuations of a prompt, each until the end of the document or `max_tokens`.

        Args:
            prompt: Start of a document. Characters outside the vocabulary are read as UNK.
            max_tokens: Most tokens to generate, at least 1.
            count: Number of texts, at least 1; `count * max_tokens` is below 2^31.
            seed: Random seed, from 0 to 2^32 - 1. Equal seeds give equal texts.
            temperature: Divides the logits, at least 0 and finite; 0 takes the most probable token each time.
            top_k: Sample from this many most probable tokens; 0 is no limit.
            top_p: Sample from the most probable tokens whose probabilities add up to this, in (0, 1]: nucleus
                sampling (Holtzman et al. 2020, section 3.1).

        Raises:
            EsjaxError: A number is out of range.
        """
        language_model, params = self._now()
        return language_model.write(
            params,
            prompt,
            max_tokens=max_tokens,
            count=count,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )

    def search(self, prompt: str = "", *, beams: int = 4, max_tokens: int = 400) -> list[Written]:
        """Find the most probable continuations of a prompt by beam search, best first.

        Args:
            prompt: Start of a document. Characters outside the vocabulary are read as UNK.
            beams: Number of continuations to keep at every length, at least 1; its products with `max_tokens` and with
                the size of the vocabulary are below 2^31.
            max_tokens: Most tokens to generate, at least 1.

        Returns:
            At most `beams` texts, each with its log probability in nats.

        Raises:
            EsjaxError: A number is out of range.
        """
        language_model, params = self._now()
        return language_model.search(params, prompt, beams=beams, max_tokens=max_tokens)

    def evaluate(self, text: str | None = None, split: Split = "held_out") -> Evaluation:
        """Score whole documents, and n-gram models on the same documents.

        The n-gram models are fitted to the training documents of the run, as the model is. If the run's text is missing
        or has changed, they are left out, and `note` in the result says so.

        Args:
            text: Another text, named as in the setting data.text. None: the run's text.
            split: Documents to score: "train", "held_out" or "all".

        Raises:
            EsjaxError: The text cannot be read, or the split holds no document.
        """
        language_model, params = self._now()
        corpus = self._text(text)
        documents, size = corpus.split(split)
        is_measured = text is None and documents is corpus.measured
        baselines = self.baselines if is_measured else {}  # computing them takes seconds
        note = ""
        if not baselines:
            try:
                baselines = self._training_text(corpus).baselines(documents)
            except EsjaxError as error:
                note = f"n-gram models are left out: {str(error).partition(';')[0]}"
        return language_model.score(params, documents, size, baselines, note)

    def plot(
        self,
        *,
        out: str | Path | None = None,
        over: Axis = "steps",
        log_x: bool = False,
        log_y: bool = False,
        smoothing: float = 0.0,
    ) -> "Figure":
        """Draw the run's loss curves.

        Args:
            out: File to write, .png, .svg or .pdf. None: no file.
            over: Horizontal axis: "steps", "seconds" or "member-tokens".
            log_x: Whether the horizontal axis is logarithmic.
            log_y: Whether the axis of the loss is logarithmic.
            smoothing: Steps over which the loss of the population is averaged exponentially; 0 is no smoothing.

        Raises:
            EsjaxError: No step is finished, no loss is finite, matplotlib is missing, or the file cannot be written.
        """
        from esjax.watch.plotting import plot

        return plot(self._view(), out=out, over=over, log_x=log_x, log_y=log_y, smoothing=smoothing)
