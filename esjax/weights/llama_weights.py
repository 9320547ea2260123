"""From the tensors of a file to the parameters of `esjax.models.llama`, one tensor at a time."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from esjax.config.models import LlamaConfig
from esjax.data.tokenizer import TokenizerVocabulary
from esjax.errors import EsjaxError
from esjax.models.layers import Norm
from esjax.models.llama import LlamaLayers, LlamaParams

Kind = Literal["float32", "bfloat16"]
"""Type of the weights in memory."""

MOST_CONTEXT = 1024
"""Context of a model unless the caller names one: caches grow with it. The model may have been trained for more."""


class Pretrained(NamedTuple):
    """A pretrained model.

    Attributes:
        config: Its settings.
        vocabulary: Its tokens; STOP is the tokenizer's end of a text.
        params: Its weights.
    """

    config: LlamaConfig
    vocabulary: TokenizerVocabulary
    params: LlamaParams


class Tensors(NamedTuple):
    """The tensors of a file.

    Attributes:
        path: Name of the file, for messages.
        names: Name of the tensor of each field of `LlamaParams` and `LlamaLayers`; {} stands for the layer.
        read: `(name) -> tensor`; a matrix is [outputs, inputs]. Raises KeyError if there is none.
    """

    path: str
    names: Mapping[str, str]
    read: Callable[[str], ndarray]


def assemble(
    tensors: Tensors, config: LlamaConfig, vocab_size: int, vocabulary: TokenizerVocabulary, kind: Kind
) -> LlamaParams:
    """Read all tensors and put the rows of the embeddings into the order of the vocabulary.

    Args:
        tensors: The file.
        config: Settings of the model.
        vocab_size: Number of embeddings in the file.
        vocabulary: Its tokens.
        kind: Type of the result.

    Raises:
        EsjaxError: A tensor is missing, has another shape or values that are not finite; or the vocabulary does not
            fit.
    """
    order, hidden, mlp = vocabulary.order, config.hidden_size, config.mlp_size
    if order.min() < 0 or order.max() >= vocab_size:
        needed = max(len(order), order.max() + 1)
        lacks = "" if vocabulary.unknown_id is not None else "; no special token but its end can be UNK"
        raise EsjaxError(f"{tensors.path!r} holds {vocab_size} embeddings, and its tokenizer needs {needed}{lacks}")
    keys = hidden // config.n_heads * config.n_kv_heads

    def take(field: str, *shape: int, layer: int = 0) -> Float32[ndarray, "..."]:
        name = tensors.names[field].format(layer)
        try:
            found = tensors.read(name)
        except KeyError as error:
            raise EsjaxError(f"{tensors.path!r} has no tensor {name}") from error
        if found.shape != shape:
            raise EsjaxError(f"tensor {name} of {tensors.path!r} is {list(found.shape)}; it must be {list(shape)}")
        found = found.astype(np.float32)
        if not np.isfinite(found).all():
            raise EsjaxError(f"tensor {name} of {tensors.path!r} holds values that are not finite")
        return found

    def norms(field: str) -> Norm:
        return Norm(_on_device(np.stack([take(field, hidden, layer=layer) for layer in range(config.n_layers)]), kind))

    def matrices(field: str, rows: int, columns: int) -> jax.Array:
        stack = np.empty((config.n_layers, rows, columns), jnp.dtype(kind))
        for layer in range(config.n_layers):
            stack[layer] = take(field, columns, rows, layer=layer).T
        return jnp.asarray(stack)

    return LlamaParams(
        embedding=_on_device(take("embedding", vocab_size, hidden)[order], kind),
        layers=LlamaLayers(
            attention_norm=norms("attention_norm"),
            query=matrices("query", hidden, hidden),
            key=matrices("key", hidden, keys),
            value=matrices("value", hidden, keys),
            output=matrices("output", hidden, hidden),
            mlp_norm=norms("mlp_norm"),
            gate=matrices("gate", hidden, mlp),
            up=matrices("up", hidden, mlp),
            down=matrices("down", mlp, hidden),
        ),
        norm=Norm(_on_device(take("norm", hidden), kind)),
        output=() if config.tied else _on_device(take("logits", vocab_size, hidden)[order].T, kind),
    )


def _on_device(array: ndarray, kind: Kind) -> jax.Array:
    return jnp.asarray(np.ascontiguousarray(array.astype(jnp.dtype(kind))))


def make_config(source: str, context: int | None, trained: int, settings: Mapping[str, Any]) -> LlamaConfig:
    """Make the settings of a model.

    Args:
        source: Name of the file, for messages.
        context: Context that the caller wants. None: `MOST_CONTEXT`, or what the model was trained for.
        trained: Context that the model was trained for.
        settings: The other settings.

    Raises:
        EsjaxError: A number is out of range.
    """
    if context is not None and not 1 <= context <= trained:
        raise EsjaxError(f"context must be from 1 to {trained}, for which {source!r} was trained, got {context}")
    try:
        return LlamaConfig(context=min(trained, MOST_CONTEXT) if context is None else context, **settings)
    except EsjaxError as error:
        raise EsjaxError(f"{source!r} cannot be used: {error}") from error


def unknown_of(tokenizer: Any, stop_id: int) -> int | None:
    """Choose the token that is UNK, which is never generated: the unknown token, or else the last special one.

    Args:
        tokenizer: A `tokenizers.Tokenizer`.
        stop_id: The id that is STOP.

    Returns:
        An id other than `stop_id`; None if there is none.
    """
    special = [i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special and i != stop_id]
    named = getattr(tokenizer.model, "unk_token", None)
    unknown = None if named is None else tokenizer.token_to_id(named)
    return unknown if unknown not in (None, stop_id) else max(special, default=None)
