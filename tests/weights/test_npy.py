"""Weight files of the original program, against an independent writer and a float64 reference of its equations."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from esjax.errors import EsjaxError
from esjax.inference.loaded_run import load
from esjax.weights.npy import import_npy

D, V, L = 6, 7, 3
STOP = 1
CHARACTERS = ["e", " ", "a", "\n", "é"]  # ids 2 to 6

DOCUMENTS = ["ea\nae", "é", "a ea xé", "eeee", "a", "aé aé"]  # x is unknown: id 0


class Weights(NamedTuple):
    """Matrices in the order of the file."""

    start: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]
    head_hidden: np.ndarray
    head_output: np.ndarray


def some_weights() -> Weights:
    """Draw weights of so different a size that no two of them can be taken for each other."""
    rng = np.random.default_rng(3)

    def draw(size: float, *shape: int) -> np.ndarray:
        return (size * rng.normal(size=shape)).astype(np.float32)

    return Weights(
        draw(0.9, D),
        [(draw(0.5 + i, D, D), draw(0.7 + i, V, D)) for i in range(L)],
        draw(1.1, D, 4 * D),
        draw(0.6, 4 * D, V),
    )


def flat(weights: Weights) -> np.ndarray:
    """Write the layout of the original: D, V, L; s0; U_i and E_i of each layer; W1; W2, row by row."""
    numbers: list[float] = [D, V, L]
    numbers += weights.start.tolist()
    for recurrent, embedding in weights.layers:
        for row in (*recurrent, *embedding):
            numbers += row.tolist()
    for row in (*weights.head_hidden, *weights.head_output):
        numbers += row.tolist()
    return np.array(numbers, np.float32)


def reference(weights: Weights, documents: list[str]) -> float:
    """Mean nats per token by the original's equations in float64; the STOP after each document is predicted too."""
    start, layers, head_hidden, head_output = weights
    total, tokens = 0.0, 0
    for document in documents:
        state = start.astype(np.float64)
        for token in [2 + CHARACTERS.index(c) if c in CHARACTERS else 0 for c in document] + [STOP]:
            logits = np.maximum(state @ head_hidden.astype(np.float64), 0) @ head_output.astype(np.float64)
            total += math.log(np.exp(logits).sum()) - logits[token]
            tokens += 1
            for recurrent, embedding in layers:
                state = np.tanh(state + (state @ recurrent.astype(np.float64)) * embedding[token].astype(np.float64))
    return total / tokens


class Files(NamedTuple):
    """Paths of a weight file, its table, and the run to make."""

    weights: Path
    characters: Path
    out: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path / "weights.npy", tmp_path / "characters.json", tmp_path / "run")
    np.save(files.weights, flat(some_weights()))
    files.characters.write_text(json.dumps(CHARACTERS))
    return files


@pytest.mark.parametrize("form", ["list", "pairs", "longer"])
def test_imported_weights_score_as_the_originals_equations(files: Files, form: str) -> None:
    table: list[Any] = list(CHARACTERS)
    if form == "pairs":
        table = [[character, 100 - i] for i, character in enumerate(CHARACTERS)]
    elif form == "longer":
        table += ["y", "z"]  # the weights end before them
    files.characters.write_text(json.dumps(table), encoding="utf-8")
    text = files.out.with_name("text.txt")
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")

    import_npy(*files)
    loaded = load(files.out)
    assert loaded.step == 0
    assert loaded.vocabulary.symbols == tuple(CHARACTERS)
    # Sums of up to 24 float32 products, each off by 6e-8, through layers that grow a difference some five times.
    # A mistake in the equations changes the figure by more than 1e-2, see below.
    expected = reference(some_weights(), DOCUMENTS)
    scored = loaded.evaluate(str(text), "all")
    assert scored.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert scored.tokens == sum(len(document) + 1 for document in DOCUMENTS)
    assert scored.unknown_tokens == 1
    size = sum(len(document.encode()) + 1 for document in DOCUMENTS)
    assert scored.bits_per_byte == pytest.approx(expected * scored.tokens / size / math.log(2), rel=1e-5)


def test_the_reference_notices_a_state_that_is_carried_over() -> None:
    """Else the equality above would not show that each document starts at s0."""
    joined = "".join(DOCUMENTS)
    apart = reference(some_weights(), DOCUMENTS)
    assert abs(reference(some_weights(), [joined]) - apart) > 1e-2
    assert abs(reference(some_weights(), DOCUMENTS[:1]) - apart) > 1e-2


def test_float64_files_are_read_as_well(files: Files) -> None:
    np.save(files.weights, flat(some_weights()).astype(np.float64))
    import_npy(*files)
    np.testing.assert_array_equal(load(files.out).params.head_output, some_weights().head_output)


def refused(files: Files) -> str:
    """See that an import is refused in one line and that nothing is made of it."""
    with pytest.raises(EsjaxError) as caught:
        import_npy(*files)
    assert not files.out.exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_table_that_is_too_short_is_refused(files: Files) -> None:
    files.characters.write_text(json.dumps(CHARACTERS[:-1]))
    message = refused(files)
    assert "holds 4 characters" in message
    assert "weights for 5" in message


def test_a_missing_weight_file_is_named(files: Files) -> None:
    files.weights.unlink()
    assert "weights.npy" in refused(files)


def test_a_folder_in_place_of_the_weights_is_named(files: Files) -> None:
    files.weights.unlink()
    files.weights.mkdir()
    assert "weights.npy" in refused(files)


def test_a_missing_table_is_named(files: Files) -> None:
    files.characters.unlink()
    assert "characters.json" in refused(files)


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000000000,), }"


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no numbers",
        b"\x93NUMPY",
        b"\x80\x04K\x01.",  # a pickle
        b"PK\x03\x04 and no zip after it",
        with_header(HUGE),  # petabytes, says its header
        with_header(HUGE.replace(b")", b" ")),
        with_header(HUGE.replace(b"'shape'", b"[1]")),
    ],
)
def test_a_file_that_is_not_npy_is_named(files: Files, content: bytes) -> None:
    files.weights.write_bytes(content)
    assert "weights.npy" in refused(files)


def test_a_truncated_file_is_named(files: Files) -> None:
    files.weights.write_bytes(files.weights.read_bytes()[:-10])
    assert "weights.npy" in refused(files)


class Pickled:
    """Says so where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


def test_pickled_objects_are_never_loaded(files: Files) -> None:
    np.save(files.weights, np.array([Pickled()], object), allow_pickle=True)
    assert "weights.npy" in refused(files)


def test_several_arrays_are_refused(files: Files) -> None:
    with files.weights.open("wb") as file:
        np.savez(file, flat(some_weights()))
    assert "weights.npy" in refused(files)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.reshape(1, -1),
        lambda v: v.astype(np.int32),
        lambda v: v.astype(np.complex64),
        lambda v: v[:2],
        lambda v: np.float32(3),
        lambda v: v[:-1],
        lambda v: np.append(v, np.float32(0)),
        lambda v: np.concatenate([[np.float32(D + 1)], v[1:]]),
        lambda v: np.concatenate([[np.float32(5.5)], v[1:]]),
        lambda v: np.concatenate([v[:1], [np.float32(2)], v[2:]]),
        lambda v: np.concatenate([v[:2], [np.float32(0)], v[3:]]),
        lambda v: np.concatenate([[np.float32(-D)], v[1:]]),
        lambda v: np.concatenate([[np.float32("nan")], v[1:]]),
        lambda v: np.concatenate([v[:1], [np.float32("inf")], v[2:]]),
    ],
    ids=[
        "matrix",
        "integers",
        "complex",
        "two numbers",
        "scalar",
        "one missing",
        "one too many",
        "another D",
        "fractional D",
        "no character",
        "no layer",
        "negative D",
        "NaN",
        "infinite V",
    ],
)
def test_a_vector_that_does_not_fit_its_head_is_refused(files: Files, change: Any) -> None:
    np.save(files.weights, change(flat(some_weights())))
    assert "weights.npy" in refused(files)


def test_weights_that_are_not_finite_are_refused(files: Files) -> None:
    broken = flat(some_weights())
    broken[-1] = np.nan
    np.save(files.weights, broken)
    assert "weights.npy" in refused(files)


@pytest.mark.parametrize(
    "table",
    [
        "",
        '["e", " "',
        '{"e": 1}',
        '"e aé"',
        '["e", " ", "a", "b", 5]',
        '["e", " ", "a", "b", "cd"]',
        '["e", " ", "a", "b", ""]',
        '["e", " ", "a", "b", null]',
        '["e", " ", "a", "b", []]',
        '["e", " ", "a", "b", [5, "c"]]',
        '["e", " ", "a", "b", "e"]',
        '[["e", 2], [" ", 2], ["a", 1], ["b", 1], ["e", 1]]',
        '["e", " ", "a", "b", "\\ud800"]',
    ],
)
def test_a_table_that_is_not_of_characters_is_named(files: Files, table: str) -> None:
    files.characters.write_text(table, encoding="utf-8")
    assert "characters.json" in refused(files)


def test_a_table_that_is_not_utf8_is_named(files: Files) -> None:
    files.characters.write_bytes(b'["\xe9"]')
    assert "characters.json" in refused(files)


def test_an_existing_run_is_left_alone(files: Files) -> None:
    files.out.mkdir()
    (files.out / "mine").write_text("mine")
    with pytest.raises(EsjaxError, match="exists already"):
        import_npy(*files)
    assert [(path.name, path.read_text()) for path in files.out.iterdir()] == [("mine", "mine")]
