"""The command line as a person uses it: what it does, and one clear line for each mistake."""

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import TEXT, TINY, Called, call, succeed
from processes import environment
from rich.table import Table

import esjax.training.run
from esjax import cli
from esjax.cli.shared import announce_to_hosts, open_console
from esjax.config.models import GruConfig, RnnConfig
from esjax.config.settings import Config, DataConfig, EsConfig, from_yaml, replace
from esjax.cores import available_cores
from esjax.data.corpus import load_corpus
from esjax.errors import EsjaxError
from esjax.hosts.local import LocalWorkers, check_workers
from esjax.runs.checkpoint import digest

RUN_PY = Path(__file__).parents[2] / "experiments" / "run.py"

LONG_NAME = "a-name-of-a-run-that-does-not-fit-into-the-eighty-columns-of-an-old-terminal-by-far"


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Leave JAX as conftest.py has set it up, but let optax multiply floats with steps."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr("esjax.devices.mesh.prepare_devices", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, in_process: None) -> tuple[Path, Called]:
    """A folder with a text and a run of three steps with two checkpoints, and what training it wrote."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        called = succeed("train", *TINY, "--steps", "3", "--checkpoint-time", "1e-9", "--out", LONG_NAME)
    (folder / LONG_NAME).rename(folder / "run")
    return folder, called


@pytest.fixture
def work(trained: tuple[Path, Called], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the working directory."""
    work = tmp_path / "work"
    shutil.copytree(trained[0], work)
    monkeypatch.chdir(work)
    return work


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what it does ---


def test_train_leaves_a_run(trained: tuple[Path, Called]) -> None:
    folder, called = trained
    run = folder / "run"
    config = from_yaml((run / "config.yaml").read_text(), "config.yaml")
    assert (config.steps, config.es.population_size, config.data.window) == (3, 8, 4)
    assert config.model.hidden_size == 4
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert all(row["population"] == 8 and math.isfinite(row["loss"]) for row in metrics(run))
    # Three steps of 8 members on 4 tokens each.
    assert metrics(run)[-1]["member_tokens"] == 3 * 8 * 4
    assert checkpoints(run) == [2, 3]
    assert "--- step 3\n" in (run / "samples.txt").read_text()
    for name in ("unigram", "bigram", "trigram"):
        assert name in called.err


def test_a_line_says_what_is_trained_before_the_first_step(trained: tuple[Path, Called]) -> None:
    """Reference: the text's documents, split as `evaluate` says it; the sizes of the weights; 8 members on 4 tokens."""
    folder, called = trained
    documents = TEXT.rstrip("\n").split("\n\n")
    settings = from_yaml((folder / "run/config.yaml").read_text(), "config.yaml").data
    corpus = load_corpus(replace(settings, text=str(folder / "text.txt")))
    train, held_out = (sum(len(one) + 1 for one in some) for some in (corpus.train, corpus.held_out))
    assert train + held_out == sum(len(document) + 1 for document in documents)
    weights = sum(leaf.size for leaf in jax.tree.leaves(esjax.load(folder / "run").params))
    assert called.err.splitlines()[0] == (
        f"{len(jax.devices())} x cpu; text text.txt: {train:,} tokens, {held_out:,} held out, {corpus.vocabulary.size} "
        f"token ids; model mingru: {weights:,} parameters; population 8, 32 tokens a step"
    )


def test_the_folder_is_said_on_one_line_however_long_its_name(trained: tuple[Path, Called]) -> None:
    assert f"kept in {trained[0] / LONG_NAME}" in trained[1].err.splitlines()


def test_resume_goes_on_to_more_steps(work: Path) -> None:
    before = metrics(work / "run")
    succeed("resume", "run", "--steps", "4")
    after = metrics(work / "run")
    assert after[:3] == before
    assert [row["step"] for row in after] == [1, 2, 3, 4]
    assert after[3]["member_tokens"] == 4 * 8 * 4
    assert after[3]["seconds"] >= before[2]["seconds"]
    assert checkpoints(work / "run") == [2, 3, 4]


def test_a_run_is_shown_to_trackers_and_shows_its_metrics(work: Path) -> None:
    for words in (["train", *TINY, "--steps", "2", "--out", "shown"], ["resume", "shown", "--steps", "3"]):
        called = succeed(*words, "--track", "tensorboard", "--track", "tensorboard", "--metrics-port", "0")
        assert re.match(r"metrics at http://127\.0\.0\.1:\d+/metrics, health at /healthz\n", called.err)
    assert len(list(Path("shown/tensorboard").iterdir())) == 2


def test_evaluate_prints_the_score_beside_the_baselines(work: Path) -> None:
    lines = succeed("evaluate", "run").out.splitlines()
    assert re.fullmatch(r"\d+\.\d{4} nats/token, \d+\.\d{4} bits/byte, \d+ tokens", lines[0])
    names = ("unigram", "bigram", "trigram")
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
        f"{name}, fitted to the run's training text" for name in names
    ]
    # The run's last figure, by the same weights on the same documents.
    assert float(lines[0].split()[0]) == pytest.approx(metrics(work / "run")[-1]["held_out"], abs=1e-4)


def test_evaluate_prints_json_whose_splits_add_up(work: Path) -> None:
    splits = {name: json.loads(succeed("evaluate", "run", "--json", "--split", name).out) for name in ("train", "all")}
    splits["held_out"] = json.loads(succeed("evaluate", "--json", "run").out)
    for scores in splits.values():
        assert list(scores) == [
            *("nats_per_token", "bits_per_byte", "tokens", "unknown_tokens"),
            *("unigram", "bigram", "trigram"),
        ]
    # Every character of the text is scored, a line end less and a STOP more for each of its documents.
    documents = TEXT.rstrip("\n").split("\n\n")
    assert splits["all"]["tokens"] == sum(len(document) + 1 for document in documents)
    train, held_out, everything = splits["train"], splits["held_out"], splits["all"]
    assert held_out["tokens"] > 0
    for name in ("tokens", "unknown_tokens"):
        assert train[name] + held_out[name] == everything[name]
    for name in ("nats_per_token", "unigram", "bigram", "trigram"):
        # The model's means are float32 sums of some hundred losses.
        total = train[name] * train["tokens"] + held_out[name] * held_out["tokens"]
        assert total / everything["tokens"] == pytest.approx(everything[name], rel=1e-5)
    # The text is ASCII: a byte a character and one for each end, so bits per byte are nats over log 2.
    assert everything["bits_per_byte"] == pytest.approx(everything["nats_per_token"] / math.log(2), rel=1e-6)


def test_tune_prints_words_to_copy(work: Path) -> None:
    words = ("--es.space", "activation", "--sigma", "0.1", "--repeats", "1")
    assert re.fullmatch(r"sigma 0.1 +cosine -?[01]\.\d{4}", succeed("tune", "run", *words).out.splitlines()[0])
    lines = succeed("tune", "run", "--sigma", "0.1", "0.1", "--repeats", "2").out.splitlines()
    assert all(re.fullmatch(r"sigma 0.1 +cosine -?[01]\.\d{4} ± \d+\.\d{4}", line) for line in lines[:2])
    assert lines[2].startswith("no difference seen between --es.sigma 0.1, --es.sigma 0.1;")
    lines = succeed("tune", "run", "--sigma", "0.1", "--repeats", "1").out.splitlines()
    assert re.fullmatch(r"sigma 0.1 +cosine -?[01]\.\d{4}", lines[0])
    assert lines[1:] == ["nothing to compare --es.sigma 0.1 with; name another --sigma"]
    assert call("tune", "run", "--repeats", "0").err == "error: repeats must be at least 1, got 0\n"
    wrong = call("tune", "run", "--sigma", "-1")
    assert wrong.code == 2
    assert wrong.err.count("\n") == 1
    assert "sigma must be above 0" in wrong.err


def test_evaluate_takes_another_text_and_says_what_is_unknown(work: Path) -> None:
    (work / "other.txt").write_text("the CAT\n\nsat\n\non A mat")
    called = succeed("evaluate", "run", "--data.text", "other.txt", "--split", "all")
    assert ", 21 tokens" in called.out  # 7 + 3 + 8 characters and 3 STOPs
    assert "4 tokens are outside the vocabulary" in called.out


def test_evaluate_says_why_n_gram_models_are_left_out(work: Path) -> None:
    """The text of a run is known by its digest; they are not fitted to another one in its place."""
    shutil.copytree(work / "run", work / "changed")
    (work / "another.txt").write_text("the CAT")
    (work / "changed.txt").write_text(f"{TEXT}\n\none more")
    settings = work / "changed" / "config.yaml"
    settings.write_text(re.sub("text: .*text.txt", f"text: {work / 'changed.txt'}", settings.read_text()))
    for asked in ([], ["--data.text", "another.txt", "--split", "all"]):
        called = succeed("evaluate", "changed", *asked)
        assert re.fullmatch(
            "n-gram models are left out: the text '.*changed.txt' is not the one '.*changed' was .*\n", called.err
        )
        assert "gram" not in called.out
        assert "unigram" not in succeed("evaluate", "changed", *asked, "--json").out
    # It lies elsewhere now: the same text by its digest.
    assert succeed("evaluate", "changed", "--data.text", "text.txt").out == succeed("evaluate", "run").out


def test_generate_writes_the_same_text_for_the_same_seed(work: Path) -> None:
    words = ("generate", "run", "--max-tokens", "30", "--count", "4", "--prompt", "the ")
    first = succeed(*words, "--seed", "5").out
    assert first == succeed(*words, "--seed", "5").out
    assert first != succeed(*words, "--seed", "6").out
    texts = first.split("---\n")
    assert len(texts) == 5
    assert texts[-1] == ""
    assert all(text.startswith("the ") for text in texts[:-1])


def test_generate_searches_with_beams_the_best_first(work: Path) -> None:
    words = ("generate", "run", "--max-tokens", "6", "--beams", "5")
    called = succeed(*words, "--count", "3")
    found = [float(number) for number in re.findall(r"\[log probability (-\d+\.\d\d)\]", called.err)]
    assert len(found) == 3
    assert found == sorted(found, reverse=True)
    assert called.out.count("---\n") == 3
    best = succeed(*words)
    assert best.out == called.out.split("---\n")[0]


def test_generate_says_which_characters_it_does_not_know(work: Path) -> None:
    called = succeed("generate", "run", "--max-tokens", "2", "--prompt", "thZ!eZ")
    assert called.err == "not in the model's vocabulary, read as unknown: 'Z' '!'\n"
    assert called.out.startswith("thZ!eZ")


def test_generate_takes_a_prompt_that_is_no_text(work: Path) -> None:
    """Bytes that are not UTF-8 reach Python as lone surrogates."""
    called = call("generate", "run", "--max-tokens", "2", "--prompt", "th\udcff")
    assert called.code in (0, 2)
    assert re.match(r"(error: |not in the model's vocabulary).*\n\Z", called.err)


def test_imported_weights_are_scored(work: Path) -> None:
    hidden, vocab, layers = 2, 4, 1
    count = hidden + layers * (hidden + vocab) * hidden + 4 * hidden * (hidden + vocab)
    np.save("weights.npy", np.array([hidden, vocab, layers] + [0.0] * count, np.float32))
    (work / "characters.json").write_text('["a", "b"]')
    (work / "ab.txt").write_text("ab\n\nba\n\naab")
    called = succeed("import-npy", "weights.npy", "--chars", "characters.json", "--out", "imported")
    assert called.out.startswith(f"esjax evaluate {work / 'imported'} --data.text ")  # what to do next
    again = succeed("import", "weights.npy", "--chars", "characters.json", "--out", "again")  # the newer name
    path = work / "again"
    assert again.out.startswith(f"esjax evaluate {path} --data.text ")
    assert f"kept in {path}; " in again.err
    assert f" esjax generate {path} generates text, and esjax export {path} " in again.err
    assert again.err.endswith("resumed\n")
    words = [*called.out.replace("TEXT", "ab.txt").split()[1:], "--json"]
    scores = json.loads(succeed(*words).out)
    # Weights of zero predict the uniform distribution over the four ids.
    assert scores["nats_per_token"] == pytest.approx(math.log(4), rel=1e-6)
    assert scores["tokens"] == 3 + 3 + 4
    said = "error: the weights are imported and have no text; name one: --data.text TEXT, or text= in Python\n"
    assert call("evaluate", "again") == (2, "", said)
    succeed("export", "again")
    succeed("import", "again.safetensors", "--out", "third")
    assert call("evaluate", "third") == (2, "", said)


@pytest.mark.parametrize("words", [[], ["--format", "safetensors"], ["--out", "weights.safetensors"]])
def test_exported_weights_come_back(work: Path, words: list[str]) -> None:
    file = words[-1] if words and words[0] == "--out" else "run.safetensors"
    assert succeed("export", "run", *words).out == f"{work / file}\n"
    succeed("import", file, "--out", "back")
    generate = ("generate", "--prompt", "the ", "--max-tokens", "20")
    assert succeed(*generate, "back").out == succeed(*generate, "run").out
    scores, back = (json.loads(succeed("evaluate", "--json", name).out) for name in ("run", "back"))
    # Which text the n-gram models would have to be fitted to is not known there.
    assert back == {name: value for name, value in scores.items() if "gram" not in name}


def test_a_sweep_ends_with_a_table_and_says_how_to_go_on(work: Path) -> None:
    words = ("sweep", "--axis", "es.sigma=0.1,0.2", "--axis", "model.hidden-size=3", *TINY, "--steps", "2")
    called = succeed(*words, "--out", "grid")
    lines = called.out.splitlines()
    assert lines[0].split()[:4] == ["es.sigma", "model.hidden_size", "held-out", "loss"]
    assert lines[0].split()[4:] == ["seconds", "member-tokens", "steps"]
    rows = [line.split() for line in lines[1:]]
    assert sorted(row[:2] for row in rows) == [["0.1", "3"], ["0.2", "3"]]
    assert [row[2] for row in rows] == sorted(row[2] for row in rows)  # the best first
    assert [row[4:] for row in rows] == [["64", "2"]] * 2  # two steps of 8 members on 4 tokens
    for name in ("es.sigma=0.1,model.hidden_size=3", "es.sigma=0.2,model.hidden_size=3"):
        assert [row["step"] for row in metrics(work / "grid" / name)] == [1, 2]
        assert name in called.err
    assert (work / "grid/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "one seed: how far runs of other seeds lie apart is not known" in called.err
    again = succeed("sweep", "--resume", "grid")
    assert again.out == called.out
    assert again.err.startswith("2 of 2 runs are finished already\n")


def test_a_sweep_that_does_not_get_through_says_so_to_a_shell(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Any, console: object) -> None:
        for _ in run:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("esjax.cli.sweep.show", interrupted)
        stopped = call("sweep", "--axis", "seed=1,2", *TINY, "--steps", "9", "--out", "grid")
    assert stopped.code == 128 + signal.SIGINT
    assert stopped.err.endswith(f"stopped; go on with: esjax sweep --resume {work / 'grid'}\n")

    def failing(run: Any, console: object) -> None:
        raise EsjaxError("no luck")

    monkeypatch.setattr("esjax.cli.sweep.show", failing)
    failed = call("sweep", "--resume", "grid")
    assert failed.code == 1
    assert failed.err.endswith(f"what failed is tried again by: esjax sweep --resume {work / 'grid'}\n")


def test_a_run_trained_by_a_reward_is_evaluated_with_a_word_about_it(work: Path) -> None:
    about = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**about, "own": {"reward": "right_answers"}}))
    called = succeed("evaluate", "run")
    assert called.err == "trained for the reward right_answers; below is how well it predicts the text\n"
    assert "nats/token" in called.out


def test_plot_says_what_of_a_run_cannot_be_read(work: Path) -> None:
    with Path("run/metrics.jsonl").open("a") as file:
        file.write("{torn\n")
    called = succeed("plot", "run")
    assert (called.out, called.err) == ("curves.png\n", "run: 1 damaged line of metrics.jsonl left out\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["walk"], "there is no command 'walk'; there are train, resume"),
        (["train", "--sigma", "0.1"], "there is no option --sigma; did you mean --es.sigma?"),
        (["serve", "--es.sigm=1"], "there is no option --es.sigm; did you mean --es.sigma?"),
        (["train", "--metric-port", "1"], "did you mean --metrics-port?"),
        (["train", "--data.no-cary"], "did you mean --data.carry?"),
        (["train", "--confg", "a.yaml"], "did you mean --config?"),
        (["sweep", "--sigma=1"], "did you mean --es.sigma?"),
        (["train", "--windw", "16"], "did you mean --data.window?"),
        (["train", "--rnk", "2"], "did you mean --es.rank?"),
        (["train", "--noize", "gaussian"], "did you mean --es.noise?"),
        (["train", "--populaton", "64"], "did you mean --es.population-size?"),
        (["train", "--vocab", "64"], "did you mean --data.vocab-size?"),
        (["train", "--es", "3"], "--es is a group of settings; name one of them"),
        (["train", "--model.gate-size", "2"], "--model.gate-size is a setting of the model rwkv7; choose that"),
        (["train", "--gate-siz", "2"], "--model.gate-size is a setting of the model rwkv7; choose that"),
        (["train", "rnn", "--n-layer", "2"], "did you mean --model.n-layers?"),
        (["generate", "."], "/work' is not a run folder: it has no run.json; there is /"),
        (["train", *TINY, "--config", "wrong.yaml"], "wrong.yaml: there is no setting es.sigm; did you mean es.sigma?"),
    ],
)
def test_what_was_probably_meant_is_said(work: Path, words: list[str], said: str) -> None:
    Path("wrong.yaml").write_text("es: {sigm: 1}")
    called = call(*words)
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("error: ")
    assert said in called.err


@pytest.mark.parametrize("option", ["--metric", "--track", "--settings", "--es.qqq"])
def test_what_a_command_has_nothing_like_of_is_not_guessed_at(option: str) -> None:
    called = call("sweep", option, "1")
    assert called.code == 2
    assert "did you mean" not in called.err
    assert option in called.err


def test_every_option_in_the_help_is_one_that_there_is(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*_: object, **__: object) -> None:
        raise EsjaxError("parsed")

    helps = {words: succeed(*words, "--help").out for words in (("train",), ("train", "rnn"), ("serve",), ("sweep",))}
    monkeypatch.setattr("esjax.cli.tyro.cli", parsed)
    for words, text in helps.items():
        options = re.findall(r"^│ (--[\w.-]+)(?:, (--[\w.-]+))?", text, re.MULTILINE)
        assert len(options) > 40
        assert "{None}" not in text
        for option in {name for names in options for name in names if name} - {"--help"}:
            # Right as a text or a path, or understood and refused as something else.
            expected = r"parsed|cannot read '\S*none'|\S+ must be .* not 'none'|'none' is neither the value"
            assert re.match(f"error: ({expected})", call(*words, option, "none").err), option


def settings_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> Config:
    """Find the settings that `train` hands to the trainer."""
    seen: list[Config] = []

    def train(custom: object, settings: Config, *rest: Any, **more: Any) -> None:
        seen.append(settings)
        raise EsjaxError("seen")

    monkeypatch.setattr(esjax.training.run, "train_with", train)
    called = call("train", *words)
    assert called.err == "error: seen\n"
    return seen[0]


def test_a_file_of_settings_may_begin_with_a_byte_order_mark(
    work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_bytes("es: {sigma: 0.5}".encode("utf-8-sig"))
    assert settings_of(monkeypatch, "--config", str(file)).es.sigma == 0.5
    file.write_bytes("es: {sigma: 0.5}".encode("utf-16"))
    assert "iconv -f UTF-16 -t UTF-8" in call("train", "--config", str(file)).err


def test_a_line_without_options_takes_the_defaults(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch) == Config()

    def serve(custom: object, settings: Config, *rest: Any, **more: Any) -> None:
        raise EsjaxError(f"served {settings == Config()}")

    monkeypatch.setattr("esjax.hosts.serve.serve_with", serve)
    assert call("serve").err == "error: served True\n"
    assert call("sweep").err == "error: there is no axis; give at least one, such as es.sigma=0.05,0.1\n"


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize(("name", "model"), [("rnn", RnnConfig), ("gru", GruConfig)])
def test_a_model_may_be_named_anywhere(
    monkeypatch: pytest.MonkeyPatch, position: int, name: str, model: type[RnnConfig | GruConfig]
) -> None:
    words = ["--steps", "3", "--model.hidden-size", "5"]
    words.insert(position, name)
    settings = settings_of(monkeypatch, *words)
    assert settings.model == model(hidden_size=5)
    assert settings.steps == 3


@pytest.mark.parametrize("switch", ["--ledger", "--no-ledger", "--data.carry", "--data.no-carry"])
def test_a_model_may_be_named_after_a_switch(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    settings = settings_of(monkeypatch, "--es.space", "activation", switch, "rnn")
    assert settings.model == RnnConfig()
    is_on = "no-" not in switch
    assert (settings.ledger, settings.data.carry) == (is_on and "ledger" in switch, is_on and "carry" in switch)


def test_a_model_may_be_named_after_a_switch_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(custom: object, settings: Config, *rest: Any, plain_text_anywhere: bool, **more: Any) -> None:
        raise EsjaxError(f"{plain_text_anywhere} {settings.model}")

    monkeypatch.setattr("esjax.hosts.serve.serve_with", serve)
    assert call("serve", "--plain-text-anywhere", "rnn").err == f"error: True {RnnConfig()}\n"


def test_numbers_and_names_with_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--es.population-size", "1_000", "--es.sigma=.5", "--steps", "1e3", "--seconds", "None")
    layers = ("--es.layer-sigma", "logits", "0.1", "hidden", ".3", "rnn")  # the odd one is a model
    settings = settings_of(monkeypatch, *words, "--data.text", "1e3", *layers)
    assert (settings.es.population_size, settings.es.sigma, settings.steps, settings.seconds) == (1000, 0.5, 1000, None)
    assert settings.data.text == "1e3"
    assert settings.es.layer_sigma == {"logits": 0.1, "hidden": 0.3}
    assert settings.model == RnnConfig()


def test_a_value_that_is_called_like_a_model_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(monkeypatch, "--data.text", "gru", "rnn", "--model.n-layers", "2")
    assert settings.data.text == "gru"
    assert settings.model == RnnConfig(n_layers=2)


@pytest.mark.parametrize("form", [["--config", "my.yaml"], ["--config=my.yaml"]])
def test_options_go_before_the_settings_file_and_it_before_the_defaults(
    work: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    Path("my.yaml").write_text("seed: 7\nes: {sigma: 1e-2, rank: 3}\nmodel: {name: gru, head_size: 9}")
    settings = settings_of(monkeypatch, "--es.rank", "4", *form, "--model.hidden-size", "6", "--optim.beta1", "0.5")
    assert (settings.seed, settings.es.sigma, settings.es.rank, settings.optim.beta1) == (7, 0.01, 4, 0.5)
    assert settings.model == GruConfig(hidden_size=6, head_size=9)
    assert settings.es.noise == Config().es.noise


def test_a_model_named_on_the_line_goes_before_that_of_the_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("model: {name: gru, head_size: 9}")
    settings = settings_of(monkeypatch, "--config", "my.yaml", "rnn", "--model.n-layers", "2")
    assert settings.model == RnnConfig(n_layers=2)


def test_a_runs_own_settings_start_the_same_run_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(monkeypatch, "--config", "run/config.yaml")
    assert settings == from_yaml(Path("run/config.yaml").read_text(), "")


def test_an_option_may_complete_a_settings_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("optim: {schedule: cosine}")
    settings = settings_of(monkeypatch, "--config", "my.yaml", "--steps", "10")
    assert (settings.optim.schedule, settings.steps) == ("cosine", 10)


def test_a_model_that_is_that_of_the_file_keeps_its_settings(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("model: {name: gru, head_size: 9}")
    settings = settings_of(monkeypatch, "gru", "--config", "my.yaml", "--model.hidden-size", "6")
    assert settings.model == GruConfig(hidden_size=6, head_size=9)


def test_an_option_that_says_the_default_goes_before_the_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("steps: 5\nledger: true\nes: {sigma: 0.5, space: full}\nmodel: {name: rnn, n_layers: 3}")
    default = Config()
    words = ("--steps", "None", "--no-ledger", "--es.space", default.es.space, "--model.n-layers", "1")
    settings = settings_of(monkeypatch, "--config", "my.yaml", *words)
    assert (settings.steps, settings.ledger, settings.es.space) == (None, False, default.es.space)
    assert settings.model == RnnConfig()
    assert settings.es.sigma == 0.5


def test_the_settings_of_a_run_make_the_same_weights_again(work: Path) -> None:
    succeed("train", "--config", "run/config.yaml", "--out", "again")
    assert Path("again/config.yaml").read_bytes() == Path("run/config.yaml").read_bytes()
    first, second = (esjax.training.run.resume(work / name, steps=9) for name in ("run", "again"))
    assert digest(first._replica.state) == digest(second._replica.state)


# --- what it refuses ---

MISTAKES = {
    "unknown command": (["trian"], "trian"),
    "missing text": (["train", *TINY, "--data.text", "none.txt"], "none.txt"),
    "path too long": (["train", *TINY, "--data.text", "x" * 300], "xxx"),
    "unknown builtin": (["train", *TINY, "--data.text", "builtin:other"], "builtin:other"),
    "text that is not UTF-8": (["train", *TINY, "--data.text", "latin.txt"], "latin.txt"),
    "existing folder": (["train", *TINY, "--out", "run"], "run"),
    "existing file": (["train", *TINY, "--out", "text.txt"], "text.txt"),
    "folder in a file": (["train", *TINY, "--out", "text.txt/run"], "text.txt/run"),
    "missing settings": (["train", *TINY, "--config", "none.yaml"], "none.yaml"),
    "folder of settings": (["train", *TINY, "--config", "run"], "run"),
    "broken settings": (["train", *TINY, "--config", "broken.yaml"], "broken.yaml"),
    "wrong settings": (["train", *TINY, "--config", "wrong.yaml"], "sigmoid"),
    "two models": (["train", "rnn", *TINY, "gru"], "rnn and gru"),
    "text shorter than a window": (["train", *TINY, "--data.window", "100000"], "data.window"),
    "nothing to train on": (["train", *TINY, "--data.held-out", "0.9999999"], "held_out"),
    "port of metrics that is none": (["train", *TINY, "--metrics-port", "70000"], "70000"),
    "port of metrics that is none, at resume": (["resume", "run", "--metrics-port", "-1"], "-1"),
    "resume of nothing": (["resume", "none"], "none"),
    "resume of a file": (["resume", "text.txt"], "text.txt"),
    "resume of another folder": (["resume", "other"], "other"),
    "resume at the limit": (["resume", "run"], "limit is 3"),
    "resume to fewer steps": (["resume", "run", "--steps", "1"], "limit is 1"),
    "resume with other text": (["resume", "moved"], "text"),
    "evaluate nothing": (["evaluate", "none"], "none"),
    "evaluate on a missing text": (["evaluate", "run", "--data.text", "none.txt"], "none.txt"),
    "evaluate on an empty split": (["evaluate", "run", "--data.text", "one.txt", "--split", "train"], "train split"),
    "generate from nothing": (["generate", "none"], "none"),
    "generate without checkpoint": (["generate", "begun"], "checkpoint"),
    "negative temperature": (["generate", "run", "--temperature", "-1"], "temperature"),
    "temperature that is no number": (["generate", "run", "--temperature", "nan"], "temperature"),
    "negative top_k": (["generate", "run", "--top-k", "-1"], "top_k"),
    "top_p of zero": (["generate", "run", "--top-p", "0"], "top_p"),
    "no text": (["generate", "run", "--count", "0"], "count"),
    "no tokens": (["generate", "run", "--max-tokens", "0"], "max_tokens"),
    "no beams": (["generate", "run", "--beams", "0"], "beams"),
    "no text of a beam search": (["generate", "run", "--beams", "2", "--count", "0"], "count"),
    "more texts than beams": (["generate", "run", "--beams", "2", "--count", "5"], "at most 2 texts, not 5"),
    "temperature of a beam search": (["generate", "run", "--beams", "2", "--temperature", "0.5"], "for sampling"),
    "seed too large": (["generate", "run", "--seed", "4294967296"], "seed"),
    "sweep of nothing": (["sweep", *TINY, "--steps", "1"], "no axis"),
    "sweep of a mistyped setting": (["sweep", *TINY, "--steps", "1", "--axis", "es.sgma=1"], "did you mean es.sigma?"),
    "sweep of a value out of range": (["sweep", *TINY, "--steps", "1", "--axis", "es.sigma=-1"], "above 0"),
    "sweep without end": (["sweep", *TINY, "--axis", "seed=1,2"], "--steps or --seconds"),
    "sweep in a run": (["sweep", *TINY, "--steps", "1", "--axis", "seed=1", "--out", "run"], "left alone"),
    "sweep in a file": (["sweep", *TINY, "--steps", "1", "--axis", "seed=1", "--out", "text.txt/x"], "text.txt/x"),
    "sweep of a missing text": (["sweep", "--steps", "1", "--axis", "data.text=text.txt,none.txt"], "none.txt"),
    "sweep with two kinds of hosts": (["sweep", "--workers", "2", "--bind", "tcp://127.0.0.1:5555"], "one of them"),
    "sweep with hosts that cannot know where": (["sweep", "--bind", "tcp://127.0.0.1:0"], "port other than 0"),
    "sweep with fewer than no workers": (["sweep", "--workers", "-1"], "workers"),
    "resume of a coordinator with settings": (
        ["serve", "--resume", "run", "--es.sigma", "0.1"],
        "beside --resume give",
    ),
    "resume of a coordinator elsewhere": (["serve", "--resume", "run", "--out", "new"], "beside --resume give"),
    "resume of no sweep": (["sweep", "--resume", "run"], "not the folder of a sweep"),
    "resume of a sweep with settings": (["sweep", "--resume", "run", "--seed", "3"], "--resume alone"),
    "export of nothing": (["export", "none"], "none"),
    "export without checkpoint": (["export", "begun"], "checkpoint"),
    "export of gru as npy": (["export", "run", "--format", "npy"], "rnn"),
    "export over a file": (["export", "run", "--out", "there.npy"], "there.npy"),
    "import of an unknown kind": (["import", "text.txt", "--out", "new"], "neither .safetensors nor .npy"),
    "import of no safetensors": (["import", "none.safetensors", "--out", "new"], "none.safetensors"),
    "import over a run": (["import", "zeros.npy", "--chars", "a.json", "--out", "run"], "exists already"),
    "import of nothing": (["import-npy", "none.npy", "--chars", "a.json", "--out", "new"], "none.npy"),
    "import of a builtin model that there is not": (
        ["import", "builtin:gpt", "--out", "new"],
        "there is builtin:smollm2",
    ),
    "import of a text": (["import-npy", "text.npy", "--chars", "a.json", "--out", "new"], "text.npy"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake: str, work: Path) -> None:
    words, named = MISTAKES[mistake]
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("one.txt").write_text("the cat")
    Path("broken.yaml").write_text("es: {sigma: 1")
    Path("wrong.yaml").write_text("es: {sigmoid: 1}")
    Path("text.npy").write_text(TEXT)
    Path("there.npy").write_text("mine")
    Path("a.json").write_text('["a"]')
    np.save("zeros.npy", np.array([1, 3, 1] + [0.0] * (1 + 4 + 16), np.float32))
    Path("other").mkdir()
    Path("other/photo.jpg").write_bytes(b"")
    shutil.copytree("run", "begun")
    shutil.rmtree("begun/checkpoints")
    shutil.copytree("run", "moved")
    moved = Path("moved/config.yaml")
    moved.write_text(moved.read_text().replace("text.txt", "one.txt"))
    before = contents(work)

    called = call(*words)
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith("error: ")
    assert called.err.count("\n") == 1
    assert called.err.endswith("\n")
    assert named in called.err
    after = contents(work)
    after = {path: content for path, content in after.items() if Path(path).name != ".lock"}
    assert after == {path: content for path, content in before.items() if Path(path).name != ".lock"}
    assert not Path("runs").exists()


def test_a_taken_port_and_a_missing_package_are_one_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not installed
        for more, named in ((["--metrics-port", port], port), (["--track", "trackio"], "pip install 'esjax[trackio]'")):
            for words in (["train", *TINY], ["resume", "run", "--steps", "9"], ["serve", *TINY]):
                before = contents(work)
                called = call(*words, *more)
                assert (called.code, called.out, called.err.count("\n")) == (2, "", 1)
                assert named in called.err
                assert contents(work) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--no-such-option", "1"], "there is no option --no-such-option; esjax train --help lists them"),
        (["serve", "--workers", "2"], "there is no option --workers; esjax serve --help lists them"),
        (["train", "--steps", "two"], "steps must be a whole number or None, not 'two'"),
        (["train", "--steps=1.5"], "steps must be a whole number or None, not '1.5'"),
        (["train", "--steps", "0"], "steps must be above 0 and finite, got 0"),
        (["train", "--es.noise", "pink"], "es.noise must be rademacher or gaussian, not 'pink'"),
        (["train", "--es.sigma", "-1"], "es.sigma must be above 0 and finite, got -1.0"),
        (["train", "--es.population-size", "7"], "es.population_size must be even, got 7"),
        (["train", "--data.held-out", "1"], "data.held_out must be at least 0 and below 1, got 1.0"),
        (["train", "--model.hidden-size", "0"], "model.hidden_size must be above 0 and finite, got 0"),
        (["train", "--seed", "-1"], "seed must be at least 0 and below 2^32, got -1"),
        (["train", "--data.carry"], "data.carry needs es.space activation, where a clean copy is read"),
        (["train", "--data.text"], "--data.text needs a value"),
        (["train", "--steps", "--seed", "1"], "--steps needs a value"),
        (["train", "--es.layer-sigma"], "--es.layer-sigma needs a name and a number"),
        (["train", "--es.layer-sigma", "a", "1", "a", "2"], "--es.layer-sigma names a twice; leave one of them out"),
        (["train", "--es.layer-sigma", "logits", "x"], "es.layer_sigma: a value must be a number, not a text"),
        (["train", "--config"], "--config needs a value"),
        (
            ["train", "--ledger=true"],
            "'true' is neither the value of an option nor a model; models are rnn, gru, lstm, mingru, lru, "
            "transformer, llama, rwkv7",
        ),
        (
            ["train", "gpt"],
            "'gpt' is neither the value of an option nor a model; models are rnn, gru, lstm, mingru, lru, "
            "transformer, llama, rwkv7",
        ),
        (["sweep", "--axis"], "--axis needs a value"),
        (["sweep", "--es.sigma", "-1"], "es.sigma must be above 0 and finite, got -1.0"),
    ],
)
def test_a_wrong_setting_is_one_line(words: list[str], said: str, work: Path) -> None:
    before = contents(work)
    assert call(*words) == (2, "", f"error: {said}\n")
    assert contents(work) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["train", *TINY, "--optim.schedule", "cosine"], "decay_steps"),
        (["train", "--track", "tensorbored"], "tensorbored"),
        (["resume", "run", "--metrics-port", "high"], "metrics-port"),
        (["evaluate", "run", "--split", "none"], "split"),
        (["evaluate"], "DIR"),
        (["resume"], "DIR"),
        (["generate", "run", "--count", "many"], "count"),
        (["import-npy", "weights.npy"], "chars"),
        (["import-npy"], "FILE"),
        (["export", "run", "--format", "pickle"], "format"),
    ],
)
def test_a_wrong_option_is_refused(words: list[str], named: str, work: Path) -> None:
    """Most of these are the option parser's own words, over several lines."""
    before = contents(work)
    called = call(*words)
    assert called.code == 2
    assert called.out == ""
    assert named in called.err
    assert "Traceback" not in called.err
    assert contents(work) == before


def test_help_is_shown_beside_a_mistake(work: Path) -> None:
    assert "usage: esjax train" in succeed("train", "--es.sigma", "-1", "--help").out


def test_the_versions_are_printed() -> None:
    assert succeed("--version").out == (
        f"esjax {esjax.__version__} (JAX {jax.__version__}, Python {platform.python_version()})\n"
    )


def test_more_workers_than_cores_need_a_second_word(work: Path) -> None:
    """Reference: one more than this machine's cores, 0.6 GB each."""
    cores = len(available_cores())
    line = f"{cores + 1} workers on {cores} cores? would take about {0.6 * (cores + 1):.1f} GB of memory, of .* GB, .*"
    before = contents(work)
    for words in (["train"], ["sweep", "--axis", "seed=1,2", "--steps", "1"], ["sweep", "--resume", "run"]):
        called = call(*words, *(TINY if words[-1] != "run" else ()), "--workers", str(cores + 1))
        assert (called.code, called.out, called.err.count("\n")) == (2, "", 1)
        assert re.search(f"{line} give --workers {cores}, or --oversubscribe", called.err)
        assert contents(work) == before
    with pytest.raises(EsjaxError, match=line):
        esjax.sweep({"seed": [1]}, Config(steps=1), out="grid", hosts=esjax.Hosts(workers=cores + 1))
    with pytest.raises(EsjaxError, match=line):
        LocalWorkers(cores + 1, work, print)
    assert contents(work) == before
    check_workers(cores)
    check_workers(cores + 1, oversubscribe=True)


def test_serve_says_what_to_copy_where(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    config = Config(data=DataConfig(text="text.txt", held_out=0.3, window=4), es=EsConfig(population_size=8))
    server = esjax.serve(config, "local", tell=told.append)
    announce_to_hosts(server)
    assert capsys.readouterr().out == "esjax join tcp://127.0.0.1:5555\n"
    assert told[-1].startswith("waiting for hosts: give the line above in other terminals of this machine; ")
    (work / "own.py").write_text("import esjax\n\ndef build(size):\n    return esjax.models.gru(size, 4, 4)\n")
    server = esjax.serve(config, "open", bind="tcp://0.0.0.0:5555", model="own.py:build", tell=told.append)
    server.token = Path("a b/hosts.token")
    announce_to_hosts(server, "--stay")
    printed = capsys.readouterr().out
    assert printed == (
        f"esjax join tcp://0.0.0.0:5555 --token-file 'a b/hosts.token' --model {work / 'own.py'}:build --stay\n"
    )
    assert told[-1].startswith(f"waiting for hosts: copy a b/hosts.token and {work / 'own.py'} to each machine, and ")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(words: list[str]) -> None:
    called = succeed(*words)
    for command in cli.COMMANDS:
        assert f"\n  {command} " in called.out


def test_ctrl_c_before_the_first_step_is_no_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esjax.devices.mesh.prepare_devices", interrupted)
    try:
        called = call("generate", "run")
    except KeyboardInterrupt:
        pytest.fail("a KeyboardInterrupt leaves main: Python prints a traceback")
    assert called.code == 128 + signal.SIGINT  # what shells expect


# --- processes of their own ---


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "gru", "--help"],
        *([name, "--help"] for name in ("generate", "sweep", "dashboard")),
    ],
)
def test_help_imports_neither_jax_nor_flax(words: list[str]) -> None:
    program = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as for a script
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
    slow = {"jax", "jaxlib", "flax", "optax", "orbax"} & set(sys.modules)
    slow |= {"prometheus_client", "tensorboardX", "trackio", "wandb"} & set(sys.modules)
    assert not slow, slow
    print("ended well")
"""
    done = subprocess.run([sys.executable, "-c", program, str(RUN_PY), *words], capture_output=True, text=True)
    assert done.stdout.endswith("ended well\n"), done.stderr
    assert "usage: esjax" in done.stdout


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """Environment of a person's shell, with the compiled programs of all tests."""
    return {**environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def stop_after_a_step(words: list[str], number: signal.Signals, surroundings: dict[str, str]) -> str:
    """Run a command, send it a signal after its first step, see that it ends well; what it said after that."""
    process = subprocess.Popen(
        [sys.executable, str(RUN_PY), *words],
        env=surroundings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    watchdog = threading.Timer(120, process.kill)  # a process that hangs shall fail the test
    watchdog.start()
    try:
        said = ""
        while not said.startswith("step "):
            said = process.stderr.readline()
            assert said, "it ended before its first step"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 0, rest
    finally:
        watchdog.cancel()
        process.kill()
    return rest


def test_ctrl_c_and_sigterm_leave_a_checkpoint_to_go_on_from(work: Path, surroundings: dict[str, str]) -> None:
    """SIGINT ends a training and SIGTERM the one that goes on from there."""
    run = work / "stopped"
    last = 0
    for words, number in (
        (["train", *TINY, "--data.held-out", "0", "--out", "stopped"], signal.SIGINT),
        (["resume", "stopped"], signal.SIGTERM),
    ):
        rest = stop_after_a_step(words, number, surroundings)
        assert "Traceback" not in rest
        assert f"kept in {run}" in rest
        steps = [row["step"] for row in metrics(run)]
        assert steps == list(range(1, len(steps) + 1))
        assert steps[-1] > last
        last = steps[-1]
        assert checkpoints(run)[-1] == last


def run_alone(surroundings: dict[str, str], devices: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with so many devices."""
    return subprocess.run(
        [sys.executable, str(RUN_PY), *words],
        env={**surroundings, "JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
    )


def test_a_damaged_checkpoint_is_said_without_a_traceback(work: Path, surroundings: dict[str, str]) -> None:
    for path in Path("run/checkpoints/3/state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        for position in range(0, len(content), 50):
            content[position] ^= 1
        path.write_bytes(content)
    done = run_alone(surroundings, len(jax.devices()), "generate", "run", "--max-tokens", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"checkpoint {work}/run/checkpoints/3 is damaged and passed over")
    assert done.stderr.count("\n") == 1


def test_a_run_is_read_on_a_machine_with_fewer_devices(work: Path, surroundings: dict[str, str]) -> None:
    done = run_alone(surroundings, 1, "evaluate", "run", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    here = json.loads(succeed("evaluate", "run", "--json").out)
    # The same lanes, summed in another order.
    assert json.loads(done.stdout) == pytest.approx(here, rel=1e-5)


def test_a_disk_that_fills_up_is_one_clear_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esjax.watch.trackers.json_line", full)
    called = call("resume", "run", "--steps", "5")
    assert called.code == 2
    assert called.err.splitlines()[-1] == (
        f"error: cannot write {work}/run/metrics.jsonl: No space left on device; the run is kept to step 4; make room, "
        f"then: esjax resume {work}/run"
    )
    assert checkpoints(Path("run"))[-1] == 4  # the step that was done is kept


def test_of_a_disk_that_is_full_to_the_end_is_said_what_there_is(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ledger holds beyond the last checkpoint is kept, too."""
    succeed("train", *TINY, "--steps", "2", "--ledger", "--out", "kept")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esjax.runs.seal.write_durably", full)
    called = call("resume", "kept", "--steps", "5")
    assert called.err.splitlines()[-1] == (
        f"error: cannot write the checkpoint '{work}/kept/checkpoints/5': No space left on device; the run is kept to "
        f"step 5; make room, then: esjax resume {work}/kept"
    )


@pytest.mark.parametrize("platform", ["cuda", "none"])
def test_devices_that_are_not_there_are_one_line(work: Path, surroundings: dict[str, str], platform: str) -> None:
    done = run_alone({**surroundings, "JAX_PLATFORMS": platform}, 1, "generate", "run")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX cannot use the devices of JAX_PLATFORMS={platform}: ")
    assert done.stderr.endswith("or set JAX_PLATFORMS=cpu\n")
    assert done.stderr.count("\n") == 1


def test_paths_on_the_command_line_are_those_of_a_shell(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in the home folder, in a name that orbax reads otherwise, printed so that it can be copied."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    called = succeed("train", *TINY, "--steps", "2", "--out=~/it's a[1]")
    assert f"kept in {tmp_path}/home/it's a[1]" in called.err.splitlines()
    assert not (work / "~").exists()
    assert succeed("export", "~/it's a[1]").out == f"{tmp_path}/home/it's a[1].safetensors\n"
    line = succeed("import", "~/it's a[1].safetensors", "--out", "[red]:car: $x").out
    assert shlex.split(line)[1:3] == ["evaluate", f"{work}/[red]:car: $x"]
    error = call("resume", "[red]:car: $x").err
    assert error.startswith(f"error: '{work}/[red]:car: $x' holds imported weights")


def test_token_files_with_blanks_are_printed_so_that_they_can_be_copied(work: Path) -> None:
    line = succeed("token", "new", "my keys", "first").out
    assert shlex.split(line)[-2:] == ["--token-file", f"{work}/my keys/first.token"]
    (work / "my keys/first.token").chmod(0o644)
    error = call("status", "tcp://127.0.0.1:1", "--token-file", "my keys/first.token").err
    assert error.endswith(f"chmod 600 '{work}/my keys/first.token'\n")


def test_names_of_hosts_are_shown_letter_by_letter(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", box=None)
    table.add_row("[red]a[/] :car:")
    open_console().print(table)
    assert "[red]a[/] :car:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", *TINY, "--steps", "1"], ["import", "x"], ["sweep", "--axis", "seed=1"]])
@pytest.mark.parametrize("out", ["", "gs://bucket/run", os.fsdecode(b"caf\xe9")])
def test_an_out_that_is_no_path_is_one_line_and_nothing_is_made(work: Path, words: list[str], out: str) -> None:
    before = contents(work)
    called = call(*words, f"--out={out}")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("error: ")
    assert called.err.count("\n") == 1
    assert contents(work) == before


def test_a_text_may_be_called_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch, "--data.text", "None").data.text == "None"
