"""The progress of a run in a terminal: one line that stays in place, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from esjax.step_info import Limits, StepInfo

PLAIN_SECONDS = 5.0
"""Time between plain lines."""

SMOOTHING = 0.9
"""Memory of the shown rate and loss, a step."""


class Progress:
    """Show infos as they come; a context manager."""

    def __init__(self, console: Console, baselines: Mapping[str, float], limits: "Limits") -> None:
        """Prepare.

        Args:
            console: Where to write.
            baselines: Nats per token by name, worst first, that the held-out loss is read against.
            limits: Where the run ends.
        """
        self._console = console
        self._baselines = baselines
        self._limits = limits
        self._live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self._held_out: float | None = None
        self._loss: float | None = None
        self._rate: float | None = None
        self._began: tuple[float, int] | None = None
        self._plain_at = 0.0

    def __enter__(self) -> "Progress":
        """Start to show."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last line as it is."""
        if self._live:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Print a line above the progress."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self, info: "StepInfo") -> None:
        """Show a step."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, info.step)
        self._loss = _smooth(self._loss, info.loss)
        self._rate = _smooth(self._rate, info.member_tokens_per_second)
        if info.held_out is not None:
            self._held_out = info.held_out
        if self._live:
            self._live.update(self._line(info, now))
        elif info.held_out is not None or now >= self._plain_at:
            self._plain_at = now + PLAIN_SECONDS
            self._console.print(self._line(info, now), soft_wrap=True)

    def _line(self, info: "StepInfo", now: float) -> Text:
        line = Text.assemble(
            (f"step {info.step:,}", "bold"),
            f"  {_clock(info.seconds)}",
            f"  loss {self._loss:.3f}",
            "  held-out ",
            self._against_baselines(),
            f"  {(self._rate or 0) / 1e6:.2f} M/s",
            f"  |update| {info.update_norm:.3g}",
        )
        if info.void_pairs:
            line.append(f"  void pairs {info.void_pairs}", "red")
        left = self._time_left(info, now)
        if left is not None:
            line.append(f"  {_clock(left)} left", "dim")
        return line

    def _against_baselines(self) -> Text:
        if self._held_out is None:
            return Text("-")
        beaten = [name for name, value in self._baselines.items() if self._held_out < value]
        text = Text(f"{self._held_out:.3f}", "bold green" if beaten else "bold")
        if self._baselines:
            marks = " ".join(
                f"{'<' if name in beaten else '>'} {name} {value:.2f}" for name, value in self._baselines.items()
            )
            text.append(f" ({marks})", "green" if beaten else "dim")
        return text

    def _time_left(self, info: "StepInfo", now: float) -> float | None:
        assert self._began is not None
        began, first = self._began
        candidates = []
        if self._limits.seconds is not None:
            candidates.append(self._limits.seconds - (now - began))
        if self._limits.steps is not None and info.step > first:
            candidates.append((now - began) / (info.step - first) * (self._limits.steps - info.step))
        return max(min(candidates), 0.0) if candidates else None


def _smooth(before: float | None, value: float) -> float:
    return value if before is None or before != before else SMOOTHING * before + (1 - SMOOTHING) * value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
