"""A description of a run in one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from esjax.config.models import MODELS
from esjax.config.settings import Config
from esjax.data.corpus import Corpus
from esjax.models.model import Params


def describe_run(devices: str, config: Config, corpus: Corpus, params: Params, custom: Mapping[str, str]) -> str:
    """Return one line with the devices, the text, the vocabulary, the model, custom parts, and the population.

    Args:
        devices: Description of the devices, such as "2 x cpu".
        config: Settings of the run.
        corpus: Text of the run.
        params: Parameters of the run.
        custom: Names of custom parts, by kind.
    """
    es, data = config.es, config.data
    tokens, held_out = corpus.train.tokens, corpus.held_out.tokens
    named = next(name for name, kind in MODELS.items() if isinstance(config.model, kind))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    a_member = config.tokens_per_member
    population = (
        f"population {es.population:,}, {es.population * a_member:,} tokens a step"
        if es.time_per_step is None
        else f"as many members as {es.time_per_step:g} s a step allow, {a_member:,} tokens each"
    )
    size = f" of {corpus.train_bytes / tokens:.1f} bytes" if corpus.vocabulary.kind == "tokenizer" else ""
    parts = [
        devices,
        f"text {_short(data.text)}: {tokens:,} tokens{size}, {held_out:,} held out, "
        f"{corpus.vocabulary.size:,} token ids",
        f"model {custom.get('model', named)}: {parameters:,} parameters",
        *(f"{kind} {name}" for kind, name in custom.items() if kind != "model"),
        population,
    ]
    return "; ".join(parts)


def _short(text: str) -> str:
    """Name a text from the working folder, if it is below it."""
    path = Path(text)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else text


def describe_kinds(devices: Sequence[jax.Device]) -> str:
    """Count devices by kind: "2 x cpu"."""
    kinds = [device.device_kind for device in devices]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
