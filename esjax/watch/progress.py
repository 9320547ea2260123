"""The progress of a run: one line that is updated in place in a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from esjax.averages import Average
from esjax.texts import legible

if TYPE_CHECKING:
    from esjax.runs.step_info import Limits, StepInfo

PLAIN_SECONDS = 5.0
"""Seconds between plain lines."""

SHORTEST_WAIT, WAIT = 10.0, 3.0
"""A run has stalled if the last step finished more than both of these ago: seconds, and times of the step before."""

SMOOTHING = 0.9
"""Weight of the earlier steps in the shown speed and loss, for each step."""

GAP = "  "
"""Text between the parts of a line."""

FEWEST_DIGITS, MOST_DIGITS = 2, 6
"""Decimals of a baseline: as many as distinguish it from the held-out loss."""


class Part(NamedTuple):
    """A part of the line.

    Attributes:
        rank: Importance; if the line is too long, the part of the lowest rank is left out first.
        text: Text of the part.
        shorter: A shorter part that replaces it before it is left out, or None.
    """

    rank: int
    text: Text
    shorter: "Part | None" = None


def fit(parts: Sequence[Part], width: int, ascii_only: bool = False) -> Text:
    """Shorten or leave out the least important parts until the line fits.

    Args:
        parts: Parts in the order of the line, at least one.
        width: Columns, at least 1; the last remaining part is cut off if it is longer.
        ascii_only: Whether the terminal cannot show an ellipsis.
    """
    while len(text := join(parts)) > width and (len(parts) > 1 or parts[0].shorter):
        least = min(range(len(parts)), key=lambda index: parts[index].rank)
        shorter = parts[least].shorter
        parts = [*parts[:least], *([shorter] if shorter else []), *parts[least + 1 :]]
    text.truncate(width, overflow="crop" if ascii_only else "ellipsis")
    return text


def join(parts: Sequence[Part]) -> Text:
    """Join all parts to a line."""
    return Text(GAP, no_wrap=True, end="").join(part.text for part in parts)


class Progress:
    """Shows the infos of a run; a context manager."""

    def __init__(
        self, console: Console, baselines: Mapping[str, float], limits: "Limits", per_byte: float = 0.0
    ) -> None:
        """Prepare.

        Args:
            console: Console to write to.
            baselines: Nats per token of the n-gram models over the held-out documents, by name, worst first.
            limits: Limits of the run, for the time left.
            per_byte: Bits per byte of a held-out loss of 1 nat per token; 0: not shown. Losses of subwords can only be
                compared by byte.
        """
        self._console = console
        self._baselines = baselines
        self._limits = limits
        self._per_byte = per_byte
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_interactive else None
        self._last: tuple[StepInfo, float] | None = None  # and when it arrived
        self._first_held_out: float | None = None
        self._prompts: tuple[float, float] | None = None  # greedy reward and pass@k
        self._forgets = False  # whether a reward may make the model forget its text
        self._step_seconds = 0.0  # time between the last two steps
        self._held_out: tuple[float, float] | None = None  # and when it was measured
        self._loss, self._rate = Average(), Average()
        self._mean_loss = self._mean_rate = 0.0
        self._rewards: dict[str, Average] = {}
        self._mean_rewards: dict[str, float] = {}
        self._void_pairs = 0
        self._began: tuple[float, int] | None = None
        self._plain_at = 0.0

    def __enter__(self) -> "Progress":
        """Start the line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; the last line stays."""
        if self._live:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Print a line above the line of progress."""
        self._console.print(legible(line), markup=False, emoji=False, highlight=False, soft_wrap=True)

    def update(self, info: "StepInfo") -> None:
        """Show a step."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, info.step)
        self._mean_loss = self._loss.add(info.loss, SMOOTHING)
        self._mean_rate = self._rate.add(info.member_tokens_per_second, SMOOTHING)
        for name, value in (info.rewards or {}).items():
            self._mean_rewards[name] = self._rewards.setdefault(name, Average()).add(value, SMOOTHING)
        self._void_pairs += info.void_pairs
        if info.held_out is not None:
            self._held_out = info.held_out, now
            self._first_held_out = info.held_out if self._first_held_out is None else self._first_held_out
        if info.greedy_reward is not None and info.pass_at_k is not None:
            self._prompts = info.greedy_reward, info.pass_at_k
        self._forgets = info.reward is not None
        self._step_seconds = now - self._last[1] if self._last else 0.0
        self._last = info, now
        if not self._live and (info.is_evaluated or now >= self._plain_at):
            self._plain_at = now + PLAIN_SECONDS
            self._console.print(join(self._parts(info, now, now)), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Sequence[Text]:
        """Return the line of the last step, fitted to the current width of the terminal."""
        if self._last is None:
            return []
        return [fit(self._parts(*self._last, time.monotonic()), options.max_width, options.ascii_only)]

    def _parts(self, info: "StepInfo", came: float, now: float) -> list[Part]:
        parts = [
            Part(8, Text(f"step {info.step:,}", "bold")),
            Part(1, Text(_clock(info.seconds))),
            Part(7, Text(f"loss {self._mean_loss:.3f}" if info.reward is None else f"reward {-self._mean_loss:.3f}")),
            *(Part(6, Text(f"{name} {self._mean_rewards[name]:.3f}")) for name in info.rewards or ()),
            *self._on_held_out_prompts(),
            self._against_baselines(),
        ]
        if self._held_out and self._per_byte:
            parts.append(Part(6, Text(f"{self._held_out[0] * self._per_byte:.3f} bits/byte")))
        age = now - self._held_out[1] if self._held_out else 0.0
        if age >= 1:
            parts.append(Part(0, Text(f"{_clock(age)} ago", "dim")))
        waited = now - came
        if waited > max(SHORTEST_WAIT, WAIT * self._step_seconds):  # the speed would be outdated
            parts.append(Part(4, Text(f"no step for {_clock(waited)}", "yellow")))
        else:
            parts.append(Part(4, Text(f"{_count(self._mean_rate)}/s")))
        if not (info.applied and math.isnan(info.update_norm)):  # hosts have not reported the first update yet
            parts.append(Part(0, Text(f"|update| {info.update_norm:.3g}")))
        if self._void_pairs:  # since the start; red if the last step had some
            parts.append(Part(6, Text(f"void pairs {self._void_pairs:,}", "red" if info.void_pairs else "dim")))
        if info.hosts is not None:
            parts.append(Part(2, Text(f"hosts {info.hosts}")))
        left = self._time_left(info, came)
        if left is not None:
            parts.append(Part(5, Text(f"{_clock(left)} left", "dim")))
        return parts

    def _on_held_out_prompts(self) -> list[Part]:
        if self._prompts is None:
            return []
        return [Part(8, Text(f"greedy {self._prompts[0]:.3f}")), Part(6, Text(f"pass@k {self._prompts[1]:.3f}"))]

    def _against_baselines(self) -> Part:
        """Return the held-out loss beside all baselines; shortened, beside the next one to beat, or alone."""
        if self._held_out is None:
            return Part(9, Text("held-out -"))
        held_out, _ = self._held_out
        digits = {name: _digits(value, held_out) for name, value in self._baselines.items()}
        beaten = [name for name, value in self._baselines.items() if held_out < value and digits[name]]
        color = "green" if beaten else "dim"
        marks = {
            name: f"{'=' if not digits[name] else '<' if name in beaten else '>'} {name} "
            f"{value:.{digits[name] or FEWEST_DIGITS}f}"
            for name, value in self._baselines.items()
        }
        most = max([FEWEST_DIGITS + 1, *(number or 0 for number in digits.values())])
        alone = Text.assemble("held-out ", (f"{held_out:.{most}f}", "bold green" if beaten else "bold"))
        part = Part(9, alone)
        if self._forgets and self._first_held_out is not None:  # the text of the start, beside its first value
            return Part(5, alone.copy().append(f" (first {self._first_held_out:.{most}f})", "dim"), part)
        if marks:
            ahead = [mark for name, mark in marks.items() if name not in beaten] or [*marks.values()][-1:]
            part = Part(5, alone.copy().append(f" ({ahead[0]})", color), part)
            part = Part(3, alone.copy().append(f" ({' '.join(marks.values())})", color), part)
        return part

    def _time_left(self, info: "StepInfo", came: float) -> float | None:
        assert self._began is not None
        began, first = self._began
        candidates = []
        if self._limits.seconds is not None:
            candidates.append(self._limits.seconds - (came - began))
        if self._limits.steps is not None and info.step > first:
            candidates.append((came - began) / (info.step - first) * (self._limits.steps - info.step))
        return max(min(candidates), 0.0) if candidates else None


def _digits(value: float, other: float) -> int | None:
    """Return the decimals that distinguish two numbers; None if six do not."""
    enough = (d for d in range(FEWEST_DIGITS, MOST_DIGITS + 1) if f"{value:.{d}f}" != f"{other:.{d}f}")
    return next(enough, None)


def _count(number: float) -> str:
    """Abbreviate a large number: 950, 12.3 k, 3.08 M."""
    if number < 1e3:
        return f"{number:.0f}"
    if number < 1e5:
        return f"{number / 1e3:.1f} k"
    return f"{number / 1e6:.2f} M"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
