"""The transformer of pretrained models against its equations in float64, and its two ways of reading."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from reference_models import busy, llama_logits, wide
from small import VOCAB, dense_member, member_of, noise_of

import esjax
from esjax.config.models import LlamaConfig
from esjax.config.settings import Config, DataConfig, EsConfig, replace
from esjax.core.interpreter import interpret
from esjax.core.population import map_members
from esjax.core.seeds import pair_seeds
from esjax.data.tokens import STOP
from esjax.errors import EsjaxError
from esjax.inference import score
from esjax.models import Model, build_model
from esjax.models.custom.check import check_model
from esjax.models.member import Member
from esjax.replica.estimators.estimator import LossEstimator, make_estimator, stacked_of

TOKENS = [1, 3, 2, 6, 1, 4, 5, 2, 3, 3, 6, 1]
"""Begins with STOP, as documents do, with two more ends among them."""

CONFIG = LlamaConfig(
    hidden_size=24, mlp_size=10, n_layers=2, n_heads=6, n_kv_heads=2, context=16, rope_theta=50.0, norm_eps=0.01
)
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "a head each": {"n_kv_heads": 6},
    "one for all": {"n_kv_heads": 1},
}


def built(**changes: Any) -> tuple[Model, Any]:
    model = build_model(replace(CONFIG, **changes), VOCAB)
    return model, busy(jax.eval_shape(model.init, jax.random.key(0)))


@partial(jax.jit, static_argnames="model")
def at_once(model: Model, params: Any, tokens: Array) -> Array:
    assert model.logits is not None
    return model.logits(params, tokens)


@partial(jax.jit, static_argnames="model")
def stepwise(model: Model, params: Any, tokens: Array) -> Array:
    """Logits after the first token, which is STOP, and after each other one."""
    first = model.initial_state(params)

    def read(state: Any, token: Array) -> tuple[Any, Array]:
        after = model.consume(params, state, token)
        return after, model.predict(params, after)

    rest = jax.lax.scan(read, first, tokens[1:])[1]
    return jnp.concatenate([model.predict(params, first)[None], rest])


@partial(jax.jit, static_argnames="model")
def nats(model: Model, params: Any, tokens: Array) -> Array:
    return Member(model, params).nats(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_the_equations(kind: str) -> None:
    model, params = built(**KINDS[kind])
    expected = llama_logits(wide(params), TOKENS, 6, 50.0, 0.01)
    # float32 through two layers of sums of up to 24 products of size 1.
    np.testing.assert_allclose(at_once(model, params, jnp.array(TOKENS)), expected, atol=2e-4)
    np.testing.assert_allclose(stepwise(model, params, jnp.array(TOKENS)), expected, atol=2e-4)


def test_it_reads_on_after_a_stop_in_both_ways() -> None:
    """Reference: the nats of whole sequences, and of the same token by token."""
    model, params = built()
    tokens = jnp.array(TOKENS[1:])
    token_by_token = nats(model._replace(logits=None), params, tokens)
    np.testing.assert_allclose(nats(model, params, tokens), token_by_token, atol=2e-4)


def test_beyond_the_context_the_oldest_token_is_forgotten() -> None:
    """Reference: one layer whose cache holds 4 tokens knows the last 4 alone, at any position."""
    model, params = built(n_layers=1, context=4)
    rows = stepwise(model, params, jnp.array(TOKENS))
    for last in range(4, len(TOKENS)):
        expected = llama_logits(wide(params), TOKENS[last - 3 : last + 1], 6, 50.0, 0.01)[-1]
        np.testing.assert_allclose(rows[last], expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_nothing_is_added_up(kind: str) -> None:
    """A population shares every matrix: whole windows, and the cached steps of generation."""
    model, params = built(**KINDS[kind])
    noise = noise_of(model)

    def loss(params: Any, tokens: Array) -> Array:
        member = Member(model, params)
        written = member.generate(member.read(tokens), 3, jax.random.key(1))
        return member.cross_entropy(tokens) + jnp.sum(written).astype(jnp.float32)

    assert esjax.explain(loss, noise, params, jnp.array(TOKENS)) == []


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_member_is_the_model_with_its_noise_added(kind: str) -> None:
    """Reference: the logits of plain weights to which the noise of the pair was added."""
    model, params = built(**KINDS[kind])
    noise = noise_of(model)
    tokens = jnp.array(TOKENS)
    seeds = pair_seeds(0, 3, 2)

    def loss(params: Any, tokens: Array) -> Array:
        return Member(model, params).cross_entropy(tokens)

    got = jax.jit(esjax.evaluate(loss, noise))(params, seeds, tokens[None])
    noise = dataclasses.replace(noise, units=noise.lay_out(params).units)
    alone = jax.jit(lambda seed, sign: loss(dense_member(noise, params, seed, sign), tokens))
    for pair, seed in enumerate(seeds):
        for half, sign in enumerate((1.0, -1.0)):
            np.testing.assert_allclose(got[pair, half], alone(seed, sign), rtol=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_noise_that_is_packed_is_unpacked_layer_by_layer(split: bool) -> None:
    """Reference: the same noise unpacked."""
    model, params = built()
    seed, tokens = pair_seeds(0, 3, 1)[0], jnp.array(TOKENS)
    assert model.logits is not None
    plain, packed = (
        jax.jit(interpret(model.logits))(
            member_of(noise_of(model, split=split, packed=is_packed), params, seed, 1), tokens
        )
        for is_packed in (False, True)
    )
    np.testing.assert_allclose(packed, plain, atol=2e-5)


def test_weights_of_bfloat16_are_multiplied_as_they_are() -> None:
    """Reference: float32 products of the rounded weights; the inputs of products are rounded, too."""
    model, params = built()
    rounded = jax.tree.map(partial(jnp.asarray, dtype=jnp.bfloat16), params)
    tokens = jnp.array(TOKENS)
    got = at_once(model, rounded, tokens)
    expected = at_once(model, jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), rounded), tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=0.02 * float(jnp.abs(expected).max()))
    text = str(jax.make_jaxpr(partial(at_once, model))(rounded, tokens))
    assert f"f32[{24},{10}]" not in text, "a matrix was widened"


@pytest.mark.parametrize("space", ["low_rank", "full"])
def test_in_bfloat16_matrices_of_layers_are_rounded_and_norms_are_not(space: str) -> None:
    """A norm of one layer is a vector, whose noise of 0.001 would be lost. Reference: the same member in float32."""
    model, params = built()
    noise = dataclasses.replace(noise_of(model, space=space, sigma=0.001), stacked=stacked_of(model))
    seed = pair_seeds(3, 0, 1)[0]
    plain, rounded = (member_of(noise, params, seed, 1, precision) for precision in ("float32", "bfloat16"))
    np.testing.assert_array_equal(rounded.layers.mlp_norm.scale, plain.layers.mlp_norm.scale)
    assert (rounded.layers.mlp_norm.scale != params.layers.mlp_norm.scale).all()
    assert rounded.layers.query.base.dtype == jnp.bfloat16


def test_long_texts_are_scored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: all at once. A large vocabulary would fill the memory."""
    model, params = built()
    tokens = jnp.array([TOKENS, TOKENS[::-1], TOKENS[3:] + TOKENS[:3]])
    scored = jnp.ones(tokens.shape, bool)
    whole = jax.jit(score.make_score(model))(params, tokens, scored)
    monkeypatch.setattr(score, "MOST_LOGITS", 2 * VOCAB * len(TOKENS))
    np.testing.assert_allclose(jax.jit(score.make_score(model))(params, tokens, scored), whole, rtol=1e-6)
    text = str(jax.make_jaxpr(score.make_score(model))(params, tokens, scored))
    assert f"f32[3,{len(TOKENS)},{VOCAB}]" not in text


def test_a_program_is_as_large_for_many_layers_as_for_few() -> None:
    """A population that writes, and its update: what XLA compiles holds one layer."""

    def operations(n_layers: int) -> int:
        model, params = built(n_layers=n_layers)
        noise = noise_of(model)

        def write(params: Any, tokens: Array, key: Array) -> Array:
            member = Member(model, params)
            return member.generate(member.read(tokens), 3, key)

        def step(params: Any, seeds: Array, tokens: Array) -> Any:
            written = map_members(write, noise, jax.ShapeDtypeStruct((3,), jnp.int32), batch_axis=None)
            shaped = esjax.shape(written(params, seeds, tokens).sum(axis=-1).astype(jnp.float32), sigma=noise.sigma)
            return esjax.estimate(noise)(params, seeds, shaped)

        text = jax.jit(step).lower(params, pair_seeds(0, 0, 4), jnp.array(TOKENS[1:4])).as_text()
        return len(text.splitlines())

    assert operations(9) == operations(2)


def test_each_layer_of_a_run_has_noise_of_its_own() -> None:
    config = Config(model=CONFIG, es=EsConfig(space="low_rank", exchange="losses"))
    model, params = built()
    estimator = make_estimator(config, model, params, model.units(params), None)
    assert isinstance(estimator, LossEstimator)
    planned = {leaf.path: leaf for leaf in estimator.noise.lay_out(params)._leaves}
    assert planned["layers/gate"].factors == ((2, 24, 1), (2, 1, 10))
    assert planned["layers/mlp_norm/scale"].factors == ()
    assert planned["embedding"].factors == ((VOCAB, 1), (1, 24))


def test_it_keeps_the_interface_of_models() -> None:
    model = build_model(CONFIG, VOCAB)
    assert check_model("llama", model, VOCAB) is model
    assert model.initial_state(model.init(jax.random.key(0))).position == 1
    assert TOKENS[0] == STOP


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 20}, "hidden_size / n_heads must be an even number, got 20 / 6"),
        ({"hidden_size": 18}, "even number, got 18 / 6"),
        ({"n_kv_heads": 4}, "n_kv_heads must divide n_heads, got 4 for 6"),
        ({"context": 0}, "context must be above 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(EsjaxError, match=message):
        replace(CONFIG, **wrong)


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_run_of_subwords_trains_it_and_keeps_its_tokenizer(tied: bool, tmp_path: Path) -> None:
    """Reference: what the run itself writes and scores, after its folder is read again."""
    pytest.importorskip("tokenizers")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(40)))
    data = DataConfig(text=str(text), vocabulary="bpe:270", window=4, held_out=0.2)
    config = Config(model=replace(CONFIG, tied=tied), steps=2, data=data, es=EsConfig(population_size=8))
    run = esjax.train(config, tmp_path / "run", tell=lambda line: None)
    first = jax.tree.map(np.asarray, run.params)
    infos = list(run)
    assert "tokens of " in run.summary()
    assert infos[-1].held_out is not None
    moved = jax.tree.map(lambda one, two: bool((one != two).any()), first, run.params)
    assert all(jax.tree.leaves(moved)), "a leaf was not trained"
    loaded = esjax.load(tmp_path / "run")
    assert loaded.vocabulary == run.corpus.vocabulary
    assert loaded.generate("the ", seed=1, max_tokens=8) == run.generate("the ", seed=1, max_tokens=8)
    evaluation = loaded.evaluate()
    assert evaluation.bits_per_byte == pytest.approx(evaluation.nats_per_token * run.corpus.bits_of_a_nat)


@pytest.mark.parametrize("count", [0, 1, 5, 11])
def test_a_prompt_is_read_at_once_or_token_by_token(count: int) -> None:
    model, params = built()
    prompt = jnp.array(TOKENS[1:])
    at_once, one_by_one = Member(model, params), Member(model._replace(read=None), params)
    states = [member.read(prompt, count=jnp.int32(count)) for member in (at_once, one_by_one)]
    for token in [4, 2, 1, 5]:  # what follows the first `count` tokens of the prompt must leave no trace
        one, two = (model.predict(params, state) for state in states)
        np.testing.assert_allclose(one, two, atol=2e-5)
        states = [model.consume(params, state, jnp.int32(token)) for state in states]
    assert states[0].position == states[1].position == 1 + count + 4


def test_with_smaller_caches_it_writes_the_same() -> None:
    model, params = built()
    assert model.shortened is not None
    small = model.shortened(10)
    prompt = jnp.array(TOKENS[1:5])
    texts = [Member(each, params).generate(Member(each, params).read(prompt), 5) for each in (model, small)]
    assert texts[0].tolist() == texts[1].tolist()
    assert [each.initial_state(params).keys.shape[1] for each in (model, small)] == [CONFIG.context, 10]
    assert model.shortened(1000).context == CONFIG.context
