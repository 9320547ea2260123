"""What a run may be given beside its settings."""

from typing import NamedTuple

import optax

from esjax.evaluate import Loss
from esjax.models.model import ModelFactory


class Own(NamedTuple):
    """A model, a loss, an optimizer of one's own, each in place of the one that the settings name.

    Attributes:
        model: Builds the model from the number of token ids.
        loss: Loss of one member on one sequence.
        optimizer: Any optax transformation.
    """

    model: ModelFactory | None = None
    loss: Loss | None = None
    optimizer: optax.GradientTransformation | None = None

    def names(self) -> dict[str, str]:
        """Name what there is, by kind."""
        return {
            kind: getattr(value, "__qualname__", type(value).__name__)
            for kind, value in self._asdict().items()
            if value is not None
        }


NOTHING_OWN = Own()
