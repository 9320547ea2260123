"""Export of weights from a run folder to a file, and import; the suffix of the file is its format."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from esjax.errors import EsjaxError
from esjax.inference.loaded_run import load
from esjax.models.model import ModelFactory
from esjax.models.rnn import RnnParams
from esjax.paths import given_path
from esjax.runs.durable import write_new_files
from esjax.weights.npy import export_npy, import_npy
from esjax.weights.pretrained import begin_run, is_pretrained
from esjax.weights.safetensors import export_safetensors, import_safetensors

Format = Literal["safetensors", "npy"]
"""safetensors: any model, with its settings and vocabulary. npy: the original program's format, for the model `rnn`."""


def export(
    path: str | Path,
    out: str | Path | None = None,
    format: Format | None = None,
    *,
    model: ModelFactory | str | None = None,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """Write the averaged weights of a run's newest checkpoint to a file; `evaluate` and `generate` use the same.

    Args:
        path: Run folder.
        out: File to write; its suffix is the format. None: the path of the run folder plus the suffix.
        format: "safetensors" or "npy". None: the suffix of `out`, or safetensors.
        model: The custom model of the run, see `esjax.load`.
        tell: Called with a line for each damaged checkpoint, and if the code of the model has changed.

    Returns:
        Paths of the files, for npy those of the weights and of the table of characters.

    Raises:
        EsjaxError: The path is not a run folder, no checkpoint is whole, the format does not suit the model, or a file
            exists.
    """
    path = given_path(path)
    if out is None:
        whole = path if path.name != ".." else path.resolve()
        out = whole.with_name(f"{whole.name}.{format or 'safetensors'}")
    out = given_path(out)
    kinds = get_args(Format)
    if out.suffix[1:] not in kinds or (format and out.suffix[1:] != format):
        wanted = f".{format}" if format else " or ".join(f".{kind}" for kind in kinds)
        raise EsjaxError(f"the name {str(out)!r} does not give the format; use a name that ends in {wanted}")
    table = table_of(out)
    files = [out] if out.suffix == ".safetensors" else [out, table]
    for file in files:
        if file.exists():
            raise EsjaxError(f"{str(file)!r} exists already and is left alone; give another --out")
    loaded = load(path, model=model, tell=tell)
    contents: list[bytes | str]
    if out.suffix == ".safetensors":
        contents = [export_safetensors(loaded.config, loaded.vocabulary, loaded.params, loaded.step, loaded.custom)]
    else:
        if not isinstance(loaded.params, RnnParams):
            raise EsjaxError(f"npy is for the model rnn, and {str(path)!r} holds another one; use safetensors")
        contents = list(export_npy(loaded.params, loaded.vocabulary))
    try:
        write_new_files(dict(zip(files, contents, strict=True)))
    except FileExistsError as error:  # another process was faster
        raise EsjaxError(f"{error.filename!r} exists already and is left alone; give another --out") from error
    except OSError as error:
        raise EsjaxError(f"cannot write {str(out)!r}: {error.strerror}") from error
    return files


def import_weights(
    weights: str | Path,
    out: str | Path,
    *,
    characters: str | Path | None = None,
    model: ModelFactory | str | None = None,
) -> None:
    """Make a run folder, at step 0, from a file of weights.

    Args:
        weights: A file that `export` wrote, a .npy file of the original program, or a pretrained model, see
            `load_pretrained`.
        out: Run folder to make.
        characters: The table of characters of a .npy file, see `esjax.weights.npy.import_npy`. None: the file beside
            it with the same name and the suffix .chars.json.
        model: The custom model of the weights, if there is one: the function, or "PATH.py:FUNCTION".

    Raises:
        EsjaxError: A file cannot be read, the weights do not fit the model, or the folder exists.
    """
    out = given_path(out)
    if is_pretrained(weights):
        if characters is not None or model is not None:
            raise EsjaxError(f"{str(weights)!r} holds its vocabulary and its model; leave --chars and --model out")
        begin_run(weights, out)
        return
    weights = given_path(weights)
    if weights.suffix == ".npy":
        table = table_of(weights)
        if characters is None and not table.exists():
            raise EsjaxError(
                f"{str(weights)!r} needs its table of characters: give --chars, or put {str(table)!r} there"
            )
        import_npy(weights, given_path(characters or table), out)
    elif weights.suffix == ".safetensors":
        if characters is not None:
            raise EsjaxError(f"{str(weights)!r} holds its vocabulary; leave --chars out")
        import_safetensors(weights, out, model)
    else:
        raise EsjaxError(f"{str(weights)!r} is neither .safetensors nor .npy nor .gguf; rename it by its format")


def table_of(weights: Path) -> Path:
    """Return the path of the table of characters beside a .npy file."""
    return weights.with_suffix(".chars.json")
