r"""Train recurrent language models with evolution strategies: no backpropagation, only seeds and losses travel.

For example:

    import esjax

    run = esjax.train(esjax.Config(seconds=60))
    for info in run:
        print(info.step, info.loss)
    print(run.generate("ROMEO\n")[0].text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esjax.config import Config, DataConfig, EsConfig, GruConfig, HostsConfig, OptimConfig, RnnConfig
    from esjax.devices import prepare_devices
    from esjax.errors import EsjaxError
    from esjax.exporting import export, import_weights
    from esjax.hosts.join import join
    from esjax.hosts.serve import Server, resume_serving, serve
    from esjax.loading import load
    from esjax.metrics_server import MetricsServer
    from esjax.models import Model
    from esjax.page.report import report
    from esjax.plotting import plot
    from esjax.replaying import replay
    from esjax.step_info import StepInfo
    from esjax.sweeping import Hosts, Sweep, resume_sweep, sweep
    from esjax.tracking import TrackedRun, Tracker
    from esjax.training import Trainer, resume, train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DataConfig",
    "EsConfig",
    "EsjaxError",
    "GruConfig",
    "Hosts",
    "HostsConfig",
    "MetricsServer",
    "Model",
    "OptimConfig",
    "RnnConfig",
    "Server",
    "StepInfo",
    "Sweep",
    "TrackedRun",
    "Tracker",
    "Trainer",
    "export",
    "import_weights",
    "join",
    "load",
    "plot",
    "prepare_devices",
    "replay",
    "report",
    "resume",
    "resume_serving",
    "resume_sweep",
    "serve",
    "sweep",
    "train",
]

_HOME = {
    "EsjaxError": "errors",
    "MetricsServer": "metrics_server",
    "Model": "models",
    "Server": "hosts.serve",
    "StepInfo": "step_info",
    "TrackedRun": "tracking",
    "Tracker": "tracking",
    "Trainer": "training",
    "export": "exporting",
    "import_weights": "exporting",
    "Hosts": "sweeping",
    "Sweep": "sweeping",
    "resume_sweep": "sweeping",
    "sweep": "sweeping",
    "prepare_devices": "devices",
    "join": "hosts.join",
    "plot": "plotting",
    "replay": "replaying",
    "report": "page.report",
    "resume": "training",
    "resume_serving": "hosts.serve",
    "serve": "hosts.serve",
    "train": "training",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    # JAX takes a second to import; `esjax --help` and settings do without it.
    if name not in __all__:
        raise AttributeError(f"module 'esjax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"esjax.{_HOME.get(name, 'config')}"), name)
