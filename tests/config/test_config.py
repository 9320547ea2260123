"""Settings check themselves, and YAML carries them there and back."""

import ast
import copy
import inspect
import itertools
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest

from esjax.config import models as models_module
from esjax.config import reward as reward_module
from esjax.config import settings as config_module
from esjax.config.models import MODELS, GruConfig, RnnConfig
from esjax.config.reward import RewardConfig
from esjax.config.section import Section
from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig, OptimConfig, from_yaml, replace, to_yaml
from esjax.errors import EsjaxError

SECTIONS: list[type[Section]] = [
    Config,
    DataConfig,
    EsConfig,
    HostsConfig,
    OptimConfig,
    RewardConfig,
    *MODELS.values(),
]
NAMES = "rnn or gru or lstm or mingru or lru or transformer or llama or rwkv7"

UNUSUAL = Config(
    seed=2**32 - 1,
    steps=7,
    seconds=1.5,
    ledger=True,
    data=DataConfig(text="ä: #ö 'ü'", documents="line", vocabulary="char", vocab_size=3, held_out=0.0, block_tokens=33),
    es=EsConfig(space="full", noise="gaussian", sigma=1e-30, time_per_step=0.1, chunk_pairs=2),
    optim=OptimConfig(optimizer="sgd", schedule="cosine", learning_rate=1 / 3, decay_steps=9, average=1.0),
    model=GruConfig(hidden_size=1),
)


@pytest.mark.parametrize("config", [Config(), UNUSUAL])
def test_yaml_carries_every_setting_there_and_back(config: Config) -> None:
    text = to_yaml(config)
    assert from_yaml(text, "file") == config
    for section in (config, config.data, config.es, config.optim, config.model):
        for field in msgspec.structs.fields(section):
            assert f"{field.name}:" in text  # defaults too


def test_yaml_that_names_a_few_settings_keeps_the_rest() -> None:
    assert from_yaml("es: {sigma: 0.5}", "file") == Config(es=EsConfig(sigma=0.5))


def test_a_float_without_a_point_is_read_as_a_float() -> None:
    config = from_yaml("optim: {learning_rate: 1e-3}\nes: {sigma: 2e+1}\nseconds: 60", "file")
    assert (config.optim.learning_rate, config.es.sigma, config.seconds) == (0.001, 20.0, 60.0)
    assert all(type(value) is float for value in (config.optim.learning_rate, config.es.sigma, config.seconds))


@pytest.mark.parametrize(("name", "model"), [("rnn", RnnConfig), ("gru", GruConfig)])
def test_yaml_names_the_model(name: str, model: type[Section]) -> None:
    assert from_yaml(f"model: {{name: {name}, hidden_size: 5}}", "file").model == model(hidden_size=5)


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("stepz: 3", "stepz"),
        ("es: {sigmoid: 1}", "sigmoid"),
        ("es: {sigma: loud}", "sigma"),
        ("es: {sigma: [1]}", "sigma"),
        ("es: {noise: pink}", "noise"),
        ("steps: 1.5", "steps"),
        ("data: 7", "data"),
        ("model: {name: mamba}", "model"),
        ("model: {name: rnn, head_size: 3}", "head_size"),
        ("seed: -1", "seed"),
        ("seed: 4294967296", "seed"),
        ("steps: 0", "steps"),
        ("seconds: 0", "seconds"),
        ("seconds: .nan", "seconds"),
        ("checkpoint_time: 0", "checkpoint_time"),
        ("evaluate_time: -1", "evaluate_time"),
        ("keep_checkpoints: 0", "keep_checkpoints"),
        ("es: {sigma: 0}", "sigma"),
        ("es: {sigma: .inf}", "sigma"),
        ("es: {rank: 0}", "rank"),
        ("es: {population_size: 0}", "population_size"),
        ("es: {population_size: 3}", "population_size"),
        ("es: {time_per_step: 0}", "time_per_step"),
        ("es: {chunk_pairs: 0}", "chunk_pairs"),
        ("data: {window: 0}", "window"),
        ("data: {burn_in: -1}", "burn_in"),
        ("data: {batch_size: 0}", "batch_size"),
        ("data: {new_tokens_interval: 0}", "new_tokens_interval"),
        ("data: {block_tokens: 0}", "block_tokens"),
        ("data: {block_tokens: 40, window: 39, burn_in: 2}", "block_tokens"),
        ("data: {held_out: 1}", "held_out"),
        ("data: {held_out: -0.1}", "held_out"),
        ("data: {vocab_size: 2}", "vocab_size"),
        ("data: {text: ''}", "text"),
        ("model: {name: rnn, hidden_size: 0}", "hidden_size"),
        ("model: {name: rnn, n_layers: 0}", "n_layers"),
        ("model: {name: gru, head_size: -1}", "head_size"),
        ("optim: {learning_rate: 0}", "learning_rate"),
        ("optim: {warmup_steps: -1}", "warmup_steps"),
        ("optim: {decay_steps: 0}", "decay_steps"),
        ("optim: {beta1: 1}", "beta1"),
        ("optim: {beta2: 1}", "beta2"),
        ("optim: {momentum: 1}", "momentum"),
        ("optim: {eps: 0}", "eps"),
        ("optim: {weight_decay: -1}", "weight_decay"),
        ("optim: {weight_decay: .nan}", "weight_decay"),
        ("optim: {average: 1.1}", "average"),
        ("optim: {average: .nan}", "average"),
        ("hosts: {spot_check: 1.1}", "spot_check"),
        ("hosts: {spot_check: .nan}", "spot_check"),
        ("hosts: {digest_interval: 0}", "digest_interval"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting_and_the_file(text: str, setting: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        from_yaml(text, "my/config.yaml")
    message = str(caught.value)
    assert message.startswith("my/config.yaml: ")
    assert setting in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("es: {sigm: 1}", "there is no setting es.sigm; did you mean es.sigma?"),
        ("sigma: 1", "there is no setting sigma; did you mean es.sigma?"),
        ("model: {name: rnn, n_layer: 1}", "there is no setting model.n_layer; did you mean model.n_layers?"),
        (
            "model: {name: gru, gate_tokens: 1}",
            "model.gate_tokens is a setting of the model mingru; choose that model, or leave it out",
        ),
        ("model: {hidden_size: 4}", f"model needs a name: {NAMES}"),
        ("model: {name: [1]}", f"model.name must be {NAMES}, not a list"),
        ("es: {noise: 3}", "es.noise must be rademacher or gaussian, not a whole number"),
        ("es: {layer_sigma: {a: -1}}", "es.layer_sigma must be above 0 and finite, got -1.0 for a"),
        ("es: {layer_discount: {a: 2}}", "es.layer_discount must be from 0 to 1, got 2.0 for a"),
        ("es: {layer_sigma: {a: loud}}", "es.layer_sigma: a value must be a number, not a text"),
        ("es: {layer_sigma: {1: 2}}", "a name in es.layer_sigma must be a text"),
        ("1: 2", "a name in the whole must be a text"),
        ("es: {qqq: 1}", "there is no setting es.qqq; esjax train --help lists them"),
        ("qqqq: 1", "there is no setting qqqq; esjax train --help lists them"),
        ("es: {sigma: loud}", "es.sigma must be a number or None, not a text"),
        ("es: 3", "es must be a group of settings, not a whole number"),
        ("- 1", "the whole must be a group of settings, not a list"),
        ("steps: [1]", "steps must be a whole number or None, not a list"),
        ("es: {noise: pink}", "es.noise must be rademacher or gaussian, not 'pink'"),
        ("model: {name: gpt}", f"model.name must be {NAMES}, not 'gpt'"),
        ("es: {sigma: -1}", "es.sigma must be above 0 and finite, got -1.0"),
        ("es: {exchange: sums, noise: gaussian}", "es: exchange sums needs noise rademacher, whose sums are integers"),
        (
            "es: {pairing: split, exchange: sums}",
            "es: pairing split needs the losses of all pairs; set exchange to losses or auto",
        ),
        (
            "es: {pairing: split, space: activation}",
            "es: pairing split is for noise on weights; set pairing to antithetic",
        ),
        (
            "es: {pairing: split, population_size: 2}",
            "es: pairing split compares pairs: population_size must be at least 4, got 2",
        ),
        ("es: {pairing: split, pairs_per_window: 1}", "es.pairs_per_window must be at least 2, got 1"),
        ("seed: -1", "seed must be at least 0 and below 2^32, got -1"),
        ("es.sigma: 1", "es.sigma is no name by itself; write sigma in the group es"),
    ],
)
def test_a_mistake_is_said_in_our_words(text: str, said: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        from_yaml(text, "file")
    assert str(caught.value) == f"file: {said}"


@pytest.mark.parametrize("text", ["es: [", "\t", "es: {sigma: 1", "- 1", "just words", "a: b: c", "\x00"])
def test_text_that_holds_no_settings_is_one_line(text: str) -> None:
    with pytest.raises(EsjaxError, match=r"^my/config.yaml: ") as caught:
        from_yaml(text, "my/config.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("es: {sigma: 1}\nseed: 1\nes: {sigma: 2}", "es is set twice, on lines 1 and 3; leave one of them out"),
        ("es:\n  sigma: 1\n  rank: 1\n  sigma: 1", "es.sigma is set twice, on lines 2 and 4; leave one of them out"),
        ("es: {sigma: 1, 'sigma': 2}", "es.sigma is set twice, on line 1; leave one of them out"),
        (
            '{"es": {"layer_sigma": {"a": 1, "a": 2}}}',
            "es.layer_sigma.a is set twice, on line 1; leave one of them out",
        ),
        (
            "data: &d {window: 8,\n  window: 9}\nes: *d",
            "data.window is set twice, on lines 1 and 2; leave one of them out",
        ),
        ("es:\n  <<: {rank: 2}\n  <<: {sigma: 1}", "es.<< is set twice, on lines 2 and 3; leave one of them out"),
    ],
)
def test_a_name_that_is_set_twice_is_named_with_both_lines(text: str, said: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        from_yaml(text, "file")
    assert str(caught.value) == f"file: {said}"


@pytest.mark.parametrize(
    "text",
    [
        "es:\n  <<: &base {sigma: 1, rank: 2}\n  sigma: 0.5",
        "es:\n  sigma: 0.5\n  <<: [{sigma: 1}, {sigma: 2, rank: 2}]",
        '{"es": {"sigma": 0.5,\n"rank": 2}}',
    ],
)
def test_what_a_merge_brings_along_may_be_set_anew(text: str) -> None:
    assert from_yaml(text, "file") == Config(es=EsConfig(sigma=0.5, rank=2))


@pytest.mark.parametrize("text", ["&a [*a]", "es: &a {layer_sigma: *a}", "es: &a [*a]"])
def test_yaml_that_holds_itself_is_no_settings(text: str) -> None:
    with pytest.raises(EsjaxError, match=r"^file: "):
        from_yaml(text, "file")


NINE = "x, x, x, x, x, x, x, x, x"

BOMB = f"a: &a [{NINE}]\n" + "".join(
    f"{now}: &{now} [{NINE.replace('x', f'*{before}')}]\n" for before, now in itertools.pairwise("abcdefghijkl")
)
"""Lists of lists of the same list: 9^12 values in a few lines."""

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{now}: &{now} {{<<: [{NINE.replace('x', f'*{before}')}]}}\n" for before, now in itertools.pairwise("abcdefghijkl")
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases repeat more than 10,000 values"),
        (MERGES, "aliases repeat more than 10,000 values"),
        (f"{BOMB}? *l\n: 1", "the group or list of line 12 is used as a name"),
        ("[" * 100_000, "maximum nesting depth|levels deep"),
        ("{a: " * 100_000, "nested more than 50 levels deep"),
        ("\n".join(f"{' ' * level}a:" for level in range(1000)), "nested more than 50 levels deep"),
        ("? " * 1000 + "a", "nested more than 50 levels deep"),
        ("es: &es {sigma: *es}", "line 1 holds an alias of itself"),
    ],
    ids=["lists", "merges", "name", "brackets", "groups", "indented", "names", "itself"],
)
def test_a_small_text_that_stands_for_a_giant_one_is_refused(text: str, reason: str) -> None:
    with pytest.raises(EsjaxError, match=f"^file: .*{reason}"):
        from_yaml(text, "file")


@pytest.mark.parametrize("text", ["", "# nothing set\n"])
def test_a_file_that_sets_nothing_gives_the_defaults(text: str) -> None:
    assert from_yaml(text, "file") == Config()


@pytest.mark.parametrize("section", SECTIONS)
def test_settings_are_frozen(section: type[Section]) -> None:
    settings = section()
    for field in msgspec.structs.fields(section):
        with pytest.raises(AttributeError):
            setattr(settings, field.name, getattr(settings, field.name))


def test_replace_changes_a_copy_and_checks_it() -> None:
    settings = EsConfig()
    assert replace(settings, sigma=0.5) == EsConfig(sigma=0.5)
    assert settings == EsConfig()
    with pytest.raises(EsjaxError, match="sigma must be above 0"):
        replace(settings, sigma=-0.5)
    with pytest.raises(EsjaxError, match="even"):
        replace(settings, population_size=7)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EsConfig(noise="pink"), "noise"),  # type: ignore[arg-type]
        (lambda: EsConfig(rank=1.5), "rank"),  # type: ignore[arg-type]
        (lambda: Config(steps="ten"), "steps"),  # type: ignore[arg-type]
        (lambda: EsConfig(sigma=float("inf")), "sigma"),
        (lambda: EsConfig(layer_sigma={"hidden": "x"}), "layer_sigma"),  # type: ignore[dict-item]
        (lambda: Config(es=DataConfig()), "es must be a group of settings, not DataConfig"),  # type: ignore[arg-type]
        (lambda: Config(model="gru"), "model must be a group of settings, not 'gru'"),  # type: ignore[arg-type]
        (lambda: Config(seconds=-1), "seconds must be above 0 and finite, got -1"),
    ],
)
def test_a_wrong_type_is_refused_in_python_too(make: Callable[[], object], named: str) -> None:
    with pytest.raises(EsjaxError, match=f"^{named}"):
        make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Config(es=3), "es must be a group of settings, not 3"),  # type: ignore[arg-type]
        (lambda: Config(es=None), "es must be a group of settings, not None"),  # type: ignore[arg-type]
        (lambda: Config(es=OptimConfig()), "es must be a group of settings, not OptimConfig"),  # type: ignore[arg-type]
        (lambda: Config(model="rnn"), "model must be a group of settings, not 'rnn'"),  # type: ignore[arg-type]
        (lambda: Config(model={"hidden_size": 3}), f"model needs a name: {NAMES}"),  # type: ignore[arg-type]
        (lambda: Config(es={"sigma": "0.1"}), "es.sigma must be a number or None, not a text"),  # type: ignore[arg-type]
        (lambda: Config(es={"sigma": -1}), "es.sigma must be above 0 and finite, got -1.0"),  # type: ignore[arg-type]
        (
            lambda: Config(es={"sigm": 1}),  # type: ignore[arg-type]
            "there is no setting es.sigm; did you mean es.sigma?",
        ),
        (
            lambda: Config(es={"layer_sigma": {1: 2.0}}),  # type: ignore[arg-type]
            "a name in es.layer_sigma must be a text",
        ),
        (lambda: EsConfig(sigma="0.1"), "sigma must be a number or None, not '0.1'"),  # type: ignore[arg-type]
        (lambda: EsConfig(sigma=np.ones(2)), "sigma must be a number or None, not numpy.ndarray"),  # type: ignore[arg-type]
        (lambda: EsConfig(rank=1.5), "rank must be a whole number, not 1.5"),  # type: ignore[arg-type]
        (lambda: DataConfig(carry="no"), "carry must be true or false, not 'no'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_type_is_named_where_it_is_given(make: Callable[[], object], said: str) -> None:
    with pytest.raises(EsjaxError, match=f"^{re.escape(said)}$"):
        make()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"es": {"sigma": 0.1}}, {"es": EsConfig(sigma=0.1)}),
        ({"es": MappingProxyType({"sigma": np.float32(0.25)})}, {"es": EsConfig(sigma=0.25)}),
        ({"es": {"layer_sigma": {"a": np.float32(0.25)}}}, {"es": EsConfig(layer_sigma={"a": 0.25})}),
        ({"data": {"window": 8}, "optim": {}}, {"data": DataConfig(window=8)}),
        ({"model": {"name": "rnn", "n_layers": 2}}, {"model": RnnConfig(n_layers=2)}),
        ({"hosts": {"digest_interval": 3}}, {"hosts": HostsConfig(digest_interval=3)}),
        ({"seconds": 60, "es": {"sigma": 1}}, {"seconds": 60.0, "es": EsConfig(sigma=1.0)}),
    ],
)
def test_a_mapping_stands_for_the_settings_that_it_names(given: Any, meant: Any) -> None:
    for config in (Config(**given), replace(Config(), **given)):
        assert config == Config(**meant)
        assert to_yaml(config) == to_yaml(Config(**meant))


def test_settings_do_not_change_with_the_mapping_that_they_were_made_of() -> None:
    layers = {"a": 0.5}
    config = EsConfig(layer_sigma=layers)
    layers["a"] = -1.0
    assert config.layer_sigma == {"a": 0.5}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EsConfig(sigm=1), "EsConfig: there is no setting sigm; did you mean sigma?"),  # type: ignore[call-arg]
        (lambda: Config(sigma=1), "Config: there is no setting sigma; did you mean es.sigma?"),  # type: ignore[call-arg]
        (lambda: replace(DataConfig(), windw=1), "DataConfig: there is no setting windw; did you mean window?"),
    ],
)
def test_a_wrong_name_is_refused_in_python_too(make: Callable[[], object], said: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        make()
    assert str(caught.value) == said


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_refuses_a_wrong_name_and_is_copied_and_sent(section: type[Section]) -> None:
    with pytest.raises(EsjaxError, match=f"^{section.__name__}: there is no setting qqqq; "):
        section(qqqq=1)
    assert pickle.loads(pickle.dumps(section())) == copy.deepcopy(section()) == section()
    assert [*inspect.signature(section).parameters] == [*section.__struct_fields__]


def sections_in_source() -> dict[str, ast.ClassDef]:
    bodies = [ast.parse(inspect.getsource(module)).body for module in (config_module, models_module, reward_module)]
    return {node.name: node for body in bodies for node in body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_help(section: type[Section]) -> None:
    body = sections_in_source()[section.__name__].body
    documented = set()
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            match after:
                case ast.Expr(ast.Constant(str(text))) if text.strip():
                    documented.add(field.target.id)
    groups = {"data", "es", "optim", "reward", "hosts", "model"} if section is Config else set()
    assert documented | groups == {field.name for field in msgspec.structs.fields(section)}


def test_every_section_is_tried_here() -> None:
    assert set(sections_in_source()) - {"_Architecture"} == {section.__name__ for section in SECTIONS}
    assert models_module.__all__ == sorted(kind.__name__ for kind in MODELS.values())


@pytest.mark.parametrize(
    ("original", "section"),
    [
        ("time_per_step", EsConfig),
        ("sigma", EsConfig),
        ("learning_rate", OptimConfig),
        ("optimizer", OptimConfig),
        ("beta1", OptimConfig),
        ("beta2", OptimConfig),
        ("hidden_size", RnnConfig),
        ("n_layers", RnnConfig),
        ("vocab_size", DataConfig),
        ("batch_size", DataConfig),
        ("new_tokens_interval", DataConfig),
        ("checkpoint_time", Config),
    ],
)
def test_the_original_programs_settings_have_their_place(original: str, section: type[Section]) -> None:
    holders: list[Any] = [s for s in SECTIONS if original in {f.name for f in msgspec.structs.fields(s)}]
    assert section in holders
    assert not set(holders) - {section, *MODELS.values()}  # in one place, beside the other models


def test_numbers_of_numpy_are_numbers() -> None:
    config = EsConfig(sigma=np.float64(0.25), rank=np.int64(2))  # type: ignore[arg-type]
    assert config == EsConfig(sigma=0.25, rank=2)
    assert type(config.sigma) is float


@pytest.mark.parametrize("vocabulary", ["byte", "bpe:512", "tokenizer:tokenizer.json"])
def test_a_vocabulary_of_bytes_or_subwords_has_no_size_to_set(vocabulary: str) -> None:
    with pytest.raises(EsjaxError, match="vocab_size is for characters; leave it out"):
        DataConfig(vocabulary=vocabulary, vocab_size=100)


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        ("bpe:257", "vocabulary must be bpe:258 or more, got bpe:257"),
        ("bpe:", "vocabulary must be char or byte or bpe:N or tokenizer:FILE, not 'bpe:'"),
        ("bpe:x", "vocabulary must be char or byte or bpe:N or tokenizer:FILE, not 'bpe:x'"),
        ("tokenizer:", "vocabulary must be char or byte or bpe:N or tokenizer:FILE, not 'tokenizer:'"),
        ("word", "vocabulary must be char or byte or bpe:N or tokenizer:FILE, not 'word'"),
    ],
)
def test_a_vocabulary_has_one_of_four_forms(vocabulary: str, said: str) -> None:
    with pytest.raises(EsjaxError) as caught:
        DataConfig(vocabulary=vocabulary)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("data", "es", "named"),
    [
        ({}, {}, "es.space activation"),
        ({}, {"space": "activation", "time_per_step": 1.0}, "fixed population"),
        ({"new_tokens_interval": 2}, {"space": "activation"}, "new_tokens_interval"),
        ({"block_tokens": 100}, {"space": "activation"}, "block_tokens"),
    ],
)
def test_states_are_carried_where_windows_follow_each_other(data: dict, es: dict, named: str) -> None:
    with pytest.raises(EsjaxError, match=named):
        Config(data=DataConfig(carry=True, **data), es=EsConfig(**es))
    assert DataConfig(carry=True, burn_in=9).tokens_before == 0


def test_msgspec_knows_every_class_when_it_is_imported() -> None:
    """msgspec crashes if two threads have it look into a class for the first time; it asks for the class's hints then.

    In a process of its own, where nothing was read before.
    """
    script = """
import sys
import esjax.config.settings, esjax.hosts.executor, esjax.hosts.transport.keys, esjax.page.server as server
from esjax.hosts.protocol import wire
from itertools import pairwise
from pathlib import Path

looks = []

def see(frame, event, argument):
    caller = frame.f_back.f_code.co_filename if frame.f_back else ""
    if event == "call" and frame.f_code.co_name == "get_class_annotations" and "msgspec" not in caller:
        looks.append(frame.f_locals["obj"])

token = Path(sys.argv[1])
token.write_text('{"kind": "esjax token", "format": 1, "name": "a", "address": "b", "server_key": "%s", '
                 '"public_key": "%s", "secret_key": "%s"}' % (3 * ("k" * 40,)))
token.chmod(0o600)
sys.setprofile(see)
esjax.config.settings.from_yaml("model: {name: rnn}", "settings")
esjax.hosts.transport.keys.load_token(token)
wire.decode(wire.encode(wire.Envelope(wire.AskStatus())), "request")
server._KNOWN.decode("{}")
sys.setprofile(None)
sys.exit(f"looked into {looks}" if looks else 0)
"""
    with tempfile.NamedTemporaryFile() as token:
        subprocess.run([sys.executable, "-c", script, token.name], check=True)
