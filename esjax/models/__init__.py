"""Language models: one architecture per file, all with the interface in `model.py`."""

from importlib import import_module

import msgspec

from esjax.config.models import ModelConfig
from esjax.models.gru import gru
from esjax.models.llama import llama
from esjax.models.lru import lru
from esjax.models.lstm import lstm
from esjax.models.mingru import mingru
from esjax.models.model import Model
from esjax.models.rnn import rnn
from esjax.models.rwkv7 import rwkv7
from esjax.models.sequence import sequence_model
from esjax.models.transformer import transformer

__all__ = [
    "Model",
    "build_model",
    "gru",
    "llama",
    "lru",
    "lstm",
    "mingru",
    "rnn",
    "rwkv7",
    "sequence_model",
    "transformer",
]


def build_model(config: ModelConfig, vocab_size: int) -> Model:
    """Build the model that the settings name, for a number of token ids."""
    module, _, function = config.built_by.partition(":")
    return getattr(import_module(module), function)(vocab_size, **msgspec.structs.asdict(config))
