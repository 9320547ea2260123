"""N-gram models, to compare losses with.

The probability of a token w after a context h of n-1 tokens mixes the counts in that context with the model of a
context one token shorter (Witten & Bell 1991, method C):

    p(w | h) = (count(h, w) + types(h) * p(w | shorter h)) / (count(h) + types(h))

and so on down to the uniform distribution. Contexts do not reach across documents: STOPs precede each document.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from esjax.data.tokens import STOP

NAMES = ("unigram", "bigram", "trigram")

DENSE = 2**25
"""Number of possible codes up to which a table of counts is faster than sorting."""


PART = 2**20
"""Tokens that are counted or scored at a time."""


class Level(NamedTuple):
    """Counts of one order: sorted codes of contexts and of n-grams."""

    contexts: Int64[ndarray, " contexts"]
    context_counts: Int64[ndarray, " contexts"]
    context_types: Int64[ndarray, " contexts"]
    grams: Int64[ndarray, " grams"]
    gram_counts: Int64[ndarray, " grams"]


class NgramModel(NamedTuple):
    """Counts of the orders 1 to n over a vocabulary."""

    levels: tuple[Level, ...]
    vocab_size: int


def fit_ngrams(documents: Sequence[ndarray], vocab_size: int) -> NgramModel:
    """Count the n-grams of documents, one model for each of `NAMES`, with a STOP at the end of each document."""
    levels = []
    for n in range(1, len(NAMES) + 1):
        grams = gram_counts = contexts = context_counts = np.zeros(0, np.int64)
        for part in _parts(documents):
            context, token = _codes(part, vocab_size, n)
            more = _tally(context * vocab_size + token, vocab_size**n)
            grams, gram_counts = _merge((grams, gram_counts), more)
            contexts, context_counts = _merge((contexts, context_counts), _tally(context, vocab_size ** (n - 1)))
        _, context_types = _tally(grams // vocab_size, vocab_size ** (n - 1))
        levels.append(Level(contexts, context_counts, context_types, grams, gram_counts))
    return NgramModel(tuple(levels), vocab_size)


def ngram_losses(model: NgramModel, documents: Sequence[ndarray]) -> dict[str, float]:
    """Score documents with the model of each order.

    Returns:
        Mean nats per token, STOPs included, by name of the model, in the order of `NAMES`.
    """
    totals, tokens = dict.fromkeys(NAMES[: len(model.levels)], 0.0), 0
    for part in _parts(documents):
        for name, logs in zip(totals, _log_probabilities(model, part), strict=True):
            totals[name] -= float(np.sum(logs))
        tokens += sum(len(document) + 1 for document in part)
    return {name: total / tokens for name, total in totals.items()}


def _parts(documents: Sequence[ndarray]) -> Iterator[list[ndarray]]:
    """Gather documents to lists of about `PART` tokens."""
    part: list[ndarray] = []
    size = 0
    for document in documents:
        part.append(document)
        size += len(document) + 1
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _log_probabilities(model: NgramModel, documents: Sequence[ndarray]) -> Iterator[Float64[ndarray, " tokens"]]:
    """Yield the log probability of each token by the model of each order."""
    probability: Float64[ndarray, " tokens"] | None = None
    for n, level in enumerate(model.levels, start=1):
        context, token = _codes(documents, model.vocab_size, n)
        if probability is None:
            probability = np.full(len(token), 1 / model.vocab_size)
        seen = _count(level.grams, level.gram_counts, context * model.vocab_size + token)
        total = _count(level.contexts, level.context_counts, context)
        types = _count(level.contexts, level.context_types, context)
        # An unseen context has no types: use the shorter model alone.
        weight = np.where(total == 0, 1, types)
        probability = (seen + weight * probability) / (total + weight)
        yield np.log(probability)


def _codes(documents: Sequence[ndarray], vocab_size: int, n: int) -> tuple[ndarray, ndarray]:
    """Return, for every token, the code of the n-1 tokens before it, a number to base `vocab_size`, and the token."""
    start = np.full(n - 1, STOP, np.int64)
    stop = np.array([STOP], np.int64)
    padded = np.concatenate([part for document in documents for part in (start, document, stop)])
    lengths = np.array([len(document) + n for document in documents])
    positions = np.arange(len(padded)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    here = np.flatnonzero(positions >= n - 1)
    context = np.zeros(len(here), np.int64)
    for back in range(n - 1, 0, -1):
        context = context * vocab_size + padded[here - back]
    return context, padded[here]


def _tally(codes: ndarray, bound: int) -> tuple[ndarray, ndarray]:
    """Count equal codes, all below `bound`; return the sorted codes and their counts."""
    if bound > DENSE:
        return np.unique(codes, return_counts=True)
    counts = np.bincount(codes, minlength=bound)
    present = np.flatnonzero(counts)
    return present, counts[present]


def _merge(one: tuple[ndarray, ndarray], other: tuple[ndarray, ndarray]) -> tuple[ndarray, ndarray]:
    """Add up two tables of sorted codes and their counts."""
    codes, places = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, places, np.concatenate([one[1], other[1]]))
    return codes, counts


def _count(codes: ndarray, counts: ndarray, wanted: ndarray) -> ndarray:
    index = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    return np.where(codes[index] == wanted, counts[index], 0)
