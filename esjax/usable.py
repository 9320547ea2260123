"""What can be done with a run's weights, while they are trained and once they are loaded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from esjax.data.corpus import Corpus, Split
from esjax.errors import EsjaxError
from esjax.models.model import Params
from esjax.runs import RunView
from esjax.trained import Evaluation, Trained, Written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Usable(ABC):
    """A model that writes, is scored, and whose run is drawn.

    Attributes:
        baselines: Nats per token of the n-gram models over the held-out documents of its own text; empty if they are
            not known yet.
    """

    baselines: Mapping[str, float] = MappingProxyType({})

    @abstractmethod
    def _now(self) -> tuple[Trained, Params]:
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

    def generate(self, prompt: str = "", **settings: Any) -> list[Written]:
        """Sample texts.

        Args:
            prompt: Start of a document; characters outside the vocabulary are read as UNK.
            settings: `max_tokens`, `count`, `seed`, `temperature`, `top_k`, `top_p`, see `Trained.write`.

        Raises:
            EsjaxError: A number is out of range.
        """
        trained, params = self._now()
        return trained.write(params, prompt, **settings)

    def search(self, prompt: str = "", **settings: Any) -> list[Written]:
        """Find the most probable texts by beam search, best first.

        Args:
            prompt: Start of a document; characters outside the vocabulary are read as UNK.
            settings: `beams`, `max_tokens`, see `Trained.search`.

        Raises:
            EsjaxError: A number is out of range.
        """
        trained, params = self._now()
        return trained.search(params, prompt, **settings)

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
        trained, params = self._now()
        corpus = self._text(text)
        documents, size = corpus.split(split)
        baselines = self.baselines if text is None and split == "held_out" else {}  # they take seconds
        note = ""
        if not baselines:
            try:
                baselines = self._training_text(corpus).baselines(documents)
            except EsjaxError as error:
                note = f"n-gram models are left out: {str(error).partition(';')[0]}"
        return trained.score(params, documents, size, baselines, note)

    def plot(self, **settings: Any) -> "Figure":
        """Draw the run's curves, as far as they go.

        Args:
            settings: As for `esjax.plot`, such as `over="seconds"`.

        Raises:
            EsjaxError: No step is finished, or matplotlib is missing.
        """
        from esjax.plotting import plot

        return plot(self._view(), **settings)
