"""Subwords: ids and back, against counts by hand, the library's ids and Python's own UTF-8."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax.config.settings import Config, DataConfig
from esjax.data.corpus import load_corpus, locate_text
from esjax.data.tokenizer import TokenizerVocabulary, fit_bpe, make_vocabulary, read_tokenizer
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import UNKNOWN_MARK, fit_vocabulary, parse_vocabulary
from esjax.errors import EsjaxError

tokenizers = pytest.importorskip("tokenizers")

DOCUMENTS = ["abab abab", "abab cd", "üab"]
FITTED = fit_bpe(DOCUMENTS, 260)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters=UNKNOWN_MARK))


def words(*symbols: str, unknown: str | None = None, special: tuple[str, ...] = ()) -> str:
    """Write a tokenizer of whole words as JSON; ids count from 0."""
    model = tokenizers.models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


def test_the_most_frequent_pairs_are_joined() -> None:
    """By hand: ab comes seven times, then abab three times, or twice after a space; 256 bytes, UNK and STOP."""
    assert FITTED.size == len(FITTED) == 260
    assert FITTED.encode("ab").dtype == np.int32
    assert [len(FITTED.encode(text)) for text in ("abab", "ab", "ba", "cd", "ü")] == [1, 1, 2, 2, 2]


def test_the_same_text_gives_the_same_tokens() -> None:
    pieces = ["\0".join(DOCUMENTS).encode() + b"\0"]
    again = fit_vocabulary("bpe:260", pieces, None)
    assert again == FITTED
    assert again != fit_vocabulary("bpe:259", pieces, None)


@given(TEXT)
@settings(max_examples=50)
def test_any_text_comes_back_whole(text: str) -> None:
    ids = FITTED.encode(text)
    assert not np.isin(ids, (UNK, STOP)).any()
    assert FITTED.decode(ids) == text
    assert FITTED.unknown(text) == []


@given(st.lists(st.integers(0, 259)))
@settings(max_examples=50)
def test_broken_utf8_is_marked_as_python_does(ids: list[int]) -> None:
    """Reference: the bytes of each token alone."""
    byte_of = {int(FITTED.encode(character)[0]): ord(character) for character in map(chr, range(128))}
    first, second = FITTED.encode("ü")
    byte_of |= {int(first): "ü".encode()[0], int(second): "ü".encode()[1]}
    known = [i for i in ids if i in byte_of]
    assert FITTED.decode(known) == bytes(byte_of[i] for i in known).decode(errors="replace")
    assert isinstance(FITTED.decode(ids), str)


def test_stop_is_left_out_and_unk_is_marked() -> None:
    (ab,) = map(int, FITTED.encode("ab"))
    assert FITTED.decode([ab, STOP, UNK, ab, STOP]) == f"ab{UNKNOWN_MARK}ab"


def test_it_is_stored_whole() -> None:
    assert parse_vocabulary(json.loads(json.dumps(FITTED.stored()))) == FITTED
    text = words("?", "a", "end", unknown="?")
    chosen = make_vocabulary(text, "x", unknown_id=0, stop_id=2)
    assert parse_vocabulary(chosen.stored()) == chosen


def test_the_tokenizers_own_ids_may_be_unk_and_stop() -> None:
    """By hand: [?, end] come first, then a and b in their order."""
    chosen = make_vocabulary(words("?", "a", "b", "end", unknown="?"), "x", unknown_id=0, stop_id=3)
    np.testing.assert_array_equal(chosen.order, [0, 3, 1, 2])
    np.testing.assert_array_equal(chosen.encode("b a end zz a"), [3, 2, STOP, UNK, 2])
    assert chosen.unknown("b zz a yy zz") == ["zz", "yy"]
    assert chosen.decode([3, 2, STOP]) == "b a"


def test_without_such_ids_they_are_new() -> None:
    chosen = make_vocabulary(words("a", "b", special=("<end>",)), "x")
    np.testing.assert_array_equal(chosen.order, [-1, -1, 0, 1, 2])
    np.testing.assert_array_equal(chosen.encode("b <end> a"), [3, 4, 2])
    assert chosen.decode([3, 4, 2]) == "b <end> a"


def test_documents_are_neither_cut_nor_filled_as_the_file_says() -> None:
    """Reference: the ids of the same tokenizer without the two settings."""
    stored = tokenizers.Tokenizer.from_str(words("a", "b"))
    stored.enable_truncation(2)
    stored.enable_padding(length=4)
    chosen = make_vocabulary(stored.to_str(), "x")
    np.testing.assert_array_equal(chosen.encode("a b a"), [2, 3, 2])
    ids, lengths = chosen.encode_piece(b"a b a\0b\0")
    np.testing.assert_array_equal(ids, [2, 3, 2, STOP, 3, STOP])
    np.testing.assert_array_equal(lengths, [4, 2])


@pytest.mark.parametrize("stored", [{"tokenizer": 3}, {"tokenizer": {}}, {}, {"tokenizer": {}, "stop_id": "x"}])
def test_a_damaged_vocabulary_is_refused(stored: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer|as a tokenizer\.json"):
        parse_vocabulary({"kind": "tokenizer", **stored})


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in ("{", "{}", "[]"):
        path.write_text(content)
        with pytest.raises(EsjaxError, match=rf"^cannot read '{path}' as a tokenizer\.json: "):
            read_tokenizer(path)
    with pytest.raises(EsjaxError, match="has ids from 0 to 1, and none is 2"):
        make_vocabulary(words("a", "b"), "x", stop_id=2)


def test_without_the_library_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(EsjaxError, match=r"pip install 'esjax\[tokenizers\]'"):
        fit_bpe(DOCUMENTS, 260)
    with pytest.raises(EsjaxError, match=r"pip install 'esjax\[tokenizers\]'"):
        parse_vocabulary(FITTED.stored())


def test_a_corpus_of_subwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the bytes of the held-out text, over its tokens."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"abab cd {n}" for n in range(40)))
    Path("tokenizer.json").write_text(json.loads(json.dumps(FITTED.json)))
    config = locate_text(Config(data=DataConfig(text="text.txt", vocabulary="tokenizer:tokenizer.json", held_out=0.3)))
    assert config.data.vocabulary == f"tokenizer:{tmp_path}/tokenizer.json"
    corpus = load_corpus(config.data)
    assert isinstance(corpus.vocabulary, TokenizerVocabulary)
    assert corpus.vocabulary == FITTED
    tokens = sum(len(FITTED.encode(FITTED.decode(document))) + 1 for document in corpus.held_out)
    assert corpus.held_out
    assert corpus.bits_of_a_nat == pytest.approx(tokens / corpus.held_out_bytes / np.log(2))
    assert corpus.held_out_bytes == sum(len(FITTED.decode(document)) + 1 for document in corpus.held_out)


def test_a_text_goes_on_with_its_space_and_no_token_closes_it() -> None:
    """Reference: a tokenizer as of Llama 2, by hand: spaces begin words, and <s> and </s> enclose a text."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "▁cat": 4, "▁sat": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    enclosed = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.post_processor = enclosed
    vocabulary = make_vocabulary(made.to_str(), "one", unknown_id=0, stop_id=2)
    assert vocabulary.encode("the cat").tolist() == [2, 3, 4]
    assert vocabulary.encode("").tolist() == [2]
    assert vocabulary.encode_inner("cat").tolist() == [4]
    assert [part.tolist() for part in vocabulary.encode_piece(b"the\0cat sat\0")] == [[2, 3, 1, 2, 4, 5, 1], [3, 4]]
    assert vocabulary.decode([5]) == "sat"
    assert vocabulary.decode_after("the cat", [5, 1]) == " sat"
