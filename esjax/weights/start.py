"""A run folder that starts from given weights."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from esjax.config.custom_names import Code
from esjax.config.settings import Config, DataConfig
from esjax.data.sources import NO_TEXT
from esjax.data.vocabulary import Vocabulary
from esjax.flags import default_flags
from esjax.models.model import Params
from esjax.replica.optimizer import make_optimizer
from esjax.replica.update import init_state
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder

UNKNOWN_DATA = DataConfig(text=NO_TEXT)
"""Settings of the data for weights whose training text is unknown."""


@default_flags()
def begin_with(
    params: Params,
    out: Path,
    config: Config,
    vocabulary: Vocabulary,
    custom: Mapping[str, str] = MappingProxyType({}),
    code: Mapping[str, Code] = MappingProxyType({}),
) -> None:
    """Make a run folder from weights, at step 0 and without a text.

    Args:
        params: The weights.
        out: Run folder to make.
        config: Settings.
        vocabulary: Symbols.
        custom: Name of a custom model, under "model".
        code: Path, function and hash of the model, if it is code in a file.

    Raises:
        EsjaxError: The folder exists or cannot be written; nothing is left behind.
    """
    state = init_state(params, make_optimizer(config.optim, config.steps))
    folder = RunFolder.create(out, config, vocabulary, text_digest="", custom=custom, code=code)
    with ExitStack() as undo:
        undo.callback(folder.remove)  # a folder without a checkpoint is useless
        Checkpoints(folder.checkpoints, config.keep_checkpoints).save(state, 0.0, 0)
        undo.pop_all()
    folder.unlock()
