"""The original program's format: a flat float32 vector and a table of characters.

The vector holds three numbers (D, V, L) and then, row by row: s0; U_i and E_i of each layer; W1; W2.
"""

import io
import json
import tokenize
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from esjax.config.models import RnnConfig
from esjax.config.settings import Config
from esjax.data.text_files import read_text
from esjax.data.vocabulary import FIRST, Vocabulary, is_symbol
from esjax.errors import EsjaxError
from esjax.models.rnn import HEAD_WIDTH, Layer, RnnParams
from esjax.weights.start import UNKNOWN_DATA, begin_with

DAMAGED = (ValueError, TypeError, SyntaxError, EOFError, MemoryError, tokenize.TokenError, zipfile.BadZipFile)
"""What NumPy raises for a damaged file; its header is a Python literal."""


def import_npy(weights: Path, characters: Path, out: Path) -> None:
    """Make a run folder, at step 0, from a file of weights and its table of characters.

    Args:
        weights: A .npy vector.
        characters: JSON: a list of characters, or of [character, count] pairs; token ids 2 and up in this order.
            Characters beyond the vocabulary of the weights are left out, as in the original program.
        out: Run folder to make.

    Raises:
        EsjaxError: A file cannot be read, the two files do not fit each other, or the folder exists.
    """
    config, params = _read_weights(weights)
    symbols = _read_characters(characters)
    vocab_size = params.head_output.shape[1]
    if len(symbols) < vocab_size - FIRST:
        raise EsjaxError(
            f"{str(characters)!r} holds {len(symbols)} characters, but {str(weights)!r} has weights for "
            f"{vocab_size - FIRST}; give the table that belongs to these weights"
        )
    vocabulary = Vocabulary("char", tuple(symbols[: vocab_size - FIRST]))
    begin_with(params, out, config, vocabulary)


def export_npy(params: RnnParams, vocabulary: Vocabulary) -> tuple[bytes, str]:
    """Return the two files that `import_npy` reads.

    Args:
        params: Weights.
        vocabulary: Characters of the weights.

    Returns:
        The bytes of the .npy file, and the table of characters as JSON.

    Raises:
        EsjaxError: The vocabulary is of bytes, which the table cannot hold.
    """
    if vocabulary.kind != "char":
        raise EsjaxError("the original's layout is for characters, and this run is of bytes; use safetensors")
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]  # a tuple's leaves come in the order of its fields
    hidden, vocab = leaves[0].size, params.head_output.shape[1]
    flat = np.concatenate([np.array([hidden, vocab, len(params.layers)]), *(leaf.ravel() for leaf in leaves)])
    file = io.BytesIO()
    np.save(file, flat.astype(np.float32))
    return file.getvalue(), json.dumps(list(vocabulary.symbols), ensure_ascii=False) + "\n"


def _read_weights(path: Path) -> tuple[Config, RnnParams]:
    try:
        flat = np.load(path, allow_pickle=False)
    except (OSError, *DAMAGED) as error:
        raise EsjaxError(f"cannot read {str(path)!r} as a .npy file of numbers: {error}") from error
    if not isinstance(flat, np.ndarray) or flat.ndim != 1 or flat.dtype.kind != "f" or flat.size < 3:
        raise EsjaxError(f"{str(path)!r} is not a vector of floats that begins with D, V, L")
    head, body = flat[:3], flat[3:].astype(np.float32)
    if not (np.isfinite(head).all() and (head == np.rint(head)).all() and (head >= (1, FIRST + 1, 1)).all()):
        raise EsjaxError(f"{str(path)!r} begins with {head.tolist()}, not with whole numbers D, V, L")
    hidden, vocab, layers = (int(number) for number in head)
    expected = hidden + layers * (hidden + vocab) * hidden + HEAD_WIDTH * hidden * (hidden + vocab)
    if body.size != expected:
        raise EsjaxError(
            f"{str(path)!r} holds {body.size} weights, but D={hidden}, V={vocab}, L={layers} need {expected}"
        )
    if not np.isfinite(body).all():
        raise EsjaxError(f"{str(path)!r} holds weights that are not finite; it cannot be used")
    config = Config(model=RnnConfig(hidden_size=hidden, n_layers=layers), data=UNKNOWN_DATA)
    return config, unflatten(body, hidden, vocab, layers)


def unflatten(flat: Float32[ndarray, " weights"], hidden: int, vocab: int, layers: int) -> RnnParams:
    """Cut the flat vector into parameters.

    Args:
        flat: The weights after D, V and L.
        hidden: Width of the state, D.
        vocab: Number of token ids, V.
        layers: Number of layers, L.
    """
    rest = flat

    def take(*shape: int) -> jnp.ndarray:
        nonlocal rest
        count = int(np.prod(shape))
        part, rest = rest[:count], rest[count:]
        return jnp.asarray(part.reshape(shape))

    return RnnParams(
        start=take(hidden),
        layers=tuple(Layer(take(hidden, hidden), take(vocab, hidden)) for _ in range(layers)),
        head_hidden=take(hidden, HEAD_WIDTH * hidden),
        head_output=take(HEAD_WIDTH * hidden, vocab),
    )


def _read_characters(path: Path) -> list[str]:
    try:
        table = json.loads(read_text(path))
    except ValueError as error:
        raise EsjaxError(f"cannot read {str(path)!r} as JSON: {error}") from error
    if not isinstance(table, list):
        raise EsjaxError(f"{str(path)!r} is not a JSON list of characters or of [character, count] pairs")
    symbols = [entry[0] if isinstance(entry, list) and entry else entry for entry in table]
    for position, symbol in enumerate(symbols):
        if not is_symbol(symbol):
            raise EsjaxError(f"entry {position} of {str(path)!r} is {symbol!r}, not a character")
    if len(set(symbols)) != len(symbols):
        raise EsjaxError(f"{str(path)!r} names a character twice")
    return symbols
