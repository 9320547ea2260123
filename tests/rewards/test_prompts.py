"""Prompts: read, split and encoded; and what is said of wrong ones."""

from pathlib import Path

import numpy as np
import pytest

import esjax
from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, to_yaml
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary, fit_vocabulary
from esjax.errors import EsjaxError
from esjax.hosts.executor import Executor
from esjax.hosts.protocol import tasks
from esjax.models.custom import Custom
from esjax.rewards.prompts import Prompt, digest_of, encode_prompts, read_prompts, split_prompts, tokens_of


def zero(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(prompts)


ABC = Vocabulary("char", ("a", "b", "c"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lines.txt").write_text("one\n\n  two \n")
    (tmp_path / "json.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": ""}\n')
    (tmp_path / "made.py").write_text(
        "def make():\n    return ['x', ('y', 5)]\n\ndef wrong():\n    return [3]\n\ndef none():\n    return []\n\n"
        "def of(number):\n    pass\n\n"
        "import functools\n\n@functools.wraps(of)\ndef wrapped():\n    return ['z']\n\n"
        "def nothing():\n    pass\n\ndef sets():\n    return [('x', {'yes', 'no'})]\n"
    )
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (tmp_path / "broken.jsonl").write_text("prompt\n")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "deep.jsonl").write_text('{"prompt": ' + 100_000 * "[")
    (tmp_path / "long.jsonl").write_text('{"prompt": "", "answer": ' + 5000 * "1" + "}")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("lines.txt", [Prompt("one"), Prompt("  two ")]),
        ("json.jsonl", [Prompt("1+1=", "2"), Prompt("")]),
        ("made.py:make", [Prompt("x"), Prompt("y", 5)]),
        ("made.py:wrapped", [Prompt("z")]),
    ],
)
def test_prompts_come_from_lines_json_lines_or_a_function(folder: Path, name: str, prompts: list[Prompt]) -> None:
    assert read_prompts(str(folder / name)) == prompts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "cannot read .*missing.txt.*No such file"),
        ("missing.py:make", r"there is no file .*missing.py.*PATH.py:FUNCTION"),
        ("made.py:other", "has no other"),
        ("made.py:wrong", "returns 3 among its prompts"),
        ("made.py:none", "holds no prompt"),
        ("made.py:of", r"takes \(number\); a function for prompts takes nothing, and returns strings or "),
        ("made.py:nothing", "returns a NoneType; return a list"),
        ("made.py:sets", "returns the answer {.*}, which JSON does not hold"),
        ("deep.jsonl", "line 1 is not JSON"),
        ("long.jsonl", "line 1 is not JSON: Exceeds the limit"),
        ("bad.jsonl", "line 2 is no prompt"),
        ("broken.jsonl", "line 1 is not JSON"),
        ("blank.txt", "holds no prompt"),
    ],
)
def test_a_source_without_prompts_is_one_clear_line(folder: Path, name: str, message: str) -> None:
    with pytest.raises(EsjaxError, match=message) as raised:
        read_prompts(str(folder / name))
    assert "\n" not in str(raised.value)


def test_a_host_runs_no_file_of_prompts_that_a_coordinator_names(folder: Path) -> None:
    code = folder / "prompts.py"
    code.write_text("raise SystemExit('it was run')\n")
    config = Config(reward=RewardConfig(prompts=f"{code}:make"))
    executor = Executor(custom=Custom(reward=zero), tell=print)
    result = executor.do(tasks.Build(to_yaml(config), 256, b"", "", 0))
    assert isinstance(result, tasks.Failed)
    assert "hosts run no file that a coordinator names; write the prompts to a .jsonl file" in result.reason
    with pytest.raises(EsjaxError, match="hosts run no file that a coordinator names"):
        esjax.serve(config, folder / "run", reward=zero, bind="tcp://127.0.0.1:0", tell=print)
    assert not (folder / "run").exists()


def test_half_a_character_is_refused(folder: Path) -> None:
    (folder / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    with pytest.raises(EsjaxError, match="holds half a character"):
        read_prompts(str(folder / "half.jsonl"))


def test_prompts_are_padded_with_stop() -> None:
    encoded = encode_prompts([Prompt("ab"), Prompt(""), Prompt("c")], ABC)
    np.testing.assert_array_equal(encoded.tokens, [[2, 3], [STOP, STOP], [4, STOP]])
    np.testing.assert_array_equal(encoded.lengths, [2, 0, 1])


def test_characters_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(EsjaxError, match="prompt 'a!' holds '!'"):
        encode_prompts([Prompt("a!")], ABC)
    with pytest.raises(EsjaxError, match=r"reward\.stop holds '!'"):
        tokens_of("b!", "stop", ABC)
    assert tokens_of("cb", "stop", ABC) == (3, 4)
    assert tokens_of("", "stop", ABC) == ()


def test_subwords_that_hold_a_character_end_a_text_and_those_that_end_in_it_call_a_tool() -> None:
    """Reference: the texts of all tokens."""
    pytest.importorskip("tokenizers")
    vocabulary = fit_vocabulary("bpe:280", [b"[1], [[2]] [[3]]\0" * 40], None)
    texts = {token: vocabulary.decode([token]) for token in range(2, vocabulary.size)}
    assert tokens_of("]", "stop", vocabulary) == tuple(token for token, text in texts.items() if "]" in text)
    assert tokens_of("]", "tool_at", vocabulary) == tuple(token for token, text in texts.items() if text[-1:] == "]")
    assert len(tokens_of("]", "stop", vocabulary)) > len(tokens_of("]", "tool_at", vocabulary)) > 1


def test_the_split_goes_by_the_text_of_a_prompt() -> None:
    prompts = [Prompt(str(number), number) for number in range(400)]
    train, held_out = split_prompts(prompts, 0.25)
    assert sorted(train + held_out, key=lambda prompt: prompt.answer) == prompts
    assert 60 < len(held_out) < 140  # binomial: 100 ± 4.6 deviations
    assert split_prompts(prompts[::-1], 0.25)[1] == held_out[::-1]
    assert split_prompts(prompts, 0.0) == (prompts, [])
    with pytest.raises(EsjaxError, match="all 1 prompts are held out"):
        split_prompts(held_out[:1], 0.25)


def test_the_digest_covers_texts_answers_and_order() -> None:
    digests = [
        digest_of(prompts)
        for prompts in (
            [Prompt("a"), Prompt("b")],
            [Prompt("b"), Prompt("a")],
            [Prompt("a", 1), Prompt("b")],
            [Prompt("ab")],
        )
    ]
    assert len(set(digests)) == 4
    assert digests[0] == digest_of([Prompt("a"), Prompt("b")])
