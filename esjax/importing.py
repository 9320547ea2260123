"""A run folder that begins with somebody else's weights."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from esjax.checkpoint import Checkpoints
from esjax.config import Config
from esjax.data.vocabulary import Vocabulary
from esjax.es import init_state
from esjax.flags import default_flags
from esjax.models.model import Params
from esjax.optimizer import make_optimizer
from esjax.run_folder import RunFolder


@default_flags()
def begin_with(
    params: Params, out: Path, config: Config, vocabulary: Vocabulary, own: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Make a run folder, at step 0 and without a text, of weights.

    Args:
        params: The weights.
        out: Run folder to make.
        config: Settings.
        vocabulary: Symbols.
        own: Name of a model of its own, under "model".

    Raises:
        EsjaxError: The folder exists, or cannot be written.
    """
    folder = RunFolder.create(out, config, vocabulary, text_digest="", own=own)
    checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints)
    checkpoints.save(init_state(params, make_optimizer(config.optim, config.steps)), 0.0, 0)
