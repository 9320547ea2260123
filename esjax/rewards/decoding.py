"""From the tokens that members wrote to texts, many at once."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int, UInt32
from numpy import ndarray

from esjax.data.tokens import STOP
from esjax.data.vocabulary import FIRST, UNKNOWN_MARK, Vocabulary


def decode_all(vocabulary: Vocabulary, tokens: Int[ndarray, "texts length"]) -> list[str]:
    """Decode many texts that STOP fills up, as `Vocabulary.decode` does one."""
    if vocabulary.kind != "char" or "\0" in vocabulary.symbols:
        return [vocabulary.decode(row) for row in tokens]
    return _codes(vocabulary).take(tokens).view(f"U{tokens.shape[1]}").ravel().tolist()


@lru_cache(maxsize=4)
def _codes(vocabulary: Vocabulary) -> UInt32[ndarray, " ids"]:
    """Return the code point of each id; 0 for STOP, which numpy drops at the end of a string."""
    codes = np.full(vocabulary.size, ord(UNKNOWN_MARK), np.uint32)
    codes[FIRST:] = [ord(symbol) for symbol in vocabulary.symbols]
    codes[STOP] = 0
    return codes
