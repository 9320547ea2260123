"""export and import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from esjax.cli.shared import CustomModelOption, Run, command_line, new_folder, prepare, teller


@dataclass(frozen=True)
class Export:
    """Write a run's weights to a file for other programs, or to import elsewhere.

    They are the averaged weights of the newest checkpoint: those that evaluate and generate use.
    """

    run_folder: Run
    """Run folder."""

    format: Literal["safetensors", "npy"] | None = None
    """safetensors: any model, with its settings and vocabulary. npy: the original program's layout, for rnn, with its
    table of characters in a file beside it. None: as the suffix of out says, or else safetensors."""

    out: Path | None = None
    """File to write. None: beside the run folder, and called like it."""

    custom: Annotated[CustomModelOption, tyro.conf.arg(name="")] = field(default_factory=CustomModelOption)

    def run(self, console: Console) -> None:
        """Write it, and say where."""
        prepare()
        from esjax.weights.files import export

        for file in export(self.run_folder, self.out, self.format, tell=teller(console), **self.custom.given()):
            print(file)


@dataclass(frozen=True)
class Import:
    """Make a run folder of weights from a file.

    It is a .safetensors file that export wrote, or a .npy file of the original program.
    """

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The suffix tells what it is. A .npy file is a vector: D, V, L and the weights."""

    chars: Path | None = None
    """For .npy: JSON list of characters, or of [character, count] pairs; ids 2 and up in that order. None: the file
    beside it that is called like it and ends in .chars.json."""

    out: Path | None = None
    """Run folder to make. None: runs/, the time of day, and four random characters."""

    custom: Annotated[CustomModelOption, tyro.conf.arg(name="")] = field(default_factory=CustomModelOption)

    def run(self, console: Console) -> None:
        """Make the folder."""
        prepare()
        from esjax.weights.files import import_weights

        out = new_folder(self.out)
        import_weights(self.weights, out, characters=self.chars, **self.custom.given())
        print(command_line("esjax", "evaluate", out, "--data.text", "TEXT"))
        teller(console)(
            f"kept in {out}; the line above scores it on a text of yours, {command_line('esjax', 'generate', out)} "
            f"writes, and {command_line('esjax', 'export', out)} makes a file of it again; without a text of its own "
            "it cannot be resumed"
        )


@dataclass(frozen=True)
class ImportNpy(Import):
    """Make a run folder of the original program's weights: import, by the name of its format."""
