"""Rebuilds the weights of a run from its first parameters and its ledger."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optax

from esjax.devices.mesh import whole_mesh
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import complete_custom, load_run_corpus
from esjax.models.custom import Custom, Reward
from esjax.models.custom_code import load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import digest, find_newest
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import DIGEST, UPDATE, read
from esjax.training.start import start_of


class Replayed(NamedTuple):
    """Result of a replay.

    Attributes:
        state: The rebuilt state at the end of the ledger.
        digest: Digest of that state.
        compared: Number of digests, in the ledger and of the newest checkpoint, that were compared.
        differs_at: First step at which the digests differ, or None.
        compared_step: Step of the last digest that was compared; 0 if there was none.
    """

    state: TrainState
    digest: str
    compared: int
    differs_at: int | None
    compared_step: int

    @property
    def agrees(self) -> bool:
        """Whether at least one digest was compared, and all of them are equal."""
        return self.compared > 0 and self.differs_at is None

    def summary(self) -> str:
        """Return the result in one line."""
        step = int(self.state.step)
        if self.differs_at is not None:
            verdict = f"the state differs at step {self.differs_at:,}"
        elif not self.compared:
            verdict = "no digest was kept to compare it with"
        elif self.compared == 1:
            verdict = f"the only digest, of step {self.compared_step:,}, agrees"
        else:
            verdict = f"all {self.compared:,} digests agree, the last of step {self.compared_step:,}"
        return f"step {step:,}, digest {self.digest}: {verdict}"


def replay(
    path: str | Path,
    *,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    text: str | None = None,
    tell: Callable[[str], None] = print,
) -> Replayed:
    """Apply every update in the ledger of a run to its first parameters, and compare digests.

    Args:
        path: Run folder.
        model: The custom model of the run, if it has one, see `esjax.resume`.
        loss: The custom loss of the run, likewise.
        reward: The custom reward of the run, likewise.
        optimizer: The custom optimizer of the run, likewise.
        text: New place of the run's text, see `esjax.resume`. An exact output layer, and noise on the rows of an
            embedding, follow from the windows of each step.
        tell: Called with each line for the user.

    Raises:
        EsjaxError: The path is not a run folder, it has no ledger from step 0 on, or its text or custom code is missing
            or has changed.
    """
    return replay_with(
        load_custom(model=model, loss=loss, reward=reward, optimizer=optimizer), path, text=text, tell=tell
    )


def replay_with(
    custom: Custom, path: str | Path, *, text: str | None = None, tell: Callable[[str], None] = print
) -> Replayed:
    """`replay`, given the custom parts that the run does not find by itself."""
    folder = RunFolder(given_path(path))
    folder.check_goes_on()
    custom = complete_custom(folder, custom, "esjax.replay")
    if not folder.ledger.exists():
        raise EsjaxError(f"{str(path)!r} has no ledger; train with --ledger, or with hosts, to keep one")
    config, size = folder.config, folder.vocabulary.size
    replica = Replica(config, custom.build(config.model, size), None, whole_mesh(), custom.objective, custom.optimizer)
    if replica.reads_tokens:
        replica.use_tokens(load_run_corpus(folder, text).stream())
    params = start_of(config, custom).params
    if params is not None:
        replica.start_with(params)
    restored = find_newest(folder.checkpoints, replica.state, tell)
    kept = {} if restored is None else {int(restored.state.step): digest(restored.state)}
    compared, compared_step, differs_at = 0, 0, None

    def compare(expected: str) -> None:
        nonlocal compared, compared_step, differs_at
        compared, compared_step = compared + 1, int(replica.state.step)
        if differs_at is None and digest(replica.state) != expected:
            differs_at = compared_step

    if 0 in kept:
        compare(kept[0])
    for record in read(folder.ledger):
        step = int(replica.state.step)
        if record.kind == DIGEST and record.step == step:
            compare(record.payload.decode())
        if record.kind == UPDATE:
            if record.step != step:
                raise EsjaxError(
                    f"the ledger of {str(path)!r} begins at step {record.step}, not 0; nothing to replay from"
                )
            replica.update(record.payload)
            if step + 1 in kept:
                compare(kept[step + 1])
    return Replayed(replica.state, digest(replica.state), compared, differs_at, compared_step)
