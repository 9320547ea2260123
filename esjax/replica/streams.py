"""Numbers of a run's streams of random numbers, see `esjax.core.seeds.stream_seed`; 0 is `PERTURBATIONS` there."""

WINDOWS = 1
"""Stream for the windows of text."""

INIT = 2
"""Stream for the initial parameters."""

HELD_OUT = 3
"""Stream for the windows of held-out text, for a custom loss, and for completions of held-out prompts."""
