"""Notices of steps without an update, of void pairs and of the end of the schedule; repeated ones are left out."""

from collections.abc import Mapping

from esjax.config.settings import Config
from esjax.exchange.values import Conclusion
from esjax.replica.optimizer import last_step

QUIET = 100
"""Steps without a kind of trouble after which it is reported again."""


class Notices:
    """Makes the notices of a run and remembers which were reported."""

    def __init__(self, config: Config, custom: Mapping[str, str]) -> None:
        """Start with no reports.

        Args:
            config: Settings.
            custom: Names of the run's custom parts, by kind.
        """
        self._last_step = None if "optimizer" in custom else last_step(config.optim, config.steps)
        self._blamed = "".join(
            f" (the run's own {kind}, {name})" for kind, name in custom.items() if kind in ("loss", "reward")
        )
        self._noticed: dict[tuple[bool, bool], int] = {}

    def line(self, step: int, concluded: Conclusion) -> str:
        """Return a line about a void step or void pairs, or "" if the last such line is at most `QUIET` steps old.

        Once, after a cosine schedule has ended, it returns a line about the learning rate, which is then 0.

        Args:
            step: Steps done, this one included.
            concluded: The result of the step.
        """
        trouble, void_pairs = concluded.trouble, concluded.void_pairs
        if not trouble and not void_pairs:
            return self._end(step)
        kind = (bool(trouble), bool(void_pairs))
        before = self._noticed.get(kind)
        self._noticed[kind] = step
        if before is not None and step - before <= QUIET:
            return ""
        return (
            f"step {step}: {trouble or concluded.note}{self._blamed}; {'no update' if trouble else 'they do not count'}"
        )

    def _end(self, step: int) -> str:
        last = self._last_step
        if last is None or step <= last:
            return ""
        self._last_step = None
        return (
            f"step {step}: optim.schedule cosine has ended at step {last}; the learning rate stays 0, and the "
            "weights as they are; to train longer, begin a run with a larger optim.decay_steps"
        )
