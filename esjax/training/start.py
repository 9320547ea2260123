"""The weights that a run starts from: those of another run, or of a file."""

import tempfile
from dataclasses import replace as with_parts
from pathlib import Path
from typing import NamedTuple

from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, replace
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import LoadedRun, load, load_custom_model
from esjax.models.custom import Custom
from esjax.models.model import Params
from esjax.paths import given_path
from esjax.runs.folder import RunFolder
from esjax.weights.files import import_weights


class Start(NamedTuple):
    """What a run starts with.

    Attributes:
        config: Settings of the run, with the model and the vocabulary of the weights.
        custom: Custom parts of the run, with the model of the weights if that is custom.
        vocabulary: Vocabulary of the weights; None: there are no weights.
        params: The weights; None: random ones.
    """

    config: Config
    custom: Custom
    vocabulary: Vocabulary | None = None
    params: Params | None = None


def start_of(config: Config, custom: Custom) -> Start:
    """Load the weights that the setting `init` names.

    The averaged weights of a run are taken, with its model and vocabulary; with its text, too, unless the settings name
    one.

    Raises:
        EsjaxError: The weights cannot be read, or the settings ask for another model or vocabulary.
    """
    if config.init is None:
        return Start(config, custom)
    path = given_path(config.init)
    if path.suffix not in (".safetensors", ".npy"):
        if not path.is_dir():
            raise EsjaxError(f"init {str(path)!r} is neither a run folder nor a file of weights (.safetensors, .npy)")
        return _start_with(config, custom, path, str(path))
    with tempfile.TemporaryDirectory() as folder:
        import_weights(path, Path(folder) / "run", model=custom.model)
        return _start_with(config, custom, Path(folder) / "run", str(path))


def _start_with(config: Config, custom: Custom, folder: Path, name: str) -> Start:
    run = RunFolder(folder)
    found = load_custom_model(run, custom.model, "esjax.train", lambda line: None)
    loaded = load(folder, model=found.model)
    if found.model is None and config.model not in (GruConfig(), loaded.config.model):
        raise EsjaxError(
            f"init {name!r} holds the model {loaded.config.model}, and the settings ask for {config.model}; leave the "
            "settings of the model out"
        )
    if custom.model is None and found.model is not None:
        code = {**custom.code, **{kind: code for kind, code in found.code.items() if kind == "model"}}
        custom = with_parts(custom, model=found.model, code=code)
    data = _data(config.data, loaded, name)
    config = replace(config, init=name, model=loaded.config.model, data=data)
    return Start(config, custom, loaded.vocabulary, loaded.params)


def _data(data: DataConfig, loaded: LoadedRun, name: str) -> DataConfig:
    """Return the settings of the data, with the vocabulary of the weights."""
    theirs, vocabulary = loaded.config.data, loaded.vocabulary
    if data.text == DataConfig().text and RunFolder(loaded.path).text_digest:
        data = replace(data, text=theirs.text, documents=theirs.documents, held_out=theirs.held_out)
    symbols = "".join(vocabulary.symbols) or None
    kind = theirs.vocabulary if vocabulary.kind == "tokenizer" else vocabulary.kind
    asked = {"vocabulary": data.vocabulary, "symbols": data.symbols, "vocab_size": data.vocab_size}
    has = {"vocabulary": kind, "symbols": symbols, "vocab_size": vocabulary.size}
    for setting, value in asked.items():
        if value != getattr(DataConfig(), setting) and value != has[setting]:
            raise EsjaxError(
                f"init {name!r} was trained with data.{setting} {has[setting]!r}, and the settings ask for {value!r}; "
                f"leave data.{setting} out"
            )
    return replace(data, vocabulary=kind, symbols=symbols, vocab_size=None)
