"""Loads a run from its folder, to generate text and to be scored."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from esjax.config.settings import Config, replace
from esjax.data.corpus import Corpus, load_corpus, locate_text
from esjax.data.text_files import FileRecord
from esjax.data.vocabulary import Vocabulary
from esjax.devices.mesh import local_mesh
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.inference.language_model import LanguageModel
from esjax.inference.run_inference import RunInference
from esjax.models.custom import Custom
from esjax.models.custom.code import complete, load_custom
from esjax.models.model import Model, ModelFactory, Params
from esjax.paths import given_path
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import Restored, Weights, find_newest, restore_weights
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import UPDATE, read
from esjax.runs.reader import RunView, read_run


@dataclass(frozen=True, repr=False, eq=False)
class LoadedRun(RunInference):
    """A run loaded from its folder.

    Attributes:
        path: The run folder.
        config: Settings of the run.
        vocabulary: Maps characters, bytes or subwords to token ids.
        custom: Names of the custom model, loss, reward, tool and optimizer of the run, by kind.
        step: Steps of training.
        params: The averaged parameters.
        language_model: Compiled functions of the model.
    """

    path: Path
    config: Config
    vocabulary: Vocabulary
    custom: Mapping[str, str]
    step: int
    params: Params
    language_model: LanguageModel

    def __repr__(self) -> str:
        """Describe the run, without its parameters."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<esjax model after {self.step:,} steps: {size:,} weights, {self.vocabulary.size} token ids>"

    def _now(self) -> tuple[LanguageModel, Params]:
        return self.language_model, self.params

    def _text(self, text: str | None) -> Corpus:
        data = self.config.data if text is None else replace(self.config.data, text=text)
        return load_corpus(data, self.vocabulary)

    def _training_text(self, text: Corpus) -> Corpus:
        folder = RunFolder(self.path)
        return text if text.digest == folder.text_digest else load_run_corpus(folder)

    def _view(self) -> RunView:
        return read_run(self.path)


def load_run_corpus(folder: RunFolder, text: str | None = None) -> Corpus:
    """Read the text that a run was trained on.

    Args:
        folder: The run.
        text: New place of the text, as in the setting data.text; it replaces that setting in `folder.config`. None:
            the place in the settings.

    Raises:
        EsjaxError: The text cannot be read or has changed, or the run has no text.
    """
    if not folder.text_digest:
        raise EsjaxError(f"{str(folder.path)!r} holds imported weights and no text; train anew")
    config = folder.config
    if text is not None:
        config = locate_text(replace(config, data=replace(config.data, text=text)))
    corpus = load_corpus(config.data, folder.vocabulary)
    if corpus.digest != folder.text_digest:
        raise EsjaxError(
            f"the text {config.data.text!r} is not the one {str(folder.path)!r} was trained on"
            f"{_what_changed(folder.read_text_files(), corpus.files)}; put the old one back, let data.text name where "
            "it is, or train anew"
        )
    folder.config = config
    return corpus


def _what_changed(before: Sequence[FileRecord], now: Sequence[FileRecord]) -> str:
    """Name the first of several files that differs; "" if none is known, as for a run of an earlier version."""
    if not before or not now or len(before) == len(now) == 1:
        return ""
    known, found = map(_by_name, (before, now))
    differ = [name for name in known | found if known.get(name) != found.get(name)]
    if not differ:
        return ""
    first = differ[0]
    what = "is new" if first not in known else "has changed" if first in found else "is missing"
    return f" ({first!r} {what}; {len(differ)} of {len(known | found)} files differ)"


def _by_name(files: Sequence[FileRecord]) -> dict[str, str]:
    """Return the hash of each file by its name within the folder of all: the text may have been moved."""
    folder = os.path.commonpath([os.path.dirname(file.path) for file in files])
    return {os.path.relpath(file.path, folder or None): file.digest for file in files}


def restore_run(folder: RunFolder, first: TrainState, tell: Callable[[str], None]) -> Restored:
    """Read the newest undamaged checkpoint of a run; without one, return the first state.

    The caller applies the later updates from the ledger, if the run keeps one.

    Args:
        folder: The run.
        first: State after 0 steps, from the seed; the caller replaces its weights if the run has `init`. A checkpoint
            is restored to its shardings.
        tell: Called with each line for the user, also if no other host confirmed the state.

    Raises:
        EsjaxError: The run has done steps but has neither an undamaged checkpoint nor a ledger from step 0 on; or the
            checkpoint holds the state of another model.
    """
    restored = find_newest(folder.checkpoints, first, tell)
    if restored is not None:
        if doubt := restored.doubt():
            tell(doubt)
        return restored
    path, steps = folder.path, read_run(folder.path).step
    has_ledger = folder.ledger.exists()
    records = read(folder.ledger) if has_ledger else iter(())
    begins = next((record.step for record in records if record.kind == UPDATE), None)
    if begins or (steps and not has_ledger):
        has = f"and its ledger begins at step {begins:,}" if begins else "and no ledger"
        raise EsjaxError(
            f"{str(path)!r} has no whole checkpoint, {has}: nothing can be resumed; restore what is missing "
            f"from a copy, or train anew: esjax train --config {shlex.quote(str(path / 'config.yaml'))} --out NEW"
        )
    if begins == 0 or steps:
        init = folder.config.init
        beginning = "the seed" if init is None else f"the weights of {init!r}"
        tell(f"{path} has no whole checkpoint: its state is rebuilt from {beginning} and the ledger")
    return Restored(first, 0.0, 0)


def load(
    path: str | Path,
    *,
    model: ModelFactory | str | None = None,
    tell: Callable[[str], None] = print,
) -> LoadedRun:
    """Load a run from its newest undamaged checkpoint.

    Args:
        path: Run folder.
        model: The custom model of the run, if it has one: a function from the number of token ids to an `esjax.Model`.
            A model that was given as "PATH.py:FUNCTION" is found without this argument; such a text names the new
            place of the file.
        tell: Called with a line for each damaged checkpoint, and if the code of the model has changed.

    Raises:
        EsjaxError: The path is not a run folder, no checkpoint is whole, or the custom model is missing.
    """
    folder = RunFolder(given_path(path))
    custom = load_custom_model(folder, model, "esjax.load", tell)
    config, vocabulary = folder.config, folder.vocabulary
    built = custom.build(config.model, vocabulary.size)
    weights = read_weights(folder, built, tell)
    language_model = LanguageModel(built, vocabulary, local_mesh())
    return LoadedRun(folder.path, config, vocabulary, folder.custom, int(weights.step), weights.average, language_model)


def read_weights(folder: RunFolder, model: Model, tell: Callable[[str], None]) -> Weights:
    """Read the weights of a run's newest undamaged checkpoint onto the devices of this machine.

    Args:
        folder: The run.
        model: The model of the run.
        tell: Called with a line for each damaged checkpoint.

    Raises:
        EsjaxError: No checkpoint is whole, or the checkpoint holds the weights of another model.
    """
    everywhere = NamedSharding(local_mesh(), PartitionSpec())  # the machine that saved it had other devices
    with default_flags():
        params = jax.eval_shape(model.init, jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), params)
    return restore_weights(folder.checkpoints, like, tell)


def complete_custom(folder: RunFolder, given: Custom, again: str) -> Custom:
    """Add to the custom parts that are given those that a run began with as code in files.

    Args:
        folder: The run.
        given: The custom parts that the caller gave.
        again: The function that takes them, for messages.

    Raises:
        EsjaxError: A part of the run is missing, or it is another one; or its code has changed.
    """
    custom = complete(given, folder.code)
    folder.check_custom(custom.names(), again)
    return custom


def load_custom_model(
    folder: RunFolder, model: ModelFactory | str | None, again: str, tell: Callable[[str], None]
) -> Custom:
    """Return the custom model of a run, if it was trained with one; a loss or an optimizer is not needed.

    Args:
        folder: The run.
        model: The model that the caller gave, or None.
        again: The function that takes it, for messages.
        tell: Called with a line if the code of the model has changed.

    Raises:
        EsjaxError: The custom model is missing, or it is another one.
    """
    known = {kind: code for kind, code in folder.code.items() if kind == "model"}
    custom = complete(load_custom(model=model), known, tell)
    folder.check_custom(custom.names(), again, ("model",))
    return custom
