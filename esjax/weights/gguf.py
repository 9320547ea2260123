"""Reads a Llama model in a GGUF file, the format of llama.cpp: weights, settings and tokenizer in one file.

Quantised weights (such as Q8_0, Q4_0 and Q4_1) become floats, by the library gguf. The tokenizer is rebuilt from its
tokens and merges, for the kinds in `SPLITS`.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy import ndarray

from esjax.config.models import LlamaConfig
from esjax.data.tokenizer import TokenizerVocabulary, library, make_vocabulary
from esjax.errors import EsjaxError
from esjax.extras import needing
from esjax.weights.llama_weights import Kind, Pretrained, Tensors, assemble, make_config, unknown_of

NAMES = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "output": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "norm": "output_norm.weight",
    "logits": "output.weight",
}
"""Names of the tensors, see `esjax.weights.llama_weights.Tensors`."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}],
}
"""How each kind of tokenizer cuts a text before bytes are joined, as in tokenizer.json."""

CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that a text names as a whole."""


def read_gguf(path: Path, context: int | None, kind: Kind) -> Pretrained:
    """Read a pretrained model.

    Args:
        path: The file.
        context: See `esjax.load_pretrained`.
        kind: Type of the weights.

    Raises:
        EsjaxError: The file is missing or damaged, the model is no Llama, or a library is missing.
    """
    gguf = _library()
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items() if name != "tokenizer.chat_template"}
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise EsjaxError(f"cannot read {str(path)!r} as GGUF: {error}") from error
    found = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> ndarray:
        tensor = found[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            what = f"{tensor.tensor_type.name}: {error}"
            raise EsjaxError(f"tensor {name} of {str(path)!r} cannot be read as {what}") from error
        heads = {"attn_q.weight": config.n_heads, "attn_k.weight": config.n_kv_heads}
        of = heads.get(name.partition(".")[2].partition(".")[2])
        return array if of is None else _halves(array, of)

    try:
        config = _make_config(str(path), values, set(found), context)
        vocabulary = _make_vocabulary(str(path), values)
    except KeyError as error:
        raise EsjaxError(f"{str(path)!r} has no value {error.args[0]}, which a Llama model needs") from error
    rows = int(found["token_embd.weight"].shape[1]) if "token_embd.weight" in found else 0
    return Pretrained(config, vocabulary, assemble(Tensors(str(path), NAMES, read), config, rows, vocabulary, kind))


def _halves(matrix: ndarray, heads: int) -> ndarray:
    """Sort the rows of each head: GGUF rotates the pairs (2i, 2i + 1), this model the pairs (i, i + half)."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _make_config(path: str, values: dict[str, Any], tensors: set[str], context: int | None) -> LlamaConfig:
    if values["general.architecture"] != "llama":
        raise EsjaxError(f"{path!r} is a model of the kind {values['general.architecture']!r}; esjax reads llama alone")
    of = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    head_size = of["embedding_length"] // max(of["attention.head_count"], 1)  # LlamaConfig refuses 0 heads
    plain = of.get("rope.scaling.type", "none") == "none" and "rope_freqs.weight" not in tensors
    sizes = {
        of.get(name, head_size) for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    if not plain or sizes != {head_size}:
        raise EsjaxError(f"{path!r} scales or cuts the rotary embedding; esjax reads models with the plain one alone")
    return make_config(
        path,
        context,
        of["context_length"],
        {
            "hidden_size": of["embedding_length"],
            "mlp_size": of["feed_forward_length"],
            "n_layers": of["block_count"],
            "n_heads": of["attention.head_count"],
            "n_kv_heads": of.get("attention.head_count_kv", of["attention.head_count"]),
            "rope_theta": float(of.get("rope.freq_base", 10000.0)),
            "norm_eps": float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
            "tied": NAMES["logits"] not in tensors,
        },
    )


def _make_vocabulary(path: str, values: dict[str, Any]) -> TokenizerVocabulary:
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in values.items() if "tokenizer.ggml." in name}
    kind = of.get("pre", "gpt-2") if of["model"] == "gpt2" else of["model"]
    if kind not in SPLITS:
        raise EsjaxError(
            f"the tokenizer of {path!r} is of the kind {kind!r}; esjax reads {', '.join(SPLITS)} alone: take the "
            "folder of the same model with safetensors and tokenizer.json"
        )
    tokens, stop_id = of["tokens"], of["eos_token_id"]
    special = [i for i, type_ in enumerate(of["token_type"]) if type_ in (CONTROL, USER_DEFINED)]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": kind != "llama-bpe",
    }
    begin = of["bos_token_id"] if of.get("add_bos_token", False) else None
    written = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": of["token_type"][i] == CONTROL,
            }
            for i in special
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*SPLITS[kind], byte_level]},
        "post_processor": None if begin is None else _begins_with(tokens[begin], begin),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in of["merges"]],
            "ignore_merges": kind == "llama-bpe",
        },
    }
    text = json.dumps(written)
    plain = make_vocabulary(text, repr(path))
    unknown_id = unknown_of(library().Tokenizer.from_str(plain.json), stop_id)
    return make_vocabulary(text, repr(path), unknown_id=unknown_id, stop_id=stop_id)


def _begins_with(token: str, number: int) -> dict[str, Any]:
    """Return the part of tokenizer.json that puts a token before each text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _library() -> ModuleType:
    with needing("a file .gguf", "pretrained"):
        import gguf
        import gguf.quants
    return gguf
