"""Language models: one architecture per file, all with the interface in `model.py`."""

from esjax.config.settings import ModelConfig, RnnConfig
from esjax.models.gru import gru
from esjax.models.model import Model
from esjax.models.rnn import rnn
from esjax.models.sequence import sequence_model

__all__ = ["Model", "build_model", "gru", "rnn", "sequence_model"]


def build_model(config: ModelConfig, vocab_size: int) -> Model:
    """Build the model that the settings name, for a number of token ids."""
    if isinstance(config, RnnConfig):
        return rnn(vocab_size, config.hidden_size, config.n_layers)
    return gru(vocab_size, config.hidden_size, config.head_size)
