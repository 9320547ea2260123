"""The example of arithmetic: its calculator, its reward and its files; and it runs, in small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import arithmetic
import pytest

from esjax.config.reward import RewardConfig
from esjax.rewards.prompts import read_prompts, split_prompts

PROGRAM = Path(__file__).parents[2] / "experiments" / "arithmetic.py"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("47*85=[47*85]", "3995"),
        ("47*85=[40*85]", "3400"),
        ("47*85=[1*1]1[10*11]", "110"),
        ("47*85=[47*]", ""),
        ("47*85=[]", ""),
        ("47*85=]", ""),
        ("47*85=[4*8*5]", ""),
    ],
)
def test_the_calculator_multiplies_what_is_in_the_last_brackets(text: str, answer: str) -> None:
    """Reference: by hand."""
    assert arithmetic.calculate(text) == answer


def test_the_final_answer_counts() -> None:
    completions = ["3995", "[47*85]3995", "[47*85]39951", "3995[47*85]", "[40*85]3400"]
    found = arithmetic.reward(["47*85="] * 5, completions, ["3995"] * 5)
    assert found == {"right": [1.0, 1.0, 0.0, 0.0, 0.0], "calls": [0.0, 1.0, 1.0, 1.0, 1.0]}


def test_the_text_holds_no_held_out_problem_and_right_answers_only(tmp_path: Path) -> None:
    text, prompts = arithmetic.make_files(tmp_path)
    _, held_out = split_prompts(read_prompts(str(prompts)), RewardConfig().held_out)
    lines = text.read_text().splitlines()
    assert not {prompt.text for prompt in held_out} & {line.partition("=")[0] + "=" for line in lines}
    assert len(held_out) > 700
    calls = 0
    for line in lines[:1000]:
        found = re.fullmatch(r"(\d\d)\*(\d\d)=(\[\1\*\2\])?(\d+)", line)
        assert found is not None, line
        assert int(found[1]) * int(found[2]) == int(found[4])
        calls += found[3] is not None
    assert 70 < calls < 130  # one line in ten


@pytest.mark.nightly
def test_it_runs_in_small(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--out", str(out), "--text-steps", "2", "--steps", "2", "--population", "32"]
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, timeout=300, check=True)
    assert re.findall(r"step +(\d+)  right, held out: (\d\.\d+)", done.stdout)[0] == ("0", "0.000")
    assert (out / "curve.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (out / "reward/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward_calls"] <= 1 for row in rows)
