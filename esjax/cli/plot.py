"""The commands plot and dashboard."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from esjax.cli.shared import teller
from esjax.watch.downsampling import Axis

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]


@dataclass(frozen=True)
class Plot:
    """Draw the curves of runs as an image, or as a page in one file."""

    runs: Runs
    """Run folders, or folders of run folders."""

    out: Path = Path("curves.png")
    """File to write: .png, .svg or .pdf; .html for a page with curves, settings and samples."""

    over: Axis = "steps"
    """Horizontal axis."""

    log_x: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the horizontal axis logarithmic."""

    log_y: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make the axis of the loss logarithmic."""

    smoothing: float = 0.0
    """Steps over which the loss of the population is averaged; 0: none."""

    mean_over_seeds: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Draw runs whose settings differ only in the seed as one line, their mean, with a band from lowest to highest."""

    def run(self, console: Console) -> None:
        """Write the file."""
        from esjax.page.report import report
        from esjax.watch.plotting import open_runs, plot

        views = open_runs(self.runs)
        for view in views:
            for note in view.notes:
                teller(console)(f"{view.name}: {note}")
        draw = report if self.out.suffix == ".html" else plot
        draw(
            *views,
            out=self.out,
            over=self.over,
            log_x=self.log_x,
            log_y=self.log_y,
            smoothing=self.smoothing,
            mean_over_seeds=self.mean_over_seeds,
        )
        print(self.out)


@dataclass(frozen=True)
class Dashboard:
    """Serve a page on this machine that shows runs side by side during training."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Folder of run folders, or a run folder."""

    port: int = 8050
    """Port on 127.0.0.1; 0: any free port."""

    def run(self, console: Console) -> None:
        """Serve until Ctrl-C."""
        from esjax.page.server import serve_page

        serve_page(self.folder, self.port, lambda address: print(address, flush=True))
