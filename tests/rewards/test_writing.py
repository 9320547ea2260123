"""What a population writes: the same as one member after another writes, token by token, with weights added up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jaxtyping import Array
from small import MODELS, VOCAB, dense_member, noise_of, params_of, seeds_of

from esjax import core
from esjax.core.population import map_members
from esjax.core.seeds import loss_key
from esjax.data.tokens import STOP, UNK
from esjax.models import Model
from esjax.models.member import Member, sequence_keys
from esjax.models.model import Params
from esjax.rewards.writing import Prompted, make_write, shape_of

PAIRS, LENGTH = 6, 7
PROMPTS = Prompted(
    jnp.asarray(np.random.default_rng(0).integers(2, VOCAB, (PAIRS, 2, 5)), jnp.int32),
    jnp.asarray([[0, 5], [1, 3], [5, 5], [2, 0], [4, 1], [3, 2]], jnp.int32),
    jnp.zeros((PAIRS, 2), jnp.int32),
)
STOPS = (4,)


def written(model: Model, temperature: float, devices: int | None = None, chunk_pairs: int = 64) -> np.ndarray:
    mesh = None if devices is None else mesh_of(devices)
    write = make_write(model, LENGTH, temperature, STOPS)
    shape = shape_of(2, LENGTH)
    run = map_members(write, noise_of(model, sigma=0.3), shape, mesh=mesh, chunk_pairs=chunk_pairs)
    return np.asarray(jax.jit(run)(params_of(model), seeds_of(PAIRS), PROMPTS))


def one_writes(model: Model, params: Params, prompt: list[int], key: Array, temperature: float) -> list[int]:
    """Read a prompt and write after it, in a Python loop."""
    state = model.initial_state(params)
    for token in prompt:
        state = model.consume(params, state, jnp.int32(token))
    found: list[int] = []
    for position in range(LENGTH):
        logits = np.array(model.predict(params, state))
        if temperature:
            noise = jax.random.gumbel(jax.random.fold_in(key, position), logits.shape, jnp.float32, "low")
            logits = logits / temperature + np.asarray(noise)
        logits[UNK] = -np.inf
        token = int(logits.argmax())
        if token in (*STOPS, STOP):
            break
        found.append(token)
        state = model.consume(params, state, jnp.int32(token))
    return found + [STOP] * (LENGTH - len(found))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("name", MODELS)
def test_members_write_what_a_loop_over_added_up_members_writes(name: str, temperature: float) -> None:
    model = MODELS[name]
    noise, params, seeds = noise_of(model, sigma=0.3), params_of(model), seeds_of(PAIRS)
    tokens = written(model, temperature)
    for pair in range(PAIRS):
        keys = sequence_keys(loss_key(seeds[pair]), 2)
        for side, sign in enumerate([1.0, -1.0]):
            member = dense_member(noise, params, seeds[pair], sign)
            for row in range(2):
                prompt = PROMPTS.tokens[pair, row, : PROMPTS.lengths[pair, row]].tolist()
                assert tokens[pair, side, row].tolist() == one_writes(model, member, prompt, keys[row], temperature)
    assert len({tuple(row) for row in tokens.reshape(-1, LENGTH).tolist()}) > 3  # they do not all write the same


@pytest.mark.parametrize("name", MODELS)
def test_chunks_and_devices_do_not_change_what_is_written(name: str) -> None:
    tokens = written(MODELS[name], 1.0)
    for devices, chunk_pairs in ((1, 4), (2, 2)):
        np.testing.assert_array_equal(written(MODELS[name], 1.0, devices, chunk_pairs), tokens)


@pytest.mark.parametrize("name", MODELS)
def test_writing_adds_no_matrix_up(name: str) -> None:
    model = MODELS[name]
    write = make_write(model, LENGTH, 1.0, STOPS)

    def loss(params: Params, prompts: Prompted, key: Array) -> Array:
        return jnp.sum(write(params, prompts, key)).astype(jnp.float32)

    example = jax.tree.map(lambda leaf: leaf[0], PROMPTS)
    assert core.explain(loss, noise_of(model), params_of(model), example) == []


def test_results_may_be_any_pytree() -> None:
    """Reference: each member's weights, by `dense_member`."""
    model = MODELS["gru"]
    noise, params, seeds = noise_of(model), params_of(model), seeds_of(3)

    def start(params: Params, example: Array, key: Array) -> dict[str, Array]:
        return {"start": params.start * example, "again": params.start}

    like = jax.ShapeDtypeStruct((4,), jnp.float32)
    run = map_members(start, noise, {"start": like, "again": like}, chunk_pairs=2)
    found = run(params, seeds, jnp.arange(3.0))
    assert found["start"].shape == (3, 2, 4)
    for pair in range(3):
        for side, sign in enumerate([1.0, -1.0]):
            value = dense_member(noise, params, seeds[pair], sign).start
            np.testing.assert_allclose(found["again"][pair, side], value, rtol=1e-6)
            np.testing.assert_allclose(found["start"][pair, side], value * pair, rtol=1e-6)


def test_a_member_reads_the_first_tokens_alone() -> None:
    member = Member(MODELS["gru"], params_of(MODELS["gru"]))
    tokens = jnp.asarray([2, 3, 4, 5], jnp.int32)
    for count in range(5):
        np.testing.assert_allclose(member.read(tokens, count=jnp.int32(count)), member.read(tokens[:count]), rtol=1e-6)
