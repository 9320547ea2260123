"""The weights that a run starts from: those of another run, or of a file, known by their hash."""

import tempfile
from dataclasses import replace as with_parts
from pathlib import Path
from typing import NamedTuple

from esjax.config.custom_names import SHOWN
from esjax.config.settings import Config, DataConfig, replace
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import LoadedRun, load, load_custom_model
from esjax.models.custom import Custom
from esjax.models.model import Params
from esjax.paths import given_path
from esjax.runs.checkpoint import digest
from esjax.runs.folder import RunFolder
from esjax.weights.files import import_weights


class Start(NamedTuple):
    """What a run starts with.

    Attributes:
        config: Settings of the run, with the model, the vocabulary and the hash of the weights.
        custom: Custom parts of the run, with the model of the weights if that is custom.
        vocabulary: Vocabulary of the weights; None: there are no weights.
        params: The weights; None: random ones.
    """

    config: Config
    custom: Custom
    vocabulary: Vocabulary | None = None
    params: Params | None = None


def start_of(config: Config, custom: Custom) -> Start:
    """Load the weights that the setting `init` names, for a new run.

    The averaged weights of a run are taken, with its model and vocabulary; with its text, too, unless the settings name
    another than the default.

    Raises:
        EsjaxError: The weights cannot be read, or the settings ask for another model or vocabulary.
    """
    if config.init is None:
        return Start(config, custom)
    path = given_path(config.init)
    found, loaded = _load(path, custom)
    name = str(path)
    if found.model is None and config.model not in (Config().model, loaded.config.model):
        raise EsjaxError(
            f"init {name!r} holds the model {loaded.config.model}, and the settings ask for {config.model}; leave the "
            "settings of the model out"
        )
    if custom.model is None and found.model is not None:
        code = {**custom.code, **{kind: code for kind, code in found.code.items() if kind == "model"}}
        custom = with_parts(custom, model=found.model, code=code)
    data = _data(config.data, loaded, name)
    config = replace(config, init=name, init_digest=digest(loaded.params), model=loaded.config.model, data=data)
    return Start(config, custom, loaded.vocabulary, loaded.params)


def first_params(config: Config, custom: Custom, init: Path | None = None) -> Params | None:
    """Load the weights that a run began with; None: random ones.

    Args:
        config: Settings of the run.
        custom: Custom parts of the run.
        init: Place of the weights, as in the setting `init`. None: the place in the settings.

    Raises:
        EsjaxError: The weights cannot be read, or are not those that the run began with.
    """
    if config.init is None:
        return None
    path = init or given_path(config.init)
    if path.is_dir() and custom.model is None and _has_model_code(RunFolder(path)):
        # A host gets this path from a coordinator, and must not run code that it was not given.
        raise EsjaxError(f"{str(path)!r} holds a custom model, and the run has none; give the weights of the run")
    params: Params = _load(path, custom)[1].params
    found = digest(params)
    if config.init_digest not in ("", found):
        raise EsjaxError(
            f"the weights of {str(path)!r} (hash {found[:SHOWN]}) are not those that the run began with "
            f"({config.init_digest[:SHOWN]}); put the old ones there"
        )
    return params


def _has_model_code(run: RunFolder) -> bool:
    return "model" in {*run.custom, *run.code}


def _load(path: Path, custom: Custom) -> tuple[Custom, LoadedRun]:
    """Load the weights of a run or a file, and the custom model, if that is what they are of."""
    if path.suffix not in (".safetensors", ".npy"):
        if not path.is_dir():
            raise EsjaxError(f"init {str(path)!r} is neither a run folder nor a file of weights (.safetensors, .npy)")
        return _load_run(path, custom)
    with tempfile.TemporaryDirectory() as folder:
        import_weights(path, Path(folder) / "run", model=custom.model)
        return _load_run(Path(folder) / "run", custom)


def _load_run(folder: Path, custom: Custom) -> tuple[Custom, LoadedRun]:
    found = load_custom_model(RunFolder(folder), custom.model, "esjax.train", lambda line: None)
    return found, load(folder, model=found.model)


def _data(data: DataConfig, loaded: LoadedRun, name: str) -> DataConfig:
    """Return the settings of the data, with the vocabulary of the weights."""
    theirs, vocabulary = loaded.config.data, loaded.vocabulary
    if data.text == DataConfig().text and Path(name).is_dir() and RunFolder(loaded.path).text_digest:
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
