"""Code in a file, named PATH.py:FUNCTION: what is loaded, what is refused, and how a run finds it again."""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from command_line import TEXT, TINY, call, succeed

import esjax
from esjax.config.custom_names import Code, is_code
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.errors import EsjaxError
from esjax.hosts.protocol.actions import Terms
from esjax.hosts.protocol.wire import Join
from esjax.models.custom.code import complete, load_custom
from esjax.runs.reader import read_run

pytestmark = pytest.mark.usefixtures("lenient_promotion")

SOURCE = """
import jax.numpy as jnp
import optax

import esjax
from beside import WIDTH


def zeros(vocab_size):
    return esjax.Model(
        init=lambda key: {"start": jnp.zeros(WIDTH), "out": jnp.zeros((WIDTH, vocab_size))},
        initial_state=lambda params: params["start"],
        predict=lambda params, state: state @ params["out"],
        consume=lambda params, state, token: state,
    )


def small(member, tokens, key):
    return -jnp.sum(member.params["start"] ** 2)


def large(member, tokens, key):
    return jnp.sum(member.params["start"] ** 2)


def plain():
    return optax.sgd(0.1)


def with_rate(rate):
    return optax.sgd(rate)


number = 3
"""

OPTIONS = ("--model", "mine.py:zeros", "--reward.function", "mine.py:small", "--optim.custom", "mine.py:plain")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code and a text, as the working directory."""
    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    monkeypatch.setattr("esjax.devices.mesh.prepare_devices", lambda *_: None)
    return tmp_path / "mine.py"


def config(text: str = "text.txt", **settings: Any) -> Config:
    return Config(data=DataConfig(text=text, held_out=0.3, window=4), es=EsConfig(population_size=8), **settings)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a.py:f", True), ("/x y/a.py:f", True), ("a.py", False), ("a:f", False), ("a.py:", False), (len, False)],
)
def test_code_has_one_form(value: object, expected: bool) -> None:
    assert is_code(value) == expected


def test_a_file_is_loaded_once_and_known_by_its_hash(code: Path) -> None:
    """Reference: hashlib over the file's bytes."""
    before = list(sys.path)
    custom = load_custom(model="mine.py:zeros", reward="mine.py:small", optimizer="mine.py:plain")
    assert sys.path == before
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    assert custom.code == {
        kind: Code(str(code), name, digest)
        for kind, name in (("model", "zeros"), ("reward", "small"), ("optimizer", "plain"))
    }
    assert custom.model is not None
    assert custom.reward is not None
    assert custom.model.__globals__ is custom.reward.__globals__
    assert custom.words() == [f"{code}:{word.split(':')[1]}" if ":" in word else word for word in OPTIONS]


def test_the_code_of_a_run_is_added_to_what_is_given_and_not_run_if_it_has_changed(code: Path) -> None:
    begun = load_custom(model="mine.py:zeros", reward="mine.py:small")
    given = load_custom(optimizer=optax.sgd(0.1))
    whole = complete(given, begun.code)
    assert whole == dataclasses.replace(given, model=begun.model, reward=begun.reward, code=begun.code)
    code.write_text(f"{SOURCE}\nraise RuntimeError('it was run')\n")
    with pytest.raises(EsjaxError, match="put the old file back"):
        complete(given, begun.code)
    with pytest.raises(RuntimeError, match="it was run"):
        complete(given, begun.code, lambda line: None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "none.py:zeros"}, r"there is no file '.*none\.py'; --model takes PATH\.py:FUNCTION"),
        ({"model": "mine.py:zero"}, r"has no zero; did you mean zeros\?"),
        ({"reward": "mine.py:number"}, r"mine\.py:number is of type int; name a function"),
        ({"reward": "mine.py:plain"}, r"the reward plain takes \(\); it must take \(member, tokens, key\)"),
        ({"loss": "small"}, "loss is 'small'; give a function, or PATH.py:FUNCTION"),
        ({"optimizer": "mine.py:with_rate"}, r"with_rate takes \(rate\); a function for the optimizer takes nothing"),
        ({"model": "broken.py:zeros"}, r"cannot load '.*broken\.py', line 2: "),
        ({"model": "missing.py:zeros"}, r"cannot load '.*missing\.py': No module named 'no_such_module'"),
    ],
)
def test_what_is_no_such_function_is_refused_before_there_is_a_folder(
    code: Path, given: dict[str, Any], message: str
) -> None:
    (code.parent / "broken.py").write_text("\ndef zeros(:\n")
    (code.parent / "missing.py").write_text("import no_such_module\n")
    for begin in (esjax.train, esjax.serve):
        with pytest.raises(EsjaxError, match=message):
            begin(config(steps=1), "run", **given)
    assert not Path("run").exists()


def test_a_run_of_the_command_line_is_that_of_python(code: Path) -> None:
    """Reference: the same functions handed to `train`; every loss is the same number."""
    called = succeed("train", *OPTIONS, *TINY[:-2], "--steps", "3", "--out", "run")
    first = called.err.splitlines()[0]
    assert "; model zeros: " in first
    assert "; reward small; optimizer identity(), scale(-0.1) #" in first
    scope: dict[str, Any] = {}
    sys.path.insert(0, str(code.parent))
    exec(SOURCE, scope)
    sys.path.remove(str(code.parent))
    given = {"model": scope["zeros"], "reward": scope["small"], "optimizer": scope["plain"]()}
    expected = [info.loss for info in esjax.train(config(steps=3), **given, tell=lambda line: None)]
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    assert read_run("run").settings["code.model"] == digest[:12]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == expected


def test_a_run_finds_its_code_again_from_anywhere(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digest as without a break; the code is found from another folder, and where it was moved to."""
    settings = config(str(code.parent / "text.txt"), steps=4, ledger=True)
    whole = esjax.train(settings, "whole", model="mine.py:zeros", reward="mine.py:small", optimizer="mine.py:plain")
    list(whole)
    begun = esjax.train(settings, "run", model="mine.py:zeros", reward="mine.py:small", optimizer="mine.py:plain")
    begun.limits = begun.limits._replace(steps=2)
    list(begun)
    (code.parent / "elsewhere").mkdir()
    monkeypatch.chdir(code.parent / "elsewhere")
    run = str(code.parent / "run")
    succeed("evaluate", run)
    succeed("generate", run, "--max-tokens", "3")
    succeed("resume", run)
    np.testing.assert_array_equal(esjax.load(run).params["start"], whole.params["start"])
    assert "agree" in succeed("replay", run).out
    code.rename(code.parent / "moved.py")
    lost = call("generate", run)
    assert lost.code == 2
    assert re.fullmatch(r"error: the run was begun with the model zeros of .*mine\.py', and there is no .*\n", lost.err)
    moved = str(code.parent / "moved.py")
    options = [f"{moved}:{word.split(':')[1]}" if ":" in word else word for word in OPTIONS]
    succeed("generate", run, "--max-tokens", "3", *options[:2])
    succeed("resume", run, "--steps", "5", *options)


def test_changed_code_is_said_and_refused_where_bits_matter(code: Path) -> None:
    succeed("train", *OPTIONS, *TINY[:-2], "--steps", "2", "--ledger", "--out", "run")
    with code.open("a") as file:
        file.write("# more\n")
    used = succeed("generate", "run", "--max-tokens", "3")
    assert re.fullmatch(r"the model .*mine\.py:zeros has changed since the run was begun \(SHA-256 .*\)\n", used.err)
    for words in (["resume", "run"], ["replay", "run"], ["serve", "--resume", "run"]):
        refused = call(*words)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert re.search(r"has changed since the run was begun \(.*\); put the old file back, or", refused.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "mine.py"], "'mine.py' is a file; name the function in it that builds the model, mine.py:FUNCTION"),
        (["train", "gru", "--model", "mine.py:zeros"], "one model at a time, not gru and mine.py:zeros"),
        (["train", "mine.py:zeros", "--model.hidden-size", "3"], "--model.hidden-size changes nothing in the model"),
        (
            ["train", "--optim.custom", "mine.py:plain", "--optim.beta1", "0"],
            "--optim.beta1 changes nothing in the",
        ),
        (["train", "--model"], "--model needs a value"),
        (["sweep", "--axis", "model=rnn,gru", "--model", "mine.py:zeros"], "model would change nothing with a custom"),
    ],
)
def test_what_goes_with_no_code_is_one_line(code: Path, words: list[str], message: str) -> None:
    called = call(*words, *TINY[:-2], "--steps", "1", "--out", "run")
    assert called.code == 2
    assert called.err.startswith(f"error: {message}")
    assert called.err.count("\n") == 1
    assert not Path("run").exists()


def test_the_option_names_models_of_the_library_too(code: Path) -> None:
    succeed("train", "--model", "rnn", *TINY, "--steps", "1", "--out", "run")
    assert "name: rnn" in Path("run/config.yaml").read_text()


def test_all_runs_of_a_sweep_have_the_same_code(code: Path) -> None:
    words = ["sweep", "--axis", "es.sigma=0.1,0.2", *OPTIONS, *TINY[:-2], "--steps", "2", "--out", "grid"]
    assert succeed(*words).err.count("model zeros") == 2
    assert succeed("sweep", "--resume", "grid").err.startswith("2 of 2 runs are finished already\n")
    code.write_text(SOURCE + "# more\n")
    for again in (words, ["sweep", "--resume", "grid"]):
        changed = call(*again)
        assert changed.code == 2
        assert "put the old file back" in changed.err


def test_a_sweep_does_not_go_on_with_code_that_changes_under_it(code: Path) -> None:
    given: Any = {"model": "mine.py:zeros", "reward": "mine.py:small"}
    outcomes = iter(esjax.sweep({"seed": [1, 2]}, config(steps=1), out="grid", tell=lambda line: None, **given))
    assert next(outcomes).state == "finished"
    code.write_text(SOURCE + "# more\n")
    second = next(outcomes)
    assert second.state == "failed"
    assert "has changed since the run was begun" in second.note


@pytest.mark.parametrize(
    ("host", "run", "refusal"),
    [
        ({"model": "f", "model code": "1" * 64}, {"model": "f", "model code": "1" * 64}, ""),
        ({"model": "f"}, {"model": "f", "model code": "1" * 64}, ""),
        ({"model": "f", "model code": "1" * 64}, {"model": "f"}, ""),
        (
            {"model": "f", "model code": "1" * 64},
            {"model": "f", "model code": "2" * 64},
            "the file of this host's model f (SHA-256 111111111111) is not the coordinator's (222222222222)",
        ),
        ({}, {"loss": "f"}, "the run has loss f; join with the same: --loss.function PATH.py:FUNCTION"),
    ],
)
def test_a_host_needs_the_same_code(host: dict[str, str], run: dict[str, str], refusal: str) -> None:
    terms = Terms(run="r", incarnation=1, quantum=2, vocab_size=3, known_answers={}, custom=run)
    said = terms.objection(Join("a", "", "", [], list(host.items()), "", 0, 0), "rademacher")
    assert said.startswith(refusal)
    assert bool(said) == bool(refusal)


def test_other_processes_are_given_code_and_no_functions(code: Path) -> None:
    """What workers would need is asked for before anything is made."""
    model: Callable[[int], Any] = load_custom(model="mine.py:zeros").model  # type: ignore[assignment]
    with pytest.raises(EsjaxError, match="other processes cannot be given the model zeros; put it into a file"):
        esjax.sweep({"seed": [1, 2]}, config(steps=1), out="grid", model=model, hosts=esjax.Hosts(workers=1))
    assert not Path("grid").exists()
