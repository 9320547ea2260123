"""What a step did, and where iteration ends."""

from typing import NamedTuple

from esjax.errors import EsjaxError


class Limits(NamedTuple):
    """Where iteration ends.

    Attributes:
        steps: Steps of the whole run, or None.
        seconds: Seconds after the first step finished in this iteration, or None.
    """

    steps: int | None
    seconds: float | None

    def reached(self, step: float, seconds: float) -> bool:
        """Tell whether iteration ends after so many steps of the run, and seconds of this iteration."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

    def check(self, step: int) -> None:
        """See that there is a step to do.

        Raises:
            EsjaxError: The run has done as many as it may.
        """
        if self.steps is not None and step >= self.steps:
            raise EsjaxError(
                f"the run has done {step} steps, and its limit is {self.steps}; raise steps to go on (in Python: "
                "run.limits)"
            )


class Clock:
    """Training time of a run. It begins with the first step that a session finishes, and never goes back.

    Attributes:
        session: Seconds of this session.
    """

    def __init__(self, before: float) -> None:
        """Begin to count where the run stood.

        Args:
            before: Training time of the sessions before, in seconds.
        """
        self.session = 0.0
        self._before = before
        self._began_at: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all sessions."""
        return self._before + self.session

    def set_finished(self, now: float) -> None:
        """Hear that a step is finished.

        Args:
            now: Seconds of a clock that never jumps.
        """
        if self._began_at is None:
            self._began_at = now
        self.session = now - self._began_at


class StepInfo(NamedTuple):
    """What one step did.

    Attributes:
        step: Steps done so far, this one included.
        seconds: Training time when the losses of this step were in, from the first finished step of each session on.
        loss: Mean of the finite losses of the population, in nats per token; of a reward of one's own, the negative.
        population: Members evaluated, both signs counted.
        void_pairs: Pairs left out because a loss of theirs is not finite.
        applied: Whether the update was made: not if most losses are not finite, or all pairs are equal.
        gradient_norm: Euclidean norm of the estimate, in units of each weight's typical size.
        update_norm: Euclidean norm of the change of the weights, in the same units. With hosts, both norms are those
            of the update before, which is the last that was heard of.
        member_tokens: Tokens scored so far, times members.
        member_tokens_per_second: Rate of this step.
        held_out: Nats per token over the held-out documents, with the averaged weights; with a loss or reward of one's
            own, the same kind of number as `loss`, over windows of them. None if not measured.
        hosts: Hosts that scored a part of this step; None without hosts.
    """

    step: int
    seconds: float
    loss: float
    population: int
    void_pairs: int
    applied: bool
    gradient_norm: float
    update_norm: float
    member_tokens: int
    member_tokens_per_second: float
    held_out: float | None = None
    hosts: int | None = None

    def row(self) -> dict[str, float]:
        """Return what there is, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}
