"""From the tokens that members wrote to texts, many at once."""

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from esjax.data.tokens import STOP
from esjax.data.vocabulary import FIRST, UNKNOWN_MARK, Vocabulary


def decode_all(vocabulary: Vocabulary, tokens: Int[ndarray, "texts length"]) -> list[str]:
    """Decode many texts that STOP fills up, as `Vocabulary.decode` does one."""
    if vocabulary.kind != "char" or "\0" in vocabulary.symbols:
        return [vocabulary.decode(row) for row in tokens]
    table = np.full(vocabulary.size, UNKNOWN_MARK)
    table[FIRST:] = vocabulary.symbols
    table[STOP] = ""  # numpy drops it at the end of a string
    return np.ascontiguousarray(table[tokens]).view(f"<U{tokens.shape[1]}").ravel().tolist()
