"""Reads a local folder of a pretrained model as Hugging Face lays it out.

config.json                 settings of the model
model.safetensors           the weights; or model.safetensors.index.json and the files that it names
tokenizer.json              the tokenizer
tokenizer_config.json       names the token that ends a text; without it, config.json gives its id
"""

import json
from pathlib import Path
from typing import Any

from numpy import ndarray

from esjax.config.models import LlamaConfig
from esjax.data.text_files import read_text
from esjax.data.tokenizer import TokenizerVocabulary, library, make_vocabulary
from esjax.errors import EsjaxError
from esjax.texts import first_line
from esjax.weights.llama_weights import Kind, Pretrained, Tensors, assemble, make_config, unknown_of
from esjax.weights.safetensors import safetensors_library

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "output": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "logits": "lm_head.weight",
}
"""Names of the tensors, see `esjax.weights.llama_weights.Tensors`."""


def read_folder(folder: Path, context: int | None, kind: Kind) -> Pretrained:
    """Read a pretrained model.

    Args:
        folder: The folder.
        context: See `esjax.load_pretrained`.
        kind: Type of the weights.

    Raises:
        EsjaxError: A file is missing or damaged, the model is no Llama, or a library is missing.
    """
    file, settings = folder / "config.json", _read_json(folder / "config.json")
    try:
        config, vocab_size = _make_config(str(file), settings, context), int(settings["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise EsjaxError(f"{str(file)!r} lacks a setting of a Llama model, or it has a wrong type: {error}") from error
    vocabulary = _read_vocabulary(folder, settings)
    tensors = _open_tensors(folder)
    return Pretrained(config, vocabulary, assemble(tensors, config, vocab_size, vocabulary, kind))


def _make_config(file: str, settings: dict[str, Any], context: int | None) -> LlamaConfig:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}  # by version of transformers
    if not isinstance(rope, dict):
        raise TypeError(f"rope_scaling is {rope!r}")
    head_size = settings["hidden_size"] // max(settings["num_attention_heads"], 1)  # LlamaConfig refuses 0 heads
    wanted = {
        "model_type": (settings.get("model_type"), "llama"),
        "hidden_act": (settings.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(settings.get("attention_bias")), False),
        "mlp_bias": (bool(settings.get("mlp_bias")), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "head_dim": (settings.get("head_dim") or head_size, head_size),
    }
    for name, (found, known) in wanted.items():
        if found != known:
            raise EsjaxError(f"{name} of {file!r} is {found!r}; esjax reads models with {known!r} alone")
    return make_config(
        file,
        context,
        int(settings["max_position_embeddings"]),
        {
            "hidden_size": settings["hidden_size"],
            "mlp_size": settings["intermediate_size"],
            "n_layers": settings["num_hidden_layers"],
            "n_heads": settings["num_attention_heads"],
            "n_kv_heads": settings.get("num_key_value_heads") or settings["num_attention_heads"],
            "rope_theta": float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
            "norm_eps": float(settings["rms_norm_eps"]),
            "tied": bool(settings.get("tie_word_embeddings", False)),
        },
    )


def _read_vocabulary(folder: Path, settings: dict[str, Any]) -> TokenizerVocabulary:
    file = folder / "tokenizer.json"
    text = read_text(file)
    plain = make_vocabulary(text, repr(str(file)))
    tokenizer = library().Tokenizer.from_str(plain.json)
    more = folder / "tokenizer_config.json"
    end = _read_json(more).get("eos_token") if more.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    ids = settings.get("eos_token_id")
    stop_id = tokenizer.token_to_id(end) if isinstance(end, str) else ids[0] if isinstance(ids, list) and ids else ids
    if type(stop_id) is not int:
        raise EsjaxError(
            f"{str(folder)!r} does not name the token that ends a text; put its id into config.json, as eos_token_id"
        )
    return make_vocabulary(text, repr(str(file)), unknown_id=unknown_of(tokenizer, stop_id), stop_id=stop_id)


def _open_tensors(folder: Path) -> Tensors:
    """Open the files of weights; tensors are read from the disk when they are asked for."""
    safetensors = safetensors_library()
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = {single}
    else:
        weight_map = _read_json(index).get("weight_map", {})
        files = {folder / Path(str(name)).name for name in weight_map.values()}
    places = {}
    for file in sorted(files):
        try:
            opened = safetensors.safe_open(file, "numpy")
            places.update(dict.fromkeys(opened.keys(), opened))
        except (OSError, safetensors.SafetensorError) as error:
            raise EsjaxError(f"cannot read {str(file)!r} as safetensors: {first_line(error)}") from error

    def read(name: str) -> ndarray:
        try:
            return places[name].get_tensor(name)
        except AttributeError as error:  # numpy has no such type
            kind = places[name].get_slice(name).get_dtype()
            raise EsjaxError(f"tensor {name} of {path!r} is {kind}; convert it to F32, F16 or BF16") from error

    path = str(single if single.exists() else folder)
    return Tensors(path, NAMES, read)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(file))
    except ValueError as error:
        raise EsjaxError(f"cannot read {str(file)!r} as JSON: {error}") from error
    if not isinstance(value, dict):
        raise EsjaxError(f"{str(file)!r} is no JSON object")
    return value
