"""What settings ask for, and what is refused."""

from typing import Any

import jax
import pytest
from conftest import mesh_of

from esjax.config.settings import Config, EsConfig
from esjax.core.shaping import LIMIT
from esjax.errors import EsjaxError
from esjax.exchange.gradient_sums import LARGEST, TAIL
from esjax.models import Model, gru, rnn
from esjax.models.member import Loss, cross_entropy
from esjax.models.mingru import mingru
from esjax.replica.estimators.estimator import make_estimator
from esjax.replica.replica import Replica

MODEL = gru(7, 4, 6)
SIZE = sum(leaf.size for leaf in jax.tree.leaves(MODEL.init(jax.random.key(0))))


def vector_length(model: Model = MODEL, loss: Loss | None = None, **es: Any) -> int:
    params = model.init(jax.random.key(0))
    return make_estimator(Config(es=EsConfig(**es)), model, params, model.units(params), loss).vector_length


def test_losses_are_exchanged_but_where_sums_are_smaller() -> None:
    assert vector_length(population_size=2 * SIZE) == 0
    assert vector_length(population_size=2 * SIZE + 2) == SIZE + TAIL
    assert vector_length(population_size=2 * SIZE + 2, exchange="losses") == 0
    assert vector_length(population_size=64, exchange="sums") == SIZE + TAIL
    # With credit by gates, feedback of the state (4) and the head (6) from what comes next.
    assert vector_length(space="activation") == SIZE + 6 * 4 + 7 * 6 + TAIL
    assert vector_length(space="activation", feedback="none") == SIZE + TAIL
    assert vector_length(space="activation", credit="discount") == SIZE + TAIL


@pytest.mark.parametrize("es", [{"noise": "gaussian"}, {"shaping": "raw"}, {"time_per_step": 1.0}])
def test_auto_leaves_alone_what_sums_cannot_do(es: dict[str, Any]) -> None:
    assert vector_length(population_size=2 * SIZE + 2, **es) == 0


@pytest.mark.parametrize(
    ("es", "message"),
    [
        ({"space": "activation", "noise": "gaussian"}, "rademacher"),
        ({"space": "activation", "exchange": "losses"}, "set exchange to sums or auto"),
        ({"space": "activation", "credit": "discount", "population_size": 24}, "multiple of copies = 32"),
        ({"space": "activation", "population_size": 25}, "multiple of copies = 2"),
        ({"exchange": "sums", "shaping": "raw"}, "zscore or sign"),
        ({"exchange": "sums", "noise": "gaussian"}, "rademacher"),
        ({"exchange": "sums", "population_size": 2**20}, "at most 131072 pairs"),
        ({"exchange": "sums", "rank": 129, "population_size": 2**18}, "lower rank or population_size"),
        ({"exchange": "sums", "rank": 129, "time_per_step": 1.0}, r"got 129 \* 131072; lower rank"),
        ({"rank": 2, "population_size": 2**25}, "at most 16777216"),
        ({"discount": 1.5}, "from 0 to 1"),
        ({"layer_discount": {"new": -1.0}}, "for new"),
        ({"layer_sigma": {"new": 0.0}}, "for new"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(es: dict[str, Any], message: str) -> None:
    with pytest.raises(EsjaxError, match=message):
        EsConfig(**es)


def test_the_largest_rank_leaves_room_for_every_sum() -> None:
    """Reference: integers; every pair has the largest weight, and its noise all the same signs."""
    for es in (EsConfig(rank=128, population_size=2**18, exchange="sums"), EsConfig(rank=2, population_size=2**24)):
        assert LARGEST / 2 < LIMIT * es.rank * es.pairs <= LARGEST
    EsConfig(rank=129, population_size=2**18, space="full")
    EsConfig(rank=129, population_size=2**18, noise="gaussian")


def test_no_more_pairs_at_a_time_than_sums_are_exact_for() -> None:
    """Reference: 127 * 128 * 1032 is below 2^24, and 127 * 128 * 1033 above."""
    assert vector_length(exchange="sums", rank=128, chunk_pairs=1032) == SIZE + TAIL
    with pytest.raises(EsjaxError, match="chunk_pairs must be at most 1032, so that sums are exact, got 1033"):
        vector_length(exchange="sums", rank=128, chunk_pairs=1033)
    assert vector_length(exchange="losses", rank=128, chunk_pairs=1033) == 0
    with pytest.raises(EsjaxError, match="chunk_pairs must be at most 131072"):
        vector_length(space="activation", population_size=64, chunk_pairs=2**17 + 1)
    config = Config(es=EsConfig(exchange="sums", rank=8192, population_size=2**12))
    assert Replica(config, gru(7, 1, 1), None, mesh_of(1)).chunk_pairs == 2**24 // (127 * 8192)


def test_layers_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(EsjaxError, match=r"es\.layer_sigma names 'nwe'; the model has state, hidden, logits$"):
        vector_length(space="activation", layer_sigma={"nwe": 0.1})
    with pytest.raises(EsjaxError, match="layer_sigma names 'nwe'; the model has reset, update, new, hidden, logits"):
        vector_length(space="activation", credit="discount", layer_sigma={"nwe": 0.1})
    with pytest.raises(EsjaxError, match="layer_discount names 'hidden'; the model has reset, update, new"):
        vector_length(space="activation", credit="discount", layer_discount={"hidden": 0.1})


def test_a_model_that_does_not_say_that_its_recurrence_is_elementwise_needs_a_discount() -> None:
    silent = MODEL._replace(state_taps=())
    with pytest.raises(EsjaxError, match=r"Model\.state_taps\); set es\.credit to discount$"):
        vector_length(silent, space="activation")
    assert vector_length(silent, space="activation", credit="discount") == SIZE + TAIL
    assert vector_length(rnn(7, 4, 2), space="activation", credit="discount") > TAIL


@pytest.mark.parametrize(
    "names", [("sate",), ("new",), ("state", "state"), ("update", "state"), ("state_1",), ("state_2", "state_1")]
)
def test_state_taps_that_are_not_those_of_the_state_are_refused(names: tuple[str, ...]) -> None:
    """In another order, or fewer than the layers, errors would reach the wrong layer."""
    model = mingru(7, 4, 6, 2, 1) if names[0].startswith("state_") else MODEL
    with pytest.raises(EsjaxError, match=r"^es\.space activation: the model names .* in state_taps; "):
        vector_length(model._replace(state_taps=names), space="activation")


def test_a_model_without_taps_and_a_loss_of_ones_own_are_refused() -> None:
    with pytest.raises(EsjaxError, match="no taps"):
        vector_length(MODEL._replace(tapped=False), space="activation")
    with pytest.raises(EsjaxError, match="works with cross entropy alone"):
        vector_length(loss=cross_entropy(1), space="activation")
