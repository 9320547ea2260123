"""Weights of any model in a safetensors file: a tensor for each leaf, and metadata to use them.

The name of a tensor is its path in the parameters, such as `layers.0.recurrent`. The metadata are strings:

esjax        version of this layout
settings     settings of the run, as YAML
vocabulary   as in a run folder, JSON
own          JSON: under "model", the name of a custom model
step         steps of training
weights      "average": the averaged weights, which are evaluated
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy import ndarray

from esjax.config.settings import Config, from_yaml, to_yaml
from esjax.data.vocabulary import Vocabulary, parse_vocabulary
from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.flags import default_flags
from esjax.models.custom.code import load_custom
from esjax.models.model import ModelFactory, Params
from esjax.runs.folder import check_custom
from esjax.texts import first_line
from esjax.weights.start import begin_with

FORMAT = "1"
"""Version of the layout."""


def name_tensors(params: Params) -> dict[str, Any]:
    """Return the leaves by their paths in the parameters, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def export_safetensors(
    config: Config, vocabulary: Vocabulary, params: Params, step: int, custom: Mapping[str, str]
) -> bytes:
    """Return weights and metadata as the bytes of a safetensors file.

    Args:
        config: Settings of the run.
        vocabulary: Symbols of the run.
        params: The averaged weights.
        step: Steps of training.
        custom: Names of custom parts by kind; only that of a model is kept.

    Raises:
        EsjaxError: The package safetensors is missing.
    """
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in name_tensors(params).items()}
    metadata = {
        "esjax": FORMAT,
        "settings": to_yaml(config),
        "vocabulary": json.dumps(vocabulary.stored(), ensure_ascii=False),
        "own": json.dumps({kind: name for kind, name in custom.items() if kind == "model"}),
        "step": str(step),
        "weights": "average",
    }
    return safetensors_library().numpy.save(tensors, metadata)


def import_safetensors(path: Path, out: Path, model: ModelFactory | str | None = None) -> None:
    """Make a run folder, at step 0, from a file that `export_safetensors` wrote.

    Args:
        path: The file.
        out: Run folder to make.
        model: The custom model of the weights, if there is one: the function, or "PATH.py:FUNCTION".

    Raises:
        EsjaxError: The file cannot be read, was not written by esjax, or does not fit the model; or the folder exists.
    """
    read = _read(path)
    config, vocabulary = read.config, read.vocabulary
    custom = load_custom(model=model)
    check_custom(str(path), read.custom, custom.names(), "esjax.import_weights")
    built = custom.build(config.model, vocabulary.size)
    with default_flags():
        like = jax.eval_shape(lambda: built.init(jax.random.key(0)))
    expected = name_tensors(like)
    for tensor in {**expected, **read.tensors}:
        wanted, found = (_describe(tensors.get(tensor)) for tensors in (expected, read.tensors))
        if wanted != found:
            raise EsjaxError(f"{str(path)!r} does not fit the model of its settings: {tensor} is {found}, not {wanted}")
    if not all(np.isfinite(tensor).all() for tensor in read.tensors.values()):
        raise EsjaxError(f"{str(path)!r} holds weights that are not finite; it cannot be used")
    leaves = [jnp.asarray(read.tensors[tensor]) for tensor in expected]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    begin_with(params, out, config, vocabulary, read.custom, custom.code)


class _Read(NamedTuple):
    """Contents of a file."""

    config: Config
    vocabulary: Vocabulary
    custom: dict[str, str]
    tensors: dict[str, ndarray]


def _read(path: Path) -> _Read:
    library = safetensors_library()
    try:
        with library.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, TypeError, library.SafetensorError) as error:
        raise EsjaxError(f"cannot read {str(path)!r} as safetensors: {first_line(error)}") from error
    if metadata.get("esjax") != FORMAT:
        raise EsjaxError(f"{str(path)!r} was not written by esjax export, or by another version of it")
    config = from_yaml(metadata.get("settings", ""), f"settings in {path}")
    try:
        vocabulary = parse_vocabulary(json.loads(metadata["vocabulary"]))
        custom = {str(kind): str(name) for kind, name in json.loads(metadata.get("own", "{}")).items()}
    except (KeyError, ValueError, AttributeError) as error:
        raise EsjaxError(f"the metadata of {str(path)!r} are damaged; export it again") from error
    return _Read(config, vocabulary, custom, tensors)


def _describe(tensor: Any) -> str:
    return "absent" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def safetensors_library() -> ModuleType:
    """Return the library safetensors.

    Raises:
        EsjaxError: It is missing.
    """
    with needing("a file .safetensors", "safetensors"):
        import safetensors.numpy
    return safetensors
