"""Rewards in Python over hosts as real processes: starts from weights, subwords, and what may be wrong at a host."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from processes import SMALL, TEXT, Fleet, fleet, steps_done, updates, wait_until

import esjax
from esjax.config.settings import replace, to_yaml
from esjax.data.corpus import load_corpus
from esjax.data.delivery import pack_text
from esjax.hosts.executor import Executor, Places
from esjax.hosts.protocol.tasks import Build, Failed
from esjax.hosts.status import fetch_status
from esjax.models.custom import Custom
from esjax.models.custom.code import load_custom
from esjax.rewards.scoring import begin as with_digest
from esjax.runs.reader import read_run
from esjax.training.replay import replay

__all__ = ["fleet"]

REWARD = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def measures(prompts, completions):
    try:
        (HERE / "killed").touch(exist_ok=False)
    except FileExistsError:
        return {
            "share": [text.count("e") / max(len(text), 1) for text in completions],
            "long": [float(len(text)) for text in completions],
        }
    os.kill(os.getpid(), 9)  # once: the call is made again

def length(text):
    (HERE / "length called").touch()
    return str(len(text))

def slow(prompts, completions):
    with (HERE / "calls").open("a") as calls:
        calls.write("call\\n")
    time.sleep(0.3)
    return [float(len(text)) for text in completions]
"""


def write_files(folder: Path) -> None:
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("".join(f"{number} to be\n" for number in range(40)))


def begin_base(out: Path, vocabulary: str = "char") -> None:
    """Train the weights that a run starts from, with the model of `SMALL`."""
    config = esjax.Config(
        steps=2,
        data=esjax.DataConfig(text=str(TEXT), window=8, vocabulary=vocabulary),
        es=esjax.EsConfig(population_size=64),
        model=esjax.GruConfig(hidden_size=8, head_size=8),
    )
    list(esjax.train(config, out, tell=print))


def words_of(folder: Path, reward: str) -> tuple[list[str], list[str]]:
    """Return the words of `serve` and `train`, and those of `join`."""
    function = ["--reward.function", f"{folder / 'rewards.py'}:{reward}"]
    prompts = ["--reward.prompts", str(folder / "prompts.txt"), "--reward.length", "6", "--reward.processes", "1"]
    return [*function, *prompts, "--data.batch-size", "2"], function


def test_hosts_post_train_a_run_as_one_process_does(fleet: Fleet, lenient_promotion: None) -> None:
    """From the weights of a run with subwords, by two rewards and with a tool; hosts have the prompts elsewhere. A host
    and the coordinator are killed, and a worker process, too.
    """
    pytest.importorskip("tokenizers")
    folder = fleet.folder
    write_files(folder)
    begin_base(folder / "base", vocabulary="bpe:290")
    shutil.copytree(folder / "base", folder / "copy")
    shutil.copytree(folder / "base", folder / "other")
    list(esjax.resume(folder / "other", steps=3, tell=print))
    begin, function = words_of(folder, "measures")
    tool = ["--reward.tool", f"{folder / 'rewards.py'}:length"]
    begin += ["--init", str(folder / "base"), "--reward.weights", "long", "0.125", *tool]
    begin += ["--reward.tool-at", "tobehaniqus", "--reward.tool-calls", "2"]  # each of them is a token
    server = fleet.serve(*begin)
    (folder / "prompts.txt").rename(folder / "copied.txt")
    function += [*tool, "--reward.prompts", str(folder / "copied.txt")]
    survivor = fleet.join("survivor", *function)
    victim = fleet.join("victim", *function, "--init", str(folder / "copy"))
    other = fleet.join("other", *function, "--init", str(folder / "other"))
    missing = fleet.join("missing", *function, "--init", str(folder / "nothing"))
    assert [other.ends(), missing.ends()] == [2, 2]
    assert "are not those that the run began with" in other.output
    assert "join with --init PATH" in " ".join(missing.output.split())
    wait_until(lambda: steps_done(fleet.run) >= 3 and all_ready(fleet, 2))
    victim.send(signal.SIGKILL)
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + 3)
    wait_until(lambda: fetch_status(fleet.address).greedy_reward is not None)  # measured again if the victim had it
    assert fetch_status(fleet.address).pass_at_k is not None
    assert "long" in fetch_status(fleet.address).rewards
    server.send(signal.SIGKILL)
    server.ends()
    again = fleet.serve_again()
    done = steps_done(fleet.run)
    wait_until(lambda: steps_done(fleet.run) >= done + 3)
    again.send(signal.SIGTERM)
    assert again.ends() == 0
    assert survivor.popen.poll() is None
    assert (folder / "killed").exists()
    assert (folder / "length called").exists()
    (folder / "length called").unlink()
    (folder / "copied.txt").rename(folder / "prompts.txt")
    for process in (server, survivor, again):
        assert "Traceback" not in process.output
        assert "failed" not in process.output
    steps, local = steps_done(fleet.run), folder / "local"
    settings = ["--data.text", str(TEXT), *SMALL, *begin, "--ledger", "--steps", str(steps), "--out", str(local)]
    assert fleet.start("train", *settings).ends() == 0
    assert updates(fleet.run) == updates(local)
    assert (folder / "length called").exists()
    rewards, alone = read_run(fleet.run).metrics, read_run(local).metrics
    for metrics in (rewards, alone):  # 64 members with two texts of up to six tokens
        np.testing.assert_array_equal(metrics["member_tokens"], metrics["step"] * 64 * 2 * 6)
    np.testing.assert_allclose(alone["reward"], alone["reward_share"] + 0.125 * alone["reward_long"], rtol=1e-5)
    for name in ("reward_share", "reward_long"):  # about, since on a busy machine two hosts score some pairs
        assert np.isfinite(rewards[name]).mean() > 0.5
        np.testing.assert_allclose(np.nanmean(rewards[name]), np.mean(alone[name]), rtol=0.3)
    assert replay(fleet.run).agrees
    for measure in ("greedy_reward", "pass_at_k", "held_out"):
        assert np.isfinite(read_run(fleet.run).metrics[measure]).any()
    for info in esjax.resume(fleet.run, steps=steps + 1):
        assert info.step == steps + 1
    shutil.rmtree(fleet.run / "checkpoints")
    assert esjax.resume(fleet.run, steps=steps + 2).step == steps + 1


def all_ready(fleet: Fleet, count: int) -> bool:
    return [host.state for host in fetch_status(fleet.address).hosts].count("ready") == count


def test_a_host_with_another_reward_ends_with_one_line_and_no_call_is_made_twice(
    fleet: Fleet, lenient_promotion: None
) -> None:
    """Reference: three steps with a call for each of 32 pairs; and the four pairs that each host may have begun of the
    step after. The start is sent, since the settings say so.
    """
    folder = fleet.folder
    write_files(folder)
    begin_base(folder / "base")
    begin, function = words_of(folder, "slow")
    begin += ["--steps", "3", "--reward.held-out", "0", "--hosts.spot-check", "0"]
    server = fleet.serve(*begin, "--init", str(folder / "base"), "--hosts.send-init")
    (folder / "base").rename(folder / "gone")
    (folder / "changed.py").write_text(REWARD + "\n")
    changed = fleet.join("changed", "--reward.function", f"{folder / 'changed.py'}:slow")
    missing = fleet.join("missing", "--reward.function", f"{folder / 'none.py'}:slow")
    assert [changed.ends(), missing.ends()] == [2, 2]
    assert "is not the coordinator's" in " ".join(changed.output.split())
    assert "copy that one here" in " ".join(changed.output.split())
    assert f"there is no file '{folder / 'none.py'}'" in " ".join(missing.output.split())
    hosts = [fleet.join(name, *function) for name in ("one", "two")]
    assert [server.ends(), *(host.ends() for host in hosts)] == [0, 0, 0]
    assert not any(word in server.output for word in ("is late", "is hung", "held up"))
    assert 0 <= len((folder / "calls").read_text().splitlines()) - 3 * 32 <= 2 * 4


@pytest.mark.parametrize("kind", ["lambda", "file", "prompts", "other prompts", "no prompts"])
def test_what_a_host_lacks_is_one_line(tmp_path: Path, kind: str) -> None:
    """A function of no file; a file that is gone when the processes start; and no prompts, or others than the run's, or
    some although the run has none.
    """
    write_files(tmp_path)
    config = esjax.Config(
        data=esjax.DataConfig(text=str(TEXT)),
        reward=esjax.RewardConfig(prompts=str(tmp_path / "prompts.txt"), processes=1),
        es=esjax.EsConfig(population_size=8, chunk_pairs=2),
    )
    custom = Custom(reward=lambda prompts, completions: [0.0] * len(prompts))
    if kind != "lambda":
        custom = load_custom(reward=f"{tmp_path / 'rewards.py'}:slow")
    config = with_digest(config, custom)
    if kind in ("file", "prompts"):
        (tmp_path / {"file": "rewards.py", "prompts": "prompts.txt"}[kind]).unlink()
    places = Places()
    if kind == "other prompts":
        (tmp_path / "others.txt").write_text("other\n")
        places = Places(prompts=str(tmp_path / "others.txt"))
    if kind == "no prompts":
        config, custom = replace(config, reward=esjax.RewardConfig()), Custom()
        places = Places(prompts=str(tmp_path / "prompts.txt"))
    corpus = load_corpus(config.data)
    text = pack_text(corpus.stream(), corpus.held_out, corpus.vocabulary)
    build = Build(to_yaml(config), corpus.vocabulary.size, text.data, text.digest, text.size)
    result = Executor(custom=custom, places=places, tell=print).do(build)
    assert isinstance(result, Failed)
    assert "\n" not in result.reason
    lacks = {
        "lambda": "put it into a file",
        "file": "the reward slow cannot be called: cannot load",
        "prompts": "or on a host `join`, --reward.prompts FILE",
        "other prompts": f"{tmp_path / 'others.txt'}' are not those that the run was begun with",
        "no prompts": "the run has no prompts; leave the new place of its prompts out",
    }
    assert lacks[kind] in result.reason
