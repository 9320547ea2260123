"""Data sets of Hugging Face, by the library datasets, from folders in its layout; nothing here needs the network."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from esjax.config.settings import DataConfig
from esjax.data.corpus import load_corpus
from esjax.data.hugging_face import DatasetName, parse_name
from esjax.data.sources import locate, open_text
from esjax.errors import EsjaxError


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:name", DatasetName("name", (), None)),
        ("hf:user/name#text", DatasetName("user/name", (), "text")),
        ("hf:user/name:part:train#a b", DatasetName("user/name", ("part", "train"), "a b")),
        ("hf:name:train[:10]", DatasetName("name", ("train[:10]",), None)),
        ("hf:name:en:train[5%:10%]+test[:1]", DatasetName("name", ("en", "train[5%:10%]+test[:1]"), None)),
    ],
)
def test_a_name_is_taken_apart_and_put_together(source: str, expected: DatasetName) -> None:
    assert parse_name(source) == expected
    assert str(expected) == source


@pytest.mark.parametrize("source", ["hf:", "hf:#text", "hf:name:", "hf:name::train", "hf:a:b:c:d", "hf:name#"])
def test_another_form_is_refused(source: str) -> None:
    with pytest.raises(EsjaxError, match=r"hf:NAME\[:CONFIG\]\[:SPLIT\]\[#COLUMN\]"):
        next(iter(open_text(source, "auto")))


def test_a_folder_is_made_absolute_and_a_name_on_the_hub_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("hf:./set:train#text") == f"hf:{tmp_path}/set:train#text"
    assert locate("hf:user/set:train#text") == "hf:user/set:train#text"


TRAIN = ["first cell", "second\n\ncell", "third"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two configurations; `main` has two splits, and two columns of text."""
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    rows: dict[str, list[dict[str, Any]]] = {
        "main/train.jsonl": [{"title": "a", "text": text, "n": 1} for text in [*TRAIN, None, ""]],
        "main/test.jsonl": [{"title": "b", "text": "a test", "n": 2}],
        "other.jsonl": [{"body": "a body", "n": 1}],
    }
    for name, lines in rows.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train.jsonl}\n"
        "  - {split: test, path: main/test.jsonl}\n- config_name: other\n  data_files: other.jsonl\n---\n"
    )
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (":main", TRAIN),
        (":main:train#text", TRAIN),
        (":main:train#title", ["a"] * 5),
        (":main:test", ["a test"]),
        (":main:train[1:3]+test", [*TRAIN[1:], "a test"]),
        (":other", ["a body"]),
    ],
)
def test_the_cells_of_a_column_are_the_documents(folder: Path, rest: str, expected: list[str]) -> None:
    assert list(open_text(f"hf:{folder}{rest}", "auto")) == expected


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("", "main"),
        (":main:nope", "train"),
        (":main#body", "it has 'title', 'text', 'n'"),
        (":main#n", "row 1 of .* holds int"),
    ],
)
def test_what_is_not_there_is_named_beside_what_there_is(folder: Path, rest: str, found: str) -> None:
    with pytest.raises(EsjaxError, match=found) as caught:
        list(open_text(f"hf:{folder}{rest}", "auto"))
    assert "\n" not in str(caught.value)


@pytest.mark.nightly
def test_without_a_network_one_line_names_the_way_out(folder: Path) -> None:
    """`folder` sets the library offline; it then answers as without a network, but at once."""
    with pytest.raises(EsjaxError, match=r"cannot reach the Hub .* for hf:no/such:train#text") as caught:
        list(open_text("hf:no/such:train#text", "auto"))
    assert "\n" not in str(caught.value)
    with pytest.raises(EsjaxError, match="there is no folder"):
        list(open_text(f"hf:{folder}/none", "auto"))


@pytest.mark.nightly
def test_the_record_of_a_data_set_is_the_hash_of_its_cells(folder: Path) -> None:
    corpus = load_corpus(DataConfig(text=f"hf:{folder}:main", held_out=0.0))
    content = "".join(f"{cell}\0" for cell in TRAIN).encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    assert corpus.files == ((f"hf:{folder}:main#text", len(content), digest),)
    assert [corpus.vocabulary.decode(document) for document in corpus.train] == TRAIN
