"""Rebuilds a run's weights from its first parameters and its ledger alone."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optax

from esjax.checkpoint import digest, restore_newest
from esjax.devices import whole_mesh
from esjax.errors import EsjaxError
from esjax.es import TrainState
from esjax.ledger import DIGEST, UPDATE, read
from esjax.member import Loss
from esjax.models.model import ModelFactory
from esjax.own import Own, Reward
from esjax.replica import Replica
from esjax.run_folder import RunFolder


class Replayed(NamedTuple):
    """What came of a replay.

    Attributes:
        state: At the end of the ledger.
        digest: Of that state.
        compared: Digests in the ledger, and of the newest checkpoint, that were compared.
        differs_at: First step at which one differs, or None.
    """

    state: TrainState
    digest: str
    compared: int
    differs_at: int | None

    @property
    def agrees(self) -> bool:
        """Whether every digest is the one that was rebuilt."""
        return self.differs_at is None

    def summary(self) -> str:
        """Say it in one line."""
        step = int(self.state.step)
        verdict = (
            f"all {self.compared} digests agree" if self.agrees else f"the state differs at step {self.differs_at}"
        )
        return f"step {step:,}, digest {self.digest}: {verdict}"


def replay(
    path: str | Path,
    *,
    model: ModelFactory | None = None,
    loss: Loss | None = None,
    reward: Reward | None = None,
    optimizer: optax.GradientTransformation | None = None,
    tell: Callable[[str], None] = print,
) -> Replayed:
    """Make every update of a run again.

    Args:
        path: Run folder.
        model: The run's own model, if it was given one.
        loss: The run's own loss, if it was given one.
        reward: The run's own reward, if it was given one.
        optimizer: The run's own optimizer, if it was given one.
        tell: Called with each line that a person should see.

    Raises:
        EsjaxError: It is no run folder, or has no ledger from its first step on.
    """
    folder = RunFolder(Path(path))
    folder.check_goes_on()
    own = Own(model, loss, reward, optimizer)
    folder.check_own(own.names(), "esjax.replay")
    if not folder.ledger.exists():
        raise EsjaxError(f"{str(path)!r} has no ledger; train with --ledger, or with hosts, to keep one")
    config, size = folder.config, folder.vocabulary.size
    replica = Replica(config, own.build(config.model, size), None, whole_mesh(), own.objective, optimizer)
    checkpoint = restore_newest(folder.checkpoints, replica.state, tell).state
    kept = (int(checkpoint.step), digest(checkpoint))
    compared, differs_at = 0, None
    for record in read(folder.ledger):
        step = int(replica.state.step)
        expected = [record.payload.decode()] if record.kind == DIGEST and record.step == step else []
        if record.kind == UPDATE:
            if record.step != step:
                raise EsjaxError(
                    f"the ledger of {str(path)!r} begins at step {record.step}, not 0; nothing to replay from"
                )
            replica.update(record.payload)
            if step + 1 == kept[0]:
                expected = [kept[1]]
        for value in expected:
            compared += 1
            if differs_at is None and digest(replica.state) != value:
                differs_at = int(replica.state.step)
    return Replayed(replica.state, digest(replica.state), compared, differs_at)
