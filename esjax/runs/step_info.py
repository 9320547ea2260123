"""Information about a step, the limits of a run, and its clock."""

from collections.abc import Mapping
from typing import NamedTuple

from esjax.errors import EsjaxError

NAMED_REWARD = "reward_"
"""Beginning of the name of a metric: the mean of a reward that has a name, see `StepInfo.rewards`."""


class Limits(NamedTuple):
    """The limits at which iteration ends; None is no limit.

    Attributes:
        steps: Steps of the whole run.
        seconds: Seconds from the end of the first step of this iteration.
    """

    steps: int | None
    seconds: float | None

    def reached(self, step: float, seconds: float) -> bool:
        """Return whether iteration ends after `step` steps of the run and `seconds` of this iteration."""
        return (self.steps is not None and step >= self.steps) or (self.seconds is not None and seconds >= self.seconds)

    def check(self, step: int) -> None:
        """Check that a step is left to do.

        Raises:
            EsjaxError: The run has reached its limit of steps.
        """
        if self.steps is not None and step >= self.steps:
            raise EsjaxError(
                f"the run has done {step} steps, and its limit is {self.steps}; raise steps to continue (in Python: "
                "run.limits)"
            )


class Clock:
    """Training time of a run; it never decreases.

    In each start of the run, time counts from the end of the first step, so compilation is left out.

    Attributes:
        session: Seconds since this start.
    """

    def __init__(self, before: float) -> None:
        """Continue from an earlier training time.

        Args:
            before: Training time of all earlier starts, in seconds.
        """
        self.session = 0.0
        self._before = before
        self._began_at: float | None = None

    @property
    def seconds(self) -> float:
        """Training time of all starts, in seconds."""
        return self._before + self.session

    def set_finished(self, now: float) -> None:
        """Record that a step is finished.

        Args:
            now: Seconds of a monotonic clock.
        """
        if self._began_at is None:
            self._began_at = now
        self.session = now - self._began_at


class StepInfo(NamedTuple):
    """What one step did.

    Attributes:
        step: Steps done so far, this one included.
        seconds: Training time, see `Clock`, when all losses of this step were known.
        loss: Mean of the finite losses of the population: nats per token, the custom loss, or minus the reward. NaN if
            none is finite.
        population: Members that were scored, two for each pair.
        void_pairs: Pairs that were left out because one of their losses is not finite, or because their gradient sum is
            far larger than usual.
        applied: Whether the update was made. It is not made if most pairs are void, all losses are equal, or the
            update is not finite.
        gradient_norm: Euclidean norm of the estimate, in units of each leaf.
        update_norm: Euclidean norm of the change of the parameters, in units of each leaf. With hosts, both norms are
            those of the previous update, the last one that hosts reported.
        member_tokens: Tokens scored so far, times members.
        member_tokens_per_second: Speed of this step.
        held_out: Nats per token over the held-out documents, with the averaged parameters; with a custom loss or
            reward, the same quantity as `loss`, over windows of these documents. None if not measured.
        hosts: Hosts that scored pairs of this step; None without hosts.
        reward: Mean reward of the population, for a reward in Python; else None.
        greedy_reward: Mean reward on held-out prompts of completions of most probable tokens, with the averaged
            parameters. None if not measured. With a reward in Python, `held_out` stays nats per token over the held-out
            documents of the text: it rises if the model forgets that.
        pass_at_k: Fraction of the held-out prompts for which one of `reward.samples` completions passes, or more.
        rewards: Means over the population of the rewards that have names, without their weights. Over hosts, as they
            said: spot checks compare the reward alone. None if there are none.
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
    reward: float | None = None
    greedy_reward: float | None = None
    pass_at_k: float | None = None
    rewards: Mapping[str, float] | None = None

    @property
    def is_evaluated(self) -> bool:
        """Whether something was measured on held-out documents or prompts."""
        return self.held_out is not None or self.greedy_reward is not None

    def row(self) -> dict[str, float]:
        """Return the numbers that are not None by name; those of `rewards` as `reward_NAME`."""
        named = {f"{NAMED_REWARD}{name}": value for name, value in (self.rewards or {}).items()}
        return {
            name: value for name, value in self._replace(rewards=None)._asdict().items() if value is not None
        } | named
