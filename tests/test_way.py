"""What settings ask for, and what is refused."""

from typing import Any

import jax
import pytest

from esjax.config import Config, EsConfig
from esjax.errors import EsjaxError
from esjax.evaluate import cross_entropy
from esjax.models import Model, gru
from esjax.sums import TAIL
from esjax.way import make_way

MODEL = gru(7, 4, 6)
SIZE = sum(leaf.size for leaf in jax.tree.leaves(MODEL.init(jax.random.key(0))))


def numbers(model: Model = MODEL, **es: Any) -> int:
    return make_way(Config(es=EsConfig(**es)), model, model.init(jax.random.key(0)), None).numbers


def test_losses_are_exchanged_but_where_sums_are_smaller() -> None:
    assert numbers(population_size=2 * SIZE) == 0
    assert numbers(population_size=2 * SIZE + 2) == SIZE + TAIL
    assert numbers(population_size=2 * SIZE + 2, exchange="losses") == 0
    assert numbers(population_size=64, exchange="sums") == SIZE + TAIL
    assert numbers(space="activation", population_size=64) == SIZE + TAIL


@pytest.mark.parametrize("es", [{"noise": "gaussian"}, {"shaping": "raw"}, {"time_per_step": 1.0}])
def test_auto_leaves_alone_what_sums_cannot_do(es: dict[str, Any]) -> None:
    assert numbers(population_size=2 * SIZE + 2, **es) == 0


@pytest.mark.parametrize(
    ("es", "message"),
    [
        ({"space": "activation", "noise": "gaussian"}, "rademacher"),
        ({"space": "activation", "exchange": "losses"}, "set exchange to sums or auto"),
        ({"space": "activation", "population_size": 24}, "multiple of copies = 32"),
        ({"exchange": "sums", "shaping": "raw"}, "zscore or sign"),
        ({"exchange": "sums", "noise": "gaussian"}, "rademacher"),
        ({"exchange": "sums", "population_size": 2**20}, "at most 131072 pairs"),
        ({"discount": 1.5}, "from 0 to 1"),
        ({"layer_discount": {"new": -1.0}}, "for new"),
        ({"layer_sigma": {"new": 0.0}}, "for new"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(es: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EsConfig(**es)


def test_layers_that_the_model_does_not_have_are_named() -> None:
    with pytest.raises(EsjaxError, match="layer_sigma names 'nwe'; the model has reset, update, new, hidden, logits"):
        numbers(space="activation", layer_sigma={"nwe": 0.1})
    with pytest.raises(EsjaxError, match="layer_discount names 'hidden'; the model has reset, update, new"):
        numbers(space="activation", layer_discount={"hidden": 0.1})


def test_a_model_without_taps_and_a_loss_of_ones_own_are_refused() -> None:
    with pytest.raises(EsjaxError, match="no taps"):
        numbers(MODEL._replace(tapped=False), space="activation")
    with pytest.raises(EsjaxError, match="a loss of one's own"):
        make_way(Config(es=EsConfig(space="activation")), MODEL, MODEL.init(jax.random.key(0)), cross_entropy(1))
