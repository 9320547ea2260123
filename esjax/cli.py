"""The command line: arguments in, one clear line out when they are wrong."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro
from rich.console import Console

from esjax.config import MODELS, Config, from_yaml, replace
from esjax.errors import EsjaxError

if TYPE_CHECKING:
    from esjax.trained import Written
    from esjax.training import Trainer

Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


@dataclass(frozen=True)
class Train:
    """Train a model from scratch.

    Name a model, rnn or gru, anywhere among the options to choose it and to see its settings: esjax train gru --help.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]

    config: Path | None = None
    """YAML file of settings; options on the command line go before it."""

    out: Path | None = None
    """Run folder to make. None: runs/ and the time of day."""

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        prepare()
        from esjax.training import train

        out = self.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        _train(train(self.settings, out, tell=_teller(console)), console)


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint."""

    run_folder: Run
    """Run folder."""

    steps: int | None = None
    """Stop when the run has done so many steps in all."""

    seconds: float | None = None
    """Stop so many seconds after the first step finished from now."""

    def run(self, console: Console) -> None:
        """Train until a limit or Ctrl-C."""
        prepare()
        from esjax.training import resume

        trainer = resume(self.run_folder, steps=self.steps, seconds=self.seconds, tell=_teller(console))
        _train(trainer, console)


@dataclass(frozen=True)
class Evaluate:
    """Score a model on whole documents, beside n-gram models."""

    run_folder: Run
    """Run folder."""

    text: Annotated[str | None, tyro.conf.arg(name="data.text")] = None
    """Another text: a file, a folder, a glob, builtin:shakespeare or builtin:pydoc."""

    split: Literal["train", "held_out", "all"] = "held_out"
    """Which of the text's documents."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""

    def run(self, console: Console) -> None:
        """Print the scores."""
        prepare()
        from esjax.loading import load
        from esjax.run_folder import json_line

        evaluation = load(self.run_folder, tell=_teller(console)).evaluate(self.text, self.split)
        if self.json:
            print(json_line({**evaluation.scored._asdict(), **evaluation.baselines}))
            return
        scored = evaluation.scored
        print(f"{scored.nats_per_token:.4f} nats/token, {scored.bits_per_byte:.4f} bits/byte, {scored.tokens:,} tokens")
        if scored.unknown_tokens:
            print(f"{scored.unknown_tokens:,} tokens are outside the vocabulary and were scored as unknown")
        for name, value in evaluation.baselines.items():
            print(f"{value:.4f} {name}")


@dataclass(frozen=True)
class Generate:
    """Write text: sampled, or with --beams the most probable."""

    run_folder: Run
    """Run folder."""

    prompt: str = ""
    """Start of the text."""

    beams: int | None = None
    """Width of a beam search, in place of sampling."""

    temperature: float = 1.0
    """Below 1: safer; above 1: bolder; 0: always the most probable token."""

    top_k: int = 0
    """Choose among so many most probable tokens; 0: among all."""

    top_p: float = 1.0
    """Choose among the most probable tokens that reach this probability together."""

    max_tokens: int = 400
    """Most tokens to write; the text ends earlier where the model ends the document."""

    seed: int = 0
    """Names the texts: equal seeds, equal texts."""

    count: int = 1
    """Number of texts."""

    def run(self, console: Console) -> None:
        """Print the texts."""
        if self.count < 1:
            raise EsjaxError(f"count must be at least 1, got {self.count}")
        prepare()
        from esjax.data.vocabulary import is_symbol
        from esjax.loading import load

        if not all(map(is_symbol, self.prompt)):
            raise EsjaxError("the prompt is not UTF-8 text")
        tell = _teller(console)
        loaded = load(self.run_folder, tell=tell)
        unknown = loaded.vocabulary.unknown(self.prompt)
        if unknown:
            tell(f"not in the model's vocabulary, read as unknown: {' '.join(map(repr, unknown))}")
        texts: list[Written]
        if self.beams is None:
            texts = loaded.generate(
                self.prompt,
                max_tokens=self.max_tokens,
                count=self.count,
                seed=self.seed,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
            )
        else:
            texts = loaded.search(self.prompt, beams=self.beams, max_tokens=self.max_tokens)[: self.count]
        for text in texts:
            if text.log_probability is not None:
                tell(f"[log probability {text.log_probability:.2f}]")
            print(self.prompt + text.text)
            if len(texts) > 1:
                print("---")


@dataclass(frozen=True)
class ImportNpy:
    """Make a run folder of the original program's weight file."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .npy vector: D, V, L and the weights."""

    chars: Path
    """JSON list of characters, or of [character, count] pairs; ids 2 and up in that order."""

    out: Path
    """Run folder to make."""

    def run(self, console: Console) -> None:
        """Make the folder."""
        prepare()
        from esjax.import_npy import import_npy

        import_npy(self.weights, self.chars, self.out)
        print(f"esjax evaluate {self.out} --data.text TEXT")


COMMANDS: dict[str, Any] = {
    "train": Train,
    "resume": Resume,
    "evaluate": Evaluate,
    "generate": Generate,
    "import-npy": ImportNpy,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with 2 on a mistake that a person can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    try:
        _parse(words).run(console)
    except EsjaxError as error:
        _fail(console, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a disk that filled up, a folder that was taken away
        _fail(console, str(error))


def prepare() -> None:
    """Set up the devices, before anything imports JAX."""
    from esjax.devices import prepare_devices

    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    prepare_devices(Path(home) / "esjax")


def _parse(words: list[str]) -> Any:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise EsjaxError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
    if name == "train":
        return _parse_train(rest)
    return tyro.cli(COMMANDS[name], args=rest, prog=f"esjax {name}")


def _parse_train(words: list[str]) -> Train:
    """Read `train`: settings from a file, then a model's name, then the options, each over the one before."""
    settings = Config()
    path = _option(words, "--config")
    if path is not None:
        try:
            settings = from_yaml(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise EsjaxError(f"cannot read the settings {path!r}: {error}") from error
    named = [i for i, word in enumerate(words) if word in MODELS and not (i and _awaits_value(words[i - 1]))]
    if len(named) > 1:
        raise EsjaxError(f"one model at a time, not {' and '.join(words[i] for i in named)}")
    if named:
        settings = replace(settings, model=MODELS[words[named[0]]]())
        words = words[: named[0]] + words[named[0] + 1 :]
    try:
        return tyro.cli(
            Train,
            args=words,
            prog="esjax train",
            default=Train(settings),
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValueError as error:  # of the settings as a whole; those of a section come as a box of tyro's
        raise EsjaxError(str(error)) from error


def _awaits_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word and word != "--help"


def _option(words: Sequence[str], name: str) -> str | None:
    """Find an option's value before the whole line can be read."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == name:
            return following
        if word.startswith(name + "="):
            return word.removeprefix(name + "=")
    return None


def _train(trainer: "Trainer", console: Console) -> None:
    from esjax.progress import Progress

    assert trainer.folder is not None
    with Progress(console, trainer.baselines, trainer.limits) as progress:
        trainer.tell = progress.tell
        for info in trainer:
            progress.update(info)
    print(f"\n{trainer.sample()}\n")
    if trainer.last is not None and trainer.last.held_out is not None:
        against = ", ".join(f"{name} {value:.3f}" for name, value in trainer.baselines.items())
        trainer.tell(f"held-out {trainer.last.held_out:.4f} nats/token ({against})")
    trainer.tell(f"kept in {trainer.folder.path}")


def _teller(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fail(console: Console, message: str) -> NoReturn:
    console.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _usage() -> str:
    lines = [f"  {name:12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: esjax COMMAND ...",
            "",
            "Train language models with evolution strategies.",
            "",
            *lines,
            "",
            "esjax COMMAND --help lists the options of a command.",
        ]
    )
