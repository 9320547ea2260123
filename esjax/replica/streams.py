"""The streams of a run's random numbers, beside `esjax.core.seeds.PERTURBATIONS`; see `stream_seed` there."""

WINDOWS = 1
"""From which the windows of text are drawn."""

INIT = 2
"""From which the first parameters are drawn."""

HELD_OUT = 3
"""From which the windows of held-out text are drawn, for a custom loss."""
