"""Models of equal settings, and the compiled functions of runs of equal settings, are made once in a process of tests.

Most tests train with the same few settings. Without this, JAX would trace and lower the same functions for each.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from jax.sharding import Mesh

import esjax.models
from esjax.config.settings import Config
from esjax.core.noise import Noise
from esjax.inference import language_model
from esjax.models.custom import parts
from esjax.models.model import Model, Params
from esjax.replica import programs, replica, texts

Made = TypeVar("Made")

ONCE: list[tuple[str, list[Any]]] = [
    ("build_model", [esjax.models, parts]),
    ("make_functions", [language_model]),
    ("make_programs", [programs, replica]),
    ("make_writers", [texts]),
]
"""Names of the functions that make them, and the modules that call these by name."""


def share() -> None:
    """Replace these functions."""
    build, functions, make = esjax.models.build_model, language_model.make_functions, programs.make_programs
    write = texts.make_writers
    built = dict[int, Model]()  # by `id`; a model that is kept here is never collected
    kept = dict[Any, Any]()

    def once(model: Model, settings: Any, make: Callable[[], Made]) -> Made:
        if id(model) not in built:
            return make()
        key = id(model), repr(settings)
        if key not in kept:
            kept[key] = make()
        return kept[key]

    @cache
    def build_once(config: Any, vocab_size: int) -> Model:
        model = build(config, vocab_size)
        built[id(model)] = model
        return model

    def functions_once(model: Model) -> language_model.Functions:
        return once(model, None, lambda: functions(model))

    def make_once(
        config: Config, model: Model, params: Params, mesh: Mesh, loss: Any = None, optimizer: Any = None
    ) -> programs.Programs:
        def anew() -> programs.Programs:
            return make(config, model, params, mesh, loss, optimizer)

        if loss is not None or optimizer is not None or model.unit is None:
            return anew()
        data = config.data
        drawn = data.window, data.burn_in, data.carry, data.batch_size, data.new_tokens_interval, data.block_tokens
        steps = config.steps if config.optim.schedule == "cosine" else None
        return once(model, (mesh.devices.tolist(), drawn, config.es, config.optim, steps, config.writes), anew)

    def writers_once(
        config: Config, model: Model, noise: Noise, mesh: Mesh, chunk_pairs: int, stops: Any, pauses: Any
    ) -> texts.Writers:
        def anew() -> texts.Writers:
            return write(config, model, noise, mesh, chunk_pairs, stops, pauses)

        if model.unit is None:
            return anew()
        data, reward = config.data, config.reward
        written = data.batch_size, data.new_tokens_interval, reward.length, reward.temperature
        return once(model, ("writers", mesh.devices.tolist(), written, config.es, chunk_pairs, stops, pauses), anew)

    for (name, modules), function in zip(ONCE, (build_once, functions_once, make_once, writers_once), strict=True):
        for module in modules:
            setattr(module, name, function)
