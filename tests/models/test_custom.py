"""A loss or a reward of one's own: what it is given, what it may return, and what a run makes of it."""

import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
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
from reference_models import busy
from small import (
    MODELS,
    PAIRS,
    VOCAB,
    dense_member,
    kept_in_factors,
    member_of,
    noise_of,
    params_of,
    seeds_of,
    tokens_of,
)

import esjax
from esjax import core
from esjax.config.custom_names import name_of_optimizer
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.core.interpreter import interpret
from esjax.data.tokens import STOP, UNK
from esjax.data.vocabulary import Vocabulary
from esjax.errors import EsjaxError
from esjax.exchange.gradient_sums import TAIL
from esjax.exchange.values import Conclusion
from esjax.models import Model, gru
from esjax.models.custom import Custom
from esjax.models.member import Member, over_sequences
from esjax.replica.estimators.estimator import make_estimator
from esjax.replica.notices import Notices
from esjax.runs.checkpoint import digest
from esjax.runs.folder import RunFolder, check_custom
from esjax.training.run import train
from esjax.tuning.sigma import tune

MODEL = MODELS["gru"]

LONGEST_IN_A_MESSAGE = 128
"""Characters of a name that a host sends."""

pytestmark = pytest.mark.usefixtures("lenient_promotion")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    return Config(
        steps=4,
        data=DataConfig(text=str(path), window=6, held_out=0.2),
        es=EsConfig(population_size=32),
        model=GruConfig(hidden_size=4, head_size=8),
    )


def start_near_two(member: Member, tokens: Array, key: Array) -> Array:
    return jnp.sum((member.params.start - 2) ** 2)


def start_not_near_two(member: Member, tokens: Array, key: Array) -> Array:
    return -start_near_two(member, tokens, key)


def test_a_reward_trains_as_the_loss_of_the_other_sign_bit_for_bit(config: Config) -> None:
    by_loss, by_reward = train(config, loss=start_near_two), train(config, reward=start_not_near_two)
    losses, rewards = list(by_loss), list(by_reward)
    assert [info.loss for info in losses] == [info.loss for info in rewards]
    assert losses[-1].held_out == rewards[-1].held_out
    assert digest(by_loss._replica.state) == digest(by_reward._replica.state)


def draws(member: Member, tokens: Array, key: Array) -> Array:
    return jax.random.uniform(key)


def test_a_pair_shares_its_keys_and_no_two_pairs_or_sequences_do() -> None:
    """Reference: a loss that is nothing but a draw from its key."""

    def evaluate(sequences: int, devices: int) -> np.ndarray:
        run = core.evaluate(over_sequences(MODEL, draws), noise_of(MODEL), mesh=mesh_of(devices), chunk_pairs=3)
        return np.asarray(jax.jit(run)(params_of(MODEL), seeds_of(), tokens_of(sequences=sequences)))

    alone = evaluate(1, 1)
    np.testing.assert_array_equal(alone[:, 0], alone[:, 1])
    assert len(np.unique(alone[:, 0])) == PAIRS
    np.testing.assert_array_equal(alone, evaluate(1, 4))
    assert (evaluate(2, 1) != alone).all()  # the mean of two draws, if the second sequence has a key of its own


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampled_tokens_come_as_often_as_predicted(name: str, temperature: float) -> None:
    """Reference: softmax(logits / temperature) without UNK; the largest of 7 deviations is below 5 standard ones."""
    member = Member(MODELS[name], busy(params_of(MODELS[name])))
    state, count = member.read(jnp.array([3, 4])), 4000
    keys = jax.random.split(jax.random.key(1), count)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: member.generate(state, 1, key, temperature)[0]))(keys))
    logits = np.asarray(member.predict(state), np.float64) / temperature
    logits[UNK] = -np.inf
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    share = np.bincount(drawn, minlength=len(logits)) / count
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()
    assert share[UNK] == 0


@pytest.mark.parametrize("is_dense", [False, True])
def test_a_perturbed_member_writes_what_is_most_probable_step_by_step(is_dense: bool) -> None:
    """Reference: a loop in Python over the model's own functions, with the member's weights written out."""
    model, params, seed = MODEL, busy(params_of(MODEL)), seeds_of()[0]
    noise, prompt = noise_of(model, sigma=0.5), jnp.array([2, 5, 3])
    dense = dense_member(noise, params, seed, -1.0)
    member = dense if is_dense else member_of(noise, params, seed, -1.0)
    assert len(kept_in_factors(member)) == (0 if is_dense else 4)

    def write(params: Any) -> Array:
        member = Member(model, params)
        return member.generate(member.read(prompt), 6)

    written, expected = interpret(write)(member), []
    state = Member(model, dense).read(prompt)
    for _ in range(6):
        token = int(np.argmax(np.asarray(model.predict(dense, state))[UNK + 1 :])) + UNK + 1
        expected.append(STOP if STOP in expected else token)
        state = model.consume(dense, state, jnp.int32(token))
    np.testing.assert_array_equal(written, expected)


def test_after_a_stop_there_are_only_stops() -> None:
    member = Member(MODEL, busy(params_of(MODEL)))
    keys = jax.random.split(jax.random.key(2), 50)
    rows = np.asarray(jax.vmap(lambda key: member.generate(member.initial_state(), 8, key))(keys))
    ended = np.cumsum(rows == STOP, axis=1) > 0
    assert ended.any()
    assert (rows[ended] == STOP).all()


def test_nats_go_on_from_a_state() -> None:
    """Reference: the nats of the whole, read at once."""
    member, tokens = Member(MODEL, busy(params_of(MODEL))), jnp.array([3, 2, STOP, 4, 5, 2])
    parts = [member.nats(tokens[:2]), member.nats(tokens[2:], member.read(tokens[:2]))]
    np.testing.assert_allclose(jnp.concatenate(parts), member.nats(tokens), rtol=1e-6)
    np.testing.assert_allclose(member.cross_entropy(tokens, 2), member.nats(tokens)[2:].mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: jnp.zeros(3), r"the loss .*<lambda> returns an array of shape \(3,\)"),
        (lambda: jnp.bool_(True), "<lambda> returns bool; make it float32"),
        (lambda: jnp.int32(1), "returns int32; make it float32"),
        (lambda: jnp.bfloat16(1), "returns bfloat16; make it float32"),
        (lambda: None, "returns a NoneType"),
        (lambda: "right", "returns a str"),
    ],
)
def test_what_is_no_float32_is_refused_before_anything_is_written(
    config: Config, tmp_path: Path, value: Callable[[], Any], message: str
) -> None:
    for begin in (train, esjax.serve):
        with pytest.raises(EsjaxError, match=message):
            begin(config, tmp_path / "run", loss=lambda member, tokens, key: value())
        assert not (tmp_path / "run").exists()


def test_a_loss_of_other_arguments_is_refused(config: Config) -> None:
    wrong: list[Any] = [lambda member, tokens: 0.0, lambda member, tokens, key, more: 0.0, lambda *, member: 0.0]
    for custom in wrong:
        with pytest.raises(EsjaxError, match=r"reward .*<lambda> takes \(.*\); it must take \(member, tokens, key\)"):
            train(config, reward=custom)
    right: list[Any] = [lambda *arguments: 1.0, partial(lambda member, tokens, key, scale: scale, scale=1.0)]
    for custom in right:
        train(config, reward=custom, tell=lambda line: None)


def test_an_error_of_a_loss_is_its_own_with_a_note(config: Config) -> None:
    def careless(member: Member, tokens: Array, key: Array) -> Any:
        return member.params.no_such_weight

    with pytest.raises(AttributeError, match="no_such_weight") as caught:
        train(config, loss=careless)
    (note,) = [note for note in caught.value.__notes__ if "raised by" in note]  # JAX leaves one, too
    assert note.startswith("raised by the loss ")
    assert note.endswith("careless, given a member, tokens of shape (7,), and a key")


def test_a_refused_loss_is_not_told_under_frames_of_its_tracing(config: Config) -> None:
    """What a person sees ends where the loss was looked at, not where it was called."""
    with pytest.raises(EsjaxError, match="returns bool") as caught:
        train(config, loss=lambda member, tokens, key: jnp.bool_(True))
    shown = "".join(traceback.format_exception(caught.value))
    assert "esjax/replica/estimators/estimator.py" in shown
    assert "esjax/core/" not in shown
    assert "esjax/models/member.py" not in shown
    assert "esjax/models/custom/parts.py" not in shown


def test_any_model_takes_bfloat16(config: Config) -> None:
    """One that multiplies its matrices with @, and one of esjax: losses are those of float32, but for the rounding."""

    def custom(vocab_size: int) -> Model:
        return Model(
            init=lambda key: {"out": 0.5 * jax.random.normal(key, (vocab_size, vocab_size))},
            initial_state=lambda params: jax.nn.one_hot(STOP, vocab_size),
            predict=lambda params, state: state @ params["out"],
            consume=lambda params, state, token: jax.nn.one_hot(token, vocab_size),
        )

    for model in (custom, None):
        exact, rounded = (
            next(iter(train(replace(config, es=replace(config.es, precision=precision)), model=model))).loss
            for precision in ("float32", "bfloat16")
        )
        assert rounded != exact
        assert rounded == pytest.approx(exact, rel=1e-2)


def test_a_plain_number_is_one_float32(config: Config) -> None:
    loss: Any = lambda member, tokens, key: 1.5  # noqa: E731
    first = next(iter(train(config, loss=loss, tell=lambda line: None)))
    assert first.loss == 1.5


def test_a_loss_and_a_reward_are_one_too_many(config: Config) -> None:
    with pytest.raises(EsjaxError, match="give one of them"):
        train(config, loss=start_near_two, reward=start_not_near_two)


def spoiled(share: float, member: Member, tokens: Array, key: Array) -> Array:
    return jnp.where(jax.random.uniform(key) < share, jnp.nan, start_near_two(member, tokens, key))


@pytest.mark.parametrize(("share", "words"), [(0.2, "do not count"), (0.9, "no update")])
def test_nan_is_told_once_with_the_name_of_the_loss(config: Config, share: float, words: str) -> None:
    told: list[str] = []
    loss = partial(spoiled, share)
    config = replace(config, steps=8, es=EsConfig(population_size=128))
    infos = list(train(config, loss=loss, tell=told.append))
    assert len(told) == 1
    assert words in told[0]
    assert "the run's own loss, spoiled" in told[0]
    assert all(info.void_pairs > 0 for info in infos)
    assert all(info.applied == (share < 0.5) for info in infos)


def test_blame_is_for_losses_and_rewards_alone() -> None:
    trouble = Conclusion(np.zeros(0, np.int8), 0.0, None, 0, "all are equal")
    line = Notices(Config(), {"model": "m", "optimizer": "o"}).line(3, trouble)
    assert line == "step 3: all are equal; no update"
    line = Notices(Config(), {"model": "m", "reward": "right"}).line(3, trouble)
    assert line == "step 3: all are equal (the run's own reward, right); no update"


def constant(member: Member, tokens: Array, key: Array) -> Array:
    return jnp.mean((tokens == STOP).astype(jnp.float32)) + 0.001 * member.params.start[0]


def test_held_out_is_the_same_loss_over_windows_of_held_out_text(config: Config) -> None:
    """Reference: a start state of nearly no weight, and documents of one length, so a known share of STOPs."""
    run = train(config, reward=constant)
    infos = list(run)
    lengths = {len(document) + 1 for document in run.corpus.held_out}
    assert infos[-1].held_out is not None
    assert -infos[-1].held_out == pytest.approx(1 / np.mean(list(lengths)), abs=0.01)
    assert run.baselines == {}
    assert run.evaluate().nats_per_token > 1  # whatever the loss
    assert set(run.evaluate().baselines) == {"unigram", "bigram", "trigram"}


def test_a_held_out_text_shorter_than_a_window_is_said(config: Config) -> None:
    told: list[str] = []
    run = train(replace(config, data=replace(config.data, window=700)), loss=start_near_two, tell=told.append)
    assert any("less than a window is held out" in line for line in told)
    assert [info.held_out for info in run] == [None] * 4


def test_losses_are_exchanged_unless_sums_are_asked_for() -> None:
    size = sum(leaf.size for leaf in jax.tree.leaves(params_of(MODEL)))

    def vector_length(loss: Any, **es: Any) -> int:
        config = Config(es=EsConfig(population_size=2 * size + 2, **es))
        return make_estimator(config, MODEL, params_of(MODEL), MODEL.unit, loss).vector_length

    assert vector_length(None) == size + TAIL
    assert vector_length(start_near_two) == 0
    assert vector_length(start_near_two, exchange="sums") == size + TAIL


def test_sums_of_a_reward_may_be_below_zero(config: Config) -> None:
    """Reference: the same run, with losses exchanged."""
    rewards = []
    for exchange in ("sums", "losses"):
        es = EsConfig(population_size=32, exchange=exchange)
        (first, *_) = train(replace(config, es=es), reward=lambda member, tokens, key: 3 + member.params.start[0])
        rewards.append(-first.loss)
    assert rewards[0] == pytest.approx(rewards[1], abs=2**-10)
    assert rewards[0] > 2


def small_model(vocab_size: int) -> Model:
    return gru(vocab_size, 4, 8)


def test_all_that_a_run_was_given_is_asked_for_at_once(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "run"
    custom = Custom(model=small_model, reward=start_not_near_two, optimizer=optax.sgd(0.1))
    RunFolder.create(path, config, Vocabulary("byte"), "", custom.names())
    for begin, function in (
        (esjax.resume, "resume"),
        (esjax.resume_serving, "resume_serving"),
        (esjax.replay, "replay"),
    ):
        with pytest.raises(EsjaxError) as caught:
            begin(path)
        assert str(caught.value) == (
            f"{str(path)!r} was trained with a custom model, small_model, and a custom reward, "
            f"start_not_near_two, and a custom optimizer, {custom.names()['optimizer']}; give them again: "
            "--model PATH.py:FUNCTION --reward.function PATH.py:FUNCTION --optim.custom PATH.py:FUNCTION, or from "
            f"Python esjax.{function}({str(path)!r}, model=..., reward=..., optimizer=...)"
        )
    with pytest.raises(
        EsjaxError, match=r"custom model, small_model; give it again: --model [^-]*, or .*load\(.*, model=...\)$"
    ):
        esjax.load(path)  # of all three, weights need but the model


@pytest.mark.parametrize(
    ("was", "now", "refused"),
    [
        ("right", "right", False),
        ("right", "wrong", True),
        ("outer.<locals>.right", "right", False),
        ("Task.right", "Other.wrong", True),
        ("<lambda>", "right", False),
        ("right", "outer.<locals>.<lambda>", False),
    ],
)
def test_another_function_is_refused_where_its_name_tells(was: str, now: str, refused: bool) -> None:
    with pytest.raises(EsjaxError, match="with the reward right, not wrong; give") if refused else nullcontext():
        check_custom("run", {"reward": was}, {"reward": now}, "resume")


def test_another_optimizer_is_refused_where_its_name_tells() -> None:
    names = [Custom(optimizer=one).names() for one in (optax.adam(0.1), optax.adam(0.1), optax.adam(0.2))]
    check_custom("run", names[0], names[1], "resume")
    with pytest.raises(EsjaxError, match=r"scale\(-0.1\) #\w{8}, not .*scale\(-0.2\) #\w{8}; give that one"):
        check_custom("run", names[0], names[2], "resume")
    check_custom("run", {"optimizer": "GradientTransformation"}, names[0], "resume")  # of an earlier esjax


def test_optimizers_have_names_that_tell_them_apart() -> None:
    """Reference: each is another transformation, so each has another name, made twice the same one."""

    def make() -> list[Any]:
        return [
            *(optax.sgd(0.1), optax.sgd(0.2), optax.sgd(0.1, 0.9), optax.adam(0.1), optax.adamw(0.1)),
            *(optax.adam(optax.cosine_decay_schedule(0.1, steps)) for steps in (100, 200)),
            *(optax.adagrad(0.1, initial_accumulator_value=value) for value in (0.1, 0.2)),  # only init holds it
            *(optax.MultiSteps(optax.sgd(0.1), steps) for steps in (2, 3)),
            *(optax.inject_hyperparams(optax.sgd)(rate) for rate in (0.1, 0.2)),
            *(optax.scale(np.array([1, factor])) for factor in (2, 3)),
        ]

    first, second = ([name_of_optimizer(one) for one in make()] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(first)
    assert first[0].startswith("identity(), scale(-0.1) #")
    assert max(map(len, first)) <= LONGEST_IN_A_MESSAGE


def test_a_run_does_not_go_on_with_another_reward(config: Config, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", config, Vocabulary("byte"), "", Custom(reward=start_not_near_two).names())
    for begin in (esjax.resume, esjax.resume_serving, esjax.replay):
        with pytest.raises(EsjaxError, match="trained with the reward start_not_near_two, not constant; give that one"):
            begin(tmp_path / "run", reward=constant)


# --- a model that does not keep the contract ---

SIZE = 12


def plain(**parts: Any) -> Model:
    whole: dict[str, Any] = {
        "init": lambda key: {"out": jnp.zeros((4, SIZE))},
        "initial_state": lambda params: {"seen": jnp.zeros(4)},
        "predict": lambda params, state: state["seen"] @ params["out"],
        "consume": lambda params, state, token: state,
    }
    return Model(**{**whole, **parts})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"predict": lambda params, state: jnp.zeros(3)},
            r"predict of the model own returns float32\[3\]; it must return a float logit for each of the 12 token ids",
        ),
        (
            {"predict": lambda params, state: jnp.zeros(SIZE, jnp.int32)},
            r"predict of the model own returns int32\[12\]",
        ),
        ({"predict": lambda params, state: None}, "predict of the model own returns None"),
        (
            {"consume": lambda params, state, token: {"seen": jnp.zeros(5)}},
            r"consume of the model own returns \{'seen': float32\[5\]\}, and initial_state \{'seen': float32\[4\]\}; a",
        ),
        ({"consume": lambda params, state, token: jnp.zeros(4)}, r"returns float32\[4\], and initial_state \{'seen'"),
        (
            {"consume": lambda params, state, token: {"seen": token * jnp.ones(4, jnp.int32)}},
            r"returns \{'seen': int32",
        ),
        ({"unit": {"in": 1.0}}, "unit of the model own is no tree like its parameters"),
        ({"output_layer": "head"}, "output_layer of the model own is 'head', which names no parameter; there are "),
        (
            {"embeddings": ("out", "rows")},
            "embeddings of the model own is 'rows', which names no parameter; there are ",
        ),
        ({"stacked": ("layers",)}, "stacked of the model own is 'layers', which names no parameter; there are "),
        (
            {"init": lambda key: {"in": jnp.zeros(3)}, "stacked": ("in",)},
            r"stacked of the model own names in, whose shape \[3\] has no axis of layers before others; name the paths",
        ),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused(parts: dict[str, Any], message: str) -> None:
    def custom(vocab_size: int) -> Model:
        return plain(**parts)

    custom.__qualname__ = "own"
    with pytest.raises(EsjaxError, match=message):
        Custom(model=custom).build(GruConfig(), SIZE)


def test_a_parameter_that_is_a_number_of_python_is_refused(config: Config) -> None:
    def custom(vocab_size: int) -> Model:
        parts = {"init": lambda key: {"scale": 1.0}, "predict": lambda params, state: jnp.ones(vocab_size)}
        return plain(**parts)

    with pytest.raises(EsjaxError, match=r"parameter \['scale'\] of the model is float; make it float32"):
        train(config, model=custom)


def test_a_model_that_names_no_units_gets_those_of_its_first_weights(config: Config) -> None:
    """By hand: the root mean square of each leaf; zeros by their shape, 1/√4 and 0.3."""

    def custom(vocab_size: int) -> Model:
        first = {"kernel": jnp.full((8, vocab_size), 0.0625), "zeros": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
        return plain(init=lambda key: first, predict=lambda params, state: jnp.ones(vocab_size))

    assert train(config, model=custom)._replica.units == {"kernel": 0.0625, "zeros": 0.5, "bias": 0.3}


def test_a_model_that_keeps_the_contract_is_left_as_it_is() -> None:
    for model in (plain(), gru(SIZE, 4, 8), gru(SIZE, 4, 8)._replace(tapped=False), *MODELS.values()):
        size = VOCAB if model in MODELS.values() else SIZE
        assert Custom(model=lambda vocab_size, model=model: model).build(GruConfig(), size) is model


@pytest.mark.parametrize(
    ("parts", "raised", "note"),
    [
        ({"predict": lambda params: params}, TypeError, "raised by predict of the model own"),
        ({"initial_state": lambda params: params["in"]}, KeyError, "raised by initial_state of the model own"),
        ({"tapped": True}, TypeError, "raised by predict of the model own, given a tap"),
    ],
)
def test_an_error_of_a_model_is_its_own_with_a_note(parts: dict[str, Any], raised: type[Exception], note: str) -> None:
    def custom(vocab_size: int) -> Model:
        return plain(**parts)

    custom.__qualname__ = "own"
    with pytest.raises(raised) as caught:
        Custom(model=custom).build(GruConfig(), SIZE)
    assert note in caught.value.__notes__


def test_what_is_no_model_or_optimizer_is_refused() -> None:
    """In a process of its own, where no type is checked at calls."""
    code = """
import esjax, optax
from esjax.models import gru
for given in ({"model": "gru"}, {"model": gru(9, 4, 8)}, {"model": lambda size: None}, {"optimizer": "adam"},
              {"optimizer": optax.adam}):
    try:
        esjax.train(esjax.Config(data=esjax.DataConfig(text="builtin:pydoc")), **given)
    except esjax.EsjaxError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    expected = [
        "model is 'gru'; give",
        "model is a Model; give",
        "the model <lambda> returns a NoneType; it must return",
    ]
    expected += ["optimizer is 'adam'; give an optax", "optimizer is the function adam; give an optax"]
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start)


def test_a_model_is_checked_wherever_it_is_given(config: Config, tmp_path: Path) -> None:
    """Each of them would go on with three logits for all the text's ids."""

    def small_model(vocab_size: int) -> Model:
        return gru(vocab_size, 4, 8)._replace(predict=lambda params, state: jnp.zeros(3))

    train(config, tmp_path / "run", model=globals()["small_model"])
    (tmp_path / "run" / "ledger").touch()
    begin: list[Callable[[], Any]] = [
        lambda: train(config, tmp_path / "new", model=small_model),
        lambda: esjax.serve(config, tmp_path / "new", model=small_model),
        lambda: esjax.resume(tmp_path / "run", model=small_model),
        lambda: esjax.resume_serving(tmp_path / "run", model=small_model),
        lambda: esjax.replay(tmp_path / "run", model=small_model),
        lambda: esjax.load(tmp_path / "run", model=small_model),
        lambda: next(tune(tmp_path / "run", model=small_model)),
    ]
    for one in begin:
        with pytest.raises(EsjaxError, match=r"predict of the model .*small_model returns float32\[3\]"):
            one()
    assert not (tmp_path / "new").exists()


def test_names_are_by_kind() -> None:
    assert Custom(reward=start_not_near_two).names() == {"reward": "start_not_near_two"}
    assert Custom().objective is None


def test_a_run_is_drawn_from_memory_as_from_its_folder(config: Config, tmp_path: Path) -> None:
    kept, remembered = train(config, tmp_path / "run", reward=constant), train(config, reward=constant)
    pictures = []
    for run in (kept, remembered):
        with pytest.raises(EsjaxError, match="no step is finished"):
            run.plot()
        list(run)
        _, loss = run.plot().axes
        assert loss.get_ylabel() == "minus constant"
        (line,) = loss.get_lines()
        pictures.append(np.asarray(line.get_xydata()))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert len(pictures[0]) == 4


def test_what_is_shown_in_a_cell_is_short(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    *_, last = run
    assert repr(run).endswith(f"4 steps, 768 member-tokens, loss {last.loss:.3f}>")  # 4 * 32 * 6
    loaded = esjax.load(tmp_path / "run")
    weights = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert repr(loaded) == f"<esjax model after 4 steps: {weights:,} weights, {run.corpus.vocabulary.size} token ids>"
    assert str(loaded.generate("the", seed=3)[0]) == loaded.generate("the", seed=3)[0].text


def noisy_and_lower_on_a_plateau() -> optax.GradientTransformationExtraArgs:
    """Need the loss of the step, and keep a random key."""
    lower = optax.contrib.reduce_on_plateau(patience=1, rtol=0.5, factor=0.5)
    return optax.chain(optax.noisy_sgd(0.1, key=jax.random.key(3)), lower)


@pytest.mark.parametrize("space", ["low_rank", pytest.param("activation", marks=pytest.mark.nightly)])
def test_an_optimizer_that_needs_the_loss_and_keeps_a_key_goes_on_and_is_replayed_bit_for_bit(
    config: Config, tmp_path: Path, space: Any
) -> None:
    es = EsConfig(space=space, population_size=64, copies=8)
    config = replace(config, steps=3, es=es, ledger=True)
    list(train(config, tmp_path / "run", optimizer=noisy_and_lower_on_a_plateau()))
    resumed = esjax.resume(tmp_path / "run", steps=6, optimizer=noisy_and_lower_on_a_plateau())
    whole = train(replace(config, steps=6), optimizer=noisy_and_lower_on_a_plateau())
    list(resumed)
    losses = [info.loss for info in whole]
    assert digest(resumed._replica.state) == digest(whole._replica.state)
    replayed = esjax.replay(tmp_path / "run", optimizer=noisy_and_lower_on_a_plateau())
    assert replayed.digest == digest(whole._replica.state)
    plateau = replayed.state.opt_state[-1]
    assert float(plateau.best_value) == np.float32(losses[0])  # none is half of it
    assert float(plateau.scale) == 0.5**5
    file = tmp_path / "run.safetensors"
    assert esjax.export(tmp_path / "run", file) == [file]


@pytest.mark.parametrize("begin", [train, esjax.serve])
def test_an_optimizer_that_needs_more_than_there_is_leaves_no_folder(
    config: Config, tmp_path: Path, begin: Callable[..., Any]
) -> None:
    with pytest.raises(EsjaxError, match=r"the optimizer cannot be used: .*'grad' and 'value_fn'"):
        begin(config, tmp_path / "run", optimizer=optax.lbfgs())
    assert not (tmp_path / "run").exists()
