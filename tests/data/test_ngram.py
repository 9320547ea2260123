"""N-gram losses, against arithmetic by hand and a float64 reference of dictionaries."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.data import ngram
from esjax.data.ngram import NAMES, fit_ngrams, ngram_losses
from esjax.data.tokens import STOP

V = 5
A, B, C = 2, 3, 4

Documents = list[list[int]]
DOCUMENTS = st.lists(st.lists(st.sampled_from([0, A, B, C]), max_size=8), min_size=1, max_size=6)

# Probabilities of float64 arithmetic in two orders of operations: a few ulp, far below this.
TOLERANCE = 1e-12


def arrays(documents: Documents) -> list[np.ndarray]:
    return [np.array(document, np.int32) for document in documents]


def losses(train: Documents, scored: Documents) -> dict[str, float]:
    return ngram_losses(fit_ngrams(arrays(train), V), arrays(scored))


def reference(train: Documents, order: int) -> Callable[[Sequence[int], int], float]:
    """Witten and Bell's model in dictionaries: (context, token) -> probability."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for document in train:
        padded = [STOP] * (order - 1) + document + [STOP]
        for position in range(order - 1, len(padded)):
            for n in range(order):
                context = tuple(padded[position - n : position])
                counts.setdefault(context, Counter())[padded[position]] += 1

    def probability(context: Sequence[int], token: int) -> float:
        shorter = probability(context[1:], token) if context else 1 / V
        seen = counts.get(tuple(context))
        if seen is None:
            return shorter
        types = len(seen)
        return (seen[token] + types * shorter) / (seen.total() + types)

    return probability


def test_hand_arithmetic_of_three_orders() -> None:
    """The training text is "a b" and "a": tokens a b STOP a STOP; the text scored is "a"."""
    # Unigrams: a 2, b 1, STOP 2 of 5 tokens, 3 types; uniform 1/5.
    uni = {A: (2 + 3 / 5) / (5 + 3), B: (1 + 3 / 5) / (5 + 3), STOP: (2 + 3 / 5) / (5 + 3)}
    # After STOP (the start): a twice, 1 type. After a: b once and STOP once, 2 types.
    bi_start_a = (2 + 1 * uni[A]) / (2 + 1)
    bi_a_stop = (1 + 2 * uni[STOP]) / (2 + 2)
    # After STOP STOP: a twice, 1 type. After STOP a: b once and STOP once, 2 types.
    tri_start_a = (2 + 1 * bi_start_a) / (2 + 1)
    tri_a_stop = (1 + 2 * bi_a_stop) / (2 + 2)
    expected = {
        "unigram": -(math.log(uni[A]) + math.log(uni[STOP])) / 2,
        "bigram": -(math.log(bi_start_a) + math.log(bi_a_stop)) / 2,
        "trigram": -(math.log(tri_start_a) + math.log(tri_a_stop)) / 2,
    }
    assert losses([[A, B], [A]], [[A]]) == pytest.approx(expected, rel=TOLERANCE)


def test_a_context_never_seen_falls_back_to_the_shorter_model() -> None:
    """Trained on "a", the text scored is "b b": after b nothing was ever seen."""
    uni = {A: (1 + 2 / 5) / (2 + 2), B: (0 + 2 / 5) / (2 + 2), STOP: (1 + 2 / 5) / (2 + 2)}
    bi_start_b = (0 + 1 * uni[B]) / (1 + 1)
    tri_start_b = (0 + 1 * bi_start_b) / (1 + 1)
    expected = {
        "unigram": -(2 * math.log(uni[B]) + math.log(uni[STOP])) / 3,
        "bigram": -(math.log(bi_start_b) + math.log(uni[B]) + math.log(uni[STOP])) / 3,
        "trigram": -(math.log(tri_start_b) + math.log(uni[B]) + math.log(uni[STOP])) / 3,
    }
    assert losses([[A]], [[B, B]]) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("part", [1, 7, ngram.PART])
@given(train=DOCUMENTS, scored=DOCUMENTS)
def test_losses_are_those_of_the_reference(part: int, train: Documents, scored: Documents) -> None:
    """Also if documents are counted and scored in parts."""
    expected = {}
    for order, name in enumerate(NAMES, start=1):
        probability = reference(train, order)
        total, tokens = 0.0, 0
        for document in scored:
            padded = [STOP] * (order - 1) + document + [STOP]
            for position in range(order - 1, len(padded)):
                total -= math.log(probability(padded[position - order + 1 : position], padded[position]))
                tokens += 1
        expected[name] = total / tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "PART", part)
        found = losses(train, scored)
    assert list(found) == list(NAMES)
    assert found == pytest.approx(expected, rel=TOLERANCE)


@given(DOCUMENTS, st.lists(st.integers(0, V - 1), min_size=2, max_size=2))
def test_the_references_probabilities_sum_to_one_after_any_context(train: Documents, context: list[int]) -> None:
    """With the equality above, so do the package's."""
    for order in range(1, len(NAMES) + 1):
        probability = reference(train, order)
        after = context[len(context) - order + 1 :]
        assert sum(probability(after, token) for token in range(V)) == pytest.approx(1, rel=TOLERANCE)


@given(DOCUMENTS, DOCUMENTS)
def test_contexts_do_not_reach_across_documents(train: Documents, scored: Documents) -> None:
    """Whatever stands before a document, it counts and scores alike: the order of documents is nothing."""
    expected = losses(train, scored)
    assert losses(train[::-1], scored[::-1]) == pytest.approx(expected, rel=TOLERANCE)


def test_a_document_is_scored_as_if_it_were_alone() -> None:
    train = [[A, B, C], [A, A], [C, B]]
    together, first, second = (losses(train, scored) for scored in ([[A, B], [C, C, A]], [[A, B]], [[C, C, A]]))
    for name in NAMES:
        # Means over 3 and 4 tokens, STOP included.
        assert together[name] == pytest.approx((3 * first[name] + 4 * second[name]) / 7, rel=TOLERANCE)


@pytest.mark.parametrize("dense", [0, V, V**2])
def test_dense_and_sparse_counting_agree(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train = [rng.choice([0, A, B, C], size).tolist() for size in rng.integers(0, 30, 20)]
    scored = [rng.choice([0, A, B, C], size).tolist() for size in rng.integers(0, 30, 20)]
    assert ngram.DENSE >= V**3  # all dense
    expected = losses(train, scored)
    monkeypatch.setattr(ngram, "DENSE", dense)
    assert losses(train, scored) == expected


def test_longer_contexts_predict_a_text_of_cycles_better() -> None:
    # a b a c a b a c ...: after a stands b or c by the token before, so only the trigram knows.
    train = [[A, B, A, C] * 50]
    found = losses(train, train)
    assert found["unigram"] > found["bigram"] > found["trigram"]
    assert found["bigram"] > math.log(2) / 2 > found["trigram"]
