"""The horizon of a ledger: how old updates are dropped, so that a long run needs bounded space.

A ledger with a horizon lies in two files. When the newest checkpoint is `horizon` steps later than the first one that
was saved since the second file began, the first file is dropped: updates go on from that checkpoint, which is kept as
long as they do. Then another file begins. So between one and two horizons of updates lie behind the newest checkpoint,
and a replay begins at the oldest checkpoint. Nothing is copied, and a file is replaced in one step of the file system,
so that a crash leaves one ledger or the other.
"""

from esjax.runs.checkpoint import Checkpoints, first_since
from esjax.runs.seal import find_damage


def is_cut_due(horizon: int, beginning: int, checkpoints: Checkpoints) -> bool:
    """Return whether the first file of a ledger can be dropped, after a checkpoint was saved.

    It reads the whole checkpoint from which updates would go on, once in a horizon; any thread may call it.

    Args:
        horizon: Steps that are kept behind the newest checkpoint, at least.
        beginning: Step at which the newest file of the ledger begins.
        checkpoints: The checkpoints.
    """
    base = first_since(checkpoints.steps, beginning)
    if base is None or checkpoints.newest - base < horizon:
        return False
    return not base or not find_damage(checkpoints.path_of(base))
