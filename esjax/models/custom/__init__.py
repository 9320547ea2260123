"""Custom models, losses, rewards, tools and optimizers: `parts` has them as one value, `code` those in files."""

from esjax.models.custom.parts import NOTHING_CUSTOM, Custom, Reward, Tool

__all__ = ["NOTHING_CUSTOM", "Custom", "Reward", "Tool"]
