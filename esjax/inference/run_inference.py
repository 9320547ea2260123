"""What can be done with a run's weights, while they are trained and once they are loaded."""

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
    """A model that writes, is scored, and whose run is drawn.

    Attributes:
        baselines: Nats per token of the n-gram models over the held-out documents of its own text; empty if they are
            not known yet.
    """

    baselines: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def _now(self) -> tuple[LanguageModel, Params]:
        """Return the weights as they are now, and what uses them."""

    @abstractmethod
    def _text(self, text: str | None) -> Corpus:
        """Read a text, as the setting data.text names it, with the run's vocabulary; None: its own."""

    @abstractmethod
    def _training_text(self, text: Corpus) -> Corpus:
        """Return the text that the run was trained on: the one given, if it is that.

        Raises:
            EsjaxError: It cannot be found, or has changed.
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
        """Sample continuations of a prompt, each until the model ends the document or `max_tokens` are reached.

        Args:
            prompt: Start of a document; characters outside the vocabulary are read as UNK.
            max_tokens: Most tokens to write, at least 1.
            count: Number of texts, at least 1.
            seed: Names the texts: equal seeds, equal texts.
            temperature: At least 0; 0 takes the most probable token each time.
            top_k: Choose among so many most probable tokens; 0: among all.
            top_p: Choose among the most probable tokens that reach this probability together, in (0, 1].

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
            prompt: Start of a document; characters outside the vocabulary are read as UNK.
            beams: Continuations kept at every length, at least 1.
            max_tokens: Most tokens to write, at least 1.

        Raises:
            EsjaxError: A number is out of range.
        """
        language_model, params = self._now()
        return language_model.search(params, prompt, beams=beams, max_tokens=max_tokens)

    def evaluate(self, text: str | None = None, split: Split = "held_out") -> Evaluation:
        """Score whole documents, beside n-gram models fitted to the training split of the run's own text.

        So an n-gram model knows as much of another text as the model itself does. Where the run's own text cannot be
        found, or has changed, they are left out, and the `note` of what is returned says so.

        Args:
            text: As the setting data.text; None: the run's own.
            split: Which of the text's documents.

        Raises:
            EsjaxError: The text cannot be used, or the split holds no document.
        """
        language_model, params = self._now()
        corpus = self._text(text)
        documents, size = corpus.split(split)
        baselines = self.baselines if text is None and split == "held_out" else {}  # they take seconds
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
        """Draw the run's curves, as far as they go.

        Args:
            out: File to write, .png, .svg or .pdf. None: none is written.
            over: What the curves are drawn over.
            log_x: Whether that axis is logarithmic.
            log_y: Whether the loss is.
            smoothing: Steps over which the loss of the population is averaged, exponentially; 0: none.

        Raises:
            EsjaxError: No step is finished, matplotlib is missing, or the file cannot be written.
        """
        from esjax.watch.plotting import plot

        return plot(self._view(), out=out, over=over, log_x=log_x, log_y=log_y, smoothing=smoothing)
