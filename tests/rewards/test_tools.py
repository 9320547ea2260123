"""A tool's answer stands in the text, and the member goes on after it."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import mesh_of

import esjax
from esjax.config.settings import Config
from esjax.core.seeds import loss_key, pair_seeds
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.models import build_model
from esjax.models.custom import Custom
from esjax.models.member import Member, sequence_keys
from esjax.replica.replica import Replica
from esjax.rewards.calls import Failure, Scored, Texts, make_call
from esjax.rewards.prompts import Prompt, encode_prompts
from esjax.rewards.scoring import make_scorer
from esjax.rewards.tools import ToolUse

pytestmark = pytest.mark.usefixtures("lenient_promotion")

SYMBOLS = Vocabulary("char", tuple("0123456789+=[]"))
LENGTH = 12
BAD = str(Path(__file__).with_name("bad.py"))


def calculate(text: str) -> str:
    """Add up the numbers in the last brackets; return nothing for 0."""
    total = sum(map(int, text[text.rindex("[") + 1 : -1].split("+")))
    return str(total) if total else ""


def rows_of(*texts: str) -> np.ndarray:
    """Encode texts, and fill them up with STOP."""
    rows = np.full((len(texts), LENGTH), STOP, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = SYMBOLS.encode(text)
    return rows


def tool_use(most: int, called: list[str], reported: list[str]) -> ToolUse:
    def call(texts: Texts) -> Scored:
        scored = Scored.nothing()
        called.extend(prompt + text for prompt, text in zip(texts.prompts, texts.completions, strict=True))
        for number in range(texts.calls):
            scored.add_call(make_call("tool", calculate, {})(texts, number), 1)
        return scored

    def report(texts: Texts, failure: Failure) -> None:
        reported.append(f"{texts.prompts[0]}{texts.completions[0]}: {failure.reason}")

    return ToolUse((int(SYMBOLS.encode("]")[0]),), most, SYMBOLS, call, report)


PROMPTS = [Prompt("12+7="), Prompt("3+4="), Prompt("5+5="), Prompt("9+9="), Prompt("1=")]
FIRST = rows_of("[12+7]", "[3+4+93]", "10", "[9+]", "[100+1000+1]")
MORE = {"12+7=[12+7]19": "19", "3+4=[3+4+93]100": "[1+1]"}
"""What members write after each text that holds the answer."""


def write_on(seen: list[list[str]]) -> Any:
    def write(tokens: np.ndarray, lengths: np.ndarray, begun: np.ndarray) -> np.ndarray:
        texts = [SYMBOLS.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        seen.append([text for text in texts if text in MORE])
        assert all(
            length == len(prompt.text) + min(count, LENGTH)
            for prompt, length, count in zip(PROMPTS, lengths, begun, strict=True)
        )
        return rows_of(*(MORE.get(text, "00") for text in texts))

    return write


def test_answers_stand_where_members_paused() -> None:
    """Reference: by hand. The second text has room for one token after 100; the fourth fails; the fifth is full."""
    called: list[str] = []
    reported: list[str] = []
    seen: list[list[str]] = []
    encoded = encode_prompts(PROMPTS, SYMBOLS)
    written = tool_use(1, called, reported).finish([one.text for one in PROMPTS], encoded, FIRST, write_on(seen))
    assert [SYMBOLS.decode(row) for row in written.tokens] == [
        "[12+7]1919",
        "[3+4+93]100[",
        "10",
        "[9+]",
        "[100+1000+1]",
    ]
    assert written.failed.tolist() == [False, False, False, True, False]
    assert called == ["12+7=[12+7]", "3+4=[3+4+93]", "9+9=[9+]"]
    assert seen == [["12+7=[12+7]19", "3+4=[3+4+93]100"]]
    (line,) = reported
    assert line.startswith("9+9=[9+]: ValueError: invalid literal")
    assert (rows_of("[12+7]", "[3+4+93]", "10", "[9+]", "[100+1000+1]") == FIRST).all()


def test_a_second_call_needs_a_second_pause() -> None:
    """Reference: by hand. A member that writes nothing after an empty answer has paused once, not twice."""
    prompts, encoded = [Prompt("1="), Prompt("2=")], encode_prompts([Prompt("1="), Prompt("2=")], SYMBOLS)
    called: list[str] = []
    more = {"1=[1+1]2": "[2+2]", "1=[1+1]2[2+2]4": "4", "2=[0+0]": ""}

    def write(tokens: np.ndarray, lengths: np.ndarray, begun: np.ndarray) -> np.ndarray:
        texts = [SYMBOLS.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
        return rows_of(*(more.get(text, "") for text in texts))

    use = tool_use(3, called, [])
    written = use.finish([one.text for one in prompts], encoded, rows_of("[1+1]", "[0+0]"), write)
    assert [SYMBOLS.decode(row) for row in written.tokens] == ["[1+1]2[2+2]4", "[0+0]"]
    assert called == ["1=[1+1]", "2=[0+0]", "1=[1+1]2[2+2]"]


TEXT = "\n\n".join(["abc cab bac [ab] acb bca cba", "abc cab [b] bac"] * 8)


def count_tool(text: str) -> str:
    """Answer with a letter and a space that depend on the whole text."""
    return "abc"[len(text) % 3] + " "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nab\nbc\nca\nabc\n")
    return tmp_path


def config_of(folder: Path, **settings: Any) -> Config:
    shared: dict[str, Any] = {"prompts": str(folder / "prompts.txt"), "length": 9, "held_out": 0.3, "processes": 0}
    return esjax.Config(
        steps=2,
        data=esjax.DataConfig(text=str(folder / "text.txt"), held_out=0.2, batch_size=2),
        es=esjax.EsConfig(population_size=32, chunk_pairs=4, sigma=settings.pop("sigma", 0.2)),
        model=esjax.GruConfig(hidden_size=4, head_size=4),
        reward=esjax.RewardConfig(**shared | {"tool_at": "b", "tool_calls": 2} | settings),
        evaluate_time=1e-9,
    )


def by_hand(member: Member, vocabulary: Vocabulary, prompt: str, key: Any, length: int) -> str:
    """Write token by token, in a Python loop, and read the tool's answers as they come."""
    params, text, calls = member.params, "", 0

    def read(text: str, state: Any) -> Any:
        for token in vocabulary.encode(text):
            state = CONSUME(member.model, params, state, np.int32(token))
        return state

    state = read(prompt, member.initial_state())
    while len(text) < length:
        token = int(WRITE(member.model, params, state, key, np.int32(len(text)))[0])
        if token == STOP:
            break
        added = vocabulary.decode([token])
        if added == "b" and len(text) + 1 < length:
            if calls == 2:  # nobody answers a third call
                return text + added
            added += count_tool(prompt + text + added)
            calls += 1
        added = added[: length - len(text)]
        text += added
        state = read(added, state)
    return text


CONSUME = jax.jit(lambda model, params, state, token: Member(model, params).consume(state, token), static_argnums=0)
WRITE = jax.jit(
    lambda model, params, state, key, first: Member(model, params).generate(state, 1, key, first=first),
    static_argnums=0,
)


@pytest.mark.parametrize("devices", [1, 2])
def test_members_read_the_answers_and_write_on(folder: Path, devices: int) -> None:
    """Reference: one member, token by token; without noise, all members have its weights."""
    seen: list[tuple[list[str], list[str]]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    config = config_of(folder, sigma=1e-30)
    vocabulary = Vocabulary("char", tuple("abc []\n"))
    scorer = make_scorer(config, Custom(reward=reward, tool=count_tool), vocabulary, print)
    model = build_model(config.model, vocabulary.size)
    replica = Replica(config, model, None, mesh_of(devices), scorer=scorer)
    replica.warm_up()
    assert not seen
    assert replica._texts is not None
    programs: list[Any] = [*replica._texts.writers]
    assert [program._cache_size() for program in programs] == [1, 1]
    replica.losses(np.arange(15))  # the last chunk is not whole
    assert [program._cache_size() for program in programs] == [1, 1]  # nothing was compiled anew
    assert len(seen) == 15
    keys = [sequence_keys(loss_key(seed), 2) for seed in pair_seeds(0, 0, 15)]
    member = Member(model, replica.state.params)
    calls = 0
    for pair in range(15):
        prompts, completions = seen[pair]
        assert completions[:2] == completions[2:]
        for row in range(2):
            expected = by_hand(member, vocabulary, prompts[row], keys[pair][row], 9)
            assert completions[row] == expected
            calls += expected.count("b")
    assert calls > 10


def test_a_run_with_a_tool_is_the_same_each_time_and_measures_with_it(folder: Path) -> None:
    """Reference: the greedy completions of held-out prompts, by hand."""
    held_out: list[str] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        if len(prompts) == 5:  # one prompt, greedily and 4 samples
            held_out.append(f"{prompts[0]}>{completions[0]}")
        return [float(text.count("a")) for text in completions]

    def last() -> esjax.Trainer:
        run = esjax.train(config_of(folder), reward=reward, tool=count_tool, tell=print)
        assert [info.step for info in run] == [1, 2]
        return run

    run, again = last(), last()
    np.testing.assert_array_equal(run.params.embedding, again.params.embedding)
    assert held_out[: len(held_out) // 2] == held_out[len(held_out) // 2 :]
    member = Member(build_model(run.config.model, run.corpus.vocabulary.size), run.params)
    assert run._scorer is not None
    prompts = run._scorer.held_out
    expected = [by_hand(member, run.corpus.vocabulary, prompt.text, None, 9) for prompt in prompts]
    assert held_out[-len(prompts) :] == [
        f"{prompt.text}>{text}" for prompt, text in zip(prompts, expected, strict=True)
    ]
    assert run.last is not None
    assert run.last.greedy_reward == np.mean([text.count("a") for text in expected])


def zero(prompts: list[str], completions: list[str]) -> list[float]:
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tool_raises", r"ValueError: not now \(bad\.py, line \d+\)"),
        ("tool_hangs", r"it took more than 0\.3 s \(reward\.seconds\)"),
        ("tool_of_numbers", "it returned a int; it must return a string"),
        ("tool_of_others", "it returned 'é'; the vocabulary does not hold 'é'"),
        ("tool_of_halves", "UnicodeEncodeError: .*surrogates not allowed"),
    ],
)
def test_a_tool_that_fails_costs_its_pair_and_is_told_once(folder: Path, name: str, reason: str) -> None:
    config = config_of(folder, processes=2, seconds=0.3, held_out=0.0)
    told: list[str] = []
    run = esjax.train(config, reward=zero, tool=f"{BAD}:{name}", tell=told.append)
    assert run._scorer is not None
    for _ in range(2):
        losses = run._replica.losses(np.arange(2))
    run._scorer.close()
    assert np.isnan(losses).all(axis=1).any()
    (line,) = [line for line in told if "failed" in line]
    assert line.startswith(f"the tool {name} failed: ")
    assert re.search(reason, line)


def test_a_tool_belongs_to_a_reward_in_python(folder: Path) -> None:
    with pytest.raises(EsjaxError, match="the tool count_tool is for text that a reward in Python scores"):
        esjax.train(esjax.Config(steps=1), tool=count_tool)
    with pytest.raises(EsjaxError, match=r"reward\.tool_at holds '#', which is no token"):
        esjax.train(config_of(folder, tool_at="#"), reward=zero, tool=count_tool)
    with pytest.raises(EsjaxError, match=r"tool is 'calculator'; give a function, or PATH\.py:FUNCTION"):
        esjax.train(config_of(folder), reward=zero, tool="calculator")
