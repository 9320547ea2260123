"""The example of molecules: its text, and the gradient of REINFORCE; and, at night, it runs in small with RDKit."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import molecules
import numpy as np
import pytest
from bench.reinforce import log_probability, policy_gradient, reinforce

from esjax.config.models import GruConfig
from esjax.config.settings import OptimConfig
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import fit_vocabulary
from esjax.models import Model, build_model
from esjax.models.model import Params

PROGRAM = Path(__file__).parents[2] / "experiments" / "molecules.py"
A, B = 2, 3


def bigram() -> tuple[Model, Params]:
    """A model of 4 token ids whose weights are the logits after each token."""
    model = Model(
        init=lambda key: jax.random.normal(key, (4, 4)),
        initial_state=lambda params: jnp.int32(STOP),
        predict=lambda params, state: params[state],
        consume=lambda params, state, token: token.astype(jnp.int32),
    )
    return model, model.init(jax.random.key(3))


def probabilities(params: Params) -> np.ndarray:
    """Those of each token after each token, in float64; UNK is never written."""
    exponentials = np.exp(np.array(params, np.float64))
    exponentials[:, UNK] = 0
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_the_column_of_smiles_is_read() -> None:
    rows = iter(["SMILES,SPLIT\n", "CCO,train\n", "c1ccccc1,train\n"])
    assert molecules.parse_table(rows) == ["CCO", "c1ccccc1"]
    assert molecules.parse_table(iter(["ID,SMILES\n", "1,CN"])) == ["CN"]


def test_the_text_holds_each_drawn_molecule_once(tmp_path: Path) -> None:
    every = [f"C{'C' * number}" for number in range(100)]
    molecules.write_text(every, 40, tmp_path / "text.txt")
    lines = (tmp_path / "text.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 40
    assert set(lines) < set(every)
    assert lines != sorted(lines)


def test_probabilities_of_all_documents_add_up_to_1() -> None:
    """Reference: every document of up to 3 tokens is ended by STOP, or cut off."""
    model, params = bigram()
    documents = [
        row
        for row in itertools.product([STOP, A, B], repeat=3)
        if all(later == STOP for one, later in itertools.pairwise(row) if one == STOP)
    ]
    assert len(documents) == 1 + 2 + 4 + 8
    found = [float(log_probability(model, params, jnp.array(row))) for row in documents]
    assert math.fsum(map(math.exp, found)) == pytest.approx(1, abs=1e-6)


def test_the_gradient_is_that_of_reinforce() -> None:
    """Reference: by hand, the probabilities minus the written token, for each token up to the first STOP."""
    model, params = bigram()
    tokens = np.array([[A, B, STOP, STOP], [B, B, A, A], [STOP, STOP, STOP, STOP]])
    rewards = np.array([0.9, 0.2, 0.1])
    expected, drawn = np.zeros((4, 4)), probabilities(params)
    for row, reward in zip(tokens, rewards, strict=True):
        before = STOP
        for token in row:
            expected[before] += (reward - rewards.mean()) / 3 * (drawn[before] - np.eye(4)[token])
            before = token
            if token == STOP:
                break
    found = policy_gradient(model, params, jnp.array(tokens), jnp.array(rewards, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.usefixtures("lenient_promotion")  # of optax
def test_reinforce_learns_to_write_what_is_rewarded() -> None:
    vocabulary = fit_vocabulary("char", [b"ab"], None)
    model = build_model(GruConfig(hidden_size=4, head_size=4), vocabulary.size)
    steps = reinforce(
        model,
        model.init(jax.random.key(0)),
        vocabulary,
        lambda texts: [text.count("a") / 4 for text in texts],
        OptimConfig(learning_rate=0.1),
        documents=64,
        length=4,
        seed=0,
    )
    rewards = [step.reward for step in itertools.islice(steps, 40)]
    assert rewards[0] < 0.5
    assert np.mean(rewards[-5:]) > 0.9


def test_a_curve_counts_calls_and_the_best_weights_are_returned(tmp_path: Path) -> None:
    steps = ((0.1 * number, number) for number in itertools.count(1))

    def measure(params: int) -> tuple[float, float]:
        return 1 - abs(params - 18) / 100, 1.0

    best = molecules.follow(steps, 0, measure, calls=8, count=25, out=tmp_path / "curve.jsonl")
    points = [molecules.Point(**json.loads(line)) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [point.calls for point in points] == [0, 80, 160, 200]
    assert [point.reward for point in points] == pytest.approx([0.82, 0.92, 0.98, 0.93])
    assert best == 20
    assert points[0].written is None
    assert points[1].written == pytest.approx(1.0)
    assert all(point.seconds < 1 for point in points)


@pytest.fixture
def carbon(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of RDKit: texts of C alone are molecules, and the reward of one is its length over 10."""
    monkeypatch.setattr(molecules, "name_of", lambda text: text if set(text) == {"C"} else "")
    monkeypatch.setattr(molecules, "qed_of", lambda text: len(text) / 10)


@pytest.mark.usefixtures("carbon")
def test_a_molecule_of_an_earlier_call_gets_no_reward() -> None:
    """Reference: by hand."""
    reward = molecules.make_reward()
    assert reward([""] * 4, ["CC", "x", "CC", "CCC"]) == {
        "qed": [0.2, 0.0, 0.2, 0.3],
        "valid": [1.0, 0.0, 1.0, 1.0],
        "new": [1.0, 0.0, 1.0, 1.0],
    }
    assert reward([""] * 2, ["CCC", "CCCC"]) == {"qed": [0.0, 0.4], "valid": [1.0, 1.0], "new": [0.0, 1.0]}
    assert molecules.make_reward()([""], ["CC"])["new"] == [1.0]


@pytest.mark.usefixtures("carbon")
def test_a_repeated_molecule_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand."""
    monkeypatch.setattr(molecules, "MEASURED", 4)
    found = molecules.measure_reward(lambda params, count: ["CCC", "CC", "CCC", "x"][:count], None)
    assert found == pytest.approx(((0.3 + 0.2) / 4, 3 / 4))


@pytest.mark.nightly
def test_rdkit_scores_molecules() -> None:
    """Reference: values of RDKit, recorded, for aspirin and benzene."""
    pytest.importorskip("rdkit")
    found = molecules.make_reward()([""] * 5, ["CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1", "C1=CC=CC=C1", "c1ccccc", ""])
    np.testing.assert_allclose(found["qed"], [0.55, 0.44, 0.44, 0, 0], atol=0.005)
    assert found["valid"] == [1, 1, 1, 0, 0]
    assert molecules.name_of("C1=CC=CC=C1") == "c1ccccc1"


@pytest.mark.nightly
def test_the_quality_of_molecules() -> None:
    """Reference: by hand; OCC is ethanol as CCO is."""
    pytest.importorskip("rdkit")
    found = molecules.quality_of(["CCO", "OCC", "c1ccccc1", "C(", ""], {"CCO"})
    assert found.valid == 3 / 5
    assert found.unique_1k == found.unique_10k == 2 / 3
    assert found.novel == 1 / 2
    assert molecules.quality_of(["C(", ""], {"CCO"}) == (0, 0, 0, 0, 0, 0)
    assert 0.3 < found.diversity < 0.5  # of three, two are the same, and have nothing in common with the third


@pytest.mark.nightly
def test_it_runs_in_small(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    if importlib.util.find_spec("moses") is None:
        pytest.skip("the package molsets is not installed")
    out = tmp_path / "out"
    words = ["--molecules", "3000", "--text-steps", "20", "--search-steps", "1", "--steps", "2", "--population", "8"]
    done = subprocess.run(
        [sys.executable, PROGRAM, "--out", str(out), *words], capture_output=True, text=True, timeout=1800, check=True
    )
    assert "reinforce:" in done.stdout
    assert len((out / "search.jsonl").read_text().splitlines()) == 8
    for method in molecules.METHODS:
        points = [json.loads(line) for line in (out / f"{method}.jsonl").read_text().splitlines()]
        assert [point["calls"] for point in points] == [0, 2 * 8 * molecules.COMPLETIONS]
        assert 0 <= json.loads((out / f"{method}.json").read_text())["valid"] <= 1
    assert (out / "curves.png").stat().st_size > 1000
