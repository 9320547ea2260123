"""Run folders with metrics that are known."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from esjax.config.settings import Config
from esjax.data.vocabulary import Vocabulary
from esjax.runs.folder import RunFolder, json_line

NOTHING: Mapping[str, str] = MappingProxyType({})


def make(path: Path, done: int = 0, custom: Mapping[str, str] = NOTHING, **settings: Any) -> RunFolder:
    """Make a run of so many steps, see `line_of`."""
    folder = RunFolder.create(path, Config(**settings), Vocabulary("char", ("a", "b")), "", custom)
    with folder.open_metrics(0, print) as metrics:
        metrics.write("".join(line_of(step) for step in range(1, done + 1)))
    folder.unlock()
    return folder


def line_of(step: int) -> str:
    """Write the metrics of a step: the loss is 5 - step, measured on held-out text at every second step."""
    row = {"step": step, "seconds": step / 2, "member_tokens": 100 * step, "loss": 5.0 - step}
    return json_line({**row, "held_out": 4.0 - step} if step % 2 == 0 else row) + "\n"


def append(path: Path, text: str) -> None:
    """Write to the metrics of a run."""
    with (path / "metrics.jsonl").open("a") as file:
        file.write(text)
