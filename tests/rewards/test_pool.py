"""Worker processes: rewards come back in order, and a call that goes wrong costs itself alone."""

import hashlib
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esjax.config.custom_names import Code
from esjax.core.shaping import LARGEST_LOSS
from esjax.rewards.calls import LARGEST, Failure, Scored, Texts, make_call
from esjax.rewards.pool import Pool

BAD = {
    "hang": r"took more than 0\.5 s \(reward\.seconds\)",
    "leave": "its worker process ended with code 3",
    "killed": "its worker process was killed by signal 9",
    "exit": r"SystemExit: enough \(bad\.py, line \d+\)",
    "raise": r"ValueError: two lines \(bad\.py, line \d+\)",
    "string": "it returned a str; it must return a list of 2 numbers",
    "strings": "it returned a str in its list",
    "short": "it returned 1 values; it must return a list of 2 numbers",
    "nan": "it returned nan; rewards must be finite",
    "infinite": "it returned inf; rewards must be finite",
    "nothing": "it returned a NoneType",
}


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(Code(str(Path(__file__).with_name("bad.py")), "reward", ""), processes=2, seconds=0.5)
    yield pool
    pool.close()


def score(pool: Pool, words: list[str]) -> Scored:
    """Score each word twice, in a call of two texts."""
    texts = [word for word in words for _ in range(2)]
    scored = Scored.nothing()
    for future in pool.score(Texts(2, ["prompt"] * len(texts), texts, [None] * len(texts))):
        scored.add(future.result(120), 2)
    return scored


def test_each_bad_call_fails_alone(pool: Pool) -> None:
    """Reference: the lengths of the words."""
    words = ["a", "bb", "ccc"]
    for word in BAD:
        words += [word, "dddd", "eeeee"]
    scored = score(pool, words)
    assert len(scored.values) == 2 * len(words)
    for number, word in enumerate(words):
        pair = scored.values[2 * number : 2 * number + 2]
        if word in BAD:
            assert all(map(math.isnan, pair)), word
        else:
            assert pair == [len(word)] * 2
    assert sorted(scored.failures) == [number for number, word in enumerate(words) if word in BAD]


@pytest.mark.parametrize("word", BAD)
def test_the_reason_is_one_line(pool: Pool, word: str) -> None:
    scored = score(pool, [word])
    assert re.search(BAD[word], scored.failures[0].reason)
    assert "\n" not in scored.failures[0].reason


def test_a_pool_goes_on_after_its_processes_were_killed(pool: Pool) -> None:
    assert score(pool, ["abc"] * 8).values == [3.0] * 16
    for worker in [*pool._workers]:
        os.kill(worker._process.pid, signal.SIGKILL)
    assert score(pool, ["ab"] * 8).values == [2.0] * 16  # the calls are made again in new processes


def test_loading_twice_starts_each_process_once(pool: Pool) -> None:
    assert pool.load() is None
    first = {*pool._workers}
    assert pool.load() is None
    assert score(pool, ["a"]).values == [1.0, 1.0]
    assert {*pool._workers} == first
    assert len(first) == 2


def test_closing_ends_all_processes_and_scoring_starts_new_ones(pool: Pool) -> None:
    score(pool, ["abc"])
    processes = [worker._process for worker in pool._workers]
    pool.close()
    assert all(process.poll() is not None for process in processes)
    assert score(pool, ["abc"]).values == [3.0, 3.0]


def test_closing_ends_calls_that_hang() -> None:
    pool = Pool(Code(str(Path(__file__).with_name("bad.py")), "reward", ""), processes=1, seconds=600.0)
    (future,) = pool.score(Texts(2, ["", ""], ["hang", "hang"], [None, None]))
    while not any(worker.is_loaded for worker in [*pool._workers]):
        time.sleep(0.01)
    pool.close()
    assert future.result(60).failures == {0: Failure("closed", "the run was ended")}


def test_an_answer_that_cannot_be_sent_fails_its_batch_alone(pool: Pool) -> None:
    (future, *_) = pool.score(Texts(1, [""], ["abc"], [lambda: None]))
    assert "it cannot be called" in future.result(120).failures[0].reason
    assert score(pool, ["abc"]).values == [3.0, 3.0]


def test_a_file_that_a_process_cannot_load_fails_all_calls(tmp_path: Path) -> None:
    (tmp_path / "gone.py").write_text("import no_such_module\n")
    for name in ("gone.py", "missing.py"):
        pool = Pool(Code(str(tmp_path / name), "reward", ""), processes=1, seconds=1.0)
        scored = score(pool, ["a", "b", "c"])
        pool.close()
        assert [failure.kind for failure in scored.failures.values()] == ["load"] * 3
        assert "cannot load" in scored.failures[0].reason


def test_a_file_that_has_changed_since_the_start_is_not_called(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def reward(prompts, completions):\n    return [1.0] * len(prompts)\n")
    code = Code(str(tmp_path / "own.py"), "reward", hashlib.sha256((tmp_path / "own.py").read_bytes()).hexdigest())
    for after in ("", "\n"):
        with (tmp_path / "own.py").open("a") as file:
            file.write(after)
        pool = Pool(code, processes=2, seconds=1.0)
        failure = pool.load()
        pool.close()
        assert (failure is None) == (after == "")
    assert failure is not None
    assert "the file has changed since the run was started" in failure.reason


def test_an_error_of_many_lines_is_told_in_one(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise ValueError('one\\ntwo')\n")
    pool = Pool(Code(str(tmp_path / "own.py"), "reward", ""), processes=1, seconds=1.0)
    failure = pool.load()
    pool.close()
    assert failure is not None
    assert failure.reason.endswith("ValueError: one two")


def test_a_pool_that_was_closed_loads_and_scores_again(pool: Pool) -> None:
    for _ in range(2):
        assert pool.load() is None
        assert score(pool, ["a"]).values == [1.0, 1.0]
        pool.close()


def test_a_process_that_starts_while_the_pool_is_closed_is_ended(pool: Pool) -> None:
    pool.close()
    worker = pool._begin_worker()
    assert worker._process.wait(30) == -9
    pool._end(worker)


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (lambda prompts, completions, penalty=0.5: [penalty], 0.5),
        (lambda prompts, completions, answers: answers, 2.0),
        (lambda prompts, completions, *, answers: answers, 2.0),
    ],
)
def test_answers_go_to_the_argument_of_that_name(reward: Callable[..., list[float]], value: float) -> None:
    call = make_call("reward", reward, {})
    assert call(Texts(1, ["a"], ["b"], [2.0]), 0) == [value]


def test_a_reward_that_no_loss_may_have_is_named() -> None:
    assert LARGEST == LARGEST_LOSS
    call = make_call("reward", lambda prompts, completions: [-1e9], {})
    failure = call(Texts(1, ["a"], ["b"], [None]), 0)
    assert isinstance(failure, Failure)
    assert "less than 1e9 in size" in failure.reason


def test_calls_are_made_by_all_processes_at_once(tmp_path: Path) -> None:
    """Reference: a call that waits for one in another process returns only if both run at the same time."""
    pool = Pool(Code(str(Path(__file__).with_name("bad.py")), "meet", ""), processes=2, seconds=60.0)
    scored = Scored.nothing()
    for future in pool.score(Texts(1, [str(tmp_path)] * 4, ["a"] * 4, [None] * 4)):
        scored.add(future.result(120), 1)
    pool.close()
    assert not scored.failures
    assert len({*scored.values}) == 2


def test_one_process_makes_few_fast_calls_and_all_make_slow_ones(pool: Pool) -> None:
    score(pool, ["abc"] * 64)
    assert pool._call_seconds < 0.5
    texts = Texts(1, ["prompt"] * 64, ["abc"] * 64, [None] * 64)
    for call_seconds, batches in ((1e-6, 1), (0.05, 2)):
        pool._call_seconds = call_seconds
        assert len([future.result(60) for future in pool.score(texts)]) == batches
