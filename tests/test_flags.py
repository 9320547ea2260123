"""Flags of JAX that a process sets change no number of a run or of the core; and devices, which are set once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import esjax
from esjax import flags
from esjax.config.models import GruConfig
from esjax.config.settings import Config, DataConfig, EsConfig
from esjax.core.seeds import key_of
from esjax.core.signs import draw
from esjax.errors import EsjaxError
from esjax.hosts.known_answers import known_answers
from esjax.models.member import Member
from esjax.runs.checkpoint import digest

PARAMS = {
    "embedding": np.linspace(-1, 1, 15).reshape(5, 3),
    "layers": np.linspace(-1, 1, 18).reshape(2, 3, 3),
    "out": {"kernel": np.linspace(-0.5, 0.5, 15).reshape(3, 5), "bias": np.zeros(5)},
}


@contextmanager
def changed(**values: Any) -> Iterator[None]:
    """Set flags in this thread."""
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


DRAWS: dict[str, Any] = {"enable_x64": True, "threefry_partitionable": False, "default_prng_impl": "rbg"}


def loss(params: Any, tokens: Array) -> Array:
    """Score tokens with a small network: look-ups, a scan over layers, products."""
    state = params["embedding"][tokens]
    state = jax.lax.scan(lambda state, layer: (jnp.tanh(state @ layer), None), state, params["layers"])[0]
    logits = state @ params["out"]["kernel"] + params["out"]["bias"][None]
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 1])


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_core_has_the_same_numbers_under_other_flags(gaussian: bool) -> None:
    """Reference: the same calls under JAX's defaults, bit for bit; types follow those of the parameters."""
    noise = esjax.low_rank(0.1, gaussian=gaussian, split=not gaussian, stacked=lambda path, leaf: path == "layers")
    tokens = np.array([[0, 4, 1], [2, 2, 3]], np.int32)

    def compute(kind: Any) -> Any:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), PARAMS)
        found = jax.jit(esjax.value_and_grad(loss, noise, 4, chunk_pairs=2))(params, jax.random.key(3), tokens)
        return found, esjax.pair_seeds(5, 2, 4)

    expected = compute(np.float32)
    with changed(**DRAWS):
        found = compute(np.float32)
        (value, gradient), _ = compute(np.float64)
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (one.dtype, np.asarray(one).tobytes()) == (two.dtype, np.asarray(two).tobytes())
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float64)}


def test_normal_noise_is_what_jax_draws_by_default() -> None:
    """Reference: `jax.random.normal` and `jax.random.key` under the defaults."""
    key = jax.random.key(2**32 - 1, impl="threefry2x32")
    expected = np.asarray(jax.random.normal(key, (7,), jnp.float32))
    with changed(**DRAWS):
        np.testing.assert_array_equal(jax.random.key_data(key_of(2**32 - 1)), jax.random.key_data(key))
        drawn = jax.jit(draw, static_argnums=(0, 2))("gaussian", jax.random.key_data(key), 7)
    np.testing.assert_array_equal(drawn, expected)


def void_now_and_then(member: Member, tokens: Array, key: Array) -> Array:
    """Lose a third of the members, and hold numbers of 64 bits where they are allowed."""
    table = jnp.zeros(1) + np.zeros(1, np.float64)
    value = member.cross_entropy(tokens, 1) + table.sum().astype(jnp.float32)
    return jnp.where(jax.random.uniform(key) < 0.3, jnp.nan, value)


def test_a_run_is_the_same_under_other_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a run under JAX's defaults: first weights, windows, losses, void pairs, updates and texts."""
    monkeypatch.setattr(flags, "DEFAULTS", {**flags.DEFAULTS, "numpy_dtype_promotion": "standard"})
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"the cat sat on the mat {n} times" for n in range(60)))
    config = Config(
        steps=2,
        data=DataConfig(text=str(text), held_out=0.2, window=6),
        es=EsConfig(population_size=16),
        model=GruConfig(hidden_size=4, head_size=4),
    )

    def compute(name: str) -> tuple[list[str], str]:
        lines: list[str] = []
        run = esjax.train(config, tmp_path / name, loss=void_now_and_then, tell=lines.append)
        infos = [(info.loss, info.void_pairs, info.update_norm) for info in run]
        assert sum(void for _, void, _ in infos) > 0
        loaded = esjax.load(tmp_path / name)
        written = loaded.generate("the ", max_tokens=12, count=2, seed=1)
        return lines, repr((infos, digest(run._replica.state), written))

    with jax.numpy_dtype_promotion("standard"):
        lines, expected = compute("plain")
    with changed(**DRAWS, numpy_dtype_promotion="strict", debug_nans=True, debug_infs=True, disable_jit=True):
        more, found = compute("flags")
        assert jnp.zeros(1).dtype == np.float64  # the process keeps its own
    assert found == expected
    assert more[0] == (
        "this process sets jax_enable_x64, jax_threefry_partitionable, jax_default_prng_impl, jax_disable_jit, "
        "jax_debug_nans, jax_debug_infs, jax_numpy_dtype_promotion; runs ignore that and use JAX's defaults"
    )
    assert more[1:] == lines


def test_known_answers_cover_every_draw_and_are_the_same_under_other_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the answers under JAX's defaults. Where a run's flags are not pinned, what depends on them differs."""
    expected = known_answers()
    assert set(expected) == {"rademacher", "gaussian", "windows", "parameters", "sampling"}
    assert len(set(expected.values())) == 5
    with changed(**DRAWS):
        assert known_answers() == expected
        assert flags.names_of_changed() == "jax_enable_x64, jax_threefry_partitionable, jax_default_prng_impl"
    monkeypatch.setattr(flags, "DEFAULTS", {})
    with changed(**DRAWS):
        differ = {name for name, answer in known_answers().items() if answer != expected[name]}
    assert differ == {"parameters", "sampling"}  # noise and windows are pinned where they are drawn


def test_a_guard_against_transfers_is_lifted_for_the_time_of_a_call() -> None:
    with changed(transfer_guard="disallow"):
        with flags.default_flags():
            assert jax.jit(jnp.sin)(np.zeros(1, np.float32)) == 0
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.jit(jnp.cos)(np.zeros(1, np.float32))


def test_devices_are_prepared_before_jax_is_used_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here JAX has been used, with four devices; to ask for as many once more is no mistake."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    assert jax.device_count() == 4
    monkeypatch.setattr("esjax.devices.mesh.available_cores", lambda: [0, 1, 2, 3])
    esjax.prepare_devices()
    monkeypatch.setattr("esjax.devices.mesh.available_cores", lambda: [0, 1, 2])
    with pytest.raises(EsjaxError, match=r"call prepare_devices\(\) before anything else uses JAX"):
        esjax.prepare_devices()
