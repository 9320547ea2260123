"""Custom models, losses, rewards and optimizers: `parts` has them as one value, `code` those in files."""

from esjax.models.custom.parts import NOTHING_CUSTOM, Custom, Reward

__all__ = ["NOTHING_CUSTOM", "Custom", "Reward"]
