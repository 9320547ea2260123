"""The horizon of a ledger: how old updates are dropped, so that a long run needs bounded space.

A ledger with a horizon lies in two files. When the newest checkpoint is `horizon` steps later than the first one that
was saved since the second file began, the first file is dropped: updates go on from that checkpoint, which is kept as
long as they do. Then another file begins. So between one and two horizons of updates lie behind the newest checkpoint,
and a replay begins at the oldest checkpoint. Nothing is copied, and a file is replaced in one step of the file system,
so that a crash leaves one ledger or the other.
"""

from esjax.runs.checkpoint import Checkpoints, first_since
from esjax.runs.ledger import Ledger
from esjax.runs.seal import find_damage


def keep_within(horizon: int, ledger: Ledger, checkpoints: Checkpoints) -> None:
    """Drop old updates, after a checkpoint was saved.

    Args:
        horizon: Steps that are kept behind the newest checkpoint, at least.
        ledger: The ledger.
        checkpoints: The checkpoints.

    Raises:
        DiskError: The folder cannot be written.
    """
    base = first_since(checkpoints.steps, ledger.beginnings[-1])
    if base is None or checkpoints.newest - base < horizon:
        return
    if not base or not find_damage(checkpoints.path_of(base)):
        ledger.begin_part()
