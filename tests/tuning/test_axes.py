"""Grids of settings: what they hold, and one clear line for what they cannot."""

from typing import Any

import pytest

from esjax.config.models import GruConfig, RnnConfig
from esjax.config.settings import Config, EsConfig, replace
from esjax.errors import EsjaxError
from esjax.tuning.axes import make_grid, parse_axes

BASE = Config(seed=7, model=GruConfig(head_size=9))


def grid(*words: str) -> dict[str, Config]:
    return {trial.name: trial.config for trial in make_grid(BASE, parse_axes(words))}


def test_a_grid_holds_every_combination_and_leaves_other_settings_alone() -> None:
    found = grid("es.sigma=0.05,1e-3", "steps=3,None")
    expected = {
        f"es.sigma={sigma},steps={steps}": replace(BASE, steps=steps, es=EsConfig(sigma=sigma))
        for sigma in (0.05, 0.001)
        for steps in (3, None)
    }
    assert found == expected
    assert list(found) == list(expected)  # the last axis varies fastest


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("es.population-size=8", 8),
        ("es.time_per_step=2", 2.0),
        ("es.sigma=.5", 0.5),
        ("es.time_per_step=None", None),
        ("ledger=true", True),
        ("es.space=full", "full"),
        ("data.text=1e3", "1e3"),
    ],
)
def test_a_value_has_the_type_of_its_setting(words: str, value: Any) -> None:
    (trial,) = make_grid(BASE, parse_axes([words]))
    (found,) = trial.values.values()
    assert found == value
    assert type(found) is type(value)


def test_values_may_be_given_as_they_are() -> None:
    assert make_grid(BASE, {"es.sigma": [0.05], "seed": [1, 2]}) == make_grid(
        BASE, parse_axes(["es.sigma=0.05", "seed=1,2"])
    )


def test_models_are_an_axis_and_one_that_is_chosen_already_keeps_its_settings() -> None:
    models = [config.model for config in grid("model=rnn,gru", "model.hidden_size=8,16").values()]
    assert models == [
        RnnConfig(hidden_size=8),
        RnnConfig(hidden_size=16),
        GruConfig(hidden_size=8, head_size=9),
        GruConfig(hidden_size=16, head_size=9),
    ]


def test_values_that_only_go_together_are_checked_together() -> None:
    """48 members are no multiple of 32 copies, and 96 are."""
    discount = ("es.credit=discount",)
    assert len(grid("es.population_size=48", "es.space=full,low_rank", *discount)) == 2
    assert len(grid("es.population_size=96", "es.space=full,activation", *discount)) == 2
    with pytest.raises(EsjaxError, match=r"es\.space=activation.*: es\.population_size must be a multiple"):
        grid("es.population_size=48", "es.space=full,activation", *discount)


def test_names_can_be_names_of_folders() -> None:
    assert list(grid("data.text=my texts/*.txt,b")) == ["data.text=my_texts_.txt", "data.text=b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no axis"),
        (["es.sigma"], "'es.sigma' is no axis"),
        (["es.sigma="], "is no axis"),
        (["es.sigma=1,,2"], "is no axis"),
        (["=1"], "is no axis"),
        (["es.sigma=1", "es.sigma=2"], "es.sigma is an axis twice"),
        (["es.sigma=0.1,0.10"], "two runs would be called es.sigma=0.1"),
        (["data.text=a/b,a b"], "two runs would be called data.text=a_b"),
        (["es.sgma=1"], "did you mean es.sigma?"),
        (["sigma=1"], "did you mean es.sigma?"),
        (["es=1"], "es is a group of settings; name one of them"),
        (["qqq=1"], "esjax train --help lists them"),
        (["es.layer_sigma=1"], "es.layer_sigma holds several numbers and can be no axis"),
        (["es.sigma=x"], "es.sigma=x: es.sigma must be a number or None, not 'x'"),
        (["es.sigma=0.1,-1"], "es.sigma=-1: es.sigma must be above 0"),
        (["seed=1.5"], "seed=1.5: seed must be a whole number, not '1.5'"),
        (["es.space=ful"], "es.space=ful: es.space must be full or low_rank or activation, not 'ful'"),
        (["seed=None"], "seed=None: seed must be a whole number, not None"),
        (["model=gpt"], "there is no model 'gpt'; there are rnn, gru"),
        (["model=gru,rnn", "model.head_size=8"], "model.head_size is a setting of the model gru; choose that"),
        (["model.n_heads=1,2"], "model.n_heads is a setting of the model transformer; choose that model, or leave"),
        (["windw=8"], "did you mean data.window?"),
        (["data.text=" + "x" * 250], "longer than 200"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        grid(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[], "full", ()])
def test_an_axis_needs_a_list(values: Any) -> None:
    with pytest.raises(EsjaxError, match="needs a list of values"):
        make_grid(BASE, {"es.space": values})
