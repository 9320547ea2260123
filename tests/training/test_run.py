"""The whole loop: it learns, resumes to the bit, stops when asked, compiles once and does not grow."""

import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jaxtyping import Array
from processes import environment

import esjax
from esjax.config.models import GruConfig, RnnConfig
from esjax.config.settings import Config, DataConfig, EsConfig, OptimConfig, replace, to_yaml
from esjax.data.ngram import fit_ngrams, ngram_losses
from esjax.errors import EsjaxError
from esjax.inference.language_model import Evaluation
from esjax.models import Model, gru
from esjax.models.member import Member
from esjax.runs.checkpoint import digest, kept_steps
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import UPDATE, Ledger, read
from esjax.runs.step_info import Limits
from esjax.signals import SIGNALS
from esjax.training.local_steps import LocalSteps, StepDone
from esjax.training.replay import replay
from esjax.training.run import Trainer, resume, train

pytestmark = pytest.mark.usefixtures("lenient_promotion")

TEXT = "\n\n".join(f"the cat sat on the mat {n} times" for n in range(60))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(text: Path) -> Config:
    return Config(
        steps=6,
        data=DataConfig(text=str(text), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )


def state_digest(trainer: Trainer) -> str:
    return digest(trainer._replica.state)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "model",
    [GruConfig(hidden_size=8, head_size=16), pytest.param(RnnConfig(hidden_size=8), marks=pytest.mark.nightly)],
)
def test_it_learns_to_beat_letter_frequencies(config: Config, model: GruConfig | RnnConfig) -> None:
    """Reference: the unigram model of the training documents, on the held-out ones."""
    config = replace(
        config, steps=100, model=model, es=EsConfig(population_size=256), optim=OptimConfig(learning_rate=0.1)
    )
    trainer = train(config)
    infos = list(trainer)
    assert len(infos) == 100
    assert infos[-1].held_out is not None
    assert infos[-1].held_out < trainer.baselines["unigram"] - 0.3
    assert trainer.evaluate().nats_per_token == pytest.approx(infos[-1].held_out)


def test_a_loaded_run_gives_the_results_of_the_trainer(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    list(run)
    loaded = esjax.load(tmp_path / "run")
    assert run.generate("the", seed=3) == loaded.generate("the", seed=3)
    assert run.search("the", beams=3, max_tokens=5) == loaded.search("the", beams=3, max_tokens=5)
    (tmp_path / "other.txt").write_text("the dog\n\nthe cow")
    other = str(tmp_path / "other.txt")
    asked: list[tuple[Any, ...]] = [(), (None, "train"), (other, "all")]
    for words in asked:
        assert run.evaluate(*words) == loaded.evaluate(*words)
    assert run.evaluate().baselines == run.baselines
    assert run.evaluate(other, "all").tokens == 16  # 7 characters and a STOP, twice
    # Fitted to what the run was trained on, whatever they are scored on; to the other text they would fit better.
    documents = run._text(other).split("all")[0]
    baselines = ngram_losses(fit_ngrams(run.corpus.train, run.corpus.vocabulary.size), documents)
    assert loaded.evaluate(other, "all").baselines == baselines
    fitted_to_other = ngram_losses(fit_ngrams(documents, run.corpus.vocabulary.size), documents)
    assert baselines["trigram"] > fitted_to_other["trigram"]
    drawn = [np.asarray(one.plot(over="steps").axes[1].get_lines()[0].get_xydata()) for one in (run, loaded)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len(drawn[0]) == config.steps


def test_an_evaluation_is_shown_with_the_digits_that_mean_something() -> None:
    shown = repr(Evaluation(2.350811719894409, 3.39151, 246783, 0, {"unigram": 3.0, "bigram": 2.45678}))
    assert shown == (
        "Evaluation(nats_per_token=2.3508, bits_per_byte=3.3915, tokens=246783, unknown_tokens=0, "
        "baselines={'unigram': 3.0, 'bigram': 2.4568})"
    )


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.nightly)])
def test_resumed_is_uninterrupted_bit_for_bit(config: Config, tmp_path: Path, optimizer: str) -> None:
    optim = OptimConfig(optimizer=optimizer, schedule="cosine", decay_steps=6, warmup_steps=2)  # type: ignore[arg-type]
    config = replace(config, optim=optim)
    whole = train(config, tmp_path / "whole")
    list(whole)
    list(train(replace(config, steps=2), tmp_path / "parts"))
    list(resume(tmp_path / "parts", steps=4))
    last = resume(tmp_path / "parts", steps=6)
    list(last)
    assert state_digest(last) == state_digest(whole)
    assert [row["loss"] for row in rows(tmp_path / "parts")] == [row["loss"] for row in rows(tmp_path / "whole")]
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]


def test_equal_settings_give_equal_runs_and_another_seed_another(config: Config) -> None:
    first, again, other = train(config), train(config), train(replace(config, seed=1))
    for trainer in (first, again, other):
        list(trainer)
    assert state_digest(first) == state_digest(again)
    assert state_digest(first) != state_digest(other)


def test_leaving_the_loop_early_keeps_what_was_trained(config: Config, tmp_path: Path) -> None:
    trainer = train(config, tmp_path / "run")
    for info in trainer:
        if info.step == 3:
            break
    assert resume(tmp_path / "run").step == 3
    assert [info.step for info in trainer] == [4, 5, 6]


def killed_at(trainer: Trainer, step: int, path: Path) -> list[str]:
    """Train on, leave in `path` what a kill after a step would have left, and return the digest after each step."""
    assert trainer.folder is not None
    digests = [state_digest(trainer)]
    for info in trainer:
        digests.append(state_digest(trainer))
        if info.step == step:
            shutil.copytree(trainer.folder.path, path)
    return digests


def damage_checkpoints(run: Path) -> None:
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def tear_the_ledger(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "ledger").write_bytes((run / "ledger").read_bytes()[:-1])


@pytest.mark.parametrize(
    ("lose", "step", "told"),
    [
        (lambda run: None, 3, 0),
        (lambda run: shutil.rmtree(run / "checkpoints"), 3, 1),
        (damage_checkpoints, 3, 2),
        (tear_the_ledger, 2, 2),  # also that the torn record is cut off, once training goes on
        (lambda run: (run / "ledger").write_bytes(b"esjax"), 0, 0),
    ],
    ids=["nothing", "checkpoints", "seals", "last record", "all records"],
)
def test_row_62_a_run_killed_before_its_first_checkpoint_is_rebuilt_from_its_ledger(
    config: Config, tmp_path: Path, lose: Callable[[Path], object], step: int, told: int
) -> None:
    """Reference: the run that was not killed, after as many steps."""
    run = tmp_path / "killed"
    digests = killed_at(train(replace(config, ledger=True), tmp_path / "whole"), 3, run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0"]
    lose(run)
    replayed = replay(run, tell=lambda line: None)
    assert (int(replayed.state.step), replayed.digest) == (step, digests[step])
    lines: list[str] = []
    again = resume(run, tell=lines.append)
    assert (again.step, state_digest(again)) == (step, digests[step])
    assert [info.step for info in again] == [*range(step + 1, 7)]
    assert state_digest(again) == digests[6]
    assert len([line for line in lines if "metrics.jsonl" not in line]) == told
    assert ("rebuilt from the seed and the ledger" in " ".join(lines)) is (told > 0)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "lose",
    [lambda run: shutil.rmtree(run / "checkpoints"), pytest.param(damage_checkpoints, marks=pytest.mark.nightly)],
)
def test_row_62_a_coordinator_begins_again_from_a_ledger_alone(
    config: Config, tmp_path: Path, lose: Callable[[Path], object]
) -> None:
    """Reference: the run that was not killed."""
    run = tmp_path / "killed"
    killed_at(train(replace(config, ledger=True), tmp_path / "whole"), 3, run)
    lose(run)
    lines: list[str] = []
    server = esjax.resume_serving(run, bind="tcp://127.0.0.1:0", tell=lines.append)
    with ExitStack() as stack:
        recorder = stack.enter_context(server._recording())
        coordinator, _ = server._open(stack, recorder)
        last = rows(run)[-1]
        assert (coordinator.step, *recorder.progress) == (3, last["seconds"], last["member_tokens"])
    assert "rebuilt from the seed and the ledger" in lines[-1]
    assert (run / "checkpoints" / "0").is_dir()  # the first state, for hosts that join


def test_initial_weights_that_no_seed_gives_are_kept_with_the_ledger(config: Config, tmp_path: Path) -> None:
    """Reference: the run that was not killed."""
    drawn = iter(range(100))

    def model(vocab_size: int) -> Model:
        one, number = own_model(vocab_size), next(drawn)
        return one._replace(init=lambda key: one.init(jax.random.fold_in(key, number)))

    digests = killed_at(train(replace(config, ledger=True), tmp_path / "whole", model=model), 3, tmp_path / "killed")
    again = resume(tmp_path / "killed", model=model)
    assert state_digest(again) == digests[3]


def test_a_run_without_checkpoint_and_ledger_says_what_to_do(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "it's killed"
    killed_at(train(config, tmp_path / "whole"), 3, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(EsjaxError) as caught:
        resume(run)
    with pytest.raises(EsjaxError, match="ended before its first one: resume it"):
        esjax.load(run)
    assert str(caught.value) == (
        f"{str(run)!r} has no whole checkpoint, and no ledger: nothing can be resumed; restore what is missing "
        f"from a copy, or train anew: esjax train --config '{tmp_path}/it'\"'\"'s killed/config.yaml' --out NEW"
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def make_older(run: Path) -> None:
    """Take the clock out of a ledger, as it was before there was one."""
    records = list(read(run / "ledger"))
    (run / "ledger").unlink()
    with closing(Ledger.open(run / "ledger", pytest.fail)) as ledger:
        for record in records:
            ledger.append(UPDATE, record.step, record.payload)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: None,
        make_older,
        lambda run: (run / "ledger").unlink(),
        lambda run: (run / "metrics.jsonl").unlink(),
    ],
    ids=["ledger", "older ledger", "no ledger", "no metrics"],
)
def test_seconds_and_member_tokens_never_fall(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object]
) -> None:
    """Reference: a clock that moves one second each time it is asked, and the ledger before the run was killed."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    run = tmp_path / "killed"
    config = replace(config, ledger=True, checkpoint_time=1e-6, keep_checkpoints=4)
    killed_at(train(config, tmp_path / "whole"), 3, run)
    recorded = {record.step + 1: record.seconds or 0.0 for record in read(run / "ledger")}
    assert recorded == {row["step"]: row["seconds"] for row in rows(run)}
    assert 0 == recorded[1] < recorded[2] < recorded[3]
    shutil.rmtree(run / "checkpoints" / "3")  # the newest one is of step 2
    change(run)
    again = resume(run, tell=lambda line: None)
    stood_at = again.step
    list(again)
    curve = rows(run)
    first = stood_at + 1 if curve[0]["step"] > 1 else 1
    assert [row["step"] for row in curve] == [*range(first, 7)]
    assert [row["member_tokens"] for row in curve] == [step * 32 * 6 for step in range(first, 7)]
    seconds = {row["step"]: row["seconds"] for row in curve}
    assert list(seconds.values()) == sorted(seconds.values())
    assert seconds[stood_at + 1] == recorded[stood_at]  # it begins with the first step that is finished
    assert seconds[6] > seconds[stood_at + 1]


def test_an_error_in_the_loop_keeps_what_was_trained(config: Config, tmp_path: Path) -> None:
    def interrupted() -> None:
        for info in train(config, tmp_path / "run"):
            if info.step == 2:
                raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert resume(tmp_path / "run").step == 2


def test_iterating_outside_the_main_thread_works(config: Config) -> None:
    trainer = train(config)

    def iterate() -> None:
        with jax.numpy_dtype_promotion("standard"):  # holds for one thread
            list(trainer)

    thread = threading.Thread(target=iterate)
    thread.start()
    thread.join()
    assert trainer.step == 6


def test_metrics_hold_what_they_promise(config: Config, tmp_path: Path) -> None:
    list(train(config, tmp_path / "run"))
    lines = rows(tmp_path / "run")
    for n, row in enumerate(lines, start=1):
        assert row["step"] == n
        assert row["population"] == 32
        assert row["member_tokens"] == n * 32 * 6  # members times window
        assert row["void_pairs"] == 0
        assert {"seconds", "loss", "update_norm", "member_tokens_per_second", "applied"} <= set(row)
    assert "held_out" in lines[-1]
    assert "held_out" not in lines[2]
    assert "--- step 6" in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.parametrize("measured", [True, False])
def test_a_run_that_goes_on_is_measured_when_it_is_time(config: Config, tmp_path: Path, measured: bool) -> None:
    """It ends with a held-out loss; the one of a run that was killed before its first is not put off."""
    list(train(config, tmp_path / "run"))
    if not measured:
        kept = "".join(json.dumps({**row, "held_out": None}) + "\n" for row in rows(tmp_path / "run"))
        (tmp_path / "run" / "metrics.jsonl").write_text(kept)
    infos = list(resume(tmp_path / "run", steps=9))
    assert [info.held_out is not None for info in infos] == [not measured, False, True]


def test_a_run_without_a_folder_that_goes_on_is_measured_when_it_is_time(config: Config) -> None:
    trainer = train(config)
    assert [info.held_out is not None for info in trainer] == [True, False, False, False, False, True]
    trainer.limits = Limits(8, None)
    assert [info.held_out is not None for info in trainer] == [False, True]


def test_the_run_folder_starts_the_same_run_again(config: Config, tmp_path: Path) -> None:
    first = train(config, tmp_path / "run")
    list(first)
    stored = esjax.config.settings.from_yaml((tmp_path / "run" / "config.yaml").read_text(), "config.yaml")
    again = train(stored)
    list(again)
    assert state_digest(first) == state_digest(again)


def test_a_time_budget_takes_the_population_that_fits(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a clock that moves one second each time it is asked."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    config = replace(config, steps=2, es=EsConfig(time_per_step=4.0, chunk_pairs=3))
    trainer = train(config)
    infos = list(trainer)
    block = 2 * 3 * len(jax.local_devices())
    # Asked after 1 block at 1 s: 2 fit, ... after k blocks at k s: k + 1 blocks need k + 1 s, the fifth would not fit.
    assert [info.population for info in infos] == [4 * block, 4 * block]


def test_a_time_budget_is_the_fixed_population_of_the_same_pairs(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = 2 * 3 * len(jax.local_devices())
    monkeypatch.setattr(time, "perf_counter", iter(float(n) for n in range(10**6)).__next__)
    timed = train(replace(config, steps=1, es=EsConfig(time_per_step=2.0, chunk_pairs=3)))
    fixed = train(replace(config, steps=1, es=EsConfig(population_size=2 * pairs, chunk_pairs=3)))
    assert [info.population for info in timed] == [2 * pairs]
    list(fixed)
    assert state_digest(timed) == state_digest(fixed)


GATES = EsConfig(space="activation", population_size=128, copies=4, chunk_pairs=3)
DISCOUNT = replace(GATES, credit="discount")
EXACT = EsConfig(population_size=64, output_layer="exact", chunk_pairs=3)
SUMS = EsConfig(population_size=64, exchange="sums", chunk_pairs=3)
with_sums = pytest.mark.parametrize("es", [GATES, SUMS], ids=["gates", "sums"])
every_estimator = pytest.mark.parametrize(
    ("es", "carry"),
    [(GATES, True), (DISCOUNT, True), (EXACT, False), (SUMS, False)],
    ids=["gates", "discount", "exact output", "sums"],
)


@every_estimator
def test_with_every_estimator_resumed_is_uninterrupted_bit_for_bit(
    config: Config, tmp_path: Path, es: EsConfig, carry: bool
) -> None:
    """A checkpoint, and a replay, hold learned feedback as well."""
    config = replace(config, es=es, ledger=True, data=replace(config.data, carry=carry))
    whole = train(config, tmp_path / "whole")
    list(whole)
    list(train(replace(config, steps=2), tmp_path / "parts"))
    list(resume(tmp_path / "parts", steps=4))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")  # so these two steps come from the ledger
    last = resume(tmp_path / "parts", steps=6)
    assert last.step == 4
    assert any(matrix.any() for matrix in last._replica.state.feedback.matrices) == es.is_gated
    list(last)
    assert state_digest(last) == state_digest(whole)
    assert float(last._replica.state.spread) > 0 if es is SUMS else float(last._replica.state.spread) == 0
    whole_rows, last_rows = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for key in ("loss", "population", "member_tokens", "void_pairs", "update_norm"):
        assert [row[key] for row in last_rows] == [row[key] for row in whole_rows]
    assert last_rows[-1]["member_tokens"] == 6 * es.population * 6  # steps, members, window
    assert len({row["loss"] for row in last_rows}) == 6
    for name in ("whole", "parts"):
        replayed = replay(tmp_path / name)
        assert replayed.agrees
        assert replayed.compared >= 1
        assert replayed.digest == state_digest(whole)


@every_estimator
def test_with_every_estimator_one_device_trains_as_four(
    config: Config, monkeypatch: pytest.MonkeyPatch, es: EsConfig, carry: bool
) -> None:
    config = replace(config, steps=4, es=es, data=replace(config.data, carry=carry))
    digests = set()
    for devices in (1, 4):
        for mesh in ("whole_mesh", "local_mesh"):
            monkeypatch.setattr(f"esjax.training.run.{mesh}", partial(mesh_of, devices))
        trainer = train(config)
        infos = list(trainer)
        assert all(info.applied and info.update_norm > 0 for info in infos)
        assert trainer._replica.device_batch == 3 * devices
        digests.add(state_digest(trainer))
    assert len(digests) == 1


@with_sums
def test_with_sums_a_time_budget_takes_the_population_that_fits(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, es: EsConfig
) -> None:
    monkeypatch.setattr(time, "perf_counter", iter(float(n) for n in range(10**6)).__next__)
    pairs = 4 * 3 * len(jax.local_devices())  # as for losses
    timed = train(replace(config, steps=3, ledger=True, es=replace(es, time_per_step=4.0)), tmp_path / "run")
    infos = list(timed)
    assert [info.population for info in infos] == [pairs * es.members_per_pair] * 3
    assert all(info.applied for info in infos)
    replayed = replay(tmp_path / "run")
    assert replayed.agrees
    assert replayed.digest == state_digest(timed)
    if es is SUMS:  # noise on activations is rounded to other steps, since the number of windows is not known before
        fixed = train(replace(config, steps=3, es=replace(es, population_size=2 * pairs)))
        list(fixed)
        assert state_digest(fixed) == state_digest(timed)


@pytest.mark.parametrize("time_per_step", [pytest.param(None, marks=pytest.mark.nightly), 0.05])
def test_nothing_is_compiled_after_the_first_step(
    config: Config, caplog: pytest.LogCaptureFixture, time_per_step: float | None
) -> None:
    es = EsConfig(population_size=32, time_per_step=time_per_step, chunk_pairs=4)
    trainer = train(replace(config, steps=12, evaluate_time=1e-6, es=es))
    steps = iter(trainer)
    next(steps)
    next(steps)  # two blocks' totals are added in the first step of several blocks
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        list(steps)
    assert not [record for record in caplog.records if "Compiling" in record.getMessage()]


@pytest.mark.nightly
def test_memory_is_flat_over_a_thousand_steps(config: Config, tmp_path: Path) -> None:
    config = replace(config, steps=1100, evaluate_time=0.05, checkpoint_time=0.5)
    steps = iter(train(config, tmp_path / "run"))

    def peak_mib() -> float:
        scale = 1024 if sys.platform == "linux" else 1024**2
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale

    for _ in range(100):
        next(steps)
    gc.collect()  # what earlier tests left in cycles
    before, arrays = peak_mib(), len(jax.live_arrays())
    for _ in steps:
        pass
    gc.collect()
    assert peak_mib() - before < 30
    assert len(jax.live_arrays()) <= arrays + 5


def test_a_custom_model_and_a_custom_loss(config: Config) -> None:
    """Reference: the loss asks for a start state of 2s alone, which has a known minimum."""
    run = train(
        replace(config, steps=60, optim=OptimConfig(learning_rate=0.1)),
        model=lambda vocab_size: gru(vocab_size, 3, 5),
        loss=lambda member, tokens, key: jnp.sum((member.params.start - 2) ** 2),
    )
    list(run)
    np.testing.assert_allclose(run.params.start, 2, atol=0.3)


@pytest.mark.parametrize(("value", "reason"), [(jnp.nan, "not finite"), (1.5, "equal")])
def test_a_void_step_is_not_applied_and_reported_once(config: Config, value: float, reason: str) -> None:
    lines: list[str] = []
    run = train(config, loss=lambda member, tokens, key: jnp.float32(value), tell=lines.append)
    before = jax.tree.map(np.asarray, run.params)
    infos = list(run)
    assert [info.applied for info in infos] == [False] * 6
    assert run.step == 6
    jax.tree.map(np.testing.assert_array_equal, before, run.params)
    assert len(lines) == 1
    assert reason in lines[0]


def test_a_run_past_its_limit_says_how_to_go_on(config: Config, tmp_path: Path) -> None:
    list(train(config, tmp_path / "run"))
    with pytest.raises(EsjaxError, match="raise steps"):
        next(iter(resume(tmp_path / "run")))


def test_another_text_is_refused_at_resume(config: Config, tmp_path: Path, text: Path) -> None:
    list(train(config, tmp_path / "run"))
    text.write_text(TEXT + "\n\nmore")
    with pytest.raises(EsjaxError, match="is not the one"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: (folder / "b.csv").write_text("text\nchanged\n"), r"\('b.csv' has changed; 1 of 3 files"),
        (lambda folder: (folder / "b.csv").unlink(), r"\('b.csv' is missing; 1 of 3 files"),
        (lambda folder: (folder / "d.csv").write_text("text\nnew\n"), r"\('d.csv' is new; 1 of 4 files"),
    ],
)
def test_a_run_names_the_file_of_its_text_that_differs(
    config: Config, tmp_path: Path, change: Callable[[Path], object], found: str
) -> None:
    """Also after the folder was moved."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.csv").write_text("text\n" + "".join(f"row {name} {n}\n" for n in range(20)))
    list(train(replace(config, data=replace(config.data, text=f"{folder}#text"), steps=1), tmp_path / "run"))
    moved = folder.rename(tmp_path / "moved")
    resume(tmp_path / "run", text=f"{moved}#text", steps=2)
    change(moved)
    with pytest.raises(EsjaxError, match=found):
        resume(tmp_path / "run")


def test_nothing_is_left_behind_when_the_text_is_wrong(config: Config, tmp_path: Path) -> None:
    with pytest.raises(EsjaxError):
        train(replace(config, data=DataConfig(text=str(tmp_path / "none"))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_held_out_documents_trains(config: Config) -> None:
    run = train(replace(config, data=replace(config.data, held_out=0.0)))
    infos = list(run)
    assert run.baselines == {}
    assert infos[-1].held_out is None


def test_texts_are_named_by_their_seed(config: Config) -> None:
    run = train(config)
    next(iter(run))
    assert run.generate("the", seed=1) == run.generate("the", seed=1)
    assert run.generate("the", seed=1, max_tokens=50) != run.generate("the", seed=2, max_tokens=50)


def test_a_run_that_was_trained_on_elsewhere_is_left_alone(config: Config, tmp_path: Path) -> None:
    stale = train(config, tmp_path / "run")
    next(iter(stale))
    list(resume(tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(EsjaxError, match="was trained on to step 6 since"):
        next(iter(stale))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert resume(tmp_path / "run").step == 6


def own_model(vocab_size: int) -> Model:
    return gru(vocab_size, 4, 8)


def own_loss(member: Member, tokens: Array, key: Array) -> Array:
    return jnp.sum((member.params.start - 2) ** 2)


@pytest.mark.parametrize(("kind", "value"), [("model", own_model), ("loss", own_loss), ("optimizer", optax.adam(0.05))])
def test_custom_parts_of_a_run_must_be_given_again(config: Config, tmp_path: Path, kind: str, value: object) -> None:
    """Reference: the uninterrupted run."""
    given: dict[str, Any] = {kind: value}
    whole = train(config, **given)
    list(whole)
    list(train(replace(config, steps=3), tmp_path / "run", **given))
    with pytest.raises(EsjaxError, match=f"custom {kind}, "):
        resume(tmp_path / "run", steps=6)
    again = resume(tmp_path / "run", steps=6, **given)
    list(again)
    assert state_digest(again) == state_digest(whole)
    list(train(config, tmp_path / "plain"))
    with pytest.raises(EsjaxError, match=f"leave {kind}= out"):
        resume(tmp_path / "plain", **given)


def test_an_update_that_is_not_finite_is_not_made(config: Config, tmp_path: Path) -> None:
    lines: list[str] = []
    optim = OptimConfig(optimizer="sgd", learning_rate=3e38, schedule="constant")
    run = train(replace(config, optim=optim, steps=3), tmp_path / "run", tell=lines.append)
    before = jax.tree.map(np.asarray, run.params)
    assert [info.applied for info in run] == [False] * 3
    jax.tree.map(np.testing.assert_array_equal, before, run.params)
    assert len(lines) == 1
    assert "lower optim.learning_rate" in lines[0]
    assert [row["update_norm"] for row in rows(tmp_path / "run")] == [None] * 3


def test_the_params_of_a_run_stay_as_they_are(config: Config) -> None:
    run = train(config)
    first, kept = run.params, jax.tree.map(np.array, run.params)
    assert len(list(run)) == 6
    jax.tree.map(np.testing.assert_array_equal, first, kept)
    assert any(jax.tree.leaves(jax.tree.map(lambda one, two: (one != two).any(), first, run.params)))


@pytest.mark.parametrize("done", [0, 2])
def test_what_the_devices_lose_is_in_the_run_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Reference: a run without failure. The devices fail after they took the memory of the state."""
    config = replace(config, ledger=True, checkpoint_time=1e9)
    run = train(config, tmp_path / "run")
    update, replica = run._replica.update, run._replica

    def fail(payload: bytes) -> tuple[float | None, float | None]:
        if run.step == done:
            jax.tree.map(lambda leaf: leaf.delete(), replica.state)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return update(payload)

    monkeypatch.setattr(replica, "update", fail)
    with pytest.raises(EsjaxError, match="memory"):
        list(run)
    with pytest.raises(EsjaxError, match="resume the run from its folder"):
        list(run)
    if done == 0:
        assert not (tmp_path / "run").exists()
        return
    resumed, whole = resume(tmp_path / "run"), train(config)
    assert resumed.step == done + 1  # its update was recorded before it was made
    assert (len(list(resumed)), len(list(whole))) == (3, 6)
    assert state_digest(resumed) == state_digest(whole)


def test_limits_may_be_changed_on_the_way(config: Config) -> None:
    run = train(config)
    for info in run:
        if info.step == 2:
            run.limits = Limits(steps=4, seconds=None)
    assert run.step == 4


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (lambda leaf: leaf.astype(jnp.bfloat16), "bfloat16"),
        (lambda leaf: np.zeros(leaf.shape), "float64"),
    ],
)
def test_a_model_that_is_not_float32_is_refused(config: Config, convert: Callable[[Any], Any], kind: str) -> None:
    def other(vocab_size: int) -> Model:
        model = own_model(vocab_size)
        return model._replace(init=lambda key: jax.tree.map(convert, model.init(key)))

    with pytest.raises(EsjaxError, match=rf"parameter .*\.start of the model is {kind}; make it float32"):
        train(config, model=other)


def test_with_products_in_bfloat16_the_held_out_loss_is_that_of_float32(config: Config) -> None:
    exact, rounded = (
        train(replace(config, steps=1, es=replace(config.es, precision=precision)))
        for precision in ("float32", "bfloat16")
    )
    assert rounded.evaluate() == exact.evaluate()
    loss, other_loss = (next(iter(run)).loss for run in (exact, rounded))
    assert loss != other_loss


def test_a_missing_held_out_part_is_said(config: Config, tmp_path: Path) -> None:
    lines: list[str] = []
    data = replace(config.data, documents="file", held_out=1e-6)
    train(replace(config, data=data), tell=lines.append)
    assert len(lines) == 1
    assert "no document is held out" in lines[0]


def test_a_first_ctrl_c_in_a_step_stops_and_a_second_acts_as_before(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    presses = iter([0, 1, 2])
    take = LocalSteps.take

    def pressed(steps: LocalSteps) -> StepDone:
        for _ in range(next(presses)):
            signal.raise_signal(signal.SIGINT)
        return take(steps)

    monkeypatch.setattr(LocalSteps, "take", pressed)
    run = train(replace(config, steps=100))
    assert [info.step for info in run] == [1, 2]
    assert run.stopped
    with pytest.raises(KeyboardInterrupt):
        next(iter(run))


def test_between_two_steps_signals_are_the_programs_own(config: Config) -> None:
    """Reference: the handlers that were there before."""
    before = [signal.getsignal(number) for number in SIGNALS]
    run = train(replace(config, steps=100))
    steps = iter(run)
    next(steps)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with run.handling_signals():
        next(steps)
        signal.raise_signal(signal.SIGINT)
        assert [info.step for info in steps] == [3]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_run_stops_when_the_loop_says_so(config: Config) -> None:
    run = train(replace(config, steps=100))
    taken = []
    for info in run:
        taken.append(info.step)
        if info.step == 2:
            run.stop()
    assert (taken, run.stopped) == ([1, 2, 3], True)
    run.limits = Limits(5, None)
    assert [info.step for info in run] == [4, 5]
    assert not run.stopped


def test_a_stop_after_the_last_step_counts(config: Config) -> None:
    """As one that comes while the last step is evaluated; a sweep would go on with its next run otherwise."""
    run = train(replace(config, steps=2))
    for info in run:
        if info.step == 2:
            run.stop()
    assert run.stopped


def test_a_new_iteration_closes_the_one_that_was_left(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    left = iter(run)
    next(left)
    assert [info.step for info in run] == [2, 3, 4, 5, 6]
    assert list(left) == []


SCRIPT = """
import sys
from pathlib import Path
import esjax

steps = iter(esjax.train(esjax.config.settings.from_yaml(Path(sys.argv[1]).read_text(), ""), sys.argv[2]))
for _ in range(3):
    next(steps)
if sys.argv[3] == "raises":
    raise KeyError("a mistake in the script")
"""


@pytest.mark.parametrize("how", ["ends", "raises"])
def test_a_script_that_ends_leaves_a_checkpoint(config: Config, tmp_path: Path, how: str) -> None:
    """The iterator is suspended in a variable when the program ends."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.yaml"), str(tmp_path / "run"), how]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == (how == "raises"), done.stderr
    assert ("a mistake in the script" in done.stderr) == (how == "raises")
    assert done.stderr.count("Traceback") == (how == "raises")
    assert kept_steps(tmp_path / "run" / "checkpoints") == [3]


def test_two_runs_side_by_side_give_the_signals_back(config: Config) -> None:
    first, second = iter(train(config)), iter(train(config))
    next(first)
    next(second)
    first.close()
    second.close()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_relative_paths_hold_after_a_change_of_the_working_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the same run with absolute paths."""
    expected = train(config, tmp_path / "expected")
    list(expected)
    monkeypatch.chdir(tmp_path)
    run = train(replace(config, data=replace(config.data, text="text.txt")), "runs/a[1]")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    list(run)
    monkeypatch.chdir("/")
    assert state_digest(resume(tmp_path / "runs/a[1]")) == state_digest(expected)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_text_that_was_moved_is_named_anew(config: Config, tmp_path: Path, text: Path) -> None:
    list(train(config, tmp_path / "run"))
    moved = text.rename(tmp_path / "moved.txt")
    with pytest.raises(EsjaxError, match=r"text\.txt'; let data\.text name one that is there"):
        resume(tmp_path / "run")
    (tmp_path / "other.txt").write_text(TEXT + "\n\nanother line")
    with pytest.raises(EsjaxError, match=r"other\.txt' is not the one"):
        resume(tmp_path / "run", text=str(tmp_path / "other.txt"))
    assert resume(tmp_path / "run", text=str(moved), steps=8).step == 6
    assert resume(tmp_path / "run", steps=8).step == 6  # it was kept
    assert RunFolder(tmp_path / "run").config == replace(config, data=replace(config.data, text=str(moved)))


@pytest.mark.parametrize("name", [b"caf\xe9", b"x" * 300, b"/".join([b"y" * 250] * 15 + [b"z" * 150])])
def test_an_impossible_name_is_refused_before_anything_is_made(config: Config, tmp_path: Path, name: bytes) -> None:
    with pytest.raises(EsjaxError) as caught:
        train(config, tmp_path / os.fsdecode(name))
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_end_of_a_cosine_is_said_once_where_a_run_goes_on(config: Config, tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(config, steps=2, optim=OptimConfig(schedule="cosine"))
    list(train(config, tmp_path / "run", tell=said.append))
    assert not said
    resumed = resume(tmp_path / "run", steps=5, tell=said.append)
    norms = [info.update_norm for info in resumed]
    assert said == [
        "step 3: optim.schedule cosine has ended at step 2; the learning rate stays 0, and the weights as they are; to "
        "train longer, begin a run with a larger optim.decay_steps"
    ]
    assert norms == pytest.approx([0, 0, 0], abs=1e-5)
    said.clear()
    list(train(replace(config, steps=4), optimizer=optax.sgd(0.1), tell=said.append))
    list(train(replace(config, steps=4, optim=OptimConfig(schedule="cosine", decay_steps=4)), tell=said.append))
    assert not said
