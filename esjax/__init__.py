r"""Evolution strategies for JAX: training without backpropagation, on one machine or on hosts that exchange losses.

The functions of the core train any JAX model, see `esjax.core`:

    value, grads = esjax.value_and_grad(loss, esjax.low_rank(sigma=0.1), pairs=2048)(params, seed, batch)

A run trains a language model on your text, on one machine or many:

    run = esjax.train(esjax.Config(seconds=60))
    for info in run:
        print(info.step, info.loss)
    print(run.generate("ROMEO\n")[0].text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esjax.config.models import (
        GruConfig,
        LlamaConfig,
        LruConfig,
        LstmConfig,
        MinGruConfig,
        RnnConfig,
        Rwkv7Config,
        TransformerConfig,
    )
    from esjax.config.reward import RewardConfig
    from esjax.config.settings import Config, DataConfig, EsConfig, HostsConfig, OptimConfig
    from esjax.core import (
        Noise,
        Shaped,
        estimate,
        evaluate,
        explain,
        full,
        in_units,
        initial_units,
        low_rank,
        pair_seeds,
        shape,
        value_and_grad,
    )
    from esjax.devices.mesh import prepare_devices
    from esjax.errors import EsjaxError
    from esjax.hosts.join import join
    from esjax.hosts.serve import Server, resume_serving, serve
    from esjax.inference.language_model import Evaluation, Written
    from esjax.inference.loaded_run import LoadedRun, load
    from esjax.models import Model, sequence_model
    from esjax.models.adapters import equinox_model, linen_model, nnx_model
    from esjax.models.member import Member
    from esjax.page.report import report
    from esjax.runs.step_info import StepInfo
    from esjax.training.replay import Replayed, replay
    from esjax.training.run import Trainer, resume, train
    from esjax.tuning.sweep import Hosts, Outcome, Sweep, resume_sweep, sweep
    from esjax.watch.metrics_server import MetricsServer
    from esjax.watch.plotting import plot
    from esjax.watch.tracking import TrackedRun, Tracker
    from esjax.weights.files import export, import_weights
    from esjax.weights.pretrained import PretrainedModel, load_pretrained

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DataConfig",
    "EsConfig",
    "EsjaxError",
    "Evaluation",
    "GruConfig",
    "Hosts",
    "HostsConfig",
    "LlamaConfig",
    "LoadedRun",
    "LruConfig",
    "LstmConfig",
    "Member",
    "MetricsServer",
    "MinGruConfig",
    "Model",
    "Noise",
    "OptimConfig",
    "Outcome",
    "PretrainedModel",
    "Replayed",
    "RewardConfig",
    "RnnConfig",
    "Rwkv7Config",
    "Server",
    "Shaped",
    "StepInfo",
    "Sweep",
    "TrackedRun",
    "Tracker",
    "Trainer",
    "TransformerConfig",
    "Written",
    "equinox_model",
    "estimate",
    "evaluate",
    "explain",
    "export",
    "full",
    "import_weights",
    "in_units",
    "initial_units",
    "join",
    "linen_model",
    "load",
    "load_pretrained",
    "low_rank",
    "nnx_model",
    "pair_seeds",
    "plot",
    "prepare_devices",
    "replay",
    "report",
    "resume",
    "resume_serving",
    "resume_sweep",
    "sequence_model",
    "serve",
    "shape",
    "sweep",
    "train",
    "value_and_grad",
]

_HOME = {
    "RewardConfig": "config.reward",
    "GruConfig": "config.models",
    "LlamaConfig": "config.models",
    "MinGruConfig": "config.models",
    "RnnConfig": "config.models",
    "LruConfig": "config.models",
    "LstmConfig": "config.models",
    "Rwkv7Config": "config.models",
    "TransformerConfig": "config.models",
    "Evaluation": "inference.language_model",
    "LoadedRun": "inference.loaded_run",
    "Member": "models.member",
    "Outcome": "tuning.sweep",
    "Replayed": "training.replay",
    "Written": "inference.language_model",
    "EsjaxError": "errors",
    "MetricsServer": "watch.metrics_server",
    "Model": "models",
    "Server": "hosts.serve",
    "StepInfo": "runs.step_info",
    "TrackedRun": "watch.tracking",
    "Tracker": "watch.tracking",
    "Trainer": "training.run",
    "export": "weights.files",
    "import_weights": "weights.files",
    "PretrainedModel": "weights.pretrained",
    "load_pretrained": "weights.pretrained",
    "Hosts": "tuning.sweep",
    "Sweep": "tuning.sweep",
    "resume_sweep": "tuning.sweep",
    "sweep": "tuning.sweep",
    "prepare_devices": "devices.mesh",
    "join": "hosts.join",
    "plot": "watch.plotting",
    "replay": "training.replay",
    "report": "page.report",
    "resume": "training.run",
    "resume_serving": "hosts.serve",
    "serve": "hosts.serve",
    "train": "training.run",
    "load": "inference.loaded_run",
    "Noise": "core",
    "Shaped": "core",
    "equinox_model": "models.adapters",
    "estimate": "core",
    "evaluate": "core",
    "explain": "core",
    "full": "core",
    "in_units": "core",
    "initial_units": "core",
    "linen_model": "models.adapters",
    "low_rank": "core",
    "nnx_model": "models.adapters",
    "pair_seeds": "core",
    "sequence_model": "models",
    "shape": "core",
    "value_and_grad": "core",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    # Importing JAX takes a second, and `esjax --help` and the settings do not need it.
    if name not in __all__:
        raise AttributeError(f"module 'esjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"esjax.{_HOME.get(name, 'config.settings')}"), name)
