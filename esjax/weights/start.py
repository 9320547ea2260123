"""A run folder that begins with somebody else's weights."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

from esjax.config.custom_names import Code
from esjax.config.settings import Config
from esjax.data.vocabulary import Vocabulary
from esjax.flags import default_flags
from esjax.models.model import Params
from esjax.replica.optimizer import make_optimizer
from esjax.replica.update import init_state
from esjax.runs.checkpoint import Checkpoints
from esjax.runs.folder import RunFolder


@default_flags()
def begin_with(
    params: Params,
    out: Path,
    config: Config,
    vocabulary: Vocabulary,
    custom: Mapping[str, str] = MappingProxyType({}),
    code: Mapping[str, Code] = MappingProxyType({}),
) -> None:
    """Make a run folder, at step 0 and without a text, of weights.

    Args:
        params: The weights.
        out: Run folder to make.
        config: Settings.
        vocabulary: Symbols.
        custom: Name of a model of its own, under "model".
        code: Where it is, if it is code in a file.

    Raises:
        EsjaxError: The folder exists, or cannot be written; then it is not left behind.
    """
    state = init_state(params, make_optimizer(config.optim, config.steps))
    folder = RunFolder.create(out, config, vocabulary, text_digest="", custom=custom, code=code)
    with ExitStack() as undo:
        undo.callback(folder.remove)  # without a checkpoint it would be of no use
        Checkpoints(folder.checkpoints, config.keep_checkpoints).save(state, 0.0, 0)
        undo.pop_all()
