"""Rebuilds the weights of a run from its first parameters, or its oldest checkpoint, and its ledger."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optax

from esjax.devices.mesh import whole_mesh
from esjax.errors import EsjaxError
from esjax.inference.loaded_run import complete_custom, load_run_corpus
from esjax.models.custom import Custom, Reward, Tool
from esjax.models.custom.code import load_custom
from esjax.models.member import Loss
from esjax.models.model import ModelFactory
from esjax.paths import given_path
from esjax.replica.replica import Replica
from esjax.replica.update import TrainState
from esjax.runs.checkpoint import digest, find_newest, find_oldest
from esjax.runs.folder import RunFolder
from esjax.runs.ledger import DIGEST, UPDATE, beginning, read
from esjax.weights.first import first_params


class Replayed(NamedTuple):
    """Result of a replay.

    Attributes:
        state: The rebuilt state at the end of the ledger.
        digest: Digest of that state.
        compared: Number of digests, in the ledger and of the newest checkpoint, that were compared.
        differs_at: First step at which the digests differ, or None.
        compared_step: Step of the last digest that was compared; 0 if there was none.
        first: Step of the state from which the replay began; 0 if that is the start of the run.
    """

    state: TrainState
    digest: str
    compared: int
    differs_at: int | None
    compared_step: int
    first: int = 0

    @property
    def agrees(self) -> bool:
        """Whether at least one digest was compared, and all of them are equal."""
        return self.compared > 0 and self.differs_at is None

    def summary(self) -> str:
        """Return the result in one line."""
        step = int(self.state.step)
        is_last = self.compared_step == step
        last = "that of the final state" if is_last else f"that of step {self.compared_step:,}"
        if self.differs_at is not None:
            verdict = f"the state differs at step {self.differs_at:,}"
        elif not self.compared:
            verdict = "nothing was compared, since no digest was kept"
        elif self.compared == 1:
            verdict = f"the only digest, {last}, agrees"
        else:
            verdict = f"all {self.compared:,} digests agree, the last is {last}"
        if self.compared and not is_last:
            verdict += "; no digest of the final state was kept"
        since = f", replayed from step {self.first:,} on" if self.first else ""
        return f"step {step:,}{since}, digest {self.digest}: {verdict}"


def replay(
    path: str | Path,
    *,
    model: ModelFactory | str | None = None,
    loss: Loss | str | None = None,
    reward: Reward | str | None = None,
    tool: Tool | str | None = None,
    optimizer: optax.GradientTransformation | str | None = None,
    text: str | None = None,
    tell: Callable[[str], None] = print,
) -> Replayed:
    """Apply every update in the ledger of a run to its first parameters, and compare digests.

    If the ledger lacks the first updates, by `ledger_horizon` or since it is damaged there, the replay begins at the
    oldest checkpoint to which the others can be applied.

    Args:
        path: Run folder.
        model: The custom model of the run, if it has one, see `esjax.resume`.
        loss: The custom loss of the run, likewise.
        reward: The custom reward of the run, likewise.
        tool: The tool of the run, likewise.
        optimizer: The custom optimizer of the run, likewise.
        text: New place of the run's text, see `esjax.resume`. An exact output layer, and noise on the rows of an
            embedding, follow from the windows of each step.
        tell: Called with each line for the user.

    Raises:
        EsjaxError: The path is not a run folder, it has no ledger, the ledger has neither the first updates nor those
            since a checkpoint, or the text or custom code of the run is missing or has changed.
    """
    return replay_with(
        load_custom(model=model, loss=loss, reward=reward, tool=tool, optimizer=optimizer), path, text=text, tell=tell
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
    newest = find_newest(folder.checkpoints, replica.state, tell)
    kept = {} if newest is None else {int(newest.state.step): digest(newest.state)}
    first = _begin(folder, replica, max(kept, default=0), tell)
    if not first and (params := first_params(config, custom)) is not None:
        replica.begin(params)
    kept = {step: one for step, one in kept.items() if step > first or not first}
    compared, compared_step, differs_at = 0, 0, None

    def compare(expected: str | None) -> None:
        nonlocal compared, compared_step, differs_at
        if expected is None:
            return
        compared, compared_step = compared + 1, int(replica.state.step)
        if differs_at is None and digest(replica.state) != expected:
            differs_at = compared_step

    compare(kept.get(first))
    for record in read(folder.ledger, first):
        step = int(replica.state.step)
        if record.kind == DIGEST and record.step == step:
            compare(record.payload.decode())
        if record.kind == UPDATE:
            replica.update(record.payload)
            compare(kept.get(step + 1))
    return Replayed(replica.state, digest(replica.state), compared, differs_at, compared_step, first)


def _begin(folder: RunFolder, replica: Replica, newest: int, tell: Callable[[str], None]) -> int:
    """Give the replica the state at which the replay begins, and return its step.

    Args:
        folder: The run.
        replica: A replica at step 0.
        newest: Step of the newest whole checkpoint; 0: there is none.
        tell: Called with each line for the user.

    Raises:
        EsjaxError: The ledger begins later than the newest whole checkpoint.
    """
    begins = beginning(folder.ledger, newest)
    if not begins:
        return 0
    restored = find_oldest(folder.checkpoints, replica.state, begins, lambda line: None)
    assert restored is not None  # the newest one is late enough
    replica.resume_from(restored.state)
    first = int(restored.state.step)
    if doubt := restored.doubt():
        tell(doubt)
    tell(
        f"the ledger is whole from step {begins:,} on: replaying from the checkpoint of step {first:,}; earlier steps "
        "cannot be replayed"
    )
    return first
