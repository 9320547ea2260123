"""A finished or running run, read from its folder to write text and to be scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from esjax.carrying import first_states
from esjax.checkpoint import restore_newest
from esjax.config import Config, replace
from esjax.data.corpus import Corpus, load_corpus
from esjax.data.vocabulary import Vocabulary
from esjax.devices import local_mesh
from esjax.errors import EsjaxError
from esjax.es import TrainState, init_state
from esjax.flags import default_flags
from esjax.models.model import ModelFactory, Params
from esjax.optimizer import make_optimizer
from esjax.own import Own
from esjax.run_folder import RunFolder
from esjax.runs import RunView, read_run
from esjax.trained import Trained
from esjax.usable import Usable


@dataclass(frozen=True, repr=False, eq=False)
class Loaded(Usable):
    """A model read back from its run folder.

    Attributes:
        path: The folder.
        config: The run's settings.
        vocabulary: From characters or bytes to ids.
        own: Names of a loss, reward, model or optimizer of its own that it was trained with, by kind.
        step: Steps it was trained for.
        params: The weights to use: the average that the settings ask for.
        trained: Compiled functions around it.
    """

    path: Path
    config: Config
    vocabulary: Vocabulary
    own: Mapping[str, str]
    step: int
    params: Params
    trained: Trained

    def __repr__(self) -> str:
        """Say what it is, without its weights."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<esjax model after {self.step:,} steps: {size:,} weights, {self.vocabulary.size} token ids>"

    def _now(self) -> tuple[Trained, Params]:
        return self.trained, self.params

    def _text(self, text: str | None) -> Corpus:
        data = self.config.data if text is None else replace(self.config.data, text=text)
        return load_corpus(data, self.vocabulary)

    def _view(self) -> RunView:
        return read_run(self.path)


def load_run_corpus(folder: RunFolder) -> Corpus:
    """Read the text that a run was trained on.

    Raises:
        EsjaxError: It cannot be used, has changed, or there is none.
    """
    if not folder.text_digest:
        raise EsjaxError(f"{str(folder.path)!r} holds imported weights and no text; train anew")
    corpus = load_corpus(folder.config.data, folder.vocabulary)
    if corpus.digest != folder.text_digest:
        raise EsjaxError(
            f"the text {folder.config.data.text!r} is not the one {str(folder.path)!r} was trained on; put the old one "
            "back, or train anew"
        )
    return corpus


def load(
    path: str | Path,
    *,
    model: ModelFactory | None = None,
    optimizer: optax.GradientTransformation | None = None,
    tell: Callable[[str], None] = print,
) -> Loaded:
    """Read a run from its newest checkpoint.

    Args:
        path: Run folder.
        model: Builds the run's own model from the vocabulary's size, if it was trained with one.
        optimizer: The run's own optimizer, if it was trained with one; its state is part of a checkpoint.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        EsjaxError: It is no run folder, no checkpoint is whole, or a model or optimizer of its own is missing.
    """
    folder = RunFolder(Path(path))
    own = Own(model=model, optimizer=optimizer)
    folder.check_own(own.names(), "esjax.load", ("model", "optimizer"))
    config, vocabulary = folder.config, folder.vocabulary
    built = own.build(config.model, vocabulary.size)
    optimizer = optimizer or make_optimizer(config.optim, config.steps)
    mesh = local_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())  # not the devices of the machine that saved it

    def first() -> TrainState:
        params = built.init(jax.random.key(0))
        return init_state(params, optimizer, first_states(config, built, params))

    with default_flags():
        shapes = jax.eval_shape(first)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
    state = restore_newest(folder.checkpoints, like, tell).state
    trained = Trained(built, vocabulary, mesh)
    return Loaded(folder.path, config, vocabulary, folder.own, int(state.step), state.average, trained)
