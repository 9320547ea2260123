"""From tokens to losses, and what is said of a reward and prompts that do not belong together."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esjax.config.reward import RewardConfig
from esjax.config.settings import Config, replace
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import Vocabulary, fit_vocabulary
from esjax.errors import EsjaxError
from esjax.models.custom import Custom
from esjax.models.custom.code import load_custom
from esjax.rewards.decoding import decode_all
from esjax.rewards.prompts import digest_of, read_prompts
from esjax.rewards.scoring import Scorer, begin, code_of, make_scorer

ABC = Vocabulary("char", ("a", "b", "c"))
BAD = str(Path(__file__).with_name("bad.py"))


def count_a(prompts: list[str], completions: list[str]) -> list[float]:
    return [
        completion.count("a") - 10.0 * prompt.count("a")
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def is_answer(prompts: list[str], completions: list[str], answers: list[Any]) -> list[float]:
    return [float(completion == answer) for completion, answer in zip(completions, answers, strict=True)]


def config_of(prompts: Path, **settings: Any) -> Config:
    return Config(reward=RewardConfig(prompts=str(prompts), held_out=0.0, processes=0, **settings))


def scorer_of(config: Config, reward: Callable[..., Any], told: list[str]) -> Scorer:
    scorer = make_scorer(config, Custom(reward=reward), ABC, told.append)
    assert scorer is not None
    return scorer


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "answer": "bb"}\n{"prompt": "b", "answer": "c"}\n')
    return path


TOKENS = np.array(
    [[[[2, 2, STOP], [2, 3, 2]], [[STOP, STOP, STOP], [3, 3, STOP]]], [[[4, STOP, STOP], [3, 3, STOP]]] * 2], np.int32
)
"""Pairs 0 and 1, two members, two prompts: "aa" and "aba" against "" and "bb"; "c" and "bb" for both."""

DRAWN = np.array([[1, 0], [1, 0]])
NONE_FAILED = np.zeros(2, bool)


@pytest.mark.parametrize("processes", [0, 2])
def test_the_loss_is_minus_the_mean_reward_of_a_members_prompts(prompts: Path, processes: int) -> None:
    """Reference: by hand. The first prompt of both pairs is "b" with answer "c", the second "a" with answer "bb"."""
    config = config_of(prompts)
    config = replace(config, reward=replace(config.reward, processes=processes))
    for reward, losses in (
        (count_a, [[-(2 + 2 - 10) / 2, -(0 + 0 - 10) / 2], [5.0, 5.0]]),
        (is_answer, [[0.0, -0.5], [-1.0, -1.0]]),
    ):
        scorer = scorer_of(config, reward, [])
        found = scorer.losses(DRAWN, TOKENS, NONE_FAILED)()
        scorer.close()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, losses)


def test_a_failed_call_costs_its_pair_and_is_told_once(prompts: Path) -> None:
    told: list[str] = []

    def picky(prompts: list[str], completions: list[str]) -> list[float]:
        if "aba" in completions:
            raise ValueError("no aba, please")
        return [1.0] * len(completions)

    scorer = scorer_of(config_of(prompts), picky, told)
    for _ in range(2):
        np.testing.assert_array_equal(scorer.losses(DRAWN, TOKENS, NONE_FAILED)(), [[np.nan, np.nan], [-1.0, -1.0]])
    assert scorer.failures == 2
    (line,) = told
    assert "ValueError: no aba, please (test_scoring.py, line" in line
    assert "prompt 'b', completion 'aa'" in line


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(("weights", "empty"), [({"letters": 1, "empty": 0.5}, 0.5), ({"empty": -4}, -4), ({}, 1)])
def test_named_rewards_are_added_up_with_their_weights(
    prompts: Path, processes: int, weights: dict[str, float], empty: float
) -> None:
    """Reference: by hand. The texts have 2, 3, 0, 2 and twice 1, 2 letters; one of eight is empty."""
    config = config_of(prompts, weights=weights)
    config = replace(config, reward=replace(config.reward, processes=processes))
    custom = load_custom(reward=f"{BAD}:named")
    scorer = make_scorer(config, custom, ABC, print)
    assert scorer is not None
    losses = scorer.losses(DRAWN, TOKENS, NONE_FAILED)()
    scorer.close()
    np.testing.assert_array_equal(losses, np.array([[-2.5, -(empty + 2) / 2], [-1.5, -1.5]], np.float32))
    assert scorer.take_means() == [("empty", 1 / 8, 2), ("letters", 13 / 8, 2)]
    assert scorer.take_means() == []


@pytest.mark.parametrize(
    ("returned", "weights", "reason"),
    [
        ({"right": [1.0] * 4}, {"format": 1}, r"returned the rewards right; it must .* with format \(reward.weights"),
        ([1.0] * 4, {"format": 1}, "returned a list; it must return a mapping from names to lists, with format"),
        ({}, {}, "returned the rewards of no name; it must return a mapping"),
        ({"not a name": [1.0] * 4}, {}, "returned the name 'not a name'"),
        ({"a" * 65: [1.0] * 4}, {}, "returned the name 'a*'; names are .*, 64 at most"),
        ({f"a{number}": [1.0] * 4 for number in range(17)}, {}, "returned 17 rewards; 16 are the most"),
        ({"right": [1.0] * 4, "format": [1.0]}, {}, "1 values; it must return a list of 4 numbers, .*, format"),
        ({"right": [float("nan")] * 4}, {}, "returned nan"),
    ],
)
def test_one_named_reward_that_is_wrong_costs_the_whole_pair(
    prompts: Path, returned: Any, weights: dict[str, float], reason: str
) -> None:
    told: list[str] = []
    scorer = scorer_of(config_of(prompts, weights=weights), lambda prompts, completions: returned, told)
    assert np.isnan(scorer.losses(DRAWN, TOKENS, NONE_FAILED)()).all()
    (line,) = told
    assert re.search(reason, line)


def test_many_texts_are_decoded_as_one_is() -> None:
    tokens = np.array([[2, UNK, 4], [3, STOP, STOP], [STOP] * 3], np.int32)
    pytest.importorskip("tokenizers")
    subwords = fit_vocabulary("bpe:260", [b"ab ab"], None)
    for vocabulary in (ABC, Vocabulary("char", ("\0", "ß", "\n")), Vocabulary("byte"), subwords):
        assert decode_all(vocabulary, tokens) == [vocabulary.decode(row) for row in tokens]


def test_a_run_records_the_hash_of_its_prompts(prompts: Path) -> None:
    begun = begin(config_of(prompts), Custom(reward=count_a))
    assert begun.reward.digest == digest_of(read_prompts(str(prompts)))
    assert begin(Config(), Custom()) == Config()
    make_scorer(begun, Custom(reward=count_a), ABC, print)
    prompts.write_text('{"prompt": "b"}\n')
    with pytest.raises(EsjaxError, match="are not those that the run was begun with"):
        make_scorer(begun, Custom(reward=count_a), ABC, print)


def test_a_reward_and_its_prompts_belong_together(prompts: Path) -> None:
    with pytest.raises(EsjaxError, match=r"count_a scores completions of prompts; name their file: --reward\.prompts"):
        begin(Config(), Custom(reward=count_a))
    for custom in (Custom(), Custom(reward=lambda member, tokens, key: 0.0)):
        with pytest.raises(EsjaxError, match=r"reward\.prompts .* is for a reward in Python"):
            begin(config_of(prompts), custom)
    with pytest.raises(EsjaxError, match="or \\(prompts, completions\\) to score text"):
        Custom(reward=lambda texts: 0.0)


def test_processes_find_a_reward_in_its_file() -> None:
    def inside(prompts: list[str], completions: list[str]) -> list[float]:
        return []

    custom = load_custom(reward=f"{BAD}:reward")
    assert custom.text_reward is not None
    assert (code_of(custom, "reward", custom.text_reward).path, code_of(custom, "reward", custom.text_reward).name) == (
        BAD,
        "reward",
    )
    found = code_of(Custom(reward=count_a), "reward", count_a)
    assert (found.path, found.name) == (str(Path(__file__)), "count_a")
    nameless: Any = lambda prompts, completions: []  # noqa: E731
    for reward in (inside, nameless):
        with pytest.raises(EsjaxError, match=r"worker processes cannot load it; put it into a file .*processes 0"):
            code_of(Custom(reward=reward), "reward", reward)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"es": {"space": "activation"}}, "needs noise on weights"),
        ({"es": {"exchange": "sums"}}, "needs es.exchange losses"),
        ({"es": {"output_layer": "exact"}}, "set es.output_layer to noise"),
        ({"data": {"block_tokens": 100}}, "leave data.block_tokens out"),
        ({"reward": {"prompts": "p", "length": 0}}, "length"),
        ({"reward": {"prompts": "p", "seconds": 0}}, "seconds"),
        ({"reward": {"prompts": "p", "samples": 0}}, "samples"),
        ({"reward": {"prompts": "p", "temperature": -1}}, "temperature"),
        ({"reward": {"prompts": "p", "processes": -1}}, "processes"),
        ({"reward": {"prompts": "p", "held_out": 1}}, "held_out"),
        ({"reward": {"prompts": "p", "tool_calls": 0}}, "tool_calls"),
        (
            {"reward": {"prompts": "p", "weights": {"format": float("inf")}}},
            "weights must be finite, got inf for format",
        ),
        ({"reward": {"prompts": "p", "patience": 0}}, "patience"),
        ({"reward": {"prompts": "p", "passing": float("nan")}}, "passing"),
        ({"reward": {"prompts": ""}}, "prompts must name a file"),
        ({"data": {"symbols": "aa"}}, "symbols must be distinct"),
        ({"data": {"symbols": "ab", "vocab_size": 4}}, "leave vocab_size out"),
        ({"data": {"symbols": "ab", "vocabulary": "byte"}}, "symbols are for characters"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EsjaxError, match=message):
        Config(**{"reward": {"prompts": "p"}, **settings})
