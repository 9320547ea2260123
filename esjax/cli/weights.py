"""The commands export and import."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from esjax.cli.shared import ModelOption, Run, command_line, new_folder, prepare, teller


@dataclass(frozen=True)
class Export:
    """Write the weights of a run to a file, for other programs or for import.

    The file holds the averaged weights of the newest checkpoint, which evaluate and generate use.
    """

    run_folder: Run
    """Run folder."""

    format: Literal["safetensors", "npy"] | None = None
    """safetensors: any model, with its settings and vocabulary. npy: the format of the original program, for the model
    rnn, with a table of characters in a second file. None: the suffix of out, or safetensors."""

    out: Path | None = None
    """File to write. None: the path of the run folder plus the suffix."""

    model: ModelOption = None
    """New place of the run's custom model, if its file was moved."""

    def run(self, console: Console) -> None:
        """Write the files and print their paths."""
        prepare()
        from esjax.weights.files import export

        for file in export(self.run_folder, self.out, self.format, tell=teller(console), model=self.model):
            print(file)


@dataclass(frozen=True)
class Import:
    """Make a run folder from a file of weights.

    The file is a .safetensors file that export wrote, a .npy file of the original program, or a pretrained model.
    """

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File that ends in .safetensors or .npy. A .npy file is a vector: D, V, L and the weights. Or a pretrained Llama
    model: a file that ends in .gguf, a folder of Hugging Face, or builtin:smollm2."""

    chars: Path | None = None
    """For .npy: JSON list of characters, or of [character, count] pairs; token ids 2 and up in this order. None: the
    file of the same name that ends in .chars.json."""

    out: Path | None = None
    """Run folder to make. None: a new folder in runs/, named by date and time."""

    model: ModelOption = None
    """New place of the run's custom model, if its file was moved."""

    def run(self, console: Console) -> None:
        """Make the folder."""
        prepare()
        from esjax.weights.files import import_weights

        out = new_folder(self.out)
        import_weights(self.weights, out, characters=self.chars, model=self.model)
        print(command_line("esjax", "evaluate", out, "--data.text", "TEXT", "--split", "all"))
        teller(console)(
            f"kept in {out}; the line above scores it on your text, {command_line('esjax', 'generate', out)} generates "
            f"text, and {command_line('esjax', 'export', out)} exports it again; it has no training text, so it cannot "
            "be resumed"
        )


@dataclass(frozen=True)
class ImportNpy(Import):
    """Make a run folder from weights of the original program; the same as import."""
