"""Training with a reward in Python: it rises, it is the same to the bit each time, and failures never end a run."""

import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from loopback import Loopback
from rich.console import Console

import esjax
from esjax.config.settings import Config
from esjax.core.seeds import loss_key, pair_seeds, stream_seed
from esjax.data.packing import draw_places
from esjax.data.tokens import STOP
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.flags import default_flags
from esjax.hosts.executor import Executor
from esjax.models import build_model
from esjax.models.custom import Custom
from esjax.models.member import Member, sequence_keys
from esjax.replica.replica import Replica
from esjax.replica.streams import HELD_OUT, WINDOWS
from esjax.rewards.held_out import make_measure_rewards
from esjax.rewards.scoring import make_scorer
from esjax.runs.checkpoint import digest
from esjax.runs.step_info import Limits
from esjax.training.local_steps import LocalSteps
from esjax.watch.progress import Progress

HERE = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("lenient_promotion")
WORDS = "abc cab bac acb bca cba"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{WORDS}\n{WORDS[number:]}" for number in range(16)))
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nab\nbc\nca\nabc\n")
    return tmp_path


def config_of(folder: Path, steps: int = 3, reward: dict[str, Any] | None = None, **es: Any) -> Config:
    shared: dict[str, Any] = {"prompts": str(folder / "prompts.txt"), "length": 6, "held_out": 0.3}
    members: dict[str, Any] = {"population_size": 64, "chunk_pairs": 8}
    return esjax.Config(
        steps=steps,
        data=esjax.DataConfig(text=str(folder / "text.txt"), held_out=0.2, batch_size=2),
        es=esjax.EsConfig(**members | es),
        model=esjax.GruConfig(hidden_size=4, head_size=4),
        reward=esjax.RewardConfig(**shared | (reward or {})),
        evaluate_time=1e-9,
    )


def train(config: Config, name: str, **more: Any) -> tuple[list[esjax.StepInfo], esjax.Trainer, list[str]]:
    told: list[str] = []
    run = esjax.train(config, reward=f"{HERE / 'letters.py'}:{name}", tell=told.append, **more)
    return [*run], run, told


def test_the_share_of_a_letter_rises(folder: Path) -> None:
    """Reference: a model that writes only the letter has 1, the first one at most the share in uniform text, 1/5."""
    config = config_of(folder, steps=40, population_size=256)
    infos, run, _ = train(config, "share_of_a", out=folder / "run")
    rewards = [info.reward for info in infos]
    assert rewards == [-info.loss for info in infos]
    assert rewards[0] is not None and rewards[0] < 0.3  # noqa: PT018
    assert rewards[-1] is not None and rewards[-1] > 0.7  # noqa: PT018
    last = infos[-1]
    assert last.greedy_reward is not None and last.greedy_reward > 0.9  # noqa: PT018
    assert last.pass_at_k is not None
    assert all(text.text.count("a") > len(text.text) / 2 for text in run.generate("b", max_tokens=6, count=3))
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == rewards
    assert rows[-1]["greedy_reward"] == last.greedy_reward
    # The text that the run began with is still measured, in nats per token.
    assert last.held_out is not None and last.held_out > 0  # noqa: PT018


def test_two_runs_and_a_resumed_one_are_equal_to_the_bit(folder: Path) -> None:
    _, one, _ = train(config_of(folder, steps=4, pairing="split", pairs_per_window=4), "share_of_a")
    config = config_of(folder, steps=2, pairing="split", pairs_per_window=4)
    train(config, "share_of_a", out=folder / "run")
    resumed = esjax.resume(folder / "run", steps=4, tell=print)
    assert [info.step for info in resumed] == [3, 4]
    assert digest(resumed._replica.state) == digest(one._replica.state)
    assert math.prod(one._replica.state.params.embedding.shape) > 0


def test_a_ledger_replays_without_calling_the_reward(folder: Path) -> None:
    config = esjax.config.settings.replace(config_of(folder), ledger=True)
    _, run, _ = train(config, "share_of_a", out=folder / "run")
    (folder / "prompts.txt").unlink()
    assert esjax.replay(folder / "run").digest == digest(run._replica.state)


def test_a_reward_that_always_fails_ends_no_run(folder: Path) -> None:
    infos, run, told = train(config_of(folder), "raises")
    assert [(info.step, info.applied, info.void_pairs) for info in infos] == [(step, False, 32) for step in (1, 2, 3)]
    assert sum("ValueError: never (letters.py, line" in line for line in told) == 1
    assert run._scorer is not None
    assert run._scorer.failures >= 96
    assert all(math.isnan(info.greedy_reward or 0.0) for info in infos)


def test_named_rewards_are_shown_and_recorded(folder: Path) -> None:
    """Reference: their sum with the weights, which is the reward itself."""

    def reward(prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
        return {name: [text.count(name) / 6 for text in completions] for name in "ab"}

    config = config_of(folder, reward={"processes": 0, "weights": {"b": -0.5}})
    run = esjax.train(config, reward=reward, out=folder / "run", tell=print)
    infos = [*run]
    for info in infos:
        assert info.rewards is not None
        assert list(info.rewards) == ["a", "b"]
        assert info.reward == pytest.approx(info.rewards["a"] - 0.5 * info.rewards["b"], rel=1e-5)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["reward_b"] for row in rows] == [info.rewards["b"] for info in infos if info.rewards]
    np.testing.assert_array_equal(run._history.columns()["reward_a"], [row["reward_a"] for row in rows])
    written = io.StringIO()
    console = Console(file=written, width=200)
    with Progress(console, {}, Limits(None, None)) as progress:
        progress.update(infos[0])
    assert infos[0].rewards is not None
    assert f"a {infos[0].rewards['a']:.3f}" in written.getvalue()


def test_a_run_goes_on_with_prompts_in_another_place(folder: Path) -> None:
    config = config_of(folder, steps=2)
    train(config, "share_of_a", out=folder / "run")
    (folder / "prompts.txt").rename(folder / "moved.txt")
    (folder / "prompts.txt").write_text("a\n")
    with pytest.raises(EsjaxError, match=r"are not those .* --reward\.prompts FILE"):
        esjax.resume(folder / "run", steps=3, tell=print)
    with pytest.raises(EsjaxError, match=r"prompts\.txt' are not those that the run was begun with"):
        esjax.resume(folder / "run", steps=3, prompts=str(folder / "prompts.txt"), tell=print)
    moved = esjax.resume(folder / "run", steps=3, prompts=str(folder / "moved.txt"), tell=print)
    assert [info.step for info in moved] == [3]
    again = esjax.resume(folder / "run", steps=4, tell=print)  # the new place is in the settings now
    assert [info.step for info in again] == [4]


def test_a_run_stops_when_the_greedy_reward_has_not_risen(folder: Path) -> None:
    """Reference: a reward that is always 0 is highest at the first evaluation; then there are two more."""
    config = config_of(folder, steps=9, reward={"processes": 0, "patience": 2})
    told: list[str] = []
    run = esjax.train(config, reward=lambda prompts, completions: [0.0] * len(prompts), tell=told.append)
    assert [info.step for info in run] == [1, 2, 3]
    assert any("no greedy reward above 0 in 2 evaluations" in line for line in told)


def test_pairs_that_fail_do_not_count(folder: Path) -> None:
    infos, _, told = train(config_of(folder), "raises_on_b")
    assert all(0 < info.void_pairs < 32 for info in infos)
    assert sum("ValueError: b" in line for line in told) == 1


def test_a_pair_shares_prompts_and_keys_and_its_members_differ_by_weights(folder: Path) -> None:
    """Reference: without noise, both members write what the unperturbed model writes after the same prompts."""
    seen: list[tuple[list[str], list[str]]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    config = config_of(folder, reward={"processes": 0, "held_out": 0.0}, sigma=1e-30)
    run = esjax.train(config, reward=reward, tell=print)
    replica = run._replica
    assert (replica.losses(np.arange(32)) == 0).all()
    assert len(seen) == 32
    texts = (folder / "prompts.txt").read_text().split()
    vocabulary, params = run.corpus.vocabulary, replica.state.params
    with default_flags():
        places = draw_places(pair_seeds(stream_seed(0, WINDOWS), 0, 32), 2, len(texts))
        keys = [sequence_keys(loss_key(seed), 2) for seed in pair_seeds(0, 0, 32)]
        for pair in (0, 1, 31):
            prompts, completions = seen[pair]
            assert prompts == [texts[place] for place in places[pair]] * 2
            assert completions[:2] == completions[2:]
            for row in range(2):
                member = Member(replica.model, params)
                tokens = member.generate(member.read(jnp.asarray(vocabulary.encode(prompts[row]))), 6, keys[pair][row])
                assert completions[row] == vocabulary.decode(np.asarray(tokens))


def test_greedy_reward_and_pass_at_k_are_means_over_held_out_prompts(folder: Path) -> None:
    """Reference: completions one by one, and their rewards by hand."""
    config = config_of(folder, reward={"processes": 0, "passing": 0.34, "samples": 3, "stop": " "})
    custom = Custom(reward=lambda prompts, completions: [text.count("a") / 6 for text in completions])
    vocabulary = Vocabulary("char", tuple("abc \n"))
    scorer = make_scorer(config, custom, vocabulary, print)
    assert scorer is not None
    assert 1 < len(scorer.held_out) < 7
    model = build_model(config.model, vocabulary.size)
    params = jax.tree.map(lambda leaf: 3 * leaf, model.init(jax.random.key(1)))
    seed = stream_seed(0, HELD_OUT)
    measure = make_measure_rewards(model, config.reward, scorer, seed)
    assert measure is not None
    found = measure(params)
    greedy, passed = [], []
    member = Member(model, params)
    keys = jax.random.split(loss_key(seed), 3)
    stop = int(vocabulary.encode(" ")[0])
    for row, prompt in enumerate(scorer.held_out):
        state = member.read(jnp.asarray(vocabulary.encode(prompt.text)))
        written = [member.generate(state, 6)]
        written += [member.generate(state, 6, sequence_keys(key, len(scorer.held_out))[row]) for key in keys]
        texts = []
        for tokens in written:
            ids = np.asarray(tokens).tolist()
            ends = [ids.index(token) for token in (stop, STOP) if token in ids]
            texts.append(vocabulary.decode(ids[: min(ends, default=6)]))
        greedy.append(texts[0].count("a") / 6)
        passed.append(any(text.count("a") / 6 >= 0.34 for text in texts[1:]))
    assert found.greedy_reward == pytest.approx(np.mean(greedy))
    assert found.pass_at_k == pytest.approx(np.mean(passed))


def test_a_host_and_this_process_alone_make_the_same_run(folder: Path) -> None:
    config = config_of(folder, reward={"processes": 0})
    custom = Custom(reward=lambda prompts, completions: [float(text.count("a")) for text in completions])
    vocabulary = Vocabulary("char", tuple("abc \n"))

    def replica_of(devices: int) -> Replica:
        scorer = make_scorer(config, custom, vocabulary, print)
        model = build_model(config.model, vocabulary.size)
        return Replica(config, model, None, mesh_of(devices), scorer=scorer)

    records: list[list[bytes]] = [[], []]
    local = replica_of(1)
    steps = LocalSteps(config, local, custom={}, record=lambda step, payload: records[0].append(payload))
    host = replica_of(2)
    loopback = Loopback(
        config, Executor(host, tell=print), custom={}, record=lambda step, payload: records[1].append(payload)
    )
    for _ in range(3):
        steps.take()
        loopback.step()
    assert records[0] == records[1]
    assert digest(local.state) == digest(host.state)
